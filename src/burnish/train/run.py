"""One run of the training loop: step after step, with evaluations, checkpoints and the reasons to stop.

`trainer.train` checks what it is given, makes a `Run`, and cleans up after it. What a step computes is in `step.py`,
what survives the process in `state.py`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from burnish.errors import BurnishError, CheckpointError, ConfigError
from burnish.train.batches import TrainingExample
from burnish.train.checkpoints import Checkpoint, CheckpointFolder
from burnish.train.config import TrainConfig
from burnish.train.distributed import Ranks, single
from burnish.train.footprint import component_bytes
from burnish.train.freezing import trainable_parameters
from burnish.train.inputs import order_of_rows, total_steps
from burnish.train.loss_scaling import LossScale
from burnish.train.precision import resolve_precision
from burnish.train.profile import StepClock, operations_of, peak_rate
from burnish.train.results import EvalRecord, StepRecord, TrainResult, steady_tokens_per_s
from burnish.train.schedule import rate_factor, warmup_steps
from burnish.train.sharded_model import shard_model, unshard_model
from burnish.train.sharded_optimizer import make_sharded_optimizer
from burnish.train.state import RunState, Stateful, capture, restore
from burnish.train.step import StepRunner
from burnish.train.stopping import BestWeights, EarlyStopping, StopRequest


class Meter(Protocol):
    """A running memory meter; `peak_bytes` is over everything since `start_bytes` was read."""

    @property
    def start_bytes(self) -> int: ...

    @property
    def peak_bytes(self) -> int: ...


class Run:
    """State of one run: parameters, optimizer, counters. Arguments as of `trainer.train`."""

    def __init__(
        self,
        model: nn.Module,
        examples: Sequence[TrainingExample],
        config: TrainConfig,
        *,
        eval_examples: Sequence[TrainingExample] | None,
        on_step: Callable[[StepRecord], None] | None,
        on_eval: Callable[[int], Mapping[str, float]] | None,
        on_evaluated: Callable[[EvalRecord], None] | None,
        clock: StepClock | None,
        meter: Meter | None,
        checkpoints: CheckpointFolder | None,
        stop: StopRequest,
        ranks: Ranks | None = None,
        parent: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.ranks = ranks or single()
        self.model, self.examples, self.config = model, examples, config
        self.eval_examples, self.on_step, self.on_eval = eval_examples, on_step, on_eval
        self.on_evaluated, self.clock = on_evaluated, clock or StepClock()
        self.meter, self.checkpoints, self.stop = meter, checkpoints, stop
        self.parameters = trainable_parameters(model, config)
        self.precision = resolve_precision(model, config)
        self.device = self.parameters[0].device
        self.order = order_of_rows(examples, config)
        self.total_steps = total_steps(self.order, config)
        self.warmup = warmup_steps(config.warmup, self.total_steps)
        self.loss_scale = LossScale() if self.precision == "float16" else None
        self.runner = StepRunner(
            model,
            self.parameters,
            config,
            self.precision,
            clock=self.clock,
            ranks=self.ranks,
            loss_scale=self.loss_scale,
            parent=parent,
        )
        trained = set(map(id, self.parameters))
        names = {id(value): name for name, value in model.named_parameters() if id(value) in trained}
        if self.ranks.shards_model:
            if config.keep_best:
                raise ConfigError("a sharded model cannot keep its best weights", remedy="Use sharding zero1 or none.")
            order = [names[id(parameter)] for parameter in self.parameters]
            shard_model(model, self.ranks, precision=self.precision)
            # The same list, which the runner holds too: sharding made other parameters.
            self.parameters[:] = [model.get_parameter(name) for name in order]
        self.named_parameters = {name: model.get_parameter(name) for name in names.values()}
        self.optimizer = make_sharded_optimizer(self.parameters, config, self.ranks)
        # Whatever else remembers something from step to step is listed here, and so saved and restored.
        self.parts: dict[str, Stateful] = {"optimizer": self.optimizer}
        if self.loss_scale is not None:
            self.parts["loss_scale"] = self.loss_scale
        self.state = RunState(evaluation_due=config.eval_first and (eval_examples is not None or on_eval is not None))
        self.best = BestWeights(self.named_parameters)
        self.resumed_from: int | None = None
        self.saved_step = 0
        self.earlier_seconds = 0.0
        self.begin = time.perf_counter()
        self.previous_checkpointing = bool(getattr(model, "gradient_checkpointing", False))
        model.gradient_checkpointing = config.gradient_checkpointing  # type: ignore[assignment]
        model.checkpoint_every = config.checkpoint_every  # type: ignore[assignment]

    def release(self) -> None:
        """Leave the model in evaluation mode, without gradients."""
        self.model.eval()
        self.model.gradient_checkpointing = self.previous_checkpointing  # type: ignore[assignment]
        self.optimizer.zero_grad(set_to_none=True)

    def make_whole(self) -> None:
        """Give a sharded model its parameters back, on the main rank."""
        self.optimizer.zero_grad(set_to_none=True)
        unshard_model(self.model, self.ranks)

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Become the run that wrote the checkpoint, as it was then; later checkpoints of the folder are removed."""
        try:
            self.state = restore(
                checkpoint.values,
                steps=checkpoint.steps,
                evals=checkpoint.evals,
                tensors=checkpoint,
                parameters=self.named_parameters,
                parts=self.parts,
                device=self.device,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{checkpoint.path} does not fit this run: {error}") from error
        self.resumed_from = self.saved_step = self.state.step
        self.earlier_seconds = self.state.seconds
        if self.config.keep_best and self.state.best_step is not None:
            place = checkpoint.path.with_name(f"checkpoint-{self.state.best_step:06d}")
            try:
                self.best.keep_saved(place)
            except CheckpointError as error:
                self.state.best_loss = self.state.best_step = None
                self._notify(f"the best weights until now are lost: {error.message}")
        self.ranks.barrier()  # all have read
        if self.checkpoints is not None and self.ranks.is_main:
            self.checkpoints.discard(lambda step: step > self.state.step)

    def loop(self) -> TrainResult:
        """Train until a reason to stop comes up."""
        state = self.state
        self.early_stopping = EarlyStopping(self.config, state)
        rows = self._rows(state.step)
        self.begin = time.perf_counter()
        self._attach_clock()
        self.model.train()
        late = state.evaluation_due and not self.asked_to_stop  # `eval_first`, or an earlier session had no time
        lowest = late and self.evaluate()
        stopped = self._reason_to_stop(out_of_time=state.step > 0 and self.out_of_time)
        if late:
            self.save(stopped, lowest=lowest)
        while stopped is None:
            with self.clock.mark("data"):
                rows_of_step = next(rows)
            self._count(self.step(rows_of_step))
            out_of_time = self.out_of_time
            state.evaluation_due = self._evaluation_due(last=out_of_time or state.step == self.total_steps)
            lowest = state.evaluation_due and not self.asked_to_stop and self.evaluate()
            stopped = self._reason_to_stop(out_of_time=out_of_time)
            self.save(stopped, lowest=lowest)
        seconds = self.seconds
        best_kept = stopped != "interrupted" and self.config.keep_best and self._give_best_back()
        parts = component_bytes(self.model, self.parameters, self.optimizer)
        parts["activations"] = self._activations(parts)
        return TrainResult(
            steps=state.steps,
            eval=state.evals,
            stopped=stopped,
            tokens_per_s=steady_tokens_per_s(state.steps),
            seconds=seconds,
            component_bytes=parts,
            precision=self.precision,
            skipped_steps=sum(step.skipped for step in state.steps),
            padding_share=self.runner.padding_share,
            resumed_from=self.resumed_from,
            best_step=state.best_step,
            best_kept=best_kept,
            phase_seconds=self.clock.finish(),
            highest_memory=self.clock.highest,
        )

    @property
    def seconds(self) -> float:
        """Wall time of this session and of those before it."""
        return self.earlier_seconds + time.perf_counter() - self.begin

    @property
    def out_of_time(self) -> bool:
        limit = self.config.max_seconds
        return limit is not None and self.ranks.any(self.seconds >= limit)

    @property
    def asked_to_stop(self) -> bool:
        """Whether any rank was; to be read by all at the same place."""
        return self.ranks.any(self.stop.requested)

    def step(self, rows: Sequence[TrainingExample]) -> StepRecord:
        """Forward and backward over the rows' micro-batches, then one update, unless something is not finite."""
        begin = time.perf_counter()
        number = self.state.step + 1
        totals = self.runner.accumulate(self.ranks.split(rows))
        rate = self._rate(number)
        with self.clock.mark("optimizer"):
            norm = float(self.clip())
            skipped = not (math.isfinite(totals.loss) and math.isfinite(norm))
            overflow = False
            if self.loss_scale is not None and math.isfinite(totals.loss):
                overflow = self.loss_scale.update(overflow=skipped)
            if not skipped:
                self.update(rate)
        self.optimizer.zero_grad(set_to_none=True)  # the next backward pass then writes instead of adding
        seconds = time.perf_counter() - begin
        profile = self.clock.finish_step(
            seconds=seconds,
            tokens=totals.tokens,
            label_tokens=totals.label_tokens,
            squared_lengths=sum(len(row.tokens) ** 2 for row in rows),
        )
        return StepRecord(
            step=number,
            loss=totals.loss,
            tokens=totals.tokens,
            label_tokens=totals.label_tokens,
            seconds=seconds,
            learning_rate=rate,
            grad_norm=norm,
            skipped=skipped,
            overflow=overflow,
            phases=profile.phases,
            memory=profile.memory,
            flops_per_s=profile.flops_per_s,
            peak_share=profile.peak_share,
        )

    def clip(self) -> Tensor:
        """Scale the gradients down to `max_grad_norm`; returns their norm before."""
        limit = self.config.max_grad_norm
        if self.loss_scale is not None:
            self.loss_scale.unscale(parameter.grad for parameter in self.parameters if parameter.grad is not None)
        norm = self.ranks.gradient_norm(self.parameters)
        if limit is not None:
            self.ranks.clip(self.parameters, norm=norm, limit=limit)
        return norm

    def update(self, rate: float) -> None:
        """One step of the optimizer."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()

    def evaluate(self) -> bool:
        """Put an evaluation on record; True if no loss before was lower."""
        begin, state = time.perf_counter(), self.state
        loss = None
        figures: Mapping[str, float] = {}
        with self.clock.mark("evaluation"):
            if self.eval_examples is not None:
                loss = self.runner.evaluate(self.eval_examples)
            if self.on_eval is not None:
                self.model.eval()
                figures = self.on_eval(state.step)
                self.model.train()
        plain = {name: float(value) for name, value in figures.items()}
        seconds = time.perf_counter() - begin
        state.evals.append(EvalRecord(step=state.step, loss=loss, seconds=seconds, figures=plain))
        state.evaluation_due = False
        if self.on_evaluated is not None:
            self.on_evaluated(state.evals[-1])
        return loss is not None and self.early_stopping.observe(loss)

    def save(self, stopped: str | None, *, lowest: bool) -> None:
        """Write a checkpoint if it is time.

        After steps that went wrong it waits for a good one: what broke a run may stand in its weights. One that is
        interrupted there is saved, but takes the place of no older checkpoint.

        Args:
            stopped: why the run ends, if it does.
            lowest: the evaluation just made had the lowest loss.
        """
        config, state, folder = self.config, self.state, self.checkpoints
        best_now = lowest and config.keep_best
        place: Path | None = None
        if folder is not None:
            every = config.save_every
            due = bool(every) and state.step // every > self.saved_step // every
            due = (due or best_now) and not state.bad_in_a_row
            if due or stopped == "interrupted" or (stopped is not None and folder.save_at_end):
                state.seconds = self.seconds
                with self.clock.mark("saving"):
                    snapshot = capture(
                        state,
                        parameters=self.named_parameters,
                        parts=self.parts,
                        device=self.device,
                        whole=self.ranks.full_parameters(self.named_parameters),
                    )
                    keep_last = None if state.bad_in_a_row else config.keep_last
                    keep_step = state.best_step if config.keep_best else None
                    here = self.ranks.is_main
                    saved = here and folder.save(snapshot, keep_last=keep_last, keep_step=keep_step)
                    saved = self.ranks.any(saved)
                if saved:
                    self.saved_step, place = state.step, folder.place(state.step)
        if best_now:
            self.best.keep(place)

    def _attach_clock(self) -> None:
        config = self.config
        recomputed = 1 / config.checkpoint_every if config.gradient_checkpointing else 0.0
        self.clock.attach(
            self.model,
            self.parameters,
            self.optimizer,
            device=self.device,
            operations=operations_of(self.model, recomputed=recomputed),
            peak_rate=peak_rate(self.device, precision=self.precision),
        )

    def _rows(self, done: int) -> Iterator[list[TrainingExample]]:
        """The rows of every step after the first `done`: a function of the seed and the step's number alone."""
        return ([self.examples[row] for row in rows] for rows in self.order.start_from(done))

    def _rate(self, step: int) -> float:
        config = self.config
        factor = rate_factor(
            step,
            total_steps=self.total_steps,
            warmup=self.warmup,
            schedule=config.schedule,
            min_rate=config.min_rate,
        )
        return config.learning_rate * factor

    def _count(self, record: StepRecord) -> None:
        state = self.state
        state.step = record.step
        state.steps.append(record)
        if not record.overflow:
            state.bad_in_a_row = state.bad_in_a_row + 1 if record.skipped else 0
        if state.bad_in_a_row >= self.config.max_bad_steps:
            raise BurnishError(
                f"training stopped at step {state.step}: loss or gradient was not finite "
                f"for {state.bad_in_a_row} steps in a row",
                got=f"loss {record.loss}",
                remedy="Lower the learning rate, or look at the data; these steps did not change the weights.",
            )
        if self.on_step is not None:
            try:
                self.on_step(record)
            except KeyboardInterrupt:  # the step is done and on record: as good a moment as any
                self.stop.request()

    def _evaluation_due(self, *, last: bool) -> bool:
        every = self.config.eval_every
        due = last or (every and self.state.step % every == 0)
        return bool(due) and (self.eval_examples is not None or self.on_eval is not None)

    def _reason_to_stop(self, *, out_of_time: bool) -> str | None:
        if self.state.step >= self.total_steps and not self.state.evaluation_due:
            return "finished"
        if self.asked_to_stop:
            return "interrupted"
        if self.early_stopping.exhausted:
            return "early_stopping"
        return "max_seconds" if out_of_time else None

    def _give_best_back(self) -> bool:
        if self.state.best_step is None:
            return False
        try:
            self.best.give_back()
        except CheckpointError as error:
            self._notify(f"the weights of the last step are kept, not the best ones: {error.message}")
            return False
        return True

    def _activations(self, parts: dict[str, int]) -> int:
        if self.meter is None:
            return self.runner.activation_bytes
        return max(0, self.meter.peak_bytes - self.meter.start_bytes - parts["gradients"] - parts["optimizer"])

    def _notify(self, text: str) -> None:
        if self.checkpoints is not None:
            self.checkpoints.notify(text)
