"""What the processes of test_distributed.py run: tiny models trained over every kind of sharding, figures as JSON."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from burnish.errors import BurnishError, CapacityError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.train.checkpoints import Checkpoint, CheckpointFolder
from burnish.train.config import SHARDINGS, TrainConfig
from burnish.train.distributed import Ranks, joined, part_like
from burnish.train.lora import LoraConfig, attach_lora, lora_parameters
from burnish.train.losses import masked_cross_entropy
from burnish.train.results import StepRecord, TrainResult
from burnish.train.sharded_model import shard_model, unshard_model
from burnish.train.sharded_optimizer import make_sharded_optimizer
from burnish.train.stopping import StopRequest
from burnish.train.trainer import train

VOCAB, STEPS = 61, 10
METHODS = ("lora", "full", "full-tied")


@dataclass(frozen=True)
class Row:
    tokens: list[int]
    labels: list[int]


def rows_of_step(step: int) -> list[Row]:
    """Five rows of 4 to 17 tokens; one row in step 3; in step 5 the second rank's row has no label."""
    source = random.Random(step)
    rows = []
    for _ in range(1 if step == 3 else 5):
        tokens = [source.randrange(VOCAB) for _ in range(source.randint(4, 17))]
        masked = source.randint(1, len(tokens) - 2)
        rows.append(Row(tokens, [-100] * masked + tokens[masked:]))
    if step == 5:
        rows = [rows[0], Row(list(range(20)), [-100] * 20)]
    return rows


def make_model(method: str) -> Decoder:
    shape: dict[str, Any] = {
        "family": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 55, "num_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rotary_dim": 8, "max_position_embeddings": 64,
    }  # fmt: skip
    config = ModelConfig(**shape, tie_word_embeddings=method == "full-tied")
    model = Decoder(config).initialize(std=0.2, seed=0).train()
    if method == "lora":
        attach_lora(model, LoraConfig(rank=4), seed=0)
    return model


def parameters_of(model: Decoder, method: str) -> dict[str, Any]:
    wanted = {id(parameter) for parameter in lora_parameters(model)} if method == "lora" else None
    return {name: p for name, p in model.named_parameters() if wanted is None or id(p) in wanted}


def backward(model: Decoder, rows: Sequence[Row], num_labels: int, method: str) -> torch.Tensor:
    total = torch.zeros(())
    for row in rows:
        hidden = model.hidden(torch.tensor([row.tokens[:-1]]))
        # After `hidden`: until the backward pass a sharded model holds other parameters, which are whole.
        head = [] if method == "lora" else [(model.lm_head or model.model.embed_tokens).weight]
        labels = torch.tensor([row.labels[1:]])
        vocab = model.config.vocab_size
        loss = masked_cross_entropy(hidden, labels, logits=model.logits, vocab_size=vocab, head_parameters=head)
        (loss / num_labels).backward()
        total += loss.detach() / num_labels
    return total


def train_steps(ranks: Ranks, method: str, *, resume_at: int | None = None, **settings: Any) -> dict[str, Any]:
    """Ten steps; with `resume_at`, everything is thrown away after so many and made again from what was saved."""
    settings = {"learning_rate": 2e-3, "weight_decay": 0.1, **settings}
    config = TrainConfig(method="lora" if method == "lora" else "full", sharding=ranks.sharding, **settings)  # type: ignore[arg-type]
    losses, norms = [], []

    def begin() -> tuple[Any, Any, Any]:
        model = make_model(method)
        if ranks.shards_model:
            shard_model(model, ranks, precision="float32")
        named = parameters_of(model, method)
        return model, named, make_sharded_optimizer(list(named.values()), config, ranks)

    model, named, optimizer = begin()
    for step in range(STEPS):
        if step == resume_at:
            state = [optimizer.state_dict(), ranks.full_parameters(named)]
            if not ranks.alone:
                torch.distributed.broadcast_object_list(state)
            model, named, optimizer = begin()
            optimizer.load_state_dict(state[0])
            with torch.no_grad():
                for name, parameter in named.items():
                    mine = parameter.to_local() if ranks.shards_model else parameter
                    mine.copy_(part_like(state[1][name], parameter))
        mine = ranks.split(rows_of_step(step))
        num_labels = ranks.sum_labels(sum(label != -100 for row in mine for label in row.labels[1:]))
        if ranks.shards_model:  # as often on every rank
            mine += [Row([1, 2], [-100, -100])] * (ranks.most(len(mine)) - len(mine))
        trained = list(named.values())
        loss = backward(model, mine[:-1], num_labels, method)
        ranks.last_backward(trained)
        loss += backward(model, mine[-1:], num_labels, method)
        ranks.reduce_gradients(trained)
        norm = ranks.gradient_norm(trained)
        ranks.clip(trained, norm=norm, limit=1.0)
        losses.append(float(ranks.sum_loss(loss)))
        norms.append(float(norm))
        optimizer.step()
        optimizer.zero_grad(set_to_none=step % 2 == 0)
    held = sum(v.numel() for entry in optimizer.state.values() for v in entry.values() if torch.is_tensor(v))
    unshard_model(model, ranks)
    weights, final = {}, None
    if ranks.is_main:
        model.eval()
        with torch.no_grad():
            final = float(model(torch.arange(9)[None]).logsumexp(-1).sum())
        weights = {name: float(p.detach().double().abs().sum()) for name, p in parameters_of(model, method).items()}
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "final": final,
        "held": held,
        "kind": str(type(model)),
    }


