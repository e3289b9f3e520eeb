from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from family_decoders import DECODERS, family_examples, make_family

from burnish.compress.calibration import make_batches
from burnish.compress.config import MixedPrecision, QuantizeConfig
from burnish.compress.gptq_format import quantized_linears, save_quantized
from burnish.compress.loading import load_model
from burnish.compress.quantize import quantize_model
from burnish.compress.rtn import quantize_weight
from burnish.compress.sensitivity import UnitSensitivity, choose_bits, measure_sensitivity
from burnish.errors import ConfigError
from burnish.models.decoder import Decoder

GRID = QuantizeConfig(method="rtn", group_size=16)
ANY = MixedPrecision(target_bits=5.0)


def _measured(decoder: Decoder) -> list[UnitSensitivity]:
    batches = make_batches(family_examples(), vocab_size=96, max_length=64, batch_tokens=4096)
    return measure_sensitivity(decoder, batches, GRID, ANY)


@torch.no_grad()
def test_divergence_is_that_of_the_model_with_one_unit_rounded() -> None:
    parent, child = make_family("llama"), make_family("llama")
    before = {name: value.clone() for name, value in child.state_dict().items()}
    units = _measured(child)
    assert all(torch.equal(value, before[name]) for name, value in child.state_dict().items())
    unit = units[6]
    assert unit.linears == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    for name in unit.linears:
        weight = child.get_parameter(f"{name}.weight")
        weight.copy_(quantize_weight(weight, bits=3, group_size=16, scale_search=True).dequantize())
    tokens = torch.tensor(family_examples())
    p, q = parent(tokens).log_softmax(-1), child(tokens).log_softmax(-1)
    assert unit.divergence[3] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert unit.divergence[2] > unit.divergence[4] > unit.divergence[8] >= 0.0


@pytest.mark.parametrize("name", DECODERS)
def test_every_linear_of_every_family_belongs_to_one_unit(name: str) -> None:
    decoder = make_family(name)
    heard: list[tuple[int, int]] = []
    batches = make_batches(family_examples(count=1), vocab_size=96, max_length=64, batch_tokens=4096)
    mixed = MixedPrecision(target_bits=5.0, choices=(4, 8))
    units = measure_sensitivity(decoder, batches, GRID, mixed, on_unit=lambda *counts: heard.append(counts))
    linears = [name for unit in units for name in unit.linears]
    assert sorted(linears) == sorted(name for name in decoder.config.linear_shapes() if name != "lm_head")
    assert heard == [(number, 8) for number in range(1, 9)]


def _unit(name: str, *costs: float) -> UnitSensitivity:
    return UnitSensitivity(
        linears=(name,),
        num_weights=100,
        divergence=dict(zip((2, 3, 4, 8), costs)),
        stored={2: 200, 3: 300, 4: 400, 8: 800},
    )


def test_choice_is_the_best_there_is_on_small_problems() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        curves = (torch.rand(4, 1, generator=generator) * torch.tensor([[1.0, 0.25, 0.06, 0.0002]])).tolist()
        units = [_unit(str(number), *curve) for number, curve in enumerate(curves)]
        budget = 1700.0
        chosen = choose_bits(units, budget)
        assert sum(unit.stored[chosen[unit.linears[0]]] for unit in units) <= budget
        found = sum(unit.divergence[chosen[unit.linears[0]]] for unit in units)
        best = min(
            sum(unit.divergence[bits] for unit, bits in zip(units, widths))
            for widths in itertools.product((2, 3, 4, 8), repeat=4)
            if sum(unit.stored[bits] for unit, bits in zip(units, widths)) <= budget
        )
        assert found <= 1.3 * best


def test_bits_go_where_they_save_most() -> None:
    units = [_unit("loud", 4.0, 1.0, 0.3, 0.001), _unit("quiet", 0.04, 0.01, 0.003, 0.00001)]
    assert choose_bits(units, 1000.0) == {"loud": 8, "quiet": 2}
    assert choose_bits(units, 1600.0) == {"loud": 8, "quiet": 8}
    assert choose_bits(units, 400.0) == {"loud": 2, "quiet": 2}


def test_costs_that_do_not_fall_buy_nothing() -> None:
    assert choose_bits([_unit("odd", 0.1, 0.2, 0.1, 0.1)], 800.0) == {"odd": 2}


def test_budget_below_the_narrowest_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"got 1\.50 bits per weight for the layers; expected at least 2\.00"):
        choose_bits([_unit("a", 4.0, 1.0, 0.3, 0.0)], 150.0)


@pytest.mark.parametrize("name", ["llama-biases", "phi3", "falcon", "gpt2"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
@torch.no_grad()
def test_mixed_child_keeps_its_budget_and_is_read_back(name: str, method: str, tmp_path: Path) -> None:
    decoder = make_family(name)
    config = QuantizeConfig(method=method, group_size=16)
    result = quantize_model(decoder, family_examples(), config, mixed=MixedPrecision(target_bits=7.0))
    assert 6.0 < result.bits_per_weight <= 7.0
    widths = {name: layer.bits for name, layer in quantized_linears(decoder).items()}
    assert widths == result.widths
    assert len(set(widths.values())) > 1
    save_quantized(decoder, tmp_path, source=None, config=result.config, widths=result.widths)
    loaded = load_model(tmp_path, dtype="float32")
    assert {name: layer.bits for name, layer in quantized_linears(loaded).items()} == widths
    tokens = torch.tensor(family_examples())
    assert torch.equal(loaded(tokens), decoder(tokens))
    record = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert record["bits"] == result.config.bits
    assert all(change["bits"] != record["bits"] for change in record["dynamic"].values())


@torch.no_grad()
def test_weight_files_stay_within_the_largest_size(tmp_path: Path) -> None:
    decoder = make_family("llama-tied")
    config = QuantizeConfig(method="rtn", group_size=16)
    result = quantize_model(decoder, family_examples(), config, mixed=MixedPrecision(max_bytes=75_000))
    save_quantized(decoder, tmp_path, source=None, config=result.config, widths=result.widths)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 64_000 < size <= 75_000


def test_mixed_precision_needs_calibration() -> None:
    with pytest.raises(ConfigError, match="mixed precision needs calibration text"):
        quantize_model(make_family("llama"), None, QuantizeConfig(method="rtn"), mixed=ANY)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "takes one budget"),
        ({"target_bits": 4.0, "max_bytes": 100}, "takes one budget"),
        ({"target_bits": -1.0}, "target_bits is out of range"),
        ({"max_bytes": 0}, "max_bytes is out of range"),
        ({"target_bits": math.nan}, "target_bits is out of range"),
        ({"target_bits": 4.0, "choices": (5,)}, "choices are not supported"),
        ({"target_bits": 4.0, "tokens": 0}, "tokens is out of range"),
    ],
)
def test_budget_that_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MixedPrecision(**options)  # pyright: ignore[reportArgumentType]
