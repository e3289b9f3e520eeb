from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, load_in_transformers, random_rows, write_family
from tokenizers import Tokenizer

from burnish.compress import sparsegpt
from burnish.compress.calibration import block_linears
from burnish.compress.config import QuantizeConfig
from burnish.compress.prune_config import PruneConfig, parse_sparsity
from burnish.compress.pruning import prune_model
from burnish.compress.quantize import quantize_model
from burnish.compress.relative_error import relative_error
from burnish.compress.wanda import wanda_mask
from burnish.errors import CompressionError, ConfigError
from burnish.models.decoder import Decoder
from burnish.models.loading import load_decoder, save_decoder

MakeDecoder = Callable[..., Decoder]
UNSTRUCTURED = ["magnitude", "wanda", "sparsegpt"]


def _weights(decoder: Decoder) -> dict[str, torch.Tensor]:
    return {
        f"model.layers.{layer}.{name}": linear.weight.detach()
        for layer, block in enumerate(decoder.model.layers)
        for name, linear in block_linears(block).items()
    }


@pytest.mark.parametrize("share", [0.5, 0.3, 0.77])
@pytest.mark.parametrize("method", UNSTRUCTURED)
def test_share_of_zeros_is_exact_in_every_linear_and_nothing_else_changes(
    make_decoder: MakeDecoder, examples: list[list[int]], method: str, share: float
) -> None:
    child, parent = make_decoder(tied=False, bias=True), make_decoder(tied=False, bias=True)
    result = prune_model(child, examples, PruneConfig(method=method, sparsity=share))
    weights = _weights(child)
    for name, weight in weights.items():
        assert abs(int((weight == 0).sum()) - share * weight.numel()) <= 0.5 + 1e-6, name
    assert [layer.name for layer in result.layers] == list(weights)
    for layer in result.layers:
        assert layer.sparsity == pytest.approx(share, abs=1e-3)
        assert 0 < layer.error < 1.5
    assert result.sparsity == pytest.approx(share, abs=1e-3)
    assert result.dense_columns == 0
    untouched = {
        name: value for name, value in parent.state_dict().items() if name.removesuffix(".weight") not in weights
    }
    assert all(torch.equal(child.state_dict()[name], value) for name, value in untouched.items())


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize("method", UNSTRUCTURED)
def test_patterns_hold_in_every_run_and_the_ragged_end_stays_dense(
    make_decoder: MakeDecoder, examples: list[list[int]], method: str, pattern: tuple[int, int]
) -> None:
    keep, width = pattern
    child, parent = make_decoder(hidden=42, inner=53), make_decoder(hidden=42, inner=53)
    result = prune_model(child, examples, PruneConfig(method=method, pattern=pattern))
    before = _weights(parent)
    for layer in result.layers:
        weight = _weights(child)[layer.name]
        whole = weight.shape[1] // width * width
        runs = weight[:, :whole].reshape(-1, width)
        assert ((runs != 0).sum(1) == keep).all(), layer.name
        assert (weight[:, whole:] != 0).all()
        assert layer.dense_columns == weight.shape[1] - whole
        if method != "sparsegpt":
            assert torch.equal(weight[:, whole:], before[layer.name][:, whole:])
    assert result.dense_columns > 0
    assert result.sparsity < 1 - keep / width


def test_blocks_of_columns_hold_whole_runs_and_change_the_result_of_a_pattern_by_rounding_only(
    make_decoder: MakeDecoder, examples: list[list[int]]
) -> None:
    children = []
    for block_size in (3, 10, 128):
        child = make_decoder()
        prune_model(child, examples, PruneConfig(pattern=(2, 4), block_size=block_size))
        children.append(_weights(child)["model.layers.0.self_attn.q_proj"])
    assert torch.allclose(children[0], children[1], atol=1e-5)
    assert torch.allclose(children[0], children[2], atol=1e-5)


