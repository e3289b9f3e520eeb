"""Kernels: compiled for CPUs, Triton for GPUs, and a plain torch twin of each."""
