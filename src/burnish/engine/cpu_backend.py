"""Steps computed by the compiled CPU kernels: one call per step, whatever the decoder.

Activations are float32 between the products; a product's input is rounded to what its weights ask for (bfloat16, or
int8 token by token).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_void_p, cast

import numpy as np
import torch
from torch import Tensor

from burnish.engine import cpu_program
from burnish.engine.backends import value_width
from burnish.engine.cpu_adapters import adapter_structs
from burnish.engine.cpu_program import CpuProgram
from burnish.engine.paged_attention import untouched_zeros
from burnish.engine.step import AdapterMatrices, StepInputs
from burnish.errors import OutOfMemoryError
from burnish.kernels.cpu import library as cpu_library
from burnish.kernels.cpu.structs import Adapter, Format, StepStruct
from burnish.models.decoder import Decoder

BLOCK_SIZE = 16
_KV_FORMATS = {torch.float32: Format.F32, torch.bfloat16: Format.BF16, torch.int8: Format.INT8}


def supports(decoder: Decoder, kv_dtype: torch.dtype, *, block_size: int = BLOCK_SIZE) -> str | None:
    """Why the compiled kernels cannot run this decoder; None where they can."""
    if cpu_library.load() is None:
        return f"the compiled kernels are not here ({cpu_library.describe()['reason']})"
    if kv_dtype not in _KV_FORMATS:
        return f"they keep no {str(kv_dtype).removeprefix('torch.')} cache"
    if block_size != BLOCK_SIZE:
        return f"their cache has blocks of {BLOCK_SIZE} tokens"
    return cpu_program.against(decoder)


class CpuBackend:
    """See `Backend`.

    Args:
        consume: take the decoder's weights over; it is of no use to others afterwards.
        max_tokens: most tokens of a step (more makes the buffers grow).
        max_model_len: longest sequence.
        isa: instruction set; None is the best.
    """

    name = "cpu"

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_blocks: int,
        block_size: int = BLOCK_SIZE,
        kv_dtype: torch.dtype,
        consume: bool = False,
        max_tokens: int = 512,
        max_model_len: int | None = None,
        threads: int | None = None,
        isa: str | None = None,
    ) -> None:
        library = cpu_library.load(isa)
        assert library is not None
        assert block_size == BLOCK_SIZE
        config = decoder.config
        self.device = torch.device("cpu")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.isa = library.isa
        self._library = library
        self._threads = threads or torch.get_num_threads()
        self._max_context = max_model_len or config.max_position_embeddings
        self._vocab = config.vocab_size
        self._program = CpuProgram(decoder, library, consume=consume, max_positions=self._max_context)
        self._program.struct.kv_format = _KV_FORMATS[kv_dtype]
        self._kv = (config.num_kv_heads, config.head_dim, kv_dtype)
        self._cache = self._allocate(*self._kv)
        self._adapters: object = None
        self._runtime: int | None = None
        self._max_tokens = 0
        self._make_runtime(max_tokens)

    @property
    def kv_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self._cache)

    @property
    def weights_bytes(self) -> int:
        return self._program.num_bytes

    def forward(self, step: StepInputs, *, greedy: bool) -> Tensor:
        """See `Backend.forward`.

        Raises:
            OutOfMemoryError: the buffers of the step do not fit.
        """
        if len(step.tokens_T) > self._max_tokens:
            self._make_runtime(len(step.tokens_T))
        num_logits = len(step.logit_rows_L)
        shape = (num_logits,) if greedy else (num_logits, self._vocab)
        out = torch.empty(shape, dtype=torch.int64 if greedy else torch.float32)
        arrays = [
            np.ascontiguousarray(array, dtype=np.int32)
            for array in (
                step.tokens_T,
                step.positions_T,
                step.row_starts,
                step.context_lens_S,
                step.block_tables_SN,
                step.logit_rows_L,
                step.adapters_S,
            )
        ]
        struct = StepStruct(
            len(step.tokens_T),
            len(step.context_lens_S),
            num_logits,
            step.block_tables_SN.shape[1],
            greedy,
            0,
            *[array.ctypes.data for array in arrays],
        )
        rope = self._rope_rows(step)
        for name, tensor in rope.items():
            setattr(struct, name, tensor.data_ptr())
        if greedy:
            struct.ids = out.data_ptr()
        else:
            struct.logits = out.data_ptr()
        if self._library.functions.burnish_run(self._runtime, ctypes.addressof(struct)):
            raise OutOfMemoryError("the machine ran out of memory while generating")
        return out

    def set_adapters(self, adapters: Sequence[AdapterMatrices | None]) -> None:
        """See `Backend.set_adapters`.

        Raises:
            OutOfMemoryError: the larger buffers of a step do not fit.
        """
        struct = self._program.struct
        structs = adapter_structs(adapters, num_layers=len(self._program.layers))
        struct.num_adapters = len(adapters)
        struct.adapters = cast(structs, POINTER(Adapter))
        # What the structs point into has to stay as long as they do. Buffers depend on the ranks.
        self._adapters = (structs, [*adapters])
        self._make_runtime(self._max_tokens)

    def reset(self) -> None:
        """See `Backend.reset`."""
        self._cache = []
        self._cache = self._allocate(*self._kv)

    def __del__(self) -> None:
        if getattr(self, "_runtime", None):
            self._library.functions.burnish_destroy(self._runtime)
            self._runtime = None

    def _allocate(self, num_kv_heads: int, head_dim: int, kv_dtype: torch.dtype) -> list[Tensor]:
        """Zeroed memory that the system hands out as it is first written; pointers go to the layers."""
        width = value_width(head_dim, backend=self.name)
        shapes = {"keys": (head_dim, BLOCK_SIZE), "values": (BLOCK_SIZE, width)}
        tensors = []
        for layer in self._program.layers:
            for name, shape in shapes.items():
                cache = untouched_zeros((self.num_blocks, num_kv_heads, *shape), kv_dtype, self.device)
                setattr(layer, name, c_void_p(cache.data_ptr()))
                tensors.append(cache)
            if kv_dtype == torch.int8:
                for name in ("key_scale", "value_scale"):
                    scale = untouched_zeros((self.num_blocks, num_kv_heads, BLOCK_SIZE), torch.float32, self.device)
                    setattr(layer, name, c_void_p(scale.data_ptr()))
                    tensors.append(scale)
        return tensors

    def _make_runtime(self, max_tokens: int) -> None:
        functions = self._library.functions
        if self._runtime:
            functions.burnish_destroy(self._runtime)
        self._runtime = functions.burnish_create(
            ctypes.addressof(self._program.struct), self.isa.encode(), max_tokens, self._max_context, self._threads
        )
        if not self._runtime:
            raise OutOfMemoryError("the machine has no memory for the buffers of a step", got=f"{max_tokens} tokens")
        self._max_tokens = max_tokens

    def _rope_rows(self, step: StepInputs) -> dict[str, Tensor]:
        if not self._program.rotary_by_step:
            return {}
        positions_T = torch.from_numpy(step.positions_T)
        counts_S = torch.from_numpy(np.diff(step.row_starts))
        lengths_T = torch.from_numpy(step.rope_lens_S).repeat_interleave(counts_S)
        return self._program.rope_rows(positions_T, torch.maximum(lengths_T, positions_T + 1))
