"""From token pieces to text that is safe to show: whole characters, nothing of a stop string. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class PieceDecoder(Protocol):
    """Turns token ids into text, one at a time, holding back what is not yet a whole character."""

    def push(self, token_id: int, /) -> str: ...

    def flush(self) -> str: ...


class TextStream:
    """The text of one growing answer.

    Text that could be the beginning of a stop string is held back by `take` until it is known not to be one.

    Args:
        decoder: the tokenizer's incremental decoder, fresh for this answer.
        stop: strings that end the answer.
        include_stop: the stop string that ended it stays in the text.
    """

    def __init__(self, decoder: PieceDecoder, stop: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self.text = ""
        self._decoder = decoder
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._longest = max((len(text) for text in self._stop), default=0)
        self._searched = 0
        self._taken = 0
        self._closed = False

    def push(self, token_id: int, *, may_stop: bool = True) -> bool:
        """Add one token; return True when a stop string is complete (the text is then cut before or after it).

        With `may_stop` False, what has arrived so far is never taken for a stop string, now or later.
        """
        return self._append(self._decoder.push(token_id), may_stop)

    def finish(self, *, may_stop: bool = True) -> bool:
        """Add what the decoder still held; nothing is held back any more. Returns True as `push` does."""
        if self._closed:
            return False
        stopped = self._append(self._decoder.flush(), may_stop)
        self._closed = True
        return stopped

    def take(self) -> str:
        """Return the text that became safe to show since the last call."""
        end = len(self.text) if self._closed else len(self.text) - self._held_back()
        piece = self.text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def _append(self, piece: str, may_stop: bool) -> bool:
        self.text += piece
        if not may_stop:
            self._searched = len(self.text)
            return False
        if not piece or not self._stop:
            return False
        begin = max(self._searched, len(self.text) - len(piece) - self._longest + 1, 0)
        found = [(place, stop) for stop in self._stop if (place := self.text.find(stop, begin)) >= 0]
        if not found:
            return False
        # Of two that begin at one place, the shorter was complete first.
        place, stop = min(found, key=lambda match: (match[0], len(match[1])))
        self.text = self.text[: place + len(stop) * self._include_stop]
        self._closed = True
        return True

    def _held_back(self) -> int:
        """How many characters at the end could still grow into a stop string."""
        tail = self.text[max(self._searched, self._taken) :]
        for length in range(min(self._longest - 1, len(tail)), 0, -1):
            ending = tail[-length:]
            if any(stop.startswith(ending) for stop in self._stop):
                return length
        return 0
