"""Choosing the next token of every sequence from its logits.

What a sequence draws depends on its own logits, parameters, seed and length only, never on its neighbours: each draw
is one number made from (seed, choice, position), so it is also the same when a sequence is computed anew. (Logits
themselves are equal up to rounding whatever the batch; a tie within that rounding may fall either way.)

Shapes: B sequences, V vocabulary, K rows of one sequence (its last token and its drafts), R rows that report.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Sequence as SequenceOf
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from burnish.engine.drawing import draw
from burnish.engine.logprobs import token_logprobs
from burnish.engine.penalties import TokenCounts, apply_penalties
from burnish.engine.sampled import Sampled
from burnish.engine.sequence import Sequence
from burnish.errors import BurnishError, RequestError


class _Row(NamedTuple):
    """A row of logits: it chooses the token that follows `answer`, the sequence's own or a longer one."""

    sequence: Sequence
    answer: list[int]
    length: int  # of the answer; where its tokens do not matter, `answer` may be shorter


class Sampler:
    """Greedy and random choice. Order of the rules: repetition penalty, presence and frequency penalties, logit bias,
    minimum length, constraint, temperature, top-k, top-p, min-p.
    """

    def __init__(self) -> None:
        self._counts: WeakKeyDictionary[Sequence, TokenCounts] = WeakKeyDictionary()
        self._seeds: WeakKeyDictionary[Sequence, int] = WeakKeyDictionary()

    @staticmethod
    def needs_logits(sequence: Sequence) -> bool:
        """False when the arg-max of the model's logits is this sequence's next token, whatever else is asked."""
        params = sequence.params
        if params.plain_greedy:
            return False
        if params.greedy and params.logprobs is None and params.constraint is None and not params.logit_bias:
            scores = params.prompt_logprobs is not None and not sequence.token_ids
            return scores or params.penalised or (sequence.bans_end and bool(sequence.end_ids))
        return True

    def sample(self, logits_BV: Tensor, sequences: SequenceOf[Sequence]) -> list[Sampled]:
        """Choose one token per sequence.

        Args:
            logits_BV: the model's, any float dtype; may be changed in place.

        Raises:
            BurnishError: a row is not made of numbers.
        """
        return self._choose(logits_BV, [_Row(one, one.token_ids, len(one.token_ids)) for one in sequences])

    def verify(self, logits_KV: Tensor, drafts: SequenceOf[int], sequence: Sequence) -> list[Sampled]:
        """Choose the tokens that follow, as far as the drafts guessed them, and one more.

        Row i of the logits follows the sequence and the first i drafts. A draft is right when it is the very token that
        is chosen in its place, with that place's own random number: the answer is the one without drafts, and so is its
        distribution. An end token is the last of the result; a stop string or `max_tokens` may be met before its end.

        Args:
            logits_KV: (1 + len(drafts), V), any float dtype; may be changed in place.

        Returns:
            1 to 1 + len(drafts) tokens.

        Raises:
            BurnishError: a row is not made of numbers.
        """
        answer, params = sequence.token_ids, sequence.params
        if params.penalised or params.constraint is not None:
            accepted: list[Sampled] = []
            for place in range(len(drafts) + 1):
                answer_now = [*answer, *(one.token_id for one in accepted)]
                accepted += self._choose(logits_KV[place : place + 1], [_Row(sequence, answer_now, len(answer_now))])
                if not _goes_on(accepted[-1].token_id, place, drafts, sequence):
                    break
            return accepted
        rows = [_Row(sequence, answer, len(answer) + place) for place in range(len(drafts) + 1)]
        chosen = self._choose(logits_KV, rows)
        count = 1
        while _goes_on(chosen[count - 1].token_id, count - 1, drafts, sequence):
            count += 1
        return chosen[:count]

    def _choose(self, logits_BV: Tensor, rows: SequenceOf[_Row]) -> list[Sampled]:
        if logits_BV.dtype != torch.float32:
            logits_BV = logits_BV.float()
        reporting = [place for place, row in enumerate(rows) if row.sequence.params.logprobs is not None]
        reported_RV = _rows(logits_BV, reporting).log_softmax(dim=-1) if reporting else None
        failures = self._edit(logits_BV, rows)
        token_ids = self._pick(logits_BV, rows)
        if reported_RV is None and not failures:
            return [Sampled(token_id) for token_id in token_ids]
        reports = {}
        if reported_RV is not None:
            num_top = [rows[place].sequence.params.logprobs or 0 for place in reporting]
            found = token_logprobs(reported_RV, [token_ids[place] for place in reporting], num_top)
            reports = dict(zip(reporting, found))
        return [
            Sampled(-1, failure=failures[place]) if place in failures else Sampled(token_id, reports.get(place))
            for place, token_id in enumerate(token_ids)
        ]

    def _edit(self, logits_BV: Tensor, rows: SequenceOf[_Row]) -> dict[int, RequestError]:
        """Apply, in place, everything that changes logits; returns the rows whose constraint gave up, and why."""
        special = [place for place, row in enumerate(rows) if _edits(row)]
        if not special:
            return {}
        _check_numbers(_rows(logits_BV, special).amax(dim=-1))  # a mask would hide NaN
        penalised = []
        masks: dict[int, np.ndarray] = {}
        failures: dict[int, RequestError] = {}
        for place in special:
            sequence, answer, _ = rows[place]
            if sequence.params.penalised:
                penalised.append((place, sequence.params, self._counted(sequence, answer)))
        apply_penalties(logits_BV, penalised)
        for place in special:
            sequence, answer, length = rows[place]
            if sequence.params.logit_bias:
                ids, values = zip(*sequence.params.biases)
                logits_BV[place, list(ids)] += torch.tensor(values, device=logits_BV.device)
            if length < sequence.params.min_tokens and sequence.end_ids:
                logits_BV[
                    place, [token_id for token_id in sequence.end_ids if token_id < logits_BV.shape[1]]
                ] = -math.inf
            if sequence.constraint is not None:
                try:
                    sequence.constraint.follow(answer)
                    masks[place] = sequence.constraint.allowed()
                except RequestError as error:
                    failures[place] = error
        if masks:
            banned_RV = torch.from_numpy(np.stack([*masks.values()])).to(logits_BV.device) == 0
            places = [*masks]
            logits_BV[places] = logits_BV[places].masked_fill_(banned_RV, -math.inf)
        return failures

    def _pick(self, logits_BV: Tensor, rows: SequenceOf[_Row]) -> list[int]:
        drawn = [place for place, row in enumerate(rows) if not row.sequence.params.greedy]
        if not drawn:
            best_B, ids_B = logits_BV.max(dim=-1)
            _check_numbers(best_B)
            return ids_B.tolist()
        _check_numbers(logits_BV.amax(dim=-1))
        points = [self._uniform(rows[place].sequence, rows[place].length) for place in drawn]
        params = [rows[place].sequence.params for place in drawn]
        token_ids = draw(_rows(logits_BV, drawn), params, points).tolist()
        if len(drawn) == len(rows):
            return token_ids
        greedy = [place for place, row in enumerate(rows) if row.sequence.params.greedy]
        chosen = dict(zip(drawn, token_ids)) | dict(zip(greedy, logits_BV[greedy].max(dim=-1).indices.tolist()))
        return [chosen[place] for place in range(len(rows))]

    def _counted(self, sequence: Sequence, answer: list[int]) -> TokenCounts:
        counts = self._counts.get(sequence)
        if counts is None:
            counts = self._counts[sequence] = TokenCounts(sequence.prompt_ids)
        counts.follow(answer)
        return counts

    def _uniform(self, sequence: Sequence, position: int) -> float:
        """The number in [0, 1) that decides the token at this place of the answer."""
        seed = sequence.params.seed
        if seed is None:
            seed = self._seeds.get(sequence)
            if seed is None:
                seed = self._seeds[sequence] = secrets.randbits(64)
        name = f"{seed}/{sequence.choice}/{position}".encode()
        return (int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def accept_greedy(token_ids: SequenceOf[int], drafts: SequenceOf[int], sequence: Sequence) -> list[Sampled]:
    """As `Sampler.verify`, from the arg-max of each row, for a sequence that needs no logits."""
    count = 1
    while _goes_on(token_ids[count - 1], count - 1, drafts, sequence):
        count += 1
    return [Sampled(token_id) for token_id in token_ids[:count]]


def _goes_on(token_id: int, place: int, drafts: SequenceOf[int], sequence: Sequence) -> bool:
    return place < len(drafts) and token_id == drafts[place] and token_id not in sequence.end_ids


def _edits(row: _Row) -> bool:
    """Whether anything but the model decides this row's logits."""
    sequence = row.sequence
    params = sequence.params
    if params.plain_greedy:
        return False
    return bool(
        params.penalised or params.logit_bias or sequence.constraint is not None or row.length < params.min_tokens
    )


def _rows(logits_BV: Tensor, places: list[int]) -> Tensor:
    return logits_BV if len(places) == logits_BV.shape[0] else logits_BV[places]


def _check_numbers(best_B: Tensor) -> None:
    if not best_B.isfinite().all():
        raise BurnishError(
            "the model's logits are not numbers (NaN or infinite)",
            remedy="Try --dtype float32, or check the checkpoint.",
        )
