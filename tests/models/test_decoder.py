"""The decoder's own promises, beside parity: positions, initial weights, dtype of norms, checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder, RMSNorm
from burnish.models.loading import load_decoder
from burnish.models.recompute import recompute

CONFIG = ModelConfig(
    family="llama",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=32,
    rotary_dim=4,
)
TOKENS_BT = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


@pytest.fixture
def decoder() -> Decoder:
    return Decoder(CONFIG).initialize(seed=3, std=0.2)


def test_logits_of_hidden_equal_forward(decoder: Decoder) -> None:
    with torch.no_grad():
        assert torch.equal(decoder.logits(decoder.hidden(TOKENS_BT)), decoder(TOKENS_BT))


def test_positions_default_to_the_tokens_order(decoder: Decoder) -> None:
    with torch.no_grad():
        expected = decoder(TOKENS_BT)
        for positions in (torch.arange(5), torch.arange(5)[None], torch.arange(5).expand(2, 5)):
            assert torch.equal(decoder(TOKENS_BT, positions_BT=positions), expected)
        shifted = decoder(TOKENS_BT, positions_BT=torch.arange(7, 12))
        assert torch.allclose(shifted, expected, atol=1e-5), "rotary positions are relative"


def test_positions_differ_per_sequence(tiny_model: Callable[[str], Any]) -> None:
    learned = load_decoder(tiny_model("gpt2").folder)
    positions_BT = torch.stack((torch.arange(5), torch.arange(9, 14)))
    with torch.no_grad():
        both = learned(TOKENS_BT, positions_BT=positions_BT)
        for row in range(2):
            one = learned(TOKENS_BT[row : row + 1], positions_BT=positions_BT[row])
            assert torch.allclose(both[row], one[0], atol=1e-5)
        assert not torch.allclose(both[1], learned(TOKENS_BT)[1], atol=1e-2)


def test_tokens_on_the_right_change_nothing_on_the_left(tiny: Any) -> None:
    decoder = load_decoder(tiny.folder)
    changed_BT = tiny.tokens_BT.clone()
    changed_BT[:, 15:] = 7
    with torch.no_grad():
        logits_BTV = decoder(changed_BT)
    assert torch.allclose(logits_BTV[:, :15], decoder(tiny.tokens_BT)[:, :15], atol=1e-5)


def test_tied_decoder_has_no_output_layer_of_its_own() -> None:
    tied = Decoder(replace(CONFIG, tie_word_embeddings=True), device="meta")
    assert tied.lm_head is None
    assert "lm_head.weight" not in tied.state_dict()


def test_initialize_repeats_by_seed_and_is_neutral_in_norms() -> None:
    one, same, other = (Decoder(CONFIG).initialize(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert torch.equal(one["model.norm.weight"], torch.ones(16))
    offset = Decoder(replace(CONFIG, norm_weight_offset=1.0)).initialize()
    assert torch.equal(offset.state_dict()["model.norm.weight"], torch.zeros(16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rmsnorm_rounds_as_transformers_does(dtype: torch.dtype, offset: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(50, 64, generator=generator)).to(dtype)
    reference = Gemma3RMSNorm(64, eps=1e-5) if offset else LlamaRMSNorm(64, eps=1e-5)
    norm = RMSNorm(64, eps=1e-5, offset=offset, device=None, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(64, generator=generator))
        reference.weight.copy_(norm.weight)
        ours, theirs = norm(x), reference.to(dtype)(x)
    assert ours.dtype == dtype
    if dtype == torch.float32:
        assert torch.allclose(ours, theirs, atol=1e-5)
    else:
        assert (ours != theirs).float().mean() < 0.01, "at most a last bit here and there"


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1]), (2, [0])])
def test_checkpointing_recomputes_only_while_training(decoder: Decoder, every: int, expected: list[int]) -> None:
    calls: list[int] = []

    def spy(block: Any, *args: Any) -> Any:
        calls.append(list(decoder.model.layers).index(block))
        return recompute(block, *args)

    decoder.recompute = spy
    decoder.gradient_checkpointing, decoder.checkpoint_every = True, every
    decoder.eval()(TOKENS_BT)
    with torch.no_grad():
        decoder.train()(TOKENS_BT)
    assert not calls
    decoder(TOKENS_BT).sum().backward()
    assert calls == expected


def test_recomputed_block_draws_the_same_random_numbers() -> None:
    weight = torch.nn.Parameter(torch.ones(100))
    seen: list[torch.Tensor] = []

    def block(x: torch.Tensor) -> torch.Tensor:
        kept = torch.dropout(weight, 0.5, True)
        seen.append(kept.detach().clone())
        return x * kept

    x = torch.ones(100)
    recompute(block, x).sum().backward()
    assert torch.equal(seen[0], seen[1])
    assert weight.grad is not None
    assert torch.equal(weight.grad, seen[0])
    assert x.grad is None


def test_moving_to_another_dtype_keeps_frequencies_in_float32(decoder: Decoder) -> None:
    positions = torch.arange(4001, 4006)
    with torch.no_grad():
        expected = decoder(TOKENS_BT, positions_BT=positions)
        halved = decoder.to(torch.bfloat16)(TOKENS_BT, positions_BT=positions)
    assert (halved.float() - expected).norm() / expected.norm() < 0.03
    assert not list(decoder.buffers()), "nothing that .to() would round"


def test_compiled_decoder_needs_one_graph(decoder: Decoder) -> None:
    explanation = torch._dynamo.explain(decoder)(TOKENS_BT)  # type: ignore[attr-defined]
    assert explanation.graph_break_count == 0, explanation.break_reasons
