from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from burnish.compress import gptq
from burnish.compress.calibration import BlockWalk, TokenBatch, make_batches
from burnish.compress.config import QuantizeConfig
from burnish.compress.matching import Moments, ParentWalk, matched_weight, trusted_share
from burnish.compress.quantize import quantize_model
from burnish.errors import ConfigError
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder

MakeDecoder = Callable[..., Decoder]


def _batches(examples: list[list[int]]) -> list[TokenBatch]:
    return make_batches(examples, vocab_size=96, max_length=64, batch_tokens=150)


def _decoder(**options: object) -> Decoder:
    config = ModelConfig(
        family="llama",
        vocab_size=96,
        hidden_size=40,
        intermediate_size=52,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        rotary_dim=8,
        **options,  # pyright: ignore[reportArgumentType]
    )
    return Decoder(config, dtype=torch.float32).initialize(std=0.15, seed=1).eval()


@pytest.mark.parametrize("activation_order", [True, False])
def test_matched_weight_is_the_least_squares_answer(activation_order: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    z, weight = torch.randn(200, 12, generator=generator), torch.randn(5, 12, generator=generator)
    x = z + 0.3 * torch.randn(200, 12, generator=generator)
    extra = torch.randn(200, 5, generator=generator)
    moments = Moments(hessian_II=z.t() @ z / 200, cross_II=x.t() @ z / 200, shift_OI=extra.t() @ z / 200)
    inverse = gptq.invert_hessian(moments.hessian_II, damping=1e-6, activation_order=activation_order)
    found = matched_weight(weight, moments, inverse)
    expected = torch.linalg.lstsq(z, x @ weight.t() + extra).solution.t()
    assert torch.allclose(found, expected, atol=1e-3)


def test_inputs_that_have_not_changed_leave_the_weight_as_it_was() -> None:
    weight, moments = torch.randn(5, 12), Moments(hessian_II=torch.eye(12) * 2, cross_II=torch.eye(12) * 2)
    inverse = gptq.invert_hessian(moments.hessian_II)
    assert torch.equal(matched_weight(weight, moments, inverse), weight)
    assert trusted_share(weight, (moments, moments), (inverse, inverse)) == 0.0


@pytest.mark.parametrize(("tokens", "least", "most"), [(24, 0.0, 0.5), (20_000, 0.95, 1.0)])
def test_share_follows_how_far_the_halves_agree(tokens: int, least: float, most: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=generator)
    halves = []
    for _ in range(2):
        z = torch.randn(tokens // 2, 12, generator=generator)
        # The inputs have shrunk a little, under much noise that no weight can make up for.
        x = 1.3 * z + torch.randn(tokens // 2, 12, generator=generator)
        count = tokens // 2
        halves.append(Moments(hessian_II=z.t() @ z / count, cross_II=x.t() @ z / count))
    first, second = halves
    inverses = gptq.invert_hessian(first.hessian_II), gptq.invert_hessian(second.hessian_II)
    assert least <= trusted_share(weight, (first, second), inverses) <= most


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual_from_norm": True},
        {"parallel_residual": True},
        {"parallel_residual": True, "shared_norm": True},
        {"o_bias": True, "mlp_bias": True},
    ],
)
@torch.no_grad()
def test_residuals_and_outputs_make_up_the_stream(options: dict[str, bool], examples: list[list[int]]) -> None:
    decoder = _decoder(**options)
    block = decoder.model.layers[0]
    batches = _batches(examples)
    walk, after = BlockWalk(decoder, batches), BlockWalk(decoder, batches)
    walk.input_groups(0, block)
    after.advance(0, block)
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        linear = block.get_submodule(name)
        seen[name] = []
        for x_NI, residual_NO in walk.inputs_and_residuals(0, block, name):
            if residual_NO is None:
                assert name == "self_attn.q_proj"
                continue
            bias = linear.bias if linear.bias is not None and name == "self_attn.o_proj" else 0.0
            seen[name].append((residual_NO, x_NI @ linear.weight.t() + bias))  # pyright: ignore
    assert seen["self_attn.q_proj"] == []
    bias = block.mlp.down_proj.bias
    for batch, (real_BT, hidden_BTD) in enumerate(after.finish(decoder, 2)):
        residual, out = seen["mlp.down_proj"][batch]
        whole = residual + out + (0.0 if bias is None else bias)
        assert torch.allclose(decoder.model.norm(whole), hidden_BTD[real_BT], atol=1e-4)
        if not options.get("parallel_residual"):
            attended = sum(seen["self_attn.o_proj"][batch])
            base = block.post_attention_layernorm(attended) if options.get("residual_from_norm") else attended
            assert torch.allclose(base, residual, atol=1e-4)


@torch.no_grad()
def test_moments_are_those_of_both_models(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    decoder, batches = make_decoder(), _batches(examples)
    block = decoder.model.layers[0]
    parent, walk = ParentWalk(decoder, batches), BlockWalk(decoder, batches)
    parent.start(0, block)
    walk.input_groups(0, block)
    same = parent.moments(walk, block, "self_attn.o_proj").whole
    assert torch.allclose(same.cross_II, same.hessian_II, atol=1e-6)
    assert same.shift_OI is not None
    assert same.shift_OI.abs().max() == 0
    walk.forget_attention()
    block.self_attn.v_proj.weight.mul_(2.0)
    split = parent.moments(walk, block, "self_attn.o_proj")
    doubled = split.whole
    # Halves of each batch: equal up to a token.
    mean = (split.halves[0].hessian_II + split.halves[1].hessian_II) / 2
    assert torch.allclose(mean, doubled.hessian_II, rtol=0.05, atol=0.05 * float(mean.abs().max()))
    assert torch.allclose(doubled.hessian_II, 4.0 * same.hessian_II, rtol=1e-4, atol=1e-5)
    assert torch.allclose(doubled.cross_II, 2.0 * same.hessian_II, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "awq-gptq"])
def test_matching_the_parent_brings_the_model_nearer_to_it(
    make_decoder: MakeDecoder, examples: list[list[int]], method: str
) -> None:
    generator = torch.Generator().manual_seed(8)
    texts = [torch.randint(0, 96, (64,), generator=generator).tolist() for _ in range(40)]
    parent, shifts = make_decoder(layers=3), {}
    for match in (False, True):
        child = make_decoder(layers=3)
        quantize_model(child, texts, QuantizeConfig(method=method, bits=3, group_size=-1, match_parent=match))
        with torch.no_grad():
            tokens = torch.tensor(texts[20:])
            shifts[match] = float((child(tokens) - parent(tokens)).square().mean())
    assert shifts[True] < 0.85 * shifts[False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rtn", "match_parent": True}, "match_parent has no meaning for rtn"),
        ({"method": "awq", "match_parent": True}, "match_parent has no meaning for awq"),
        ({"match_parent": True, "true_sequential": False}, "match_parent needs true_sequential"),
        ({"refine": -1}, "refine is out of range"),
        ({"method": "rtn", "refine": 1}, "refine is out of range"),
    ],
)
def test_config_refuses_what_has_no_meaning(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizeConfig(**options)  # pyright: ignore[reportArgumentType]
