from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, load_in_transformers, random_rows, write_family

from burnish.compress.calibration import make_batches
from burnish.compress.prune_config import PruneConfig
from burnish.compress.pruning import PruneResult
from burnish.compress.structured import block_influence, fit_remaining, prune_structured, unit_norms
from burnish.errors import CompressionError, ConfigError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder
from burnish.models.loading import load_config, load_decoder, save_decoder

MakeDecoder = Callable[..., Decoder]
ROWS = random_rows()
TOKENS = torch.tensor(ROWS[:2])
FEWER_HEADS = ["llama-grouped", "llama-biases", "qwen2-tied", "qwen3", "mistral", "phi3", "gemma2"]


def _structured(decoder: Decoder, **amounts: Any) -> tuple[Decoder, PruneResult]:
    return prune_structured(decoder, ROWS, PruneConfig(method="structured", **amounts))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny model, made when it is first asked for."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = write_family(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@torch.no_grad()
def _same_in_transformers(child: Decoder, parent: Path, folder: Path) -> ModelConfig:
    """Save, load in transformers and again here; returns the config that was read."""
    save_decoder(child, folder, source=parent)
    assert (load_in_transformers(folder)(TOKENS).logits - child(TOKENS)).abs().max() < 1e-4
    assert torch.equal(load_decoder(folder, dtype="float32")(TOKENS), child(TOKENS))
    return load_config(folder)


