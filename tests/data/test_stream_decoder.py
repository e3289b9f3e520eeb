from __future__ import annotations

import time
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import BACKENDS, MakeFolder
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from burnish.data.stream_decoder import byte_level_alphabet
from burnish.data.tokenizer import Tokenizer
from burnish.data.tokenizer_files import TokenizerFiles

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
REAL = ["models/stories260k", "tokenizers/gpt2", "tokenizers/gpt-neox", "tokenizers/mistral-v1"]
MADE = [*BACKENDS, "metaspace", "no-decoder", "word-pieces"]


def wrap(backend: Backend) -> Tokenizer:
    files = TokenizerFiles(
        backend=backend, special_tokens={}, chat_templates={}, stop_ids=(), bos_id=None, max_length=None
    )
    return Tokenizer(files, source="made")


@cache
def tokenizer(name: str) -> Tokenizer:
    if name in BACKENDS:
        return wrap(BACKENDS[name]())
    if name in ("metaspace", "no-decoder", "word-pieces"):
        words = ["<unk>", "▁a", "b", "▁", "é", "##c", ",", "'s", "日本"]
        backend = Backend(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
        if name == "metaspace":
            backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        elif name == "word-pieces":
            backend.decoder = decoders.WordPiece()
        return wrap(backend)
    if not (SHARED / name).is_dir():
        pytest.skip(f"real inputs are not here: {SHARED / name}")
    return Tokenizer.load(SHARED / name)


def streamed(of: Tokenizer, ids: list[int], *, skip: bool = True) -> list[str]:
    stream = of.stream_decoder(skip_special_tokens=skip)
    return [*(stream.push(token_id) for token_id in ids), stream.flush()]


@pytest.mark.parametrize("name", [*BACKENDS, *REAL])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=40), lead=st.sampled_from(["", " ", "  \n", "é", "<0x41>"]))
def test_pieces_join_to_the_decoded_whole_for_any_text(name: str, text: str, lead: str) -> None:
    of = tokenizer(name)
    ids = of.encode(lead + text, add_special_tokens=True)
    pieces = streamed(of, ids)
    assert "".join(pieces) == of.decode(ids)
    assert "".join(streamed(of, ids, skip=False)) == of.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", [*MADE, *REAL])
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_decoded_whole_for_any_ids(name: str, data: st.DataObject) -> None:
    of = tokenizer(name)
    low_ids = st.integers(0, min(300, of.vocab_size - 1))  # byte tokens live here: many invalid sequences
    ids = data.draw(st.lists(st.one_of(low_ids, st.integers(0, of.vocab_size + 2)), max_size=30))
    assert "".join(streamed(of, ids)) == of.decode(ids)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_piece_splits_a_character(name: str) -> None:
    text = "ab 日本 😀👩‍👩‍👧 é\n"
    pieces = streamed(tokenizer(name), tokenizer(name).encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 4


def test_text_is_given_out_as_soon_as_it_is_certain() -> None:
    of = tokenizer("byte-level")
    stream = of.stream_decoder()
    ids = of.encode("aé")
    assert [stream.push(token_id) for token_id in ids] == ["a", "", "é"]
    assert stream.flush() == ""


def test_leading_space_is_as_in_the_decoded_whole() -> None:
    of = tokenizer("byte-fallback")
    for text in ("name", " name", "  name"):
        assert "".join(streamed(of, of.encode(text))) == of.decode(of.encode(text)) == text


def test_unfinished_characters_come_out_at_the_end() -> None:
    for name in BACKENDS:
        of = tokenizer(name)
        ids = of.encode("😀")[:-1]
        assert "".join(streamed(of, ids)) == of.decode(ids)
        assert "\ufffd" in of.decode(ids)


def test_cost_per_token_does_not_grow_with_the_text(make_folder: MakeFolder) -> None:
    for name in MADE:
        of = tokenizer(name)
        stream = of.stream_decoder()
        started = time.perf_counter()
        for number in range(20_000):
            stream.push(5 + number % 3)
        stream.flush()
        assert time.perf_counter() - started < 8  # decoding the whole each time would take minutes


def test_byte_alphabet_is_the_tokenizers_library_own() -> None:
    alphabet = byte_level_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(alphabet.values()) == list(range(256))