def test_wanda_keeps_what_meets_large_inputs_and_magnitude_what_is_large(make_decoder: MakeDecoder) -> None:
    decoder = make_decoder(layers=1)
    decoder.model.embed_tokens.weight.data[:, :20] *= 40.0
    rows = [list(range(60)), list(range(40, 90))]
    shares = {}
    for method in ("magnitude", "wanda"):
        child = make_decoder(layers=1)
        child.load_state_dict(decoder.state_dict())
        prune_model(child, rows, PruneConfig(method=method, sparsity=0.5))
        weight = _weights(child)["model.layers.0.self_attn.q_proj"]
        shares[method] = float((weight[:, :20] == 0).float().mean())
        if method == "wanda":
            assert ((weight == 0).sum(1) == weight.shape[1] // 2).all()
    assert shares["wanda"] < 0.1
    assert 0.35 < shares["magnitude"] < 0.65


@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"sparsity": None, "pattern": (2, 4)}])
def test_sparsegpt_makes_up_for_what_it_removes_where_inputs_go_together(amount: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator) @ torch.randn(12, 48, generator=generator)
    x += 0.3 * torch.randn(400, 48, generator=generator)
    weight, hessian = torch.randn(20, 48, generator=generator), x.t() @ x / len(x)
    kept = weight.masked_fill(wanda_mask(weight, hessian, **amount), 0.0)
    corrected = sparsegpt.prune_weight(weight, hessian, **amount)
    assert int((corrected == 0).sum()) == int((kept == 0).sum())
    assert relative_error(weight, corrected, hessian) < 0.5 * relative_error(weight, kept, hessian)
    lost = (x @ corrected.t() - x @ weight.t()).norm() / (x @ weight.t()).norm()
    assert relative_error(weight, corrected, hessian) == pytest.approx(float(lost), rel=1e-3)