@pytest.mark.parametrize("name", sorted(FAMILIES))
@torch.no_grad()
def test_with_nothing_to_remove_the_child_is_its_parent(
    folders: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    parent = load_decoder(folders(name), dtype="float32")
    expected = parent(TOKENS)
    child, result = _structured(parent)
    assert torch.equal(child(TOKENS), expected)
    assert child.config == parent.config
    assert result.layers == ()
    assert result.sparsity == 0.0
    assert _same_in_transformers(child, folders(name), tmp_path / "child") == child.config


@pytest.mark.parametrize("name", FEWER_HEADS)
def test_smaller_models_with_heads_of_their_own_width_load_in_transformers(
    folders: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    parent = load_decoder(folders(name), dtype="float32")
    shape = parent.config
    child, result = _structured(parent, heads=0.5, channels=0.25, layers=1)
    read = _same_in_transformers(child, folders(name), tmp_path / "child")
    assert read == child.config
    assert (read.num_layers, read.num_kv_heads, read.num_heads) == (2, 2, 4)
    assert read.head_dim == shape.head_dim
    assert read.intermediate_size == shape.intermediate_size - round(0.25 * shape.intermediate_size)
    assert read.num_parameters() < shape.num_parameters()
    assert len(result.layers) == 1 + 2 * 2
    removed = [layer.name for layer in result.layers if layer.sparsity == 1.0]
    assert len(removed) == 1
    assert not any(layer.name.startswith(f"{removed[0]}.") for layer in result.layers)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neox", "falcon-7b", "codegen"])
def test_channels_and_layers_of_families_whose_heads_have_a_fixed_width(
    folders: Callable[[str], Path], name: str, tmp_path: Path
) -> None:
    parent = load_decoder(folders(name), dtype="float32")
    child, _ = _structured(parent, channels=0.3, layers=1)
    read = _same_in_transformers(child, folders(name), tmp_path / "child")
    assert (read.num_layers, read.intermediate_size) == (2, child.config.intermediate_size)
    with pytest.raises(ConfigError, match=r"cannot say this shape|of 1 key-value heads|no head would be left"):
        _structured(load_decoder(folders(name), dtype="float32"), heads=0.5)


def test_bloom_loses_layers_only(folders: Callable[[str], Path], tmp_path: Path) -> None:
    child, _ = _structured(load_decoder(folders("bloom"), dtype="float32"), layers=2)
    assert _same_in_transformers(child, folders("bloom"), tmp_path / "child").num_layers == 1
    with pytest.raises(ConfigError, match="ALiBi"):
        _structured(load_decoder(folders("bloom"), dtype="float32"), heads=0.5)
    with pytest.raises(ConfigError, match=r"config\.json of bloom cannot say this shape"):
        _structured(load_decoder(folders("bloom"), dtype="float32"), channels=0.5)


def test_llama_whose_heads_do_not_divide_its_width_becomes_a_mistral(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    child, _ = _structured(load_decoder(folders("llama-grouped"), dtype="float32"), heads=0.25)
    assert child.config.num_heads == 6  # divides 48
    assert child.config.family == "llama"
    parent = load_decoder(folders("llama-grouped"), dtype="float32")
    wide = Decoder(ModelConfig(**{**vars(parent.config), "hidden_size": 40})).initialize(std=0.2).eval()
    child, _ = _structured(wide, heads=0.25)
    assert child.config.family == "mistral"
    assert _same_in_transformers(child, tmp_path, tmp_path / "child").num_heads == 6


def test_gemma_says_which_heads_can_go(folders: Callable[[str], Path]) -> None:
    parent = load_decoder(folders("gemma2"), dtype="float32")
    wide = Decoder(ModelConfig(**{**vars(parent.config), "hidden_size": 40})).eval()
    with pytest.raises(ConfigError, match="hidden size 40 with 6 heads; expected 1 or 2 of 4 key-value heads left"):
        _structured(wide, heads=0.25)


@torch.no_grad()
def test_heads_and_channels_without_effect_are_the_ones_to_go(make_decoder: MakeDecoder) -> None:
    parent = make_decoder(tied=False, bias=True)
    silent_channels = torch.arange(0, 52, 4)
    for block in parent.model.layers:
        block.self_attn.o_proj.weight[:, 16:] = 0.0  # pyright: ignore
        block.mlp.down_proj.weight[:, silent_channels] = 0.0  # pyright: ignore
    rows = [[token % 96 for token in row] for row in ROWS]
    expected = parent(torch.tensor(rows))
    child, result = prune_structured(parent, rows, PruneConfig(method="structured", heads=0.5, channels=0.25))
    assert (child(torch.tensor(rows)) - expected).abs().max() < 1e-4
    assert max(layer.error for layer in result.layers) < 1e-4


@torch.no_grad()
def test_a_block_that_does_nothing_is_the_first_to_go(make_decoder: MakeDecoder) -> None:
    parent = make_decoder(layers=4)
    parent.model.layers[2].self_attn.o_proj.weight.zero_()  # pyright: ignore
    parent.model.layers[2].mlp.down_proj.weight.zero_()  # pyright: ignore
    rows = [[token % 96 for token in row] for row in ROWS]
    batches = make_batches(rows, vocab_size=96, max_length=64, batch_tokens=100)
    influence = block_influence(parent, batches)
    assert influence[2] == pytest.approx(0.0, abs=1e-6)
    assert min(influence[:2] + influence[3:]) > 0.01
    expected = parent(torch.tensor(rows))
    child, result = prune_structured(parent, rows, PruneConfig(method="structured", layers=1))
    assert [layer.name for layer in result.layers] == ["model.layers.2"]
    assert (child(torch.tensor(rows)) - expected).abs().max() < 1e-5


def test_remaining_inputs_make_up_for_the_removed_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator) @ torch.randn(6, 10, generator=generator)
    weight = torch.randn(4, 10, generator=generator)
    hessian = x.t() @ x / len(x)
    kept = torch.tensor([0, 1, 3, 5, 6, 8, 9])
    fitted = fit_remaining(weight, hessian, kept, damping=1e-6)
    assert (fitted[:, [2, 4, 7]] == 0).all()
    # Ten inputs of rank six: seven of them say everything.
    assert (x @ fitted.t() - x @ weight.t()).norm() < 1e-2 * (x @ weight.t()).norm()


def test_a_heads_norm_is_that_of_what_it_adds() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 12, generator=generator), torch.randn(5, 12, generator=generator)
    hessian = x.t() @ x / len(x)
    for width in (1, 4):
        expected = [
            float((x[:, unit : unit + width] @ weight[:, unit : unit + width].t()).norm() / len(x) ** 0.5)
            for unit in range(0, 12, width)
        ]
        assert unit_norms(weight, hessian, width=width).tolist() == pytest.approx(expected, rel=1e-4)


def test_damaged_and_constant_weights(make_decoder: MakeDecoder) -> None:
    rows = [[token % 96 for token in row] for row in ROWS]
    config = PruneConfig(method="structured", heads=0.5, channels=0.5)
    decoder = make_decoder()
    decoder.model.layers[1].mlp.down_proj.weight.data[0, 0] = math.nan  # pyright: ignore
    with pytest.raises(CompressionError, match=r"model\.layers\.1\.mlp\.down_proj holds 1 NaN"):
        prune_structured(decoder, rows, config)
    decoder = make_decoder()
    decoder.model.layers[0].mlp.down_proj.weight.data.fill_(0.1)  # pyright: ignore
    decoder.model.layers[0].self_attn.v_proj.weight.data.zero_()  # pyright: ignore
    child, _ = prune_structured(decoder, rows, config)
    assert child(torch.tensor(rows)).isfinite().all()


@pytest.mark.parametrize(
    ("amounts", "message"),
    [
        ({"layers": 2}, "no layer would be left; got 2; expected at most 1"),
        ({"heads": 0.9}, "no head would be left"),
        ({"channels": 0.999}, "no channel would be left"),
    ],
)
def test_removing_everything_is_refused(make_decoder: MakeDecoder, amounts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prune_structured(make_decoder(), [[1, 2, 3]], PruneConfig(method="structured", **amounts))
