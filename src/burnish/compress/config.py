"""What a quantization is asked to do: one frozen value, checked once, written with every artifact. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from burnish.errors import ConfigError

METHODS = ("rtn", "gptq", "awq", "awq-gptq")
BITS = (2, 3, 4, 8)
PER_CHANNEL = -1


@dataclass(frozen=True, kw_only=True)
class MixedPrecision:
    """A width for each linear, chosen by what its rounding costs the model; one of the two budgets is given.

    Attributes:
        target_bits: stored bits per weight of the blocks' linears, on average; scales and zero points count.
        max_bytes: of the weight files, with all that is not quantized.
        choices: bits to choose from.
        tokens: calibration tokens that every linear is tried on at every width.
    """

    target_bits: float | None = None
    max_bytes: int | None = None
    choices: tuple[int, ...] = BITS
    tokens: int = 512

    def __post_init__(self) -> None:
        if (self.target_bits is None) == (self.max_bytes is None):
            raise ConfigError("mixed precision takes one budget", expected="either target_bits or max_bytes")
        for name, budget in (("target_bits", self.target_bits), ("max_bytes", self.max_bytes)):
            if budget is not None and not 0 < budget < float("inf"):
                raise ConfigError(f"{name} is out of range", got=budget, expected="a positive number")
        if not self.choices or not set(self.choices) <= set(BITS):
            raise ConfigError("choices are not supported", got=self.choices, expected="some of 2, 3, 4 and 8")
        if self.tokens < 1:
            raise ConfigError("tokens is out of range", got=self.tokens, expected="1 or more")


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Weight quantization of every linear inside the decoder's blocks.

    Embeddings, norms and the language-model head stay as they are.

    Attributes:
        method: "rtn" (round to nearest; the only one that needs no calibration), "gptq", "awq" (channels scaled by
            importance, folded into norms and linears before, then rounded) or "awq-gptq" (scaled, then gptq).
        bits: 2, 3, 4 or 8 bits per weight.
        group_size: input features that share one scale; -1 is one scale per output feature. The last may be short.
        symmetric: zero point fixed at the middle of the grid; else fitted per group.
        damping: share of the Hessian's mean diagonal added to its diagonal (gptq).
        activation_order: quantize input features in order of falling Hessian diagonal (gptq); groups then hold features
            of similar importance, recorded in g_idx.
        scale_search: choose each scale by the least squared error over shrunken ranges; else take the whole range.
        match_parent: fit each linear to what the parent gives at the same tokens, from the inputs that it really gets
            (gptq); takes the parent's hidden states and a second forward.
        refine: passes of coordinate descent over each linear's scales and integers afterwards (gptq).
        true_sequential: the inputs of a block's later linears come from its quantized earlier ones; else all from one
            forward through the dense block, which is quicker.
        block_size: input features quantized between two updates of the rest (gptq); speed only.
        batch_tokens: calibration tokens run through a block at once; memory against speed.
        rotate: rotate the residual stream and the attention's heads before (models with RMSNorm).
    """

    method: str = "gptq"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    damping: float = 0.01
    activation_order: bool = False
    scale_search: bool = True
    match_parent: bool = False
    refine: int = 0
    true_sequential: bool = True
    block_size: int = 128
    batch_tokens: int = 4096
    rotate: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError("unknown quantization method", got=repr(self.method), expected=" or ".join(METHODS))
        if self.bits not in BITS:
            raise ConfigError("bits is not supported", got=self.bits, expected="2, 3, 4 or 8")
        if self.group_size != PER_CHANNEL and self.group_size < 1:
            raise ConfigError("group_size is not valid", got=self.group_size, expected="a positive number or -1")
        if not 0.0 < self.damping < 1.0:
            raise ConfigError("damping is not valid", got=self.damping, expected="a share between 0 and 1")
        if self.activation_order and not self.corrects:
            raise ConfigError(f"activation_order has no meaning for {self.method}", remedy="Use gptq")
        if self.match_parent and not self.corrects:
            raise ConfigError(f"match_parent has no meaning for {self.method}", remedy="Use gptq")
        if self.match_parent and not self.true_sequential:
            raise ConfigError("match_parent needs true_sequential", remedy="Leave one of them out")
        if self.refine < 0 or (self.refine and not self.corrects):
            raise ConfigError(
                "refine is out of range", got=f"{self.refine} with {self.method}", expected="0 or more, with gptq"
            )
        if self.block_size < 1 or self.batch_tokens < 1:
            raise ConfigError(
                "block_size and batch_tokens must be positive", got=f"{self.block_size} and {self.batch_tokens}"
            )

    @property
    def scales(self) -> bool:
        """Whether channels are scaled before rounding."""
        return self.method in ("awq", "awq-gptq")

    @property
    def corrects(self) -> bool:
        """Whether columns make up for the errors of those before them."""
        return self.method in ("gptq", "awq-gptq")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for manifests."""
        return asdict(self)
