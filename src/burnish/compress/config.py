"""What a quantization is asked to do: one frozen value, checked once, written with every artifact. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from burnish.errors import ConfigError

METHODS = ("rtn", "gptq", "awq", "awq-gptq", "smoothquant", "w8a8", "nf4", "fp4", "llm.int8")
FORMATS = ("gptq", "compressed-tensors", "bitsandbytes")
"""Layouts of folders that quantized models are written in."""
ROW_METHODS = ("smoothquant", "w8a8")
"""Methods whose linears compute with 8-bit activations: one scale per row of the weight and per token."""
CODE_METHODS = ("nf4", "fp4", "llm.int8")
"""Methods of bitsandbytes."""
BITS = (2, 3, 4, 8)
PER_CHANNEL = -1
CODE_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Weights per scale that bitsandbytes computes with."""


def default_bits(method: str) -> int:
    """Bits per weight where nothing else is asked for; the only ones of the methods that have one width."""
    return 8 if method in (*ROW_METHODS, "llm.int8") else 4


def default_group_size(method: str) -> int:
    """Weights per scale where nothing else is asked for."""
    if method in (*ROW_METHODS, "llm.int8"):
        return PER_CHANNEL
    return 64 if method in ("nf4", "fp4") else 128


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

    Embeddings, norms and the language-model head stay as they are, unless `embeddings` says otherwise.

    Attributes:
        method: "rtn" (round to nearest), "gptq", "awq" (channels scaled by importance, folded into norms and linears
            before, then rounded), "awq-gptq" (scaled, then gptq); "w8a8" (weights in 8 bits per output feature,
            activations in 8 bits per token), "smoothquant" (w8a8 after outliers of the activations were moved into the
            weights); "nf4", "fp4" and "llm.int8" as bitsandbytes has them. Calibration is needed by gptq, awq and
            smoothquant.
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
        block_size: input features quantized between two updates of the rest (gptq without the compiled kernels);
            speed only.
        batch_tokens: calibration tokens run through a block at once; memory against speed.
        rotate: rotate the residual stream and the attention's heads before (models with RMSNorm).
        format: layout of the folder, one of `FORMATS`; "auto" is the method's own.
        alpha: share of the activations' range that smoothquant moves, 0..1; None chooses it place by place.
        double_quant: scales of nf4 and fp4 are quantized as well.
        embeddings: embedding and output layer in 8 bits per row as well (compressed-tensors).
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
    format: str = "auto"
    alpha: float | None = None
    double_quant: bool = True
    embeddings: bool = False

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

        self._check_format()

    def _check_format(self) -> None:
        """Refuse settings that the method or the layout has no place for."""
        if self.format not in ("auto", *FORMATS):
            raise ConfigError("unknown format", got=repr(self.format), expected=f"auto, {', '.join(FORMATS)}")
        if self.method in (*ROW_METHODS, *CODE_METHODS) and self.bits != default_bits(self.method):
            raise ConfigError(f"{self.method} has {default_bits(self.method)} bits", got=self.bits)
        if self.method in (*ROW_METHODS, "llm.int8") and self.group_size != PER_CHANNEL:
            raise ConfigError(f"{self.method} has one scale per output feature", got=f"group_size {self.group_size}")
        if self.method in ("nf4", "fp4") and self.group_size not in CODE_BLOCKS:
            raise ConfigError(
                f"group_size is not valid for {self.method}",
                got=self.group_size,
                expected=", ".join(map(str, CODE_BLOCKS)),
            )
        if self.layout not in self._layouts():
            raise ConfigError(
                f"{self.method} cannot be written in this format",
                got=self.layout,
                expected=" or ".join(self._layouts()),
            )
        if self.layout == "compressed-tensors" and self.bits == 3:
            raise ConfigError("compressed-tensors has no settled layout of 3 bits", expected="2, 4 or 8 bits")
        if self.layout == "compressed-tensors" and self.activation_order and self.group_size != PER_CHANNEL:
            raise ConfigError(
                "compressed-tensors keeps groups in plain order", remedy="Use --group-size -1, or --format gptq"
            )
        if self.embeddings and self.layout != "compressed-tensors":
            raise ConfigError(
                "embeddings in 8 bits have no place in this format",
                got=self.layout,
                remedy="Use --format compressed-tensors",
            )
        if not self.double_quant and self.method not in ("nf4", "fp4"):
            raise ConfigError(f"double_quant has no meaning for {self.method}", remedy="Use nf4 or fp4")
        if self.alpha is not None and (self.method != "smoothquant" or not 0.0 <= self.alpha <= 1.0):
            raise ConfigError(
                "alpha is out of range", got=f"{self.alpha} with {self.method}", expected="0 to 1, with smoothquant"
            )
        if self.method in (*ROW_METHODS, *CODE_METHODS) and not (self.symmetric and self.true_sequential):
            raise ConfigError(f"{self.method} is always symmetric and sequential", remedy="Leave both settings out")

    @property
    def layout(self) -> str:
        """The folder's layout, one of `FORMATS`."""
        return self._layouts()[0] if self.format == "auto" else self.format

    def _layouts(self) -> tuple[str, ...]:
        """What the method can be written in, its own first."""
        if self.method in CODE_METHODS:
            return ("bitsandbytes",)
        return ("compressed-tensors",) if self.method in ROW_METHODS else ("gptq", "compressed-tensors")

    @property
    def needs_calibration(self) -> bool:
        """Whether the method has to see text."""
        return self.method in ("gptq", "awq", "awq-gptq", "smoothquant")

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
