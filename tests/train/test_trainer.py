"""The loop: equal losses however a step is cut, learning, stopping, and staying whole when something goes wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from burnish.errors import BurnishError, ConfigError, DataError
from burnish.models import decoder as decoder_module
from burnish.models import recompute as recompute_module
from burnish.train import precision as precision_rule
from burnish.train.adamw import AdamW
from burnish.train.config import TrainConfig
from burnish.train.lora import LoraConfig, attach_lora, lora_modules
from burnish.train.results import StepRecord, TrainResult
from burnish.train.step import evaluate_loss
from burnish.train.trainer import train

FAST: dict[str, Any] = {"precision": "float32", "learning_rate": 5e-3, "warmup": 0}


@pytest.fixture
def run(make_decoder: Callable[..., Any], make_rows: Callable[..., Any]) -> Callable[..., TrainResult]:
    """Trains a fresh tiny decoder on 24 rows; the same settings give the same run."""

    def go(*, lora: LoraConfig | None = None, arguments: dict[str, Any] | None = None, **settings: Any) -> TrainResult:
        model = make_decoder()
        config = TrainConfig(**{**FAST, "steps": 6, "micro_batch_size": 4, **settings})
        if config.method == "lora":
            attach_lora(model, lora or LoraConfig(rank=4), seed=0)
        return train(model, make_rows(24), config=config, **(arguments or {}))

    return go


def losses(result: TrainResult) -> list[float]:
    return [step.loss for step in result.steps]


def test_accumulated_steps_equal_the_large_batch(run: Callable[..., TrainResult]) -> None:
    large = run(micro_batch_size=8, gradient_accumulation=1)
    for micro, accumulation in ((4, 2), (1, 8)):
        small = run(micro_batch_size=micro, gradient_accumulation=accumulation)
        assert losses(small) == pytest.approx(losses(large), abs=1e-5)
        assert [step.grad_norm for step in small.steps] == pytest.approx(
            [step.grad_norm for step in large.steps], rel=1e-3
        )
        assert [step.label_tokens for step in small.steps] == [step.label_tokens for step in large.steps]


def test_checkpointed_run_equals_the_plain_one(
    run: Callable[..., TrainResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = run()
    calls = []
    real = recompute_module.recompute
    monkeypatch.setattr(decoder_module, "recompute", lambda *a: calls.append(1) or real(*a))
    assert losses(run(gradient_checkpointing=True)) == pytest.approx(losses(plain), abs=1e-6)
    assert len(calls) == 2 * 6, "each of 2 blocks in each of 6 steps"


def test_same_seed_gives_bit_identical_losses_also_with_dropout(run: Callable[..., TrainResult]) -> None:
    lora = LoraConfig(rank=4, dropout=0.2)
    torch.manual_seed(1)
    first = run(lora=lora, seed=3)
    torch.manual_seed(2)
    assert losses(run(lora=lora, seed=3)) == losses(first)
    assert losses(run(lora=lora, seed=4)) != losses(first)


def test_random_state_of_the_caller_is_kept(make_decoder: Callable[..., Any], make_rows: Callable[..., Any]) -> None:
    model = make_decoder()
    attach_lora(model, LoraConfig(rank=4, dropout=0.2), seed=0)
    state = torch.random.get_rng_state()
    train(model, make_rows(4), config=TrainConfig(**FAST, steps=1))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_padded_rows_have_the_loss_of_rows_alone(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any]
) -> None:
    model, rows = make_decoder(), make_rows(9)
    alone = evaluate_loss(model, rows, micro_batch_size=1, precision="float32")
    assert evaluate_loss(model, rows, micro_batch_size=9, precision="float32") == pytest.approx(alone, rel=1e-6)
    expected, count = 0.0, 0
    for row in rows:
        scores = model(torch.tensor([row.tokens])).log_softmax(-1)[0]
        for place, label in enumerate(row.labels[1:]):
            if label != -100:
                expected -= scores[place, label].item()
                count += 1
    assert alone == pytest.approx(expected / count, rel=1e-5)


def test_prompt_tokens_are_not_learned(make_decoder: Callable[..., Any], make_rows: Callable[..., Any]) -> None:
    model, (row,) = make_decoder(), make_rows(1)
    once = evaluate_loss(model, [row], micro_batch_size=1, precision="float32")
    everything = type(row)(row.tokens, list(row.tokens))
    assert evaluate_loss(model, [everything], micro_batch_size=1, precision="float32") != pytest.approx(once, rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_memorised(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any], method: Any, tied: bool
) -> None:
    model = make_decoder(tie_word_embeddings=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if method == "lora":
        attach_lora(model, LoraConfig(rank=16), seed=0)
    config = TrainConfig(method=method, steps=60, learning_rate=1e-2, warmup=3, precision="float32")
    result = train(model, make_rows(8), config=config)
    assert result.steps[-1].loss < 0.2 * result.steps[0].loss
    assert not model.training
    after = model.state_dict()
    if method == "full":
        assert all(not torch.equal(after[name], value) for name, value in before.items())
    else:
        kept = {name.replace(".base.", "."): value for name, value in after.items()}
        assert all(torch.equal(kept[name], value) for name, value in before.items())


def test_full_gradients_equal_autograd_over_the_whole_vocabulary(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any]
) -> None:
    for tied in (True, False):
        model, rows = make_decoder(tie_word_embeddings=tied), make_rows(1)
        tokens, labels = torch.tensor([rows[0].tokens]), torch.tensor(rows[0].labels)
        loss = torch.nn.functional.cross_entropy(model(tokens)[0, :-1], labels[1:])
        expected = float(torch.nn.utils.get_total_norm(torch.autograd.grad(loss, list(model.parameters()))))
        result = train(model, rows, config=TrainConfig(method="full", steps=1, precision="float32"))
        assert result.steps[0].loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.steps[0].grad_norm == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bfloat16_run_stays_close_and_gives_the_float32_weights_back(
    run: Callable[..., TrainResult], make_decoder: Callable[..., Any], make_rows: Callable[..., Any], method: Any
) -> None:
    exact = run(method=method, learning_rate=1e-3)
    model = make_decoder()
    if method == "lora":
        attach_lora(model, LoraConfig(rank=4), seed=0)
    embedding = model.model.embed_tokens.weight
    before = embedding.detach().clone()
    config = TrainConfig(**{**FAST, "steps": 6, "micro_batch_size": 4, "learning_rate": 1e-3}, method=method)
    config = TrainConfig(**{**config.__dict__, "precision": "bfloat16"})
    result = train(model, make_rows(24), config=config)
    assert result.precision == "bfloat16"
    assert losses(result) == pytest.approx(losses(exact), rel=0.02)
    assert losses(result) != losses(exact)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(embedding, before) == (method == "lora")


def test_precision_follows_weights_and_hardware(
    make_decoder: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_decoder()
    for native, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(precision_rule, "bfloat16_is_native", lambda _, native=native: native)
        assert precision_rule.resolve_precision(model, TrainConfig()) == expected
    assert precision_rule.resolve_precision(make_decoder().bfloat16(), TrainConfig()) == "bfloat16"
    for wrong, config in (
        (make_decoder().bfloat16(), TrainConfig(precision="float32")),
        (make_decoder().bfloat16(), TrainConfig(method="full")),
        (make_decoder().half(), TrainConfig()),
    ):
        with pytest.raises(ConfigError, match="float32"):
            precision_rule.resolve_precision(wrong, config)


def test_bad_steps_are_skipped_counted_and_end_the_run(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from burnish.train.step import StepRunner

    real = StepRunner.accumulate
    bad_steps: set[int] = set()
    calls = []

    def sometimes_nan(runner: StepRunner, rows: Any) -> Any:
        """The gradients of some steps are NaN; only their norm shows it."""
        calls.append(1)
        totals = real(runner, rows)
        for parameter in runner.model.parameters():
            if parameter.grad is not None and len(calls) in bad_steps:
                parameter.grad.fill_(math.nan)
        return totals

    monkeypatch.setattr(StepRunner, "accumulate", sometimes_nan)
    model = make_decoder()
    attach_lora(model, LoraConfig(rank=4), seed=0)
    bad_steps = {2, 3, 4, 5}
    result = train(model, make_rows(24), config=TrainConfig(**FAST, steps=8, micro_batch_size=4))
    assert [step.skipped for step in result.steps] == [False] + [True] * 4 + [False] * 3
    assert result.skipped_steps == 4
    assert all(module.lora_B.isfinite().all() for module in lora_modules(model).values())
    calls.clear()
    bad_steps = {3, 4, 5, 6, 7}
    with pytest.raises(BurnishError, match=r"step 7.*not finite for 5 steps in a row"):
        train(model, make_rows(24), config=TrainConfig(**FAST, steps=20, micro_batch_size=4))
    assert all(module.lora_B.isfinite().all() for module in lora_modules(model).values())


def test_interrupt_returns_what_was_learned(run: Callable[..., TrainResult]) -> None:
    def interrupt(record: StepRecord) -> None:
        if record.step == 3:
            raise KeyboardInterrupt

    result = run(arguments={"on_step": interrupt})
    assert result.interrupted
    assert result.stopped == "interrupted"
    assert losses(result) == losses(run())[:3]


def test_time_budget_finishes_the_step_and_evaluates(
    run: Callable[..., TrainResult], make_rows: Callable[..., Any]
) -> None:
    result = run(max_seconds=1e-6, arguments={"eval_examples": make_rows(3, seed=9)})
    assert result.stopped == "max_seconds"
    assert len(result.steps) == 1
    assert [entry.step for entry in result.eval] == [1]
    assert run(max_seconds=600).stopped == "finished"


def test_evaluations_come_when_due_and_do_not_change_the_run(
    run: Callable[..., TrainResult], make_rows: Callable[..., Any]
) -> None:
    lora = LoraConfig(rank=4, dropout=0.1)
    asked: list[int] = []

    def figures(step: int) -> dict[str, float]:
        asked.append(step)
        return {"score": step / 10}

    arguments = {"eval_examples": make_rows(5, seed=9), "on_eval": figures}
    result = run(lora=lora, eval_every=4, arguments=arguments)
    assert asked == [4, 6] == [entry.step for entry in result.eval]
    assert result.eval[1].figures == {"score": 0.6}
    assert result.eval[1].loss is not None
    assert losses(result) == losses(run(lora=lora))


def test_steps_report_tokens_rates_and_norms(run: Callable[..., TrainResult], make_rows: Callable[..., Any]) -> None:
    result = run(steps=None, epochs=2, ordering="shuffled", schedule="linear", warmup=2)
    assert len(result.steps) == 12
    assert sum(step.tokens for step in result.steps) == 2 * sum(len(row.tokens) for row in make_rows(24))
    rates = [step.learning_rate for step in result.steps]
    assert rates[:3] == pytest.approx([2.5e-3, 5e-3, 5e-3])
    assert rates[-1] == pytest.approx(5e-4)
    steady = result.steps[2:]
    assert result.tokens_per_s == pytest.approx(
        sum(step.tokens for step in steady) / sum(step.seconds for step in steady)
    )
    assert 0 < result.padding_share < 0.6  # widths are multiples of 16


def test_clipping_bounds_the_update_but_reports_the_true_norm(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    real = AdamW.step

    def spy(optimizer: AdamW) -> Any:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        seen.append(float(torch.nn.utils.get_total_norm(grads)))
        return real(optimizer)

    monkeypatch.setattr(AdamW, "step", spy)
    model = make_decoder()
    attach_lora(model, LoraConfig(rank=4), seed=0)
    result = train(model, make_rows(4), config=TrainConfig(**FAST, steps=1, max_grad_norm=1e-3))
    assert result.steps[0].grad_norm > 0.01
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


def test_component_bytes_count_what_is_there(run: Callable[..., TrainResult], make_decoder: Callable[..., Any]) -> None:
    parts = run().component_bytes
    model = make_decoder()
    base = sum(parameter.numel() * 4 for parameter in model.parameters())
    attach_lora(model, LoraConfig(rank=4), seed=0)
    adapter = sum(parameter.numel() * 4 for parameter in model.parameters()) - base
    assert parts["weights"] == base + adapter
    assert parts["gradients"] == adapter
    assert 2 * adapter <= parts["optimizer"] <= 2 * adapter + 1000
    assert parts["activations"] > 0


def test_meter_gives_the_activations(run: Callable[..., TrainResult]) -> None:
    class Meter:
        start_bytes = 1000
        peak_bytes = 50_000_000

    parts = run(arguments={"meter": Meter()}).component_bytes
    assert parts["activations"] == 50_000_000 - 1000 - parts["gradients"] - parts["optimizer"]


def test_rows_that_teach_nothing_are_refused(make_decoder: Callable[..., Any], make_rows: Callable[..., Any]) -> None:
    model, rows = make_decoder(), make_rows(3)
    attach_lora(model, LoraConfig(), seed=0)
    with pytest.raises(DataError, match="training data has no rows"):
        train(model, [], config=TrainConfig())
    masked = type(rows[0])(rows[0].tokens, [rows[0].tokens[0]] + [-100] * (len(rows[0].tokens) - 1))
    with pytest.raises(DataError, match="training row 2 teaches nothing"):
        train(model, [rows[0], masked], config=TrainConfig())
    with pytest.raises(DataError, match="evaluation row 1"):
        train(model, rows, config=TrainConfig(), eval_examples=[masked])


def test_method_and_model_have_to_fit(make_decoder: Callable[..., Any], make_rows: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="Call attach_lora first"):
        train(make_decoder(), make_rows(2), config=TrainConfig(method="lora"))
    model = make_decoder()
    attach_lora(model, LoraConfig(), seed=0)
    with pytest.raises(ConfigError, match="Merge it first"):
        train(model, make_rows(2), config=TrainConfig(method="full"))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "qlora"}, {"schedule": "step"}, {"precision": "float64"}, {"ordering": "sorted"},
        {"micro_batch_size": 0}, {"learning_rate": 0}, {"steps": 1, "epochs": 1}, {"warmup": -1}, {"max_seconds": 0},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TrainConfig(**settings)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_adapter_over_quantized_weights_learns_and_leaves_them_alone(
    make_decoder: Callable[..., Any], make_rows: Callable[..., Any], precision: Any
) -> None:
    from burnish.compress.config import QuantizeConfig
    from burnish.compress.quantize import quantize_model

    model = make_decoder(hidden_size=64, head_dim=16, rotary_dim=16, intermediate_size=96)
    quantize_model(model, None, QuantizeConfig(method="rtn", bits=4, group_size=32))
    quantized = model.model.layers[0].mlp.up_proj
    before = quantized.dequantize()
    with pytest.raises(ConfigError, match="quantized weights cannot be trained in full"):
        train(model, make_rows(8), config=TrainConfig(method="full", precision="float32"))
    attach_lora(model, LoraConfig(rank=8), seed=0)
    config = TrainConfig(steps=60, learning_rate=1e-2, warmup=3, precision=precision)
    result = train(model, make_rows(8), config=config)
    assert result.steps[-1].loss < 0.5 * result.steps[0].loss
    assert torch.equal(quantized.dequantize(), before)
