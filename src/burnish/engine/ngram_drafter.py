"""Prompt lookup: what an answer copies from its prompt, or repeats of itself, is guessed and verified in one step.

Saxena, 2023, "Prompt lookup decoding" (github.com/apoorvumang/prompt-lookup-decoding). A step over a few rows costs
hardly more than one over a single row as long as reading the weights takes longer than computing with them. How much
more is measured, how often guesses are right is counted (also of those that were not tried), and a guess is as long as
makes the most tokens per second: none, where none pays. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from weakref import WeakKeyDictionary

from burnish.engine.ngram_history import NgramHistory
from burnish.engine.sequence import Sequence
from burnish.engine.step_costs import StepCosts

MAX_DRAFT = 8
# A gain below this is noise.
_LEAST_GAIN = 1.03
# Where the measured cost is all that stands against a guess, it is measured again after so many steps, and then after
# twice as many, up to the last.
_FIRST_WAIT, _LAST_WAIT = 16, 256
_RETRIED_DRAFT = 4
# The share of right guesses, before any was seen, by how many tokens matched: 2 or 3, 4 to 7, 8 to 15, more.
_PRIOR_SHARES = (0.4, 0.6, 0.75, 0.85)
# How much an estimate counts against what is seen next, and what is kept of the past with every guess.
_PRIOR_WEIGHT, _LOCAL_WEIGHT = 8.0, 4.0
_KEPT, _LOCAL_KEPT = 0.99, 0.95


class AcceptanceShare:
    """How often guesses come true, by how many tokens matched when they were made; the past fades."""

    def __init__(self, *, shares: SequenceOf[float], weight: float, kept: float) -> None:
        self._kept = kept
        self._seen = [weight] * len(shares)
        self._right = [weight * share for share in shares]

    def count(self, matched: int, hit: bool) -> None:
        """Note one guess."""
        place = _bucket(matched)
        self._seen[place] = self._kept * self._seen[place] + 1.0
        self._right[place] = self._kept * self._right[place] + hit

    def share(self, matched: int) -> float:
        """Between 0 and 1."""
        place = _bucket(matched)
        return self._right[place] / self._seen[place]

    def shares(self) -> list[float]:
        """One for each bucket."""
        return [right / seen for right, seen in zip(self._right, self._seen)]


class _Copying:
    """What is known of one sequence."""

    def __init__(self, prompt_ids: SequenceOf[int], shares: SequenceOf[float]) -> None:
        self.history = NgramHistory()
        self.history.prime(prompt_ids)
        self.accepted = AcceptanceShare(shares=shares, weight=_LOCAL_WEIGHT, kept=_LOCAL_KEPT)


class NgramDrafter:
    """A `Drafter` that needs no model.

    Args:
        most_sequences: with more of them decoding at once nothing is guessed; None for any number.
        max_draft: longest guess.
    """

    def __init__(self, *, most_sequences: int | None = None, max_draft: int = MAX_DRAFT) -> None:
        self.most_sequences = most_sequences
        self.max_draft = max_draft
        self.costs = StepCosts()
        self._accepted = AcceptanceShare(shares=_PRIOR_SHARES, weight=_PRIOR_WEIGHT, kept=_KEPT)
        self._copying: WeakKeyDictionary[Sequence, _Copying] = WeakKeyDictionary()
        self._wait = _FIRST_WAIT
        self._waited = 0

    def draft(self, sequences: SequenceOf[Sequence]) -> None:
        """See `Drafter.draft`."""
        if not sequences or (self.most_sequences is not None and len(sequences) > self.most_sequences):
            return
        guesses = [self._guess(sequence) for sequence in sequences]
        # Every guessed token with the chance that it and all before it are right.
        chances = sorted(
            ((chance, place) for place, (_, row) in enumerate(guesses) for chance in row), key=lambda one: -one[0]
        )
        lengths = [0] * len(sequences)
        for _, place in chances[: self._worthwhile(len(sequences), [chance for chance, _ in chances])]:
            lengths[place] += 1
        for sequence, (tokens, _), length in zip(sequences, guesses, lengths):
            sequence.drafts[:] = tokens[:length]

    def observe(self, num_rows: int, seconds: float) -> None:
        """See `Drafter.observe`."""
        self.costs.observe(num_rows, seconds)

    def _guess(self, sequence: Sequence) -> tuple[list[int], list[float]]:
        copying = self._copying.get(sequence)
        if copying is None:
            copying = self._copying[sequence] = _Copying(sequence.prompt_ids, self._accepted.shares())
        history, accepted = copying.history, copying.accepted
        for matched, hit in history.extend(sequence.tokens(len(history), sequence.num_tokens)):
            accepted.count(matched, hit)
            self._accepted.count(matched, hit)
        room = sequence.max_tokens - len(sequence.token_ids) - 1
        tokens = history.guess(max(0, min(self.max_draft, room)))
        chances, chance = [], 1.0
        for place in range(len(tokens)):
            chance *= accepted.share(history.matched + place)
            chances.append(chance)
        return tokens, chances

    def _worthwhile(self, num_sequences: int, chances: list[float]) -> int:
        """How many of the guessed tokens, the surest first, give the most tokens per second."""
        alone = num_sequences / self.costs.seconds(num_sequences)
        best, best_rate, expected = 0, alone * _LEAST_GAIN, float(num_sequences)
        for count, chance in enumerate(chances, start=1):
            expected += chance
            rate = expected / self.costs.seconds(num_sequences + count)
            if rate > best_rate:
                best, best_rate = count, rate
        if best:
            self._wait, self._waited = _FIRST_WAIT, 0
            return best
        retried = chances[:_RETRIED_DRAFT]
        if num_sequences + sum(retried) < num_sequences * _LEAST_GAIN:
            return 0  # It would not pay at any cost.
        self._waited += 1
        if self._waited < self._wait:
            return 0
        self._wait, self._waited = min(2 * self._wait, _LAST_WAIT), 0
        return len(retried)


def _bucket(matched: int) -> int:
    return min(max(matched.bit_length() - 2, 0), len(_PRIOR_SHARES) - 1)
