"""What a pruning is asked to do: one frozen value, checked once, written with every artifact. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from burnish.errors import ConfigError

METHODS = ("magnitude", "wanda", "sparsegpt", "structured")
DEFAULT_SPARSITY = 0.5


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """Weights set to zero in every linear inside the decoder's blocks, the same share in each; or whole parts removed.

    Embeddings, norms, biases and the language-model head stay as they are.

    Attributes:
        method: "magnitude" (needs no calibration), "wanda", "sparsegpt", or "structured", which removes heads, channels
            and layers and leaves a smaller dense model.
        sparsity: share of each linear's weights that become zero; 0.5 when neither it nor a pattern is given.
        pattern: (n, m) keeps n of every m consecutive input features instead; the ragged end of a row stays dense.
        heads: share of the key-value heads of each layer to remove, each with its query heads (structured).
        channels: share of each MLP's inner features to remove (structured).
        layers: whole blocks to remove (structured).
        damping: share of the Hessian's mean diagonal added to its diagonal (sparsegpt and structured).
        block_size: input features pruned between two updates of the rest, among which a mask is chosen (sparsegpt).
        batch_tokens: calibration tokens run through a block at once; memory against speed.
    """

    method: str = "sparsegpt"
    sparsity: float | None = None
    pattern: tuple[int, int] | None = None
    heads: float = 0.0
    channels: float = 0.0
    layers: int = 0
    damping: float = 0.01
    block_size: int = 128
    batch_tokens: int = 4096

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError("unknown pruning method", got=repr(self.method), expected=", ".join(METHODS))
        if self.is_structured:
            if self.sparsity is not None or self.pattern is not None:
                raise ConfigError("structured takes no sparsity", remedy="Say what to remove: heads, channels, layers.")
        elif self.heads or self.channels or self.layers:
            raise ConfigError(f"heads, channels and layers have no meaning for {self.method}", remedy="Use structured.")
        elif self.sparsity is not None and self.pattern is not None:
            raise ConfigError("both sparsity and pattern are given", remedy="Give one of them.")
        elif self.sparsity is None and self.pattern is None:
            object.__setattr__(self, "sparsity", DEFAULT_SPARSITY)
        if self.sparsity is not None and not 0.0 < self.sparsity < 1.0:
            raise ConfigError("sparsity is out of range", got=self.sparsity, expected="a share between 0 and 1")
        if self.pattern is not None and not 0 < self.pattern[0] < self.pattern[1]:
            raise ConfigError("the pattern is not valid", got=":".join(map(str, self.pattern)), expected="such as 2:4")
        for name, share in (("heads", self.heads), ("channels", self.channels)):
            if not 0.0 <= share < 1.0:
                raise ConfigError(f"{name} is out of range", got=share, expected="a share, 0 up to, not including, 1")
        if self.layers < 0:
            raise ConfigError("layers is out of range", got=self.layers, expected="0 or more")
        if not 0.0 < self.damping < 1.0:
            raise ConfigError("damping is not valid", got=self.damping, expected="a share between 0 and 1")
        if self.block_size < 1 or self.batch_tokens < 1:
            raise ConfigError(
                "block_size and batch_tokens must be positive", got=f"{self.block_size} and {self.batch_tokens}"
            )

    @property
    def is_structured(self) -> bool:
        return self.method == "structured"

    @property
    def needs_calibration(self) -> bool:
        return self.method != "magnitude"

    @property
    def described(self) -> str:
        """The amount, for people."""
        if self.is_structured:
            return f"{self.heads:g} of heads, {self.channels:g} of channels, {self.layers} layers removed"
        return f"{self.pattern[0]}:{self.pattern[1]}" if self.pattern else f"{self.sparsity:g} of the weights zero"

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for manifests."""
        return asdict(self)


def parse_sparsity(text: str) -> dict[str, Any]:
    """`sparsity` or `pattern` of "0.5" or "2:4".

    Raises:
        ConfigError: it is neither.
    """
    if found := re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", text):
        return {"pattern": (int(found[1]), int(found[2]))}
    try:
        return {"sparsity": float(text)}
    except ValueError as error:
        raise ConfigError("sparsity is not known", got=repr(text), expected="a share such as 0.5, or 2:4") from error
