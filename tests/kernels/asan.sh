#!/bin/sh
# Builds the CPU kernels to look for errors of memory and undefined behaviour, and runs their tests over that library.
# Leaves the installed library alone. Arguments go to pytest; PYTHON and CXX are the programs to use.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
export CXX="${CXX:-g++}"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The checks of every access make one register spill after another: without -O1 the compiler takes many minutes.
CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined" \
  "$python" setup.py -q build_ext --build-temp "$work/objects" --build-lib "$work/built"
library=$(ls "$work"/built/burnish/kernels/cpu/_burnish_cpu*.so)

# The checker has to be there before Python, and the C++ library before the checker looks for its functions.
preload="$("$CXX" -print-file-name=libasan.so) $("$CXX" -print-file-name=libubsan.so) $("$CXX" -print-file-name=libstdc++.so)"
# Python and torch keep memory until they end, which is no leak of ours.
ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  BURNISH_CPU_LIBRARY="$library" OMP_NUM_THREADS=1 LD_PRELOAD="$preload" \
  "$python" -m pytest -q -p no:cacheprovider tests/kernels --ignore tests/kernels/gpu --ignore tests/kernels/test_build.py "$@"
