"""What a quantization is asked to do: one frozen value, checked once, written with every artifact. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from burnish.errors import ConfigError

METHODS = ("rtn", "gptq")
BITS = (2, 3, 4, 8)
PER_CHANNEL = -1


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Weight quantization of every linear inside the decoder's blocks.

    Embeddings, norms and the language-model head stay as they are.

    Attributes:
        method: "rtn" (round to nearest; needs no calibration) or "gptq" (needs calibration).
        bits: 2, 3, 4 or 8 bits per weight.
        group_size: input features that share one scale; -1 is one scale per output feature. The last may be short.
        symmetric: zero point fixed at the middle of the grid; else fitted per group.
        damping: share of the Hessian's mean diagonal added to its diagonal (gptq).
        activation_order: quantize input features in order of falling Hessian diagonal (gptq); groups then hold features
            of similar importance, recorded in g_idx.
        scale_search: choose each scale by the least squared error over shrunken ranges; else take the whole range.
        block_size: input features quantized between two updates of the rest (gptq); speed only.
        batch_tokens: calibration tokens run through a block at once; memory against speed.
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    damping: float = 0.01
    activation_order: bool = False
    scale_search: bool = True
    block_size: int = 128
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError("unknown quantization method", got=repr(self.method), expected=" or ".join(METHODS))
        if self.bits not in BITS:
            raise ConfigError("bits is not supported", got=self.bits, expected="2, 3, 4 or 8")
        if self.group_size != PER_CHANNEL and self.group_size < 1:
            raise ConfigError("group_size is not valid", got=self.group_size, expected="a positive number or -1")
        if not 0.0 < self.damping < 1.0:
            raise ConfigError("damping is not valid", got=self.damping, expected="a share between 0 and 1")
        if self.activation_order and self.method != "gptq":
            raise ConfigError(f"activation_order has no meaning for {self.method}", remedy="Use gptq")
        if self.block_size < 1 or self.batch_tokens < 1:
            raise ConfigError(
                "block_size and batch_tokens must be positive", got=f"{self.block_size} and {self.batch_tokens}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for manifests."""
        return asdict(self)
