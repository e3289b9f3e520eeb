"""Which dtype to generate in when nobody says: by the hardware, the checkpoint and the model's size.

On a CPU: float32 below 100 million parameters, where it is exact and speed is not bound by memory. Larger models run in
bfloat16 when the processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX), which halves memory and is several
times as fast there; a large checkpoint that is stored in 16 bits also does so without such hardware when it has over
a billion parameters, as float32 would double its memory. Everything else is float32.

On a GPU: the checkpoint's own 16-bit dtype, else bfloat16; float16 where the card has no bfloat16 (compute capability
below 8: T4, V100, P100). Models trained in bfloat16 may hold activations above 65,504, which float16 turns into
infinities and soon into NaN: the engine then stops with an error that says so and never answers from such logits. They
need float32 there, or a newer card.
"""

from __future__ import annotations

import torch

from burnish.models.loading import parse_dtype

SMALL_PARAMETERS = 100_000_000
LARGE_PARAMETERS = 1_000_000_000


def pick_dtype(
    dtype: str | torch.dtype, *, num_parameters: int, stored: torch.dtype | None, device: torch.device
) -> torch.dtype:
    """The dtype to load in: the one asked for, or by the rule above for "auto".

    Args:
        stored: the checkpoint's dtype, None when config.json does not tell.

    Raises:
        ConfigError: the name is unknown.
    """
    asked = None if dtype == "auto" else parse_dtype(dtype)
    if asked is not None:
        return asked
    if device.type == "cuda":
        wanted = torch.bfloat16 if stored is None or stored == torch.float32 else stored
        if wanted == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.float16
        return wanted
    if num_parameters < SMALL_PARAMETERS:
        return torch.float32
    large_16_bit = num_parameters >= LARGE_PARAMETERS and stored in (torch.bfloat16, torch.float16)
    return torch.bfloat16 if large_16_bit or cpu_multiplies_bfloat16() else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether the processor has AVX512-BF16 or AMX; False where torch cannot tell."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(probe()) for probe in (getattr(torch.cpu, name, None) for name in probes) if probe is not None)
