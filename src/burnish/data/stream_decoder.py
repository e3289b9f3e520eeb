"""Turning token ids into text one at a time, so that the pieces together equal decoding all ids at once.

A tokenizer's decoder is a chain of steps. Each known step has a streaming twin here that holds back only what later
tokens can still change: an unfinished UTF-8 sequence, or a run of byte tokens. Work per token does not grow with the
text. A decoder with a step that has no twin is decoded over a sliding window instead.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_REPLACEMENT = "\ufffd"


def byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2), turned round: character -> byte."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


class Step(Protocol):
    """One streaming step: pieces in, pieces out, and what is left at the end."""

    def push(self, piece: str) -> Iterable[str]: ...

    def flush(self) -> Iterable[str]: ...


class _Replace:
    def __init__(self, old: str, new: str) -> None:
        self.old, self.new = old, new

    def push(self, piece: str) -> Iterable[str]:
        yield piece.replace(self.old, self.new)

    def flush(self) -> Iterable[str]:
        return ()


class _ByteFallback:
    """A run of <0xXX> tokens is text only if the whole run is valid UTF-8, so it is held until the run ends."""

    def __init__(self) -> None:
        self.run = bytearray()

    def push(self, piece: str) -> Iterable[str]:
        byte = _BYTE_TOKEN.match(piece)
        if byte:
            self.run.append(int(byte[1], 16))
            return
        yield from self.flush()
        yield piece

    def flush(self) -> Iterable[str]:
        if self.run:
            run, self.run = bytes(self.run), bytearray()
            try:
                yield run.decode("utf-8")
            except UnicodeDecodeError:
                yield _REPLACEMENT * len(run)


class _ByteLevel:
    """Byte-level BPE: characters are bytes; a token with any other character stands for its own UTF-8."""

    def __init__(self) -> None:
        self.alphabet = byte_level_alphabet()
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, piece: str) -> Iterable[str]:
        try:
            raw = bytes(self.alphabet[character] for character in piece)
        except KeyError:
            raw = piece.encode("utf-8")
        yield self.decoder.decode(raw)

    def flush(self) -> Iterable[str]:
        yield self.decoder.decode(b"", final=True)


class _Metaspace:
    """The mark becomes a space, but in the first token it disappears where the tokenizer prepends it."""

    def __init__(self, mark: str, *, drop_first: bool) -> None:
        self.mark, self.drop = mark, drop_first

    def push(self, piece: str) -> Iterable[str]:
        yield piece.replace(self.mark, "" if self.drop else " ")
        self.drop = False

    def flush(self) -> Iterable[str]:
        return ()


class _StripStart:
    """At most `count` leading characters of the whole text are dropped (after the pieces were fused)."""

    def __init__(self, content: str, count: int) -> None:
        self.content, self.left = content, count

    def push(self, piece: str) -> Iterable[str]:
        while self.left and piece:
            if piece[0] != self.content:
                self.left = 0
                break
            piece, self.left = piece[1:], self.left - 1
        yield piece

    def flush(self) -> Iterable[str]:
        return ()


class _JoinWithSpace:
    """What no decoder at all means: tokens joined by spaces."""

    def __init__(self) -> None:
        self.first = True

    def push(self, piece: str) -> Iterable[str]:
        yield piece if self.first else " " + piece
        self.first = False

    def flush(self) -> Iterable[str]:
        return ()


def _steps_for(decoder: Mapping[str, Any] | None) -> list[Step] | None:
    """The streaming steps of a serialized decoder, or None where one of them has no twin."""
    if decoder is None:
        return [_JoinWithSpace()]
    chain = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    steps: list[Step] = []
    fused = False
    for part in chain:
        kind = part["type"]
        if kind == "Replace" and "String" in part["pattern"]:
            old = part["pattern"]["String"]
            if not old or (fused and len(old) > 1):
                return None
            steps.append(_Replace(old, part["content"]))
        elif kind == "ByteFallback" and not fused:
            steps.append(_ByteFallback())
        elif kind == "ByteLevel" and not fused:
            steps.append(_ByteLevel())
            fused = True
        elif kind == "Metaspace" and not fused:
            drop_first = part.get("prepend_scheme", "always") != "never" and part.get("add_prefix_space", True)
            steps.append(_Metaspace(part["replacement"], drop_first=drop_first))
        elif kind == "Strip" and fused and not part["stop"]:
            steps.append(_StripStart(part["content"], part["start"]))
        elif kind == "Fuse":
            fused = True
        else:
            return None
    return steps


class StreamDecoder:
    """Text of a growing list of token ids; made by `Tokenizer.stream_decoder`.

    Args:
        backend: the tokenizer to decode with.
        decoder: its decoder as JSON values, None when it has none.
        skip_ids: ids that leave no text (special tokens).
    """

    def __init__(self, backend: Backend, *, decoder: Mapping[str, Any] | None, skip_ids: frozenset[int]) -> None:
        self._backend = backend
        self._skip = skip_ids
        self._steps = _steps_for(decoder)
        self._window: list[int] = []
        self._read = 0  # characters of the window's text that were given out
        self._held = 0  # ids since text was last given out

    def push(self, token_id: int) -> str:
        """Take one id and return the text that is certain by now; often a word, sometimes nothing."""
        if token_id in self._skip:
            return ""
        if self._steps is None:
            return self._push_window(token_id)
        token = self._backend.id_to_token(token_id)
        return "" if token is None else self._run([token], self._steps)

    def flush(self) -> str:
        """Return what was held back; the stream is over after this."""
        if self._steps is None:
            text = self._backend.decode(self._window, skip_special_tokens=False)
            rest, self._window, self._read = text[self._read :], [], 0
            return rest
        text = ""
        for position, step in enumerate(self._steps):
            text += self._run(list(step.flush()), self._steps[position + 1 :])
        return text

    @staticmethod
    def _run(pieces: list[str], steps: list[Step]) -> str:
        for step in steps:
            pieces = [out for piece in pieces for out in step.push(piece)]
        return "".join(pieces)

    def _push_window(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._backend.decode(self._window, skip_special_tokens=False)
        self._held += 1
        if text.endswith(_REPLACEMENT) and self._held < 16:
            return ""
        piece, self._read, self._held = text[self._read :], len(text), 0
        if len(self._window) >= 64:
            # The last tokens stay as context: decoders look at neighbours (spaces, clean-up), not further back.
            self._window = self._window[-8:]
            self._read = len(self._backend.decode(self._window, skip_special_tokens=False))
        return piece
