"""Reading a SentencePiece model (tokenizer.model) into a `tokenizers` tokenizer, without sentencepiece itself.

The file is a protocol buffer: pieces with scores, then the trainer's and the normalizer's settings. Field numbers are
those of sentencepiece_model.proto (github.com/google/sentencepiece). BPE and unigram models are understood.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from burnish.errors import CheckpointError

_UNIGRAM, _BPE = 1, 2
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "▁"


@dataclass(frozen=True, kw_only=True)
class _Piece:
    text: str
    score: float
    kind: int


def load_sentencepiece(path: Path) -> tuple[Backend, dict[str, str]]:
    """Read a SentencePiece file.

    Returns:
        the tokenizer (nothing added at either end), and its special tokens: bos_token, eos_token, unk_token, pad_token.

    Raises:
        CheckpointError: the file is truncated, or of another kind.
    """
    try:
        pieces, trainer, normalizer = _parse(path.read_bytes())
        kind = _number(trainer, 3, _UNIGRAM)
        if not pieces or not trainer or kind not in (_UNIGRAM, _BPE):
            raise ValueError(f"{len(pieces)} pieces, {len(trainer)} trainer settings, model type {kind}")
        backend = Backend(_model(pieces, kind, byte_fallback=bool(_number(trainer, 35, 0))))
        backend.normalizer = _normalizer(normalizer)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read", got=error.strerror or error) from error
    except Exception as error:  # a malformed buffer fails in many ways, and the Rust library raises bare Exception
        raise CheckpointError(
            f"{path} cannot be read as a SentencePiece model", got=error, expected="a BPE or unigram model"
        ) from error
    strip = [decoders.Strip(content=" ", left=1, right=0)] if _number(normalizer, 3, 1) else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [piece.text for piece in pieces if piece.kind in (_UNKNOWN, _CONTROL)]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    defined = [piece.text for piece in pieces if piece.kind == _USER_DEFINED]
    backend.add_tokens([AddedToken(text, normalized=False) for text in defined])
    defaults = {"unk_token": (40, 0), "bos_token": (41, 1), "eos_token": (42, 2), "pad_token": (43, -1)}
    ids = {name: _number(trainer, field, default) for name, (field, default) in defaults.items()}
    return backend, {name: pieces[number].text for name, number in ids.items() if 0 <= number < len(pieces)}


def _parse(data: bytes) -> tuple[list[_Piece], dict[int, bytes | int], dict[int, bytes | int]]:
    pieces: list[_Piece] = []
    settings: dict[int, dict[int, bytes | int]] = {2: {}, 3: {}}
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            parts = dict(_fields(value))
            text, score, kind = parts[1], parts.get(2, b"\0\0\0\0"), parts.get(3, 1)
            if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
                raise ValueError("a piece is malformed")
            pieces.append(_Piece(text=text.decode("utf-8"), score=struct.unpack("<f", score)[0], kind=kind))
        elif number in settings and isinstance(value, bytes):
            settings[number] = dict(_fields(value))
    return pieces, settings[2], settings[3]


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int]]:
    """(field number, value) pairs of one protocol buffer message; fixed-width values come as bytes."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            length, position = _varint(data, position)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")
        if position + length > len(data):
            raise ValueError("the file ends inside a value")
        yield number, data[position : position + length]
        position += length


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise ValueError("the file ends inside a number")
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if not byte & 0x80:
            return value - (1 << 64) if value >> 63 else value, position


def _number(settings: dict[int, bytes | int], field: int, default: int) -> int:
    value = settings.get(field, default)
    return value if isinstance(value, int) else default


def _model(pieces: list[_Piece], kind: int, *, byte_fallback: bool) -> models.Model:
    if kind == _UNIGRAM:
        unknown = next((number for number, piece in enumerate(pieces) if piece.kind == _UNKNOWN), None)
        return models.Unigram([(piece.text, piece.score) for piece in pieces], unknown, byte_fallback)
    vocabulary = {piece.text: number for number, piece in enumerate(pieces)}
    unknown = next((piece.text for piece in pieces if piece.kind == _UNKNOWN), None)
    return models.BPE(
        vocab=vocabulary,
        merges=_merges(pieces, vocabulary),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )


def _merges(pieces: list[_Piece], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Merges in the order in which SentencePiece would prefer them: by the score of what they make.

    Among equal scores SentencePiece takes the leftmost pair; ranking a longer left part first has the same effect, as
    it lets the piece at the left grow on. It matters for runs of spaces, whose pieces all share one score.
    """
    scored = [
        (piece.score, cut, piece.text)
        for piece in pieces
        if piece.kind not in (_UNKNOWN, _CONTROL)
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in vocabulary and piece.text[cut:] in vocabulary
    ]
    scored.sort(key=lambda merge: (-merge[0], -merge[1]))
    return [(text[:cut], text[cut:]) for _, cut, text in scored]


def _normalizer(settings: dict[int, bytes | int]) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    charsmap = settings.get(2)
    if isinstance(charsmap, bytes) and charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    if _number(settings, 4, 1):  # remove_extra_whitespaces
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if _number(settings, 3, 1):  # add_dummy_prefix
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
