"""Names of dtypes, as config.json and the command line spell them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from burnish.errors import ConfigError

DTYPE_NAMES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}


def parse_dtype(dtype: str | torch.dtype, hf_config: Mapping[str, Any] | None = None) -> torch.dtype | None:
    """A torch dtype from its name; None for "auto" where config.json does not name one.

    Raises:
        ConfigError: the name is unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        stated = (hf_config or {}).get("dtype") or (hf_config or {}).get("torch_dtype")
        return DTYPE_NAMES.get(str(stated).removeprefix("torch."))
    if dtype not in DTYPE_NAMES:
        raise ConfigError("unknown dtype", got=dtype, expected="auto, float32, bfloat16 or float16")
    return DTYPE_NAMES[dtype]
