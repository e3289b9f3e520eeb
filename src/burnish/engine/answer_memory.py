"""How earlier answers went on after the same tokens: many requests of one kind share their phrases. Torch-free.

The idea is that of suffix decoding (Oliaro et al., 2024, arXiv:2411.04975); what is kept are counts: after the last
one, two, three and four tokens of an answer, the token that came most often. They are of bounded number, and fade.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

ORDERS = 4
# Contexts kept before those are forgotten that were not met since as many others came: about 300 bytes each.
_GENERATION = 1 << 15
# Counts are halved here, so that what is asked today outweighs what was asked long ago.
_MOST_SEEN = 64
# How often a context was seen before it is asked rather than a shorter one.
_ENOUGH = 2

_Entry = list[int]  # the token that came most, how often, the one that last came instead, how often, all there were


class AnswerMemory:
    """What came after the last tokens of answers.

    Args:
        generation: contexts after which those that were not met again since as many are forgotten.
    """

    def __init__(self, *, generation: int = _GENERATION) -> None:
        self._generation = generation
        self._young: dict[tuple[int, ...], _Entry] = {}
        self._old: dict[tuple[int, ...], _Entry] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def learn(self, context: SequenceOf[int], token_id: int) -> None:
        """Note that `token_id` came after the answer so far."""
        for order in range(1, min(ORDERS, len(context)) + 1):
            key = tuple(context[-order:])
            entry = self._young.get(key)
            if entry is None:
                if len(self._young) >= self._generation:
                    self._old, self._young = self._young, {}
                entry = self._young[key] = self._old.pop(key, None) or [token_id, 0, -1, 0, 0]
            entry[4] += 1
            if entry[0] == token_id:
                entry[1] += 1
            elif entry[2] == token_id:
                entry[3] += 1
                if entry[3] > entry[1]:
                    entry[:4] = entry[2], entry[3], entry[0], entry[1]
            else:
                entry[2:4] = token_id, 1
            if entry[4] >= _MOST_SEEN:
                entry[1], entry[3], entry[4] = entry[1] // 2, entry[3] // 2, entry[4] // 2

    def guess(self, context: SequenceOf[int]) -> tuple[int, int, float] | None:
        """What is likely to come next.

        Returns:
            The token, how many tokens before it were compared, and the share of times it came after them, 0 to 1,
            cautious where these are few; None where nothing is known.
        """
        found = None
        for order in range(min(ORDERS, len(context)), 0, -1):
            key = tuple(context[-order:])
            entry = self._young.get(key) or self._old.get(key)
            if entry is None:
                continue
            found = entry[0], order, entry[1] / (entry[4] + 1)
            if entry[4] >= _ENOUGH:
                return found
        return found