@pytest.mark.parametrize("method", UNSTRUCTURED)
def test_same_inputs_give_the_same_model_bit_for_bit(
    make_decoder: MakeDecoder, examples: list[list[int]], method: str
) -> None:
    states = []
    for _ in range(2):
        child = make_decoder()
        prune_model(child, examples, PruneConfig(method=method))
        states.append(child.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("method", UNSTRUCTURED)
def test_constant_and_zero_weights_are_pruned_exactly(
    make_decoder: MakeDecoder, examples: list[list[int]], method: str
) -> None:
    decoder = make_decoder()
    weights = _weights(decoder)
    weights["model.layers.0.mlp.up_proj"].fill_(0.25)
    weights["model.layers.1.self_attn.v_proj"].zero_()
    result = prune_model(decoder, examples, PruneConfig(method=method, sparsity=0.5))
    found = {layer.name: layer for layer in result.layers}
    assert found["model.layers.0.mlp.up_proj"].sparsity == 0.5
    assert found["model.layers.1.self_attn.v_proj"].sparsity == 1.0
    assert found["model.layers.1.self_attn.v_proj"].error == 0.0
    assert all(weight.isfinite().all() for weight in _weights(decoder).values())


@pytest.mark.parametrize("method", UNSTRUCTURED)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_damaged_weights_are_refused_by_layer(
    make_decoder: MakeDecoder, examples: list[list[int]], method: str, value: float
) -> None:
    decoder = make_decoder()
    _weights(decoder)["model.layers.1.self_attn.v_proj"][0, 0] = value
    with pytest.raises(CompressionError, match=r"model\.layers\.1\.self_attn\.v_proj holds 1 NaN"):
        prune_model(decoder, examples, PruneConfig(method=method))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_activations_that_overflow_are_refused(
    make_decoder: MakeDecoder, examples: list[list[int]], method: str
) -> None:
    decoder = make_decoder()
    decoder.model.layers[0].input_layernorm.weight.data[0] = math.inf  # pyright: ignore
    with pytest.raises(CompressionError, match=r"activations of .* are NaN or infinite"):
        prune_model(decoder, examples, PruneConfig(method=method))


def test_bfloat16_and_training_mode_survive(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    child = make_decoder().to(torch.bfloat16).train()
    result = prune_model(child, examples, PruneConfig())
    assert child.training
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)
    assert child(torch.tensor([examples[0]])).dtype == torch.bfloat16


def test_magnitude_needs_no_calibration_and_the_others_do(make_decoder: MakeDecoder) -> None:
    result = prune_model(make_decoder(), None, PruneConfig(method="magnitude"))
    assert result.calibration_tokens == 0
    assert all(0 < layer.error < 1 for layer in result.layers)
    with pytest.raises(ConfigError, match="wanda needs calibration text"):
        prune_model(make_decoder(), None, PruneConfig(method="wanda"))


def test_quantized_models_are_refused(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    decoder = make_decoder()
    quantize_model(decoder, None, QuantizeConfig(method="rtn", group_size=16))
    with pytest.raises(CompressionError, match="no dense linears"):
        prune_model(decoder, examples, PruneConfig())


@pytest.mark.parametrize("name", ["llama-biases", "qwen2-tied", "phi3", "gpt2", "gpt-neox", "bloom", "falcon-7b"])
def test_zeros_reach_the_files_of_every_family(name: str, tmp_path: Path) -> None:
    assert name in FAMILIES
    decoder = load_decoder(write_family(name, tmp_path / "parent"), dtype="float32")
    rows = random_rows()
    prune_model(decoder, rows, PruneConfig(pattern=(2, 4)))
    save_decoder(decoder, tmp_path / "child", source=tmp_path / "parent")
    other = load_in_transformers(tmp_path / "child")
    tokens = torch.tensor(rows[:2])
    with torch.no_grad():
        assert (other(tokens).logits - decoder(tokens)).abs().max() < 1e-4
    again = load_decoder(tmp_path / "child", dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(_weights(again).values(), _weights(decoder).values(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "random"}, "unknown pruning method"),
        ({"sparsity": 1.0}, "sparsity is out of range"),
        ({"sparsity": 0.0}, "sparsity is out of range"),
        ({"pattern": (4, 4)}, "pattern is not valid; got 4:4"),
        ({"pattern": (2, 4), "sparsity": 0.5}, "both sparsity and pattern"),
        ({"heads": 0.5}, "have no meaning for sparsegpt"),
        ({"method": "structured", "sparsity": 0.5}, "structured takes no sparsity"),
        ({"method": "structured", "heads": 1.0}, "heads is out of range"),
        ({"method": "structured", "layers": -1}, "layers is out of range"),
        ({"damping": 0.0}, "damping is not valid"),
        ({"block_size": 0}, "must be positive"),
    ],
)
def test_config_refuses_what_cannot_be_done(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PruneConfig(**options)


def test_sparsity_as_it_is_written_on_the_command_line() -> None:
    assert parse_sparsity("0.5") == {"sparsity": 0.5}
    assert parse_sparsity("2:4") == {"pattern": (2, 4)}
    with pytest.raises(ConfigError, match="sparsity is not known; got 'half'"):
        parse_sparsity("half")


@torch.no_grad()
def test_each_method_beats_the_simpler_one_on_a_real_model_and_held_out_text(shared_data: Path) -> None:
    folder = shared_data / "models" / "stories260k"
    text = (shared_data / "text" / "tinystories_sample_197k.txt").read_text(encoding="utf-8", errors="replace")
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    rows = [[1, *tokens[start : start + 255]] for start in range(0, len(tokens) - 255, 255)]
    held_out = torch.tensor(rows[len(rows) // 2 :])[:64]

    def perplexity(decoder: Decoder) -> float:
        logs = decoder(held_out)[:, :-1].log_softmax(-1)
        return math.exp(-float(logs.gather(-1, held_out[:, 1:, None]).mean()))

    amounts: list[dict[str, Any]] = [{"sparsity": 0.5}, {"pattern": (2, 4)}]
    for amount in amounts:
        found = {}
        for method in UNSTRUCTURED:
            child = load_decoder(folder, dtype="float32")
            prune_model(child, rows[:32], PruneConfig(method=method, **amount))
            found[method] = perplexity(child)
        assert found["sparsegpt"] < found["wanda"] < found["magnitude"]
