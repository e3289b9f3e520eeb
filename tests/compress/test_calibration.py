from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from burnish.compress.calibration import BlockWalk, block_linears, make_batches
from burnish.errors import DataError
from burnish.models.decoder import Decoder

MakeDecoder = Callable[..., Decoder]


def test_batches_hold_every_token_once_and_stay_within_the_budget() -> None:
    examples = [[1] * 5, [2] * 9, [], [3], [4] * 30]
    batches = make_batches(examples, vocab_size=9, max_length=12, batch_tokens=24)
    kept = torch.cat([batch.tokens_BT[batch.real_BT] for batch in batches])
    assert torch.bincount(kept).tolist() == [0, 5, 9, 1, 30]
    assert all(batch.tokens_BT.numel() <= 24 for batch in batches)
    assert max(batch.tokens_BT.shape[1] for batch in batches) == 12


def test_sequence_beyond_the_budget_gets_a_batch_of_its_own() -> None:
    (batch,) = make_batches([[1] * 10], vocab_size=9, max_length=12, batch_tokens=4)
    assert batch.tokens_BT.shape == (1, 10)


@pytest.mark.parametrize("examples", [[], [[]]])
def test_empty_calibration_is_refused(examples: list[list[int]]) -> None:
    with pytest.raises(DataError, match="holds no tokens"):
        make_batches(examples, vocab_size=9, max_length=12, batch_tokens=4)


@pytest.mark.parametrize("token", [-1, 9])
def test_token_outside_the_vocabulary_names_the_sequence(token: int) -> None:
    with pytest.raises(DataError, match="sequence 1 has token ids outside"):
        make_batches([[1], [2, token]], vocab_size=9, max_length=12, batch_tokens=4)


@torch.no_grad()
def test_walk_ends_in_the_hidden_states_of_a_plain_forward(
    make_decoder: MakeDecoder, examples: list[list[int]]
) -> None:
    decoder = make_decoder()
    walk = BlockWalk(decoder, make_batches(examples, vocab_size=96, max_length=64, batch_tokens=150))
    for layer, block in enumerate(decoder.model.layers):
        walk.advance(layer, block)
    seen = torch.cat([each.hidden_BTD[each.real_BT] for each in walk._inputs])
    alone = torch.cat([_last_hidden(decoder, tokens) for tokens in sorted(examples, key=len, reverse=True)])
    assert torch.allclose(seen, alone, atol=1e-5)


def _last_hidden(decoder: Decoder, tokens: list[int]) -> torch.Tensor:
    caught: list[torch.Tensor] = []
    hook = decoder.model.norm.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    decoder.hidden(torch.tensor([tokens]))
    hook.remove()
    return caught[0][0]


@torch.no_grad()
def test_linears_are_grouped_by_the_input_they_share(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    decoder = make_decoder()
    walk = BlockWalk(decoder, make_batches(examples, vocab_size=96, max_length=64, batch_tokens=150))
    assert walk.input_groups(1, decoder.model.layers[1]) == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


@torch.no_grad()
def test_hessian_counts_real_tokens_only(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    decoder = make_decoder()
    walk = BlockWalk(decoder, make_batches(examples, vocab_size=96, max_length=64, batch_tokens=150))
    block = decoder.model.layers[0]
    walk.input_groups(0, block)
    linear = block_linears(block)["mlp.down_proj"]
    inputs: list[torch.Tensor] = []
    hook = linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    for tokens in examples:
        decoder.hidden(torch.tensor([tokens]))
    hook.remove()
    x = torch.cat(inputs)
    assert torch.allclose(walk.hessian(0, block, "mlp.down_proj"), x.t() @ x / len(x), atol=1e-5)


def test_walk_leaves_the_decoder_as_it_was(make_decoder: MakeDecoder, examples: list[list[int]]) -> None:
    decoder = make_decoder()
    tokens = torch.tensor([examples[0]])
    before = decoder(tokens)
    with torch.no_grad():
        walk = BlockWalk(decoder, make_batches(examples, vocab_size=96, max_length=64, batch_tokens=150))
        block = decoder.model.layers[0]
        walk.input_groups(0, block)
        walk.hessian(0, block, "self_attn.o_proj")
    assert torch.equal(decoder(tokens), before)


@torch.no_grad()
def test_kept_attention_is_taken_again_from_the_final_linears(
    make_decoder: MakeDecoder, examples: list[list[int]]
) -> None:
    decoder = make_decoder()
    walk = BlockWalk(decoder, make_batches(examples, vocab_size=96, max_length=64, batch_tokens=150))
    block = decoder.model.layers[0]
    linears = block_linears(block)
    walk.input_groups(0, block)
    walk.hessian(0, block, "self_attn.q_proj")
    linears["self_attn.v_proj"].weight.mul_(2.0)
    changed = walk.hessian(0, block, "self_attn.o_proj")
    walk.hessian(0, block, "mlp.up_proj")
    fresh = BlockWalk(decoder, make_batches(examples, vocab_size=96, max_length=64, batch_tokens=150))
    fresh.input_groups(0, block)
    assert torch.equal(changed, fresh.hessian(0, block, "self_attn.o_proj"))
    for each in (walk, fresh):
        each.advance(0, block)
    assert all(torch.equal(a.hidden_BTD, b.hidden_BTD) for a, b in zip(walk._inputs, fresh._inputs, strict=True))
