"""Where the end of a text stood before in the same text, and so how it may go on. Torch-free.

Copies are followed as a compressor of the LZ77 family does it: every pair of tokens knows where it stood last, each
place knows the one before, and the longest match among the latest of them is taken; a token alone knows its last place.
While the text goes on as its copy did, nothing is looked up.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

# Places that are compared, and tokens that are compared at each: both bound the work for one token.
_CANDIDATES = 16
_LONGEST = 32
_NONE = -1


class NgramHistory:
    """One text, token by token. Work for each token is bounded, whatever the length.

    Attributes:
        matched: tokens at the text's end that also precede the place it is copied from; 0 when it is no copy.
    """

    def __init__(self) -> None:
        self.matched = 0
        self._tokens: list[int] = []
        # Where the token after the pair last stood, and for each such place the one before it.
        self._places: dict[int, int] = {}
        self._earlier = array("i")
        # Where the token after this one last stood.
        self._singles: dict[int, int] = {}
        self._source = _NONE

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def following(self) -> int | None:
        """The next token as the copy has it; past the copy's end it goes on with itself. None without a copy."""
        return None if self._source == _NONE else self._tokens[self._source]

    def prime(self, token_ids: Iterable[int]) -> None:
        """Take many tokens without foreseeing each of them, as for a prompt."""
        for token_id in token_ids:
            self._tokens.append(token_id)
            self._note_last()
        self._source, self.matched = _NONE, 0
        self._search()

    def append(self, token_id: int) -> None:
        """Take one more token."""
        self._advance(token_id)
        self._note_last()
        self._search()

    def foresee(self, token_id: int) -> None:
        """Suppose that this token comes next: `following` and `matched` are then what they would be after it."""
        self._advance(token_id)
        self._search()

    def mark(self) -> tuple[int, int, int]:
        """The present state, for `back`."""
        return len(self._tokens), self._source, self.matched

    def back(self, mark: tuple[int, int, int]) -> None:
        """Drop every token that was foreseen since the mark."""
        length, self._source, self.matched = mark
        del self._tokens[length:]

    def _advance(self, token_id: int) -> None:
        if self._source != _NONE:
            hit = self._tokens[self._source] == token_id
            self._source = self._source + 1 if hit else _NONE
            self.matched = self.matched + 1 if hit else 0
        self._tokens.append(token_id)

    def _note_last(self) -> None:
        """Note the last token's place as what follows those before it: what ends with it stays out."""
        tokens = self._tokens
        place = len(tokens) - 1
        earlier = _NONE
        if place >= 1:
            self._singles[tokens[-2]] = place
        if place >= 2:
            pair = tokens[-3] << 32 | tokens[-2]
            earlier = self._places.get(pair, _NONE)
            self._places[pair] = place
        self._earlier.append(earlier)

    def _search(self) -> None:
        """Look for a place that matches more tokens than the present one."""
        tokens = self._tokens
        if len(tokens) < 2 or self.matched >= _LONGEST:
            return
        place = self._places.get(tokens[-2] << 32 | tokens[-1], _NONE)
        for _ in range(_CANDIDATES):
            if place == _NONE:
                break
            matched = 2
            while matched < _LONGEST and matched < place and tokens[place - matched - 1] == tokens[-matched - 1]:
                matched += 1
            if matched > self.matched:
                self._source, self.matched = place, matched
            place = self._earlier[place]
        if not self.matched:
            place = self._singles.get(tokens[-1], _NONE)
            if place != _NONE:
                self._source, self.matched = place, 1
