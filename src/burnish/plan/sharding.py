"""How several cards would hold a model: what each takes for every way of dividing their number. Torch-free.

The parts are those that the engine makes (`models.shard_cut`); a part's memory is the inference stage's formula for a
model of the part's shape. The first card also gathers all parts' logits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from burnish.errors import ConfigError
from burnish.models.config import ModelConfig
from burnish.models.shard_cut import ShardCut, cut_model
from burnish.plan.devices import Device
from burnish.plan.options import PlanOptions
from burnish.plan.stages import load_dtype, predict_inference
from burnish.plan.weights import DTYPE_BYTES


@dataclass(frozen=True, kw_only=True)
class Split:
    """One way of dividing a model over so many cards.

    Attributes:
        tensor_parallel, pipeline_parallel: processes that share every block, and stages.
        peak_bytes, components: of the card that takes most; its weights, keys and values, activations, logits.
        least_bytes: of the card that takes least.
        sent_bytes_per_token: what one card sends for one token, about; every sum counted once in and once out.
        copied_kv_heads: whether cards hold copies of kv heads, as there are fewer than cards of a stage.
        fits: whether every card holds its part (on a CPU: whether the machine holds them all).
        reason: why it is not possible, in words; None where it is.
    """

    tensor_parallel: int
    pipeline_parallel: int
    peak_bytes: int = 0
    components: dict[str, int]
    least_bytes: int = 0
    sent_bytes_per_token: int = 0
    copied_kv_heads: bool = False
    fits: bool = False
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)


def predict_splits(
    config: ModelConfig, *, cards: int, device: Device, options: PlanOptions, stored_dtype: str | None = None
) -> tuple[Split, ...]:
    """Every way of dividing the model over exactly `cards`, most tensor parallelism first.

    Raises:
        ConfigError: fewer than one card.
    """
    if cards < 1:
        raise ConfigError("cards is out of range", got=cards, expected="at least 1")
    dtype = load_dtype(config, device, options, stored_dtype)
    ways = [(n, cards // n) for n in range(cards, 0, -1) if cards % n == 0]
    return tuple(_split(config, n, m, device, options, dtype) for n, m in ways)


def advised(splits: tuple[Split, ...]) -> Split | None:
    """The one to take: of those that fit, the most tensor parallelism without copies of kv heads; None if none fits.

    Cards that share every block shorten each step; stages only add room, but send least.
    """
    fitting = [split for split in splits if split.fits]
    return next((split for split in fitting if not split.copied_kv_heads), fitting[0] if fitting else None)


def _split(config: ModelConfig, n: int, m: int, device: Device, options: PlanOptions, dtype: str) -> Split:
    try:
        cuts = cut_model(config, tensor_parallel=n, pipeline_parallel=m)
    except ConfigError as error:
        return Split(tensor_parallel=n, pipeline_parallel=m, components={}, reason=error.message)
    parts = [_components(config, cut, device, options, dtype) for cut in cuts]
    sizes = [sum(part.values()) for part in parts]
    row = config.hidden_size * DTYPE_BYTES[dtype]
    layers = max(cut.num_layers for cut in cuts)
    sums = (2 * layers if n > 1 else 0) + (1 if n * m > 1 else 0)
    return Split(
        tensor_parallel=n,
        pipeline_parallel=m,
        peak_bytes=max(sizes),
        components=parts[sizes.index(max(sizes))],
        least_bytes=min(sizes),
        sent_bytes_per_token=2 * sums * row + (row if m > 1 else 0),
        copied_kv_heads=n > config.num_kv_heads,
        fits=(sum(sizes) if device.kind == "cpu" else max(sizes)) <= device.usable_bytes,
    )


def _components(config: ModelConfig, cut: ShardCut, device: Device, options: PlanOptions, dtype: str) -> dict[str, int]:
    part = cut.cache_config(config)
    if config.position == "learned":
        part = replace(part, max_position_embeddings=cut.positions[1] - cut.positions[0])
    found = predict_inference(part, device, options, dtype)
    if cut.rank == 0 and cut.world_size > 1:
        found["gathered logits"] = 2 * 4 * options.concurrency * config.vocab_size
    return found
