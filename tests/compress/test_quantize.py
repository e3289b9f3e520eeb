from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from burnish.compress import gptq
from burnish.compress.config import QuantizeConfig
from burnish.compress.gptq import quantize_weight
from burnish.compress.gptq_format import quantized_linears
from burnish.compress.group_linear import GroupQuantizedLinear
from burnish.compress.quantize import quantize_model
from burnish.errors import CompressionError, ConfigError
from burnish.models.decoder import Decoder
from burnish.models.linears import linear_names
from burnish.models.loading import load_decoder

MakeDecoder = Callable[..., Decoder]


def _output_shift(decoder: Decoder, parent: Decoder, examples: list[list[int]]) -> float:
    with torch.no_grad():
        return sum(
            float((decoder(torch.tensor([tokens])) - parent(torch.tensor([tokens]))).square().sum())
            for tokens in examples
        )


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_block_linear_is_replaced_and_nothing_else(
    make_decoder: MakeDecoder, examples: list[list[int]], method: str
) -> None:
    decoder = make_decoder(tied=False)
    result = quantize_model(decoder, examples, QuantizeConfig(method=method, bits=4, group_size=16))
    assert linear_names(decoder) == ["lm_head"]
    assert [layer.name for layer in result.layers] == list(quantized_linears(decoder))
    assert result.num_weights == sum(a * b for n, (a, b) in decoder.config.linear_shapes().items() if n != "lm_head")
    assert result.calibration_tokens == sum(map(len, examples))
    assert 4.0 < result.bits_per_weight < 8.0


def test_gptq_moves_the_outputs_less_than_rounding(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    parent = make_decoder()
    shifts = {}
    for method in ("rtn", "gptq"):
        child = make_decoder()
        quantize_model(child, examples, QuantizeConfig(method=method, bits=4, group_size=-1, scale_search=False))
        shifts[method] = _output_shift(child, parent, examples)
    assert shifts["gptq"] < 0.8 * shifts["rtn"]


@torch.no_grad()
def test_reported_error_is_the_relative_error_of_the_layers_output(
    make_decoder: MakeDecoder, examples: list[list[int]]
) -> None:
    parent, child = make_decoder(layers=1), make_decoder(layers=1)
    result = quantize_model(child, examples, QuantizeConfig(bits=3, group_size=16))
    first = result.layers[0]
    assert first.name == "model.layers.0.self_attn.q_proj"
    dense = parent.get_submodule(first.name)
    small = child.get_submodule(first.name)
    inputs: list[torch.Tensor] = []
    hook = dense.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    for tokens in examples:
        parent(torch.tensor([tokens]))
    hook.remove()
    x = torch.cat(inputs)
    assert first.error == pytest.approx(float((small(x) - dense(x)).norm() / dense(x).norm()), rel=1e-3)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"])
@torch.no_grad()
def test_each_linear_is_calibrated_on_what_the_quantized_ones_before_it_give(
    make_decoder: MakeDecoder, examples: list[list[int]], name: str
) -> None:
    child, parent = make_decoder(), make_decoder()
    quantize_model(child, examples, QuantizeConfig(bits=2, group_size=-1))
    weight = parent.get_submodule(name).weight
    found = {}
    for which, decoder in (("child", child), ("parent", parent)):
        inputs: list[torch.Tensor] = []
        hook = decoder.get_submodule(name).register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, 1))
        )
        for tokens in examples:
            decoder(torch.tensor([tokens]))
        hook.remove()
        x = torch.cat(inputs)
        found[which] = quantize_weight(weight, x.t() @ x, bits=2, scale_search=True).ints  # pyright: ignore
    layer = child.get_submodule(name)
    assert isinstance(layer, GroupQuantizedLinear)
    assert (layer.quantized().ints == found["child"]).float().mean() > 0.99
    assert (layer.quantized().ints == found["parent"]).float().mean() < 0.9


@torch.no_grad()
def test_without_true_sequential_later_linears_see_the_dense_earlier_ones(
    make_decoder: MakeDecoder, examples: list[list[int]]
) -> None:
    child, parent = make_decoder(layers=1), make_decoder(layers=1)
    quantize_model(child, examples, QuantizeConfig(bits=2, group_size=-1, true_sequential=False))
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"):
        dense, inputs = parent.get_submodule(name), []
        hook = dense.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].flatten(0, 1)))
        for tokens in examples:
            parent(torch.tensor([tokens]))
        hook.remove()
        x = torch.cat(inputs)
        expected = quantize_weight(dense.weight, x.t() @ x, bits=2, scale_search=True).ints  # pyright: ignore
        layer = child.get_submodule(name)
        assert isinstance(layer, GroupQuantizedLinear)
        assert (layer.quantized().ints == expected).float().mean() > 0.99


@pytest.mark.parametrize("true_sequential", [True, False])
def test_linears_with_one_input_share_its_hessian_and_its_inverse(
    make_decoder: MakeDecoder, examples: list[list[int]], monkeypatch: pytest.MonkeyPatch, true_sequential: bool
) -> None:
    inverted: list[str] = []
    invert = gptq.inverse_factor

    def counting(hessian: torch.Tensor, **options: Any) -> torch.Tensor:
        inverted.append(options["name"])
        return invert(hessian, **options)

    monkeypatch.setattr(gptq, "inverse_factor", counting)
    quantize_model(make_decoder(), examples, QuantizeConfig(group_size=16, true_sequential=true_sequential))
    roles = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    assert inverted == [f"model.layers.{layer}.{role}" for layer in (0, 1) for role in roles]


