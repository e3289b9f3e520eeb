"""What a stage costs beyond its tensors: figures that only measuring gives, each with what it stands for.

CPU figures are growth of the resident set of a process on Linux with the constrained versions, on a model of a few
million parameters, where they are most of what is seen.
"""

from __future__ import annotations

MIB = 2**20

RUNTIME_CPU = 230 * MIB
"""Resident set of Python with torch, tokenizers and burnish imported, before a model is loaded."""

RUNTIME_CUDA = 550 * MIB
"""CUDA context, loaded kernels and the matrix library's workspace on the card."""

FIRST_USE_CPU = {
    "load": 4 * MIB,
    "generate": 39 * MIB,
    "train": 30 * MIB,
    "quantize": 80 * MIB,
    "merge": 50 * MIB,
}
"""Code pages, thread pools and primitives that a stage touches for the first time, and the rows it reads."""

ALLOCATOR_LAYERS = 2.5
"""What the C library's allocator keeps of freed tensors, in units of one layer's activations.

It gives blocks of 32 MiB and more back at once, so this stops growing; with a fixed MALLOC_MMAP_THRESHOLD_ it is about
0, for some more page faults."""

ALLOCATOR_LIMIT = 512 * MIB
"""Most that the allocator was seen to keep."""

FREED_SHARE = 0.6
"""What the heap keeps of dense weights that are freed one by one while packed ones take their place, in their units."""

LAYOUT_SHARE, LAYOUT_LIMIT = 0.7, 128 * MIB
"""What laying out the weights for the kernels leaves in the heap: of the output layer in float32, and at most."""

WRITTEN_SHARE = 0.25
"""What the heap keeps of a merged model that was written and read back, in units of its float32 weights."""

ALLOCATOR_SHARE = {2: 0.3, 4: 0.35}
"""The same for fused training, in units of what is kept for the backward pass and of the larger moment, by bytes of the
compute dtype: compiled bfloat16 products stand in the heap between activations, and what is freed around them is not
always used again."""

ALLOCATOR_SHARE_UNFUSED = {"dense": 0.4, "quantized": 0.55}
"""The same for packed rows in blocks that do not fuse (DoRA, dropout), by the base: many tensors of many sizes, among
them rebuilt weights, come and go between those that are kept. With MALLOC_MMAP_THRESHOLD_ fixed it was about 0."""

FIT_SPARE_SHARE, FIT_SPARE_BYTES = 0.08, 24 * MIB
"""What `tune --memory` keeps free beyond a prediction: of everything but the weights, and for each run."""

KERNEL_BYTES = 0.55 * MIB
"""oneDNN's compiled code and descriptors of one bfloat16 matrix product of one width (it keeps 1,024 of them)."""

KERNEL_BYTES_PER_INPUT = 60
"""The same, growing with the inputs of the widest product."""

REBUILT_COPIES = 1
"""Of the largest group of quantized linears, rebuilt in the compute dtype in memory that all groups share."""

HESSIAN_COPIES = 5
"""(I, I) float32 matrices alive in GPTQ: the Hessian, damped, reversed, its Cholesky factor, the factor's inverse."""

WEIGHT_COPIES = 4
"""(O, I) float32 matrices alive while one linear is quantized: the transposed weight, corrections, error, product."""

ADAM_BYTES = 8
"""Two float32 moments per trained number (Loshchilov and Hutter, 2017, arXiv:1711.05101)."""

GRADIENT_BYTES = 4
"""Gradients of trained numbers are float32."""
