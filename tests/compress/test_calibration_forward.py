"""A block's forward over calibration tokens is the decoder's, and what it holds on to changes nothing."""

from __future__ import annotations

import pytest
import torch
from family_decoders import DECODERS, VOCAB, family_examples, make_family

from burnish.compress.calibration import BlockWalk, make_batches
from burnish.compress.calibration_forward import HEADS, NOTHING, OUTPUT, KeptAttention, run_block
from burnish.models.decoder import Decoder


@torch.no_grad()
def _hidden_before(decoder: Decoder, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, list[tuple]]:
    seen: list[tuple] = []
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args)) for block in decoder.model.layers]
    decoder.hidden(tokens_BT)
    for hook in hooks:
        hook.remove()
    return seen[0][0], seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", list(DECODERS))
@torch.no_grad()
def test_block_is_the_decoders_own(family: str, dtype: torch.dtype) -> None:
    decoder = make_family(family).to(dtype).eval()
    tokens_BT = torch.randint(0, VOCAB, (3, 21), generator=torch.Generator().manual_seed(0))
    _, seen = _hidden_before(decoder, tokens_BT)
    kept = KeptAttention()
    for block, (hidden_BTD, rope, attention) in zip(decoder.model.layers, seen):
        expected_BTD = block(hidden_BTD, rope, attention)
        scale = float(expected_BTD.abs().max())
        for keep in (NOTHING, HEADS, HEADS, OUTPUT, OUTPUT, HEADS, NOTHING):
            kept.keep = keep
            found_BTD = run_block(block, hidden_BTD, rope, kept, activation=decoder.config.activation)
            tolerance = 1e-5 if dtype == torch.float32 else 0.03
            assert float((found_BTD - expected_BTD).abs().max()) <= tolerance * scale
        kept.release()
        assert "forward" not in vars(block.mlp)


@torch.no_grad()
def test_outputs_held_on_to_are_computed_anew_when_linears_changed() -> None:
    decoder = make_family("llama").eval()
    batches = make_batches(family_examples(), vocab_size=VOCAB, max_length=64, batch_tokens=150)
    block, walk = decoder.model.layers[0], BlockWalk(decoder, batches)
    walk.input_groups(0, block)
    for name in ("self_attn.o_proj", "mlp.up_proj"):
        walk.hessian(0, block, name)
    block.get_submodule("self_attn.o_proj").weight.mul_(2.0)
    walk.forget_attention()
    walk.hessian(0, block, "self_attn.o_proj")
    found_II = walk.hessian(0, block, "mlp.up_proj")
    fresh = BlockWalk(decoder, batches)
    fresh.input_groups(0, block)
    assert torch.equal(found_II, fresh.hessian(0, block, "mlp.up_proj"))
