"""Which way of cutting a step up fits into so much memory, the fastest first. A pure choice: nothing runs here.

What is chosen (positions of a micro-batch, how many blocks are computed again, the compute dtype) changes no loss
beyond rounding. What a setting needs is predicted by `plan`, how long it takes by counting positions; both are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from burnish.errors import CapacityError
from burnish.plan.training import PADDED_STEP, filled
from burnish.train.batches import TrainingExample, count_labels
from burnish.train.config import TrainConfig
from burnish.train.packing_plan import cut_step
from burnish.train.row_order import RowOrder

CAPS = {"cpu": (512, 384, 256, 128, 96, 64, 32), "cuda": (8192, 6144, 4096, 3072, 2048, 1024, 512, 256)}
"""Most positions of a micro-batch that are tried. Beyond the first, products are slower per position."""

EVERY = (0, 8, 6, 4, 3, 2, 1)
"""Of so many blocks, one is computed again; 0 keeps the activations of all."""

FIXED_POSITIONS = 100
"""A micro-batch takes as long as so many positions more: weights are read, kernels started."""

EMULATED_BFLOAT16 = 3.0
"""How much longer bfloat16 takes where the processor does not multiply it."""

STEPS_LOOKED_AT = 256


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run a step.

    Attributes:
        precision: "float32", "bfloat16" or "float16".
        micro_batch_size: rows of a forward pass at most.
        micro_batch_tokens: positions at most; None where rows are padded.
        checkpoint_every: blocks computed again, see `EVERY`.
    """

    precision: str
    micro_batch_size: int
    micro_batch_tokens: int | None
    checkpoint_every: int

    def applied(self, config: TrainConfig) -> TrainConfig:
        """The run's settings with these, and as many rows in a step as before."""
        accumulation = 1 if config.tokens_per_step else -(-config.rows_per_step // self.micro_batch_size)
        size = config.rows_per_step if config.packing else self.micro_batch_size
        return replace(
            config,
            precision=self.precision,  # type: ignore[arg-type]
            micro_batch_size=size,
            gradient_accumulation=1 if config.packing else accumulation,
            micro_batch_tokens=self.micro_batch_tokens,
            gradient_checkpointing=self.checkpoint_every > 0,
            checkpoint_every=max(1, self.checkpoint_every),
        )

    def __str__(self) -> str:
        size = f"{self.micro_batch_tokens} tokens" if self.micro_batch_tokens else f"{self.micro_batch_size} rows"
        again = {0: "no checkpointing", 1: "every block checkpointed"}
        blocks = again.get(self.checkpoint_every, f"one block in {self.checkpoint_every} checkpointed")
        return f"{size} at once, {blocks}, {self.precision}"


@dataclass(frozen=True, kw_only=True)
class MicroBatches:
    """What a setting's micro-batches are like over a run.

    Attributes:
        positions: most of one, filled up.
        labels: most learned positions of one.
        widths: how many different numbers of positions occur.
        cost: positions computed per token, with what each micro-batch costs beside.
    """

    positions: int
    labels: int
    widths: int
    cost: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen.

    Attributes:
        setting: the fastest that fits.
        peak_bytes: its predicted peak, what is kept spare included.
        cost: relative time per token.
        tried: settings that were looked at; `fitting` of them fit.
    """

    setting: Setting
    peak_bytes: int
    cost: float
    tried: int
    fitting: int


class Rows:
    """The rows of a run as far as its micro-batches hang on them.

    Args:
        examples: training rows.
        order: which of them make which step.
        steps: of the whole run.
    """

    def __init__(self, examples: Sequence[TrainingExample], order: RowOrder, *, steps: int) -> None:
        per_epoch = order.steps_per_epoch()
        numbers = order.epoch(0)[: min(steps, per_epoch)]
        self.lengths = order.lengths
        self.covered = len(numbers) <= STEPS_LOOKED_AT and steps <= per_epoch
        if len(numbers) > STEPS_LOOKED_AT:
            by_tokens = sorted(numbers, key=lambda step: -int(self.lengths[step].sum()))
            numbers = by_tokens[: STEPS_LOOKED_AT // 2] + numbers[:: -(-len(numbers) * 2 // STEPS_LOOKED_AT)]
        self.steps = numbers
        self.rows_of_a_step = max(map(len, numbers))
        self.labels = {row: count_labels(examples[row]) for row in {row for step in numbers for row in step}}
        self._known: dict[tuple[int, int | None], MicroBatches] = {}

    @property
    def longest(self) -> int:
        return int(self.lengths.max())

    @property
    def largest_step(self) -> list[int]:
        """Row numbers of the step with the longest row, and the most tokens among such."""
        return max(self.steps, key=lambda step: (int(self.lengths[step].max()), int(self.lengths[step].sum())))

    def micro_batches(self, *, max_rows: int, max_tokens: int | None) -> MicroBatches:
        """The cuts of all steps that were looked at; `max_tokens` None is padded."""
        key = max_rows, max_tokens
        if key not in self._known:
            found = self.count(self.steps, max_rows=max_rows, max_tokens=max_tokens)
            self._known[key] = found if self.covered else self._of_any_epoch(found, max_rows, max_tokens)
        return self._known[key]

    def count(self, steps: Sequence[Sequence[int]], *, max_rows: int, max_tokens: int | None) -> MicroBatches:
        """The cuts of these steps, given as row numbers."""
        sizes, labels, tokens = [], 0, 0
        for step in steps:
            tokens += sum(int(self.lengths[row]) for row in step)
            for part in cut_step([int(self.lengths[row]) - 1 for row in step], max_rows, max_tokens):
                lengths = [int(self.lengths[step[place]]) - 1 for place in part]
                wide = len(lengths) * -(-max(lengths) // PADDED_STEP) * PADDED_STEP
                sizes.append(wide if max_tokens is None else filled(sum(lengths)))
                labels = max(labels, sum(self.labels[step[place]] for place in part))
        cost = sum(FIXED_POSITIONS + size for size in sizes) / max(1, tokens)
        return MicroBatches(positions=max(sizes), labels=labels, widths=len(set(sizes)), cost=cost)

    def _of_any_epoch(self, found: MicroBatches, max_rows: int, max_tokens: int | None) -> MicroBatches:
        """Other epochs put other rows together."""
        row = self.longest - 1
        if max_tokens is None:
            positions = max_rows * -(-row // PADDED_STEP) * PADDED_STEP
        else:
            positions = filled(min(max(max_tokens, row), self.rows_of_a_step * row))
        positions = max(found.positions, positions)
        labels = min(positions, found.labels * positions // found.positions)
        return replace(found, positions=positions, labels=labels, widths=max(found.widths, -(-positions // 128) + 1))


def settings(config: TrainConfig, *, precisions: Sequence[str], device: str, layers: int) -> list[Setting]:
    """All that are looked at. What the run's settings name themselves is kept.

    Args:
        config: of the run; its `micro_batch_tokens` and `gradient_checkpointing` are kept where they are given.
        precisions: to choose from.
        device: "cpu" or "cuda".
        layers: of the model.
    """
    sizes: list[tuple[int, int | None]]
    if config.packing:
        caps = CAPS[device] if config.micro_batch_tokens is None else (config.micro_batch_tokens,)
        sizes = [(config.rows_per_step, cap) for cap in caps]
    else:
        rows = config.rows_per_step
        sizes = [(size, None) for size in range(rows, 0, -1) if rows % size == 0]
    every = [count for count in EVERY if count <= layers]
    if config.gradient_checkpointing:
        every = [config.checkpoint_every]
    return [
        Setting(precision=precision, micro_batch_size=rows, micro_batch_tokens=cap, checkpoint_every=count)
        for precision in precisions
        for rows, cap in sizes
        for count in every
    ]


def cost(setting: Setting, batches: MicroBatches, *, full: bool, native: bool) -> float:
    """Relative time per token: positions, and the share of the work that is done again (a third of it, or a half).

    Args:
        full: all weights are trained, so the backward pass is twice the forward pass; once with adapters.
        native: the device multiplies bfloat16.
    """
    again = 0.0 if not setting.checkpoint_every else (1 / 3 if full else 1 / 2) / setting.checkpoint_every
    slower = EMULATED_BFLOAT16 if setting.precision == "bfloat16" and not native else 1.0
    return batches.cost * (1 + again) * slower


def choose(
    candidates: Iterable[Setting],
    *,
    budget: int,
    peak: Callable[[Setting], int],
    time: Callable[[Setting], float],
    remedy: Callable[[Setting, int], str],
) -> Choice:
    """The fastest setting whose peak is within `budget`, of equally fast ones the smallest.

    Args:
        remedy: what to do where nothing fits, given the least setting and what it needs.

    Raises:
        CapacityError: none is.
    """
    known = [(time(one), peak(one), number, one) for number, one in enumerate(candidates)]
    fitting = [entry for entry in known if entry[1] <= budget]
    if not fitting:
        _, needed, _, least = min(known, key=lambda entry: entry[1])
        raise CapacityError(f"nothing fits into {_mib(budget)}", remedy=remedy(least, needed))
    cost_of, needed, _, best = min(fitting)
    return Choice(setting=best, peak_bytes=needed, cost=cost_of, tried=len(known), fitting=len(fitting))


def in_words(config: TrainConfig, *, precision: str, device: str) -> str:
    """How a run's settings cut a step up."""
    most = config.tokens_at_once(device)
    every = config.checkpoint_every if config.gradient_checkpointing else 0
    size = config.micro_batch_size
    return str(Setting(precision=precision, micro_batch_size=size, micro_batch_tokens=most, checkpoint_every=every))


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"