def train_whole(ranks: Ranks, method: str, folder: Path, *, stop_after: int | None = None) -> dict[str, Any]:
    """Eight steps of the trainer itself, with an evaluation; with `stop_after`, interrupted and taken up again."""
    rows = [row for step in range(4) for row in rows_of_step(step)]
    settings: dict[str, Any] = {"precision": "float32", "learning_rate": 5e-3, "warmup": 0, "eval_every": 5}
    config = TrainConfig(
        method="lora" if method == "lora" else "full",
        steps=8,
        micro_batch_size=2,
        gradient_accumulation=2,
        sharding=ranks.sharding,  # type: ignore[arg-type]
        **settings,
    )
    stop, model = StopRequest(), make_model(method)

    def on_step(record: StepRecord) -> None:
        if record.step == stop_after and ranks.rank == ranks.world_size - 1:  # one of them notices
            stop.request()

    def go(resume: Checkpoint | None) -> TrainResult:
        folder_of_checkpoints = CheckpointFolder(folder, identity={}, environment={})
        return train(
            model, rows, config=config, eval_examples=rows[:5], on_step=on_step, ranks=ranks, stop=stop,
            checkpoints=folder_of_checkpoints, resume=resume,
        )  # fmt: skip

    result = go(None)
    if stop_after is not None:
        assert (result.stopped, len(result.steps)) == ("interrupted", stop_after)
        ranks.barrier()
        stop, model = StopRequest(), make_model(method)
        result = go(Checkpoint(folder / f"checkpoint-{stop_after:06d}"))
    weights = {}
    if ranks.is_main:
        weights = {name: float(p.detach().double().abs().sum()) for name, p in parameters_of(model, method).items()}
    return {
        "losses": [step.loss for step in result.steps],
        "norms": [step.grad_norm for step in result.steps],
        "evals": [item.loss for item in result.eval],
        "tokens": [step.tokens for step in result.steps],
        "weights": weights,
    }


def main(arguments: list[str]) -> None:
    out, *fail = arguments
    figures: dict[str, Any] = {}
    torch.set_num_threads(1)
    with joined() as ranks:
        if fail and ranks.rank == 1:
            if fail == ["killed"]:
                os.kill(os.getpid(), signal.SIGKILL)
            raise CapacityError("row 7 does not fit")
        for sharding, method in itertools.product(SHARDINGS, METHODS):
            ranks.sharding = sharding
            figures[f"{method} {sharding}"] = train_steps(ranks, method)
        for sharding in SHARDINGS:
            ranks.sharding = sharding
            figures[f"full {sharding} resumed"] = train_steps(ranks, "full", resume_at=4)
            figures[f"lora {sharding} lion"] = train_steps(ranks, "lora", resume_at=5, optimizer="lion")
        ranks.sharding, ranks.bucket_bytes = "none", 4000
        figures["full none buckets"] = train_steps(ranks, "full")
        ranks.sharding = "zero1"
        figures["full zero1 adafactor"] = train_steps(ranks, "full", resume_at=5, optimizer="adafactor")
        ranks.bucket_bytes = 4000
        for sharding, method in itertools.product(SHARDINGS, METHODS[:2]):
            ranks.sharding = sharding
            place = Path(out).with_name(f"{method} {sharding}")
            figures[f"{method} {sharding} trainer"] = train_whole(ranks, method, place / "straight")
            figures[f"{method} {sharding} trainer stopped"] = train_whole(ranks, method, place / "cut", stop_after=3)
        figures["flags"] = [
            ranks.any(ranks.rank == 1),
            ranks.any(False),
            ranks.sum_counts(1, ranks.rank),
            ranks.seed(5),
        ]
        if ranks.is_main:
            with open(out, "w", encoding="utf-8") as file:
                json.dump(figures, file)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except BurnishError as error:
        print(f"error: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
