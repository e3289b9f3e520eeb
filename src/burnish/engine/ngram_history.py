"""Where the end of a text stood before in the same text, and so how it may go on. Torch-free.

Copies are followed as a compressor of the LZ77 family does it: every pair of tokens knows where it stood last, each
place knows the one before, and the longest match among the latest of them is taken. While the text goes on as its copy
did, nothing is looked up.
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
        self._source = _NONE

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, token_ids: Iterable[int]) -> list[tuple[int, bool]]:
        """Take more tokens.

        Returns:
            For each token that was foreseen: how many tokens matched then, and whether it came.
        """
        tokens = self._tokens
        outcomes = []
        for token_id in token_ids:
            if self._source != _NONE:
                hit = tokens[self._source] == token_id
                outcomes.append((self.matched, hit))
                self._source = self._source + 1 if hit else _NONE
                self.matched = self.matched + 1 if hit else 0
            self._append(token_id)
            if self.matched < _LONGEST:
                self._search()
        return outcomes

    def prime(self, token_ids: Iterable[int]) -> None:
        """Take many tokens without foreseeing each of them, as for a prompt."""
        for token_id in token_ids:
            self._append(token_id)
        self._source, self.matched = _NONE, 0
        self._search()

    def guess(self, count: int) -> list[int]:
        """The next tokens as the copy has them; past its end it goes on with itself. Empty when there is no copy."""
        if self._source == _NONE:
            return []
        known = self._tokens[self._source : self._source + count]
        period = len(self._tokens) - self._source
        while len(known) < count:
            known.append(known[len(known) - period])
        return known

    def _append(self, token_id: int) -> None:
        """Add a token, and note its place as what follows the two before it: the last pair itself stays out."""
        tokens = self._tokens
        place = len(tokens)
        earlier = _NONE
        if place >= 2:
            pair = tokens[-2] << 32 | tokens[-1]
            earlier = self._places.get(pair, _NONE)
            self._places[pair] = place
        self._earlier.append(earlier)
        tokens.append(token_id)

    def _search(self) -> None:
        """Look for a place that matches more tokens than the present one."""
        tokens = self._tokens
        if len(tokens) < 3:
            return
        place = self._places.get(tokens[-2] << 32 | tokens[-1], _NONE)
        for _ in range(_CANDIDATES):
            if place == _NONE:
                return
            matched = 2
            while matched < _LONGEST and matched < place and tokens[place - matched - 1] == tokens[-matched - 1]:
                matched += 1
            if matched > self.matched:
                self._source, self.matched = place, matched
            place = self._earlier[place]
