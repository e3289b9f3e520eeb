"""The training loop's entrance: rows in, an adapted model out, every step on record.

A plain loop over any model with `hidden(tokens_BT)` and `logits(hidden)`. What a run may be told is in `config.py`, the
loop itself in `run.py`, how rows become batches in `batches.py`, what comes out in `results.py`. Reading data and
writing the result happen elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from burnish.errors import ConfigError, SettingError
from burnish.models.attention import Attention
from burnish.train.batches import TrainingExample
from burnish.train.checkpoints import Checkpoint, CheckpointFolder
from burnish.train.config import TrainConfig
from burnish.train.distributed import Ranks, single
from burnish.train.inputs import check_examples
from burnish.train.precision import frozen_in_bfloat16, frozen_linears_in_float16
from burnish.train.profile import StepClock
from burnish.train.results import EvalRecord, StepRecord, TrainResult
from burnish.train.run import Meter, Run
from burnish.train.stopping import StopRequest, stop_on_signals


class CausalModel(Protocol):
    """What the trainer needs of a model besides being a module, and besides `config.hidden_size` and `.vocab_size`."""

    gradient_checkpointing: bool

    @property
    def dtype(self) -> torch.dtype: ...

    def hidden(self, tokens_BT: Tensor, *, attention: Attention | None = None) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


def train(
    model: nn.Module,
    examples: Sequence[TrainingExample],
    *,
    config: TrainConfig,
    eval_examples: Sequence[TrainingExample] | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
    on_eval: Callable[[int], Mapping[str, float]] | None = None,
    on_evaluated: Callable[[EvalRecord], None] | None = None,
    clock: StepClock | None = None,
    meter: Meter | None = None,
    checkpoints: CheckpointFolder | None = None,
    resume: Checkpoint | None = None,
    stop: StopRequest | None = None,
    ranks: Ranks | None = None,
    parent: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
) -> TrainResult:
    """Train the adapters that `model` carries, or all of it, and report every step.

    The same seed, model, data and number of threads give bit-identical losses, also when a run is interrupted, or
    killed, and goes on from a checkpoint. SIGINT and SIGTERM end the run after the step at hand; what there is is saved
    as a checkpoint and returned, marked as interrupted. `model` is changed in place and left in evaluation mode.

    In precision "bfloat16" an adapter's frozen base is held in bfloat16 while training (evaluations included) and given
    back untouched; full training keeps float32 weights under autocast.

    Args:
        model: a decoder (see `CausalModel`), as it was when the run began, also where it resumes.
        examples: rows; those without a label to learn are refused.
        config: the settings.
        eval_examples: rows for the evaluation loss.
        on_step: called after every step.
        on_eval: called at every evaluation with the step, the model in evaluation mode; returns figures to record.
        on_evaluated: called after every evaluation.
        clock: measures the steps; a fresh one when None.
        meter: a running memory meter. With it, component_bytes["activations"] is its peak over its start less gradients
            and optimizer; without, the bytes that autograd kept in the first step, scaled to the largest micro-batch.
        checkpoints: where the run is saved, so that it can go on.
        resume: go on from here; model, rows and settings have to be those of that run, which the caller checks.
        stop: asks the run to end; by default it listens to SIGINT and SIGTERM itself.
        ranks: the processes that train together (see `distributed.joined`); each calls this with the same arguments.
            With sharding "zero2" or "zero3" only the main one's model is whole afterwards.
        parent: inside this context `model` computes as its parent (`fake_quant.parent_computes`). With it nothing is
            learned of the labels but their places: losses, also those of evaluations, are the KL from the parent there.

    Raises:
        ConfigError: the method and the model do not fit together, or the settings ask for what is not given here.
        DataError: no rows, or a row that teaches nothing.
        CheckpointError: `resume` is of a run that trains other parameters.
        BurnishError: the loss or its gradient was not finite for `config.max_bad_steps` steps in a row.
        KeyboardInterrupt: a second SIGINT came before the step at hand was done and saved.
    """
    ranks = ranks or single()
    if ranks.sharding != config.sharding:
        raise ConfigError(
            "the processes were joined for another sharding", got=ranks.sharding, expected=config.sharding
        )
    check_examples(examples, "training")
    if eval_examples is not None:
        check_examples(eval_examples, "evaluation")
    elif config.keep_best or config.early_stopping_patience is not None:
        name = "keep_best" if config.keep_best else "early_stopping_patience"
        raise SettingError(f"{{{name}}} needs rows for evaluation")
    if checkpoints is None and config.save_every:
        raise SettingError("{save_every} needs a folder for checkpoints")
    with contextlib.ExitStack() as stack:
        run = Run(
            model,
            examples,
            config,
            eval_examples=eval_examples,
            on_step=on_step,
            on_eval=on_eval,
            on_evaluated=on_evaluated,
            clock=clock,
            meter=meter,
            checkpoints=checkpoints,
            stop=stop or stack.enter_context(stop_on_signals()),
            ranks=ranks,
            parent=parent,
        )
        stack.callback(run.release)
        stack.enter_context(_seeded(ranks.seed(config.seed), run.device))
        # Full training computes under autocast, on float32 weights; what a pattern freezes stays so too.
        halved = run.precision == "bfloat16" and config.method != "full" and not ranks.shards_model
        stack.enter_context(frozen_in_bfloat16(model, enabled=halved))
        stack.enter_context(frozen_linears_in_float16(model, enabled=run.precision == "float16"))
        stack.enter_context(run.runner.prepared())
        if checkpoints is not None and ranks.is_main:
            checkpoints.clear_leftovers()
        if resume is not None:
            run.go_on_from(resume)
        result = run.loop()
        run.make_whole()
        return result


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device):
    """Seed dropout for the run, and give the caller's random state back afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
