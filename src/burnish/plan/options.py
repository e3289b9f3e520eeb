"""What a plan assumes about the work: lengths, batches, formats."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from burnish.errors import ConfigError
from burnish.plan.weights import DTYPE_BYTES, FORMATS, GROUP_SIZE

PRECISIONS = ("auto", "float32", "bfloat16")
OPTIMIZERS = ("adamw", "adamw-8bit", "paged-adamw-8bit", "adafactor", "lion")


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The work that is to fit.

    Attributes:
        dtype: what the model is loaded in; "auto" follows the device, the checkpoint and the size.
        weight_format: what it is run in: a dtype, "int8", "int4", "w8a8" or "nf4"; None is `dtype`.
        concurrency: requests generated at once.
        input_tokens, output_tokens: of each request.
        max_batch_tokens: prompt tokens computed in one step.
        kv_cache: whether keys and values are kept.
        micro_batch_size: training rows per forward pass.
        micro_batch_tokens: positions per forward pass at most; None is what training takes by itself.
        packing: rows of a forward pass lie end to end.
        fused: blocks run fused where they can; False for float16.
        dora, dropout: of the adapters; their blocks run through the decoder's own forward.
        sequence_tokens: tokens of the longest training row.
        label_tokens: learned tokens per row; None is all of them.
        positions, labels, widths: of the micro-batches, where they were counted: most positions (filled up), most
            learned ones, and how many different numbers of positions there are. None works them out from the above.
        gradient_checkpointing: recompute blocks in the backward pass.
        checkpoint_every: with it, every so many-th block.
        optimizer: as `TrainConfig.optimizer`.
        precision: training computes in this; "auto" is bfloat16 where the device multiplies it.
        rank, target_modules: the adapter's.
        train_tokens: tokens of the whole training, for its time; None leaves the time out.
        bits, group_size: of the quantization stage.
        hessians: whether its method keeps the inputs' second moments.
        calibration_tokens: tokens whose hidden states are kept while quantizing.
        calibration_batch_tokens: of those, computed at once.
    """

    dtype: str = "auto"
    weight_format: str | None = None
    concurrency: int = 32
    input_tokens: int = 128
    output_tokens: int = 128
    max_batch_tokens: int = 512
    kv_cache: bool = True
    micro_batch_size: int = 8
    micro_batch_tokens: int | None = None
    packing: bool = True
    fused: bool = True
    dora: bool = False
    dropout: bool = False
    sequence_tokens: int = 512
    label_tokens: int | None = None
    positions: int | None = None
    labels: int | None = None
    widths: int | None = None
    gradient_checkpointing: bool = False
    checkpoint_every: int = 1
    optimizer: str = "adamw"
    precision: str = "auto"
    rank: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    train_tokens: int | None = None
    bits: int = 4
    group_size: int = GROUP_SIZE
    hessians: bool = True
    calibration_tokens: int = 65536
    calibration_batch_tokens: int = 4096

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and not isinstance(value, bool) and value < 1 and field.name != "group_size":
                raise ConfigError(f"{field.name} is out of range", got=value, expected="at least 1")
        if self.group_size < 1 and self.group_size != -1:
            raise ConfigError("group_size is out of range", got=self.group_size, expected="a positive number or -1")
        for name, value, allowed in (
            ("dtype", self.dtype, ("auto", *DTYPE_BYTES)),
            ("weight_format", self.weight_format or "float32", FORMATS),
            ("precision", self.precision, PRECISIONS),
            ("optimizer", self.optimizer, OPTIMIZERS),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} is not known", got=repr(value), expected=", ".join(allowed))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self)
