"""What an answer copies from its prompt, repeats of itself or shares with earlier answers, verified in one step.

Prompt lookup (Saxena, 2023, github.com/apoorvumang/prompt-lookup-decoding) for what is copied, an `AnswerMemory` for
what answers of one kind share: for each token the surer of both. A step over a few rows costs hardly more than one over
a single row as long as reading the weights takes longer than computing with them. How much more is measured, how often
guesses are right is counted (also of those that were not tried), and a guess is as long as makes the most tokens per
second: none, where none pays. Torch-free.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from weakref import WeakKeyDictionary

from burnish.engine.answer_memory import ORDERS, AnswerMemory
from burnish.engine.ngram_history import NgramHistory
from burnish.engine.sequence import Sequence
from burnish.engine.step_costs import StepCosts

MAX_DRAFT = 8
# A gain below this is noise.
_LEAST_GAIN = 1.03
# What is less likely to be right is not guessed: a row costs more than that at any size.
_LEAST_CHANCE = 0.1
# Where the measured cost is all that stands against a guess, it is measured again after so many steps, and then after
# twice as many, up to the last.
_FIRST_WAIT, _LAST_WAIT = 16, 256
_RETRIED_DRAFT = 4
# The share of right guesses, before any was seen. Of copies by how many tokens matched: 1, 2 or 3, 4 to 7, 8 to 15,
# more; of the memory by how many tokens were compared (all alike at first) and by the share it tells, in quarters.
_COPY_SHARES = (0.25, 0.4, 0.6, 0.75, 0.85)
_MEMORY_SHARES = (0.15, 0.35, 0.6, 0.85)
_PRIOR_SHARES = _COPY_SHARES + _MEMORY_SHARES * ORDERS
# How much an estimate counts against what is seen next, and what is kept of the past with every guess.
_PRIOR_WEIGHT, _LOCAL_WEIGHT = 8.0, 4.0
_KEPT, _LOCAL_KEPT = 0.99, 0.95
# Adapters with a memory of their own: of more, the one asked longest ago is forgotten.
_MEMORIES = 8

_Guess = tuple[int, int]  # a token, and the kind of evidence for it: a place in _PRIOR_SHARES


class AcceptanceShare:
    """How often guesses come true, by the kind of their evidence; the past fades."""

    def __init__(self, *, shares: SequenceOf[float], weight: float, kept: float) -> None:
        self._kept = kept
        self._seen = [weight] * len(shares)
        self._right = [weight * share for share in shares]

    def count(self, evidence: int, hit: bool) -> None:
        """Note one guess."""
        self._seen[evidence] = self._kept * self._seen[evidence] + 1.0
        self._right[evidence] = self._kept * self._right[evidence] + hit

    def share(self, evidence: int) -> float:
        """Between 0 and 1."""
        return self._right[evidence] / self._seen[evidence]

    def shares(self) -> list[float]:
        """One for each kind."""
        return [right / seen for right, seen in zip(self._right, self._seen)]


class _Following:
    """What is known of one sequence: its text, its answer, and how good guesses were."""

    def __init__(self, prompt_ids: SequenceOf[int], shares: SequenceOf[float], memory: AnswerMemory) -> None:
        self.history = NgramHistory()
        self.history.prime(prompt_ids)
        self.answer: list[int] = []
        self.memory = memory
        self.accepted = AcceptanceShare(shares=shares, weight=_LOCAL_WEIGHT, kept=_LOCAL_KEPT)

    def guesses(self) -> list[_Guess]:
        """What may come next; none, one or two."""
        found = []
        if (token_id := self.history.following) is not None:
            found.append((token_id, min(self.history.matched.bit_length(), len(_COPY_SHARES)) - 1))
        if (told := self.memory.guess(self.answer)) is not None:
            token_id, order, share = told
            level = min(int(share * len(_MEMORY_SHARES)), len(_MEMORY_SHARES) - 1)
            found.append((token_id, len(_COPY_SHARES) + (order - 1) * len(_MEMORY_SHARES) + level))
        return found

    def append(self, token_id: int) -> None:
        """Take a token that came."""
        self.memory.learn(self.answer, token_id)
        self.history.append(token_id)
        self.answer.append(token_id)

    def draft(self, count: int) -> tuple[list[int], list[float]]:
        """At most `count` tokens, each with the chance that it and all before it are right."""
        mark, length, chance = self.history.mark(), len(self.answer), 1.0
        tokens: list[int] = []
        chances: list[float] = []
        while len(tokens) < count and (guesses := self.guesses()):
            share, token_id = max((self.accepted.share(evidence), token_id) for token_id, evidence in guesses)
            chance *= share
            if chance < _LEAST_CHANCE:
                break
            tokens.append(token_id)
            chances.append(chance)
            self.history.foresee(token_id)
            self.answer.append(token_id)
        self.history.back(mark)
        del self.answer[length:]
        return tokens, chances


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
        self._following: WeakKeyDictionary[Sequence, _Following] = WeakKeyDictionary()
        # By adapter: each has its own way of answering.
        self._memories: dict[int, AnswerMemory] = {}
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
        following = self._following.get(sequence)
        if following is None:
            memory = self._memory(sequence.adapter_number)
            following = self._following[sequence] = _Following(sequence.prompt_ids, self._accepted.shares(), memory)
        for token_id in sequence.token_ids[len(following.answer) :]:
            for guessed, evidence in following.guesses():
                following.accepted.count(evidence, guessed == token_id)
                self._accepted.count(evidence, guessed == token_id)
            following.append(token_id)
        room = sequence.max_tokens - len(sequence.token_ids) - 1
        return following.draft(max(0, min(self.max_draft, room)))

    def _memory(self, adapter_number: int) -> AnswerMemory:
        memory = self._memories.pop(adapter_number, None)
        if memory is None:
            memory = AnswerMemory()
            if len(self._memories) >= _MEMORIES:
                del self._memories[next(iter(self._memories))]
        self._memories[adapter_number] = memory  # the latest last
        return memory

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
