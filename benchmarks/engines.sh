#!/usr/bin/env bash
# burnish's engine and transformers in turn on one workload; random weights in TinyLlama's published shape.
# usage: benchmarks/engines.sh [SHAPE] [CONCURRENCY] [REPEATS]; writes benchmarks/results/DATE-engines-SHAPE.json
set -euo pipefail
cd "$(dirname "$0")/.."
shape=${1:-tinyllama-1.1b} concurrency=${2:-32} repeats=${3:-2}
burnish=$(realpath "${BURNISH:-.venv/bin/burnish}")
models=${MODELS:-$(mktemp -d)}
[ -f "$models/$shape/config.json" ] || "$burnish" synth "$shape" --out "$models/$shape"
mkdir -p benchmarks/results
out=$PWD/benchmarks/results/$(date +%F)-engines-$shape-$concurrency.json
cd "$models" # so that the record names the shape, not a path of this machine
/usr/bin/env time -v "$burnish" bench "$shape" --input-tokens 128 --output-tokens 128 --concurrency "$concurrency" \
    --dtype bfloat16 --vs transformers --warmup 1 --repeats "$repeats" --json >"$out"
echo "$out"