def test_same_inputs_give_the_same_model_bit_for_bit(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    states = []
    for _ in range(2):
        child = make_decoder()
        quantize_model(child, examples, QuantizeConfig(bits=4, group_size=16, activation_order=True))
        states.append(child.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_batch_size_changes_the_result_by_rounding_only(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    ints = []
    for batch_tokens in (70, 4096):
        child = make_decoder()
        quantize_model(child, examples, QuantizeConfig(bits=4, group_size=16, batch_tokens=batch_tokens))
        ints.append(torch.cat([layer.quantized().ints.flatten() for layer in quantized_linears(child).values()]))
    assert (ints[0] == ints[1]).float().mean() > 0.98


def test_on_layer_hears_of_every_linear_in_order(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    heard: list[tuple[str, float, float]] = []
    result = quantize_model(
        make_decoder(), examples, QuantizeConfig(group_size=16), on_layer=lambda *record: heard.append(record)
    )
    assert [(layer.name, layer.error, layer.seconds) for layer in result.layers] == heard
    errors = [layer.error for layer in result.worst(3)]
    assert errors == sorted((error for _, error, _ in heard), reverse=True)[:3]


def test_mode_and_bias_survive(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    child, parent = make_decoder(bias=True), make_decoder(bias=True)
    child.train()
    quantize_model(child, examples, QuantizeConfig(bits=8, group_size=16))
    assert child.training
    tokens = torch.tensor([examples[0]])
    assert torch.allclose(child.eval()(tokens), parent(tokens), atol=0.1)
    layer = child.get_submodule("model.layers.1.mlp.down_proj")
    assert isinstance(layer, GroupQuantizedLinear)
    assert torch.equal(layer.bias, parent.get_submodule("model.layers.1.mlp.down_proj").bias)  # pyright: ignore


def test_bfloat16_decoder_is_quantized_in_place(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    child = make_decoder().to(torch.bfloat16)
    result = quantize_model(child, examples, QuantizeConfig(bits=8, group_size=16))
    assert child(torch.tensor([examples[0]])).dtype == torch.bfloat16
    assert max(layer.error for layer in result.layers) < 0.02


def test_rounding_needs_no_calibration(make_decoder: MakeDecoder) -> None:
    result = quantize_model(make_decoder(), None, QuantizeConfig(method="rtn", bits=4, group_size=16))
    assert result.calibration_tokens == 0
    assert all(0.0 < layer.error < 0.2 for layer in result.layers)


def test_gptq_without_calibration_is_refused(make_decoder: MakeDecoder) -> None:
    with pytest.raises(ConfigError, match="needs calibration text"):
        quantize_model(make_decoder(), None, QuantizeConfig(method="gptq"))


def test_damaged_weights_are_refused_by_layer(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    decoder = make_decoder()
    decoder.get_submodule("model.layers.1.self_attn.v_proj").weight.data[0, 0] = math.nan  # pyright: ignore
    with pytest.raises(CompressionError, match=r"model\.layers\.1\.self_attn\.v_proj holds 1 NaN"):
        quantize_model(decoder, examples, QuantizeConfig(group_size=16))


def test_quantizing_twice_is_refused(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    decoder = make_decoder()
    quantize_model(decoder, examples, QuantizeConfig(group_size=16))
    with pytest.raises(CompressionError, match="no dense linears"):
        quantize_model(decoder, examples, QuantizeConfig(group_size=16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits is not supported; got 5"),
        ({"group_size": 0}, "group_size"),
        ({"method": "ap"}, "unknown quantization method"),
        ({"damping": 0.0}, "damping"),
        ({"method": "rtn", "activation_order": True}, "activation_order has no meaning"),
        ({"batch_tokens": 0}, "must be positive"),
    ],
)
def test_config_refuses_what_cannot_be_done(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizeConfig(**options)  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def test_gptq_beats_rounding_on_a_real_model_and_held_out_text(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260k"
    text = (shared_data / "text" / "tinystories_sample_197k.txt").read_text(encoding="utf-8", errors="replace")
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    rows = [[1, *tokens[start : start + 255]] for start in range(0, len(tokens) - 255, 255)]
    held_out = torch.tensor(rows[len(rows) // 2 :])[:64]

    def predictions(decoder: Decoder) -> torch.Tensor:
        return decoder(held_out)[:, :-1].log_softmax(-1)

    def perplexity(logs: torch.Tensor) -> float:
        return math.exp(-float(logs.gather(-1, held_out[:, 1:, None]).mean()))

    parent = predictions(load_decoder(folder, dtype="float32"))
    found, divergence = {"parent": perplexity(parent)}, {}
    for method in ("rtn", "gptq"):
        for search in (False, True):
            child = load_decoder(folder, dtype="float32")
            config = QuantizeConfig(method=method, bits=4, group_size=-1, scale_search=search)
            quantize_model(child, rows[:32], config)
            name, logs = method + "-search" * search, predictions(child)
            found[name] = perplexity(logs)
            divergence[name] = float((parent.exp() * (parent - logs)).sum(-1).mean())
    assert found["parent"] < found["gptq-search"] < found["gptq"] < found["rtn"]
    assert divergence["gptq"] < 0.8 * divergence["rtn"]
    assert divergence["gptq-search"] < 0.85 * divergence["rtn-search"]
