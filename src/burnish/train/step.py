"""Forward and backward over the rows of one optimizer step: what it costs is decided here and below.

Rows become packed micro-batches, each adds its share of the step's mean loss to the gradients. Clipping, the update and
everything that lasts longer than a step stand in `run.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from burnish.errors import ConfigError
from burnish.kernels.cpu.training import TrainingKernels, available
from burnish.train.activation_offload import activations_on_host
from burnish.train.batches import Batch, TrainingExample, collate
from burnish.train.config import TrainConfig
from burnish.train.distillation import distillation_loss
from burnish.train.distributed import Ranks, single
from burnish.train.footprint import saved_activations
from burnish.train.fusing import FusedBlocks, fused_blocks
from burnish.train.head_loss import head_cross_entropy
from burnish.train.loss_scaling import LossScale
from burnish.train.losses import IGNORED_LABEL, masked_cross_entropy, used_by_head
from burnish.train.neftune import EmbeddingNoise, embedding_noise
from burnish.train.packing import PackedBatch, pack, split_step
from burnish.train.profile import StepClock
from burnish.train.row_order import row_lengths
from burnish.train.short_attention import ShortCausal

ROWS_AT_ONCE = 1024
"""Rows of an evaluation that are in memory together; a data set may be on disk."""


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """What the forward and backward passes of one step came to.

    Attributes:
        loss: mean cross-entropy per learned token, in nats.
        tokens: real tokens of the rows.
        label_tokens: positions that were learned.
    """

    loss: float
    tokens: int
    label_tokens: int


@dataclass(frozen=True)
class _Row:
    tokens: tuple[int, ...]
    labels: tuple[int, ...]


_NOTHING = _Row((0, 0), (IGNORED_LABEL, IGNORED_LABEL))


class StepRunner:
    """Adds the gradients of one step's rows to the parameters.

    Args:
        model: a decoder in training mode.
        parameters: what is trained.
        config: sizes of the micro-batches.
        precision: what is computed in, of `resolve_precision`.
        clock: what time and memory are measured with.
        ranks: the processes that share each step's rows; all of them call every method alike.
        loss_scale: what losses are multiplied with before the backward pass.
        parent: inside it the model computes as its parent; losses are then the KL from that.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: list[nn.Parameter],
        config: TrainConfig,
        precision: str,
        *,
        clock: StepClock | None = None,
        ranks: Ranks | None = None,
        loss_scale: LossScale | None = None,
        parent: Callable[[], contextlib.AbstractContextManager[None]] | None = None,
    ) -> None:
        self.parameters, self.ranks, self.loss_scale = parameters, ranks or single(), loss_scale
        self.parent = parent
        self.model, self.config, self.precision = model, config, precision
        self.clock = clock or StepClock()
        self.device = parameters[0].device
        if config.offload_activations and self.device.type != "cuda":
            raise ConfigError(
                "activations are offloaded from CUDA devices only",
                got=self.device.type,
                remedy="Use --gradient-checkpointing to save memory here.",
            )
        self.head_names = _head_parameters(model, parameters)
        self.saved_per_position = 0.0
        self.positions = self.real_positions = self.largest_batch = 0
        self._fused = FusedBlocks()
        self._noise: EmbeddingNoise | None = None

    @contextlib.contextmanager
    def prepared(self) -> Iterator[None]:
        """Inside, blocks that allow it run fused. Enter it once the weights have the dtype they keep."""
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        usable = self.config.packing and self.precision != "float16" and available(self.device, dtype)
        usable = usable and not self.ranks.shards_model
        kernels = TrainingKernels() if usable else None
        with contextlib.ExitStack() as stack:
            self._fused = stack.enter_context(fused_blocks(self.model, dtype=dtype, kernels=kernels))
            if self.config.neftune:
                embedding = self.model.model.embed_tokens  # type: ignore[union-attr]
                self._noise = stack.enter_context(embedding_noise(embedding, self.config.neftune))  # type: ignore[arg-type]
            yield
        self._fused, self._noise = FusedBlocks(), None

    @property
    def padding_share(self) -> float:
        """Share of the positions computed so far that held no token."""
        return 1 - self.real_positions / self.positions if self.positions else 0.0

    @property
    def activation_bytes(self) -> int:
        """Bytes that autograd kept in the first micro-batch, scaled to the largest."""
        return int(self.saved_per_position * self.largest_batch)

    def accumulate(self, rows: Sequence[TrainingExample]) -> StepTotals:
        """Forward and backward over this rank's rows, weighted by the learned tokens of the whole step.

        Micro-batches and ranks add up to the large batch; what is returned is of the whole step.
        """
        self._fused.refresh()
        with self.clock.mark("data"):
            batches = list(self._batches(rows))
        ranks = self.ranks
        num_tokens, num_labels = ranks.sum_counts(
            sum(batch.num_tokens for batch in batches), sum(batch.num_labels for batch in batches)
        )
        if ranks.shards_model:  # every rank has to run as many passes
            batches += list(self._batches([_NOTHING])) * (ranks.most(len(batches)) - len(batches))
        loss_sum = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, 1):
            if number == len(batches):
                ranks.last_backward(self.parameters)
            loss_sum += self._backward(batch, num_labels)
        ranks.reduce_gradients(self.parameters)
        return StepTotals(loss=float(ranks.sum_loss(loss_sum)), tokens=num_tokens, label_tokens=num_labels)

    @torch.no_grad()
    def evaluate(self, examples: Sequence[TrainingExample]) -> float:
        """Mean cross-entropy per learned token over all rows, in nats, without dropout; the model's mode is kept."""
        self._fused.refresh()
        by_length = np.argsort(row_lengths(examples), kind="stable").tolist()
        if not self.ranks.shards_model:  # whose ranks run all passes together
            by_length = by_length[self.ranks.rank :: self.ranks.world_size]
        was_training = self.model.training
        self.model.eval()
        total, labels = 0.0, 0
        try:
            for start in range(0, len(by_length), ROWS_AT_ONCE):
                rows = [examples[row] for row in by_length[start : start + ROWS_AT_ONCE]]
                for batch in self._batches(rows):
                    total += float(self._loss(batch, learning=False))
                    labels += batch.num_labels
        finally:
            self.model.train(was_training)
        if not self.ranks.shards_model:
            total = float(self.ranks.sum_loss(torch.tensor(total, dtype=torch.float64, device=self.device)))
            labels = self.ranks.sum_labels(labels)
        return total / labels

    def _batches(self, rows: Sequence[TrainingExample]) -> Iterator[PackedBatch | Batch]:
        config = self.config
        most = config.tokens_at_once(self.device.type)
        if most is not None:
            for part in split_step(rows, max_rows=config.micro_batch_size, max_tokens=most):
                yield pack(part, device=self.device)
            return
        longest = getattr(self.model.config, "max_position_embeddings", None)
        for start in range(0, len(rows), config.micro_batch_size):
            part = rows[start : start + config.micro_batch_size]
            yield collate(part, device=self.device, max_width=longest)

    def _backward(self, batch: PackedBatch | Batch, num_labels: int) -> Tensor:
        """Add the gradients of the batch's share of the step's mean loss; returns that share, detached."""
        positions = batch.num_slots
        self.positions += positions
        self.real_positions += batch.num_positions
        self.largest_batch = max(self.largest_batch, positions)
        watch = saved_activations(self.model) if not self.saved_per_position else contextlib.nullcontext()
        with self.clock.mark("forward", size=positions):
            with watch as saved, self._offloading():
                loss = self._loss(batch, learning=True) / num_labels
            if saved is not None:
                self.saved_per_position = saved.num_bytes / positions
            self.clock.saved(int(self.saved_per_position * positions))
        with self.clock.mark("backward"):
            (loss if self.loss_scale is None else loss * self.loss_scale.value).backward()
        return loss.detach()

    def _offloading(self) -> contextlib.AbstractContextManager[None]:
        return activations_on_host(self.model) if self.config.offload_activations else contextlib.nullcontext()

    def _loss(self, batch: PackedBatch | Batch, *, learning: bool) -> Tensor:
        """Sum of the cross-entropy, or of the KL from the parent, over the batch's labels."""
        model = self.model
        casting = self.precision != "float32" and model.dtype != torch.bfloat16
        dtype = torch.float16 if self.precision == "float16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=casting):
            if self.parent is not None:
                with torch.no_grad(), self.parent():
                    parent_hidden, _ = self._hidden(batch)
                hidden, labels = self._hidden(batch)
                vocab_size: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
                return distillation_loss(hidden, parent_hidden, labels, logits=model.logits, vocab_size=vocab_size)  # type: ignore[arg-type]
            hidden, labels = self._hidden(batch)
            head = self._dense_head()
            if head is not None and self._fused.kernels is not None:
                weight_VD, bias_V = head
                cap: float | None = model.config.logit_softcap  # type: ignore[union-attr, assignment]
                fused = self._fused
                assert fused.kernels is not None
                return head_cross_entropy(
                    hidden, labels, weight_VD, bias_V, softcap=cap, kernels=fused.kernels, scratch=fused.scratch
                )
            return masked_cross_entropy(
                hidden,
                labels,
                logits=model.logits,  # type: ignore[arg-type]
                vocab_size=model.config.vocab_size,  # type: ignore[union-attr, arg-type]
                # Only now: from `hidden` to the backward pass, a sharded model holds whole parameters.
                head_parameters=[model.get_parameter(name) for name in self.head_names] if learning else [],
            )

    def _hidden(self, batch: PackedBatch | Batch) -> tuple[Tensor, Tensor]:
        """Final hidden states and the label of each position; packed rows are one row of the decoder's."""
        model = self.model
        if self._noise is not None:
            self._noise.lengths_BT = None if isinstance(batch, Batch) else batch.lengths_N[None]
        if isinstance(batch, Batch):
            return model.hidden(batch.tokens_BT, attention=ShortCausal()), batch.labels_BT  # type: ignore[operator]
        hidden_1ND = model.hidden(  # type: ignore[operator]
            batch.tokens_N[None],
            positions_BT=batch.positions_N[None],
            attention=self._fused.attention(batch.starts, device=self.device),
            lengths_BT=batch.lengths_N[None] if model.needs_lengths else None,
        )
        return hidden_1ND, batch.labels_N[None]

    def _dense_head(self) -> tuple[Tensor, Tensor | None] | None:
        """The output layer's weight and bias where it is nothing but these."""
        head = self.model.lm_head
        if head is None:
            return self.model.model.embed_tokens.weight, None  # type: ignore[union-attr, return-value]
        return (head.weight, head.bias) if type(head) is nn.Linear else None


def evaluate_loss(
    model: nn.Module, examples: Sequence[TrainingExample], *, micro_batch_size: int, precision: str
) -> float:
    """`StepRunner.evaluate` of a model that is not being trained."""
    config = TrainConfig(micro_batch_size=micro_batch_size)
    return StepRunner(model, list(model.parameters()), config, precision).evaluate(examples)


def _head_parameters(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    reference = next(model.parameters())
    hidden_size: int = model.config.hidden_size  # type: ignore[union-attr, assignment]
    probe = torch.zeros(1, hidden_size, dtype=reference.dtype, device=reference.device)
    used = set(map(id, used_by_head(model.logits, probe, parameters)))  # type: ignore[arg-type]
    return [name for name, parameter in model.named_parameters() if id(parameter) in used]
