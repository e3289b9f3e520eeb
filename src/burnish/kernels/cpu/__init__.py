"""The CPU kernels: C++ in `csrc/`, reached through `library.py`; `packing.py` lays weights out for them."""
