"""A step through the torch backend gives the decoder's own logits, and says so when they are no numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from fake_cache import make_sequence

from burnish.engine.model_runner import pack_rows
from burnish.engine.scheduler import Row
from burnish.engine.sequence import Sequence
from burnish.engine.step import StepInputs
from burnish.engine.torch_backend import TorchBackend
from burnish.models.config import ModelConfig
from burnish.models.decoder import Decoder


def row(sequence: Sequence, start: int, end: int, num_logits: int, drafts: tuple[int, ...] = ()) -> Row:
    return Row(
        sequence=sequence,
        start=start,
        end=end,
        num_logits=num_logits,
        drafts=drafts,
        samples=end - len(drafts) == sequence.num_tokens,
    )


def packed(*rows: Row) -> StepInputs:
    return pack_rows(list(rows), block_size=4)


def two_sequences() -> tuple[Sequence, Sequence]:
    first, second = make_sequence(0, [5, 6, 7, 8, 9, 10, 11]), make_sequence(1, [50, 51, 52])
    first.block_table.extend([6, 1, 3])
    second.block_table.extend([2])
    return first, second


def test_rows_are_packed_as_the_backend_wants_them() -> None:
    first, second = two_sequences()
    second.token_ids += [60]
    second.adapter = 3
    second.rope_len = 9
    step = packed(row(first, 2, 6, 0), row(second, 3, 6, 3, (61, 62)))
    assert step.tokens_T.tolist() == [7, 8, 9, 10, 60, 61, 62]
    assert step.positions_T.tolist() == [2, 3, 4, 5, 3, 4, 5]
    assert step.row_starts.tolist() == [0, 4, 7]
    assert step.context_lens_S.tolist() == [6, 6]
    assert step.block_tables_SN.tolist() == [[6, 1, -1], [2, -1, -1]]
    assert step.logit_rows_L.tolist() == [4, 5, 6]
    assert (step.adapters_S.tolist(), step.rope_lens_S.tolist()) == ([-1, 3], [0, 9])
    arrays = list(vars(step).values())
    assert all(array.dtype == "int32" and array.flags["C_CONTIGUOUS"] for array in arrays)


def test_logits_equal_the_decoders_in_pieces(decoder: Decoder) -> None:
    first, second = two_sequences()
    backend = TorchBackend(decoder, num_blocks=8, block_size=4)
    with torch.no_grad():
        expected = [decoder(torch.tensor([one.prompt_ids]))[0] for one in (first, second)]
    one = backend.forward(packed(row(first, 0, 3, 2), row(second, 0, 1, 0)), greedy=False)
    two = backend.forward(packed(row(second, 1, 3, 1), row(first, 3, 7, 4)), greedy=False)
    torch.testing.assert_close(one, expected[0][1:3])
    torch.testing.assert_close(two, torch.cat((expected[1][2:], expected[0][3:])))
    ids_L = backend.forward(packed(row(second, 1, 3, 1), row(first, 3, 7, 4)), greedy=True)
    assert ids_L.dtype == torch.int64
    assert ids_L.tolist() == two.argmax(-1).tolist()
    none = backend.forward(packed(row(second, 1, 2, 0)), greedy=True)
    assert none.tolist() == []


def test_logits_may_be_changed_by_the_caller(decoder: Decoder) -> None:
    first, _ = two_sequences()
    backend = TorchBackend(decoder, num_blocks=8, block_size=4)
    step = packed(row(first, 0, 7, 1))
    logits_LV = backend.forward(step, greedy=False)
    kept = logits_LV.clone()
    with torch.inference_mode():
        logits_LV.fill_(0)
    assert torch.equal(backend.forward(step, greedy=False), kept)


def test_logits_that_are_no_numbers_are_marked(decoder: Decoder) -> None:
    first, second = two_sequences()
    with torch.no_grad():
        decoder.model.embed_tokens.weight[8] = float("nan")
    backend = TorchBackend(decoder, num_blocks=8, block_size=4)
    step = packed(row(first, 0, 7, 2), row(second, 0, 3, 1))
    ids = backend.forward(step, greedy=True).tolist()
    assert [token_id == -1 for token_id in ids] == [True, True, False]
    backend.reset()
    assert not any(tensor.isnan().any() for tensor in backend._store.keys)  # type: ignore[union-attr]


@pytest.mark.parametrize("kv_dtype", [None, torch.bfloat16, torch.int8])
def test_cache_takes_what_its_dtype_says(decoder: Decoder, kv_dtype: torch.dtype | None) -> None:
    backend = TorchBackend(decoder, num_blocks=8, block_size=4, kv_dtype=kv_dtype)
    per_token = decoder.config.kv_bytes_per_token((kv_dtype or torch.float32).itemsize)
    scales = 2 * 2 * 2 * 4 if kv_dtype == torch.int8 else 0
    assert backend.kv_bytes == 32 * (per_token + scales)


@pytest.mark.parametrize("rule", ["dynamic", "longrope"])
def test_packed_sequences_rotate_as_if_they_were_alone(rule: str) -> None:
    scaling = {
        "dynamic": {"rope_type": "dynamic", "factor": 3.0},
        "longrope": {
            "rope_type": "longrope",
            "original_max_position_embeddings": 5,
            "short_factor": [1.0, 1.1, 1.3, 1.5],
            "long_factor": [1.0, 2.0, 4.0, 8.0],
        },
    }[rule]
    config = ModelConfig(
        family="llama",
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rotary_dim=8,
        max_position_embeddings=5 if rule == "dynamic" else 60,
        rope_scaling=scaling,
    )
    decoder = Decoder(config).initialize(std=0.4, seed=3).eval()
    first, second = two_sequences()
    first.rope_len, second.rope_len = 7, 3
    with torch.no_grad():
        expected = [decoder(torch.tensor([one.prompt_ids]))[0, -1] for one in (first, second)]
    backend = TorchBackend(decoder, num_blocks=8, block_size=4)
    backend.forward(packed(row(first, 0, 4, 0)), greedy=True)
    step = packed(row(first, 4, 7, 1), row(second, 0, 3, 1))
    torch.testing.assert_close(backend.forward(step, greedy=False), torch.stack(expected))
    # Without the lengths the longer one would decide for both, and its first piece for itself.
    wrong = replace(step, rope_lens_S=step.rope_lens_S * 0)
    assert not torch.allclose(backend.forward(wrong, greedy=False), torch.stack(expected), atol=1e-3)
