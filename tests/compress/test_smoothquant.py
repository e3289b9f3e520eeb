"""SmoothQuant: what is folded changes nothing but the rounding, and loses less than rounding as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from family_decoders import DECODERS, family_examples, make_family
from tokenizers import Tokenizer

from burnish.compress.calibration import BlockWalk, InputSample, make_batches
from burnish.compress.channel_scales import ScaleSite
from burnish.compress.config import QuantizeConfig
from burnish.compress.int8_linear import Int8Linear
from burnish.compress.smoothquant import refined, rounded_rows, search_scale, smooth_block
from burnish.compress.w8a8 import quantize_w8a8
from burnish.errors import CompressionError, ConfigError
from burnish.models.decoder import Decoder
from burnish.models.loading import load_decoder

MakeDecoder = Callable[..., Decoder]
SMOOTH = QuantizeConfig(method="smoothquant", bits=8, group_size=-1)


def outliers(decoder: Decoder) -> Decoder:
    """A few channels of every norm a hundred times as large, as large models grow them."""
    with torch.no_grad():
        for block in decoder.model.layers:
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                if norm is not None:
                    norm.weight[::11] *= 100.0
    return decoder


@torch.no_grad()
def divergence(child: Decoder, parent_logits: torch.Tensor, tokens_BT: torch.Tensor) -> float:
    log_p, log_q = parent_logits.log_softmax(-1), child(tokens_BT).log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("name", DECODERS)
def test_factors_leave_the_function_as_it_was(name: str) -> None:
    decoder = make_family(name)
    tokens_BT = torch.tensor(family_examples(count=2))
    walk = BlockWalk(decoder, make_batches(family_examples(), vocab_size=96, max_length=64, batch_tokens=100))
    with torch.no_grad():
        before = decoder(tokens_BT)
        for layer, block in enumerate(decoder.model.layers):
            smooth_block(walk, layer, block, model=decoder.config, alpha=0.5)
            walk.advance(layer, block)
        assert torch.allclose(decoder(tokens_BT), before, atol=2e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_every_family_becomes_integers(name: str) -> None:
    decoder = make_family(name)
    tokens_BT = torch.tensor(family_examples(count=2))
    with torch.no_grad():
        before = decoder(tokens_BT)
    result = quantize_w8a8(decoder, family_examples(), SMOOTH)
    assert all(type(module) is not torch.nn.Linear for module in decoder.model.modules())
    assert len(result.layers) == sum(isinstance(module, Int8Linear) for module in decoder.modules())
    assert divergence(decoder, before, tokens_BT) < 0.05
    assert max(layer.error for layer in result.layers) < 0.1


def test_outliers_cost_less_when_they_are_moved() -> None:
    tokens_BT = torch.tensor(family_examples(count=4))
    parent = outliers(make_family("llama"))
    with torch.no_grad():
        expected = parent(tokens_BT)
    losses = {}
    for method in ("w8a8", "smoothquant"):
        child = outliers(make_family("llama"))
        quantize_w8a8(child, family_examples() if method == "smoothquant" else None, QuantizeConfig(
            method=method, bits=8, group_size=-1
        ))  # fmt: skip
        losses[method] = divergence(child, expected, tokens_BT)
    assert losses["smoothquant"] < 0.2 * losses["w8a8"]


def test_search_loses_no_more_than_any_alpha_and_refining_helps() -> None:
    generator = torch.Generator().manual_seed(0)
    site = ScaleSite(source="norm", readers=("a", "b"))
    spread = torch.randn(64, generator=generator).mul(1.5).exp()
    x_NI = torch.randn(300, 64, generator=generator) * spread
    weights = [torch.randn(40, 64, generator=generator), torch.randn(24, 64, generator=generator)]
    sample = InputSample(rows_NI=x_NI, peak_I=x_NI.abs().amax(dim=0))

    def lost(scale: torch.Tensor) -> float:
        return sum(
            float((rounded_rows(x_NI / scale) @ rounded_rows(weight * scale).t() - x_NI @ weight.t()).square().sum())
            for weight in weights
        )

    fixed = [search_scale(weights, sample, site, alpha=alpha) for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)]
    best = min(lost(scale) for scale in fixed)
    assert lost(search_scale(weights, sample, site)) <= best < 0.5 * lost(torch.ones(64))
    start = torch.ones(64)
    assert lost(refined(start, weights, weights, x_NI, site)) < 0.5 * lost(start)


def test_factors_are_shared_by_the_heads_that_share_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    site = ScaleSite(source="v", readers=("o",), repeats=3, width=4)
    x_NI = torch.randn(50, 24, generator=generator)
    sample = InputSample(rows_NI=x_NI, peak_I=x_NI.abs().amax(dim=0))
    assert search_scale([torch.randn(10, 24, generator=generator)], sample, site).shape == (8,)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_sizes_that_nothing_divides(
    make_decoder: MakeDecoder, examples: list[list[int]], *, tied: bool, bias: bool
) -> None:
    decoder = make_decoder(hidden=40, inner=53, tied=tied, bias=bias)
    result = quantize_w8a8(decoder, examples, QuantizeConfig(method="smoothquant", bits=8, group_size=-1, alpha=0.5))
    assert result.calibration_tokens == sum(map(len, examples))
    assert 8.0 < result.bits_per_weight < 9.0
    assert [layer.name for layer in result.layers[:2]] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.k_proj",
    ]


def test_constant_and_zero_weights_are_fine(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    decoder = make_decoder()
    with torch.no_grad():
        decoder.model.layers[0].mlp.up_proj.weight.zero_()
        decoder.model.layers[1].self_attn.v_proj.weight.fill_(0.25)
        decoder.model.layers[1].input_layernorm.weight[3] = 0.0
    result = quantize_w8a8(decoder, examples, SMOOTH)
    with torch.no_grad():
        assert bool(torch.isfinite(decoder(torch.tensor([examples[0]]))).all())
    assert all(0.0 <= layer.error < 1.0 for layer in result.layers)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_are_named(make_decoder: MakeDecoder, examples: list[list[int]], value: float) -> None:
    decoder = make_decoder()
    with torch.no_grad():
        decoder.model.layers[1].mlp.down_proj.weight[0, 0] = value
    with pytest.raises(CompressionError, match=r"model\.layers\.1\.mlp\.down_proj"):
        quantize_w8a8(decoder, examples, SMOOTH)


def test_bad_activations_are_named(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    decoder = make_decoder()
    with torch.no_grad():
        decoder.model.embed_tokens.weight[examples[0][0], 0] = float("nan")
    with pytest.raises(CompressionError, match=r"model\.layers\.0\.self_attn\.q_proj is given NaN"):
        quantize_w8a8(decoder, examples, SMOOTH)


def test_smoothquant_needs_text(make_decoder: MakeDecoder) -> None:
    with pytest.raises(ConfigError, match="needs calibration text"):
        quantize_w8a8(make_decoder(), None, SMOOTH)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"bits": 4}, "smoothquant has 8 bits"),
        ({"group_size": 64}, "one scale per output feature"),
        ({"symmetric": False}, "always symmetric"),
        ({"alpha": 1.5}, "alpha is out of range"),
        ({"format": "gptq"}, "cannot be written in this format"),
        ({"method": "w8a8", "alpha": 0.5}, "alpha is out of range"),
        ({"method": "gptq", "embeddings": True}, "have no place in this format"),
        ({"method": "nf4", "bits": 8}, "nf4 has 4 bits"),
        ({"method": "nf4", "bits": 4}, "group_size is not valid for nf4"),
        ({"method": "gptq", "bits": 3, "format": "compressed-tensors"}, "no settled layout of 3 bits"),
        ({"method": "rtn", "format": "bitsandbytes"}, "cannot be written in this format"),
        ({"method": "rtn", "double_quant": False}, "double_quant has no meaning"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        QuantizeConfig(**{"method": "smoothquant", "bits": 8, "group_size": -1, **settings})  # pyright: ignore[reportArgumentType]


def test_stories_stay_within_two_hundredths_of_their_perplexity(shared_data: Path) -> None:
    """Held out, on some of the text; docs/compress.md has all of it."""
    folder = shared_data / "models" / "stories260k"
    text = (shared_data / "text" / "tinystories_sample_197k.txt").read_text(encoding="utf-8", errors="replace")
    tokens = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids
    rows = [[1, *tokens[start : start + 255]] for start in range(0, len(tokens) - 255, 255)]
    held_out = torch.tensor(rows[len(rows) // 2 :])[:24]
    with torch.no_grad():
        expected = load_decoder(folder, dtype="float32")(held_out)
    losses = {}
    for method in ("w8a8", "smoothquant"):
        child = load_decoder(folder, dtype="float32")
        config = QuantizeConfig(method=method, bits=8, group_size=-1)
        quantize_w8a8(child, rows[:64] if method == "smoothquant" else None, config)
        losses[method] = divergence(child, expected, held_out)
    assert losses["smoothquant"] < losses["w8a8"] < 0.003
