"""Where answers differ: word by word, each against the first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import NamedTuple

_PART = re.compile(r"\s+|\w+|[^\w\s]")
# Matching takes time that grows with the square; longer answers are compared by their beginnings.
_MOST_PARTS = 2_000
# With less in common nearly everything would be marked, which helps nobody to see anything.
_LEAST_SHARED = 0.3


class Segment(NamedTuple):
    """A piece of an answer; joined, the pieces are the answer."""

    text: str
    differs: bool


class _Match(NamedTuple):
    """Two answers' words against each other: the share in common, and the places of the parts that differ in each."""

    shared: float
    first: tuple[int, ...]
    other: tuple[int, ...]


def mark_differences(answers: Sequence[str | None]) -> list[list[Segment]]:
    """Cut answers into pieces that others share and pieces that differ.

    Args:
        answers: the first is what the others are held against; None for one that is not there.

    Returns:
        for every answer its pieces. Of the first, what any other answer has otherwise is marked. Blanks alone are not,
        and neither are answers that share hardly anything (`share_enough`).
    """
    first = answers[0] if answers else None
    if first is None:
        return [[] if text is None else [Segment(text, False)] for text in answers]
    marked: set[int] = set()
    found: list[list[Segment]] = []
    for text in answers[1:]:
        if text is None:
            found.append([])
            continue
        match = _matched(first, text)
        enough = match.shared >= _LEAST_SHARED
        if enough:
            marked.update(match.first)
        found.append(_joined(text, set(match.other) if enough else set()))
    return [_joined(first, marked), *found]


def share_enough(first: str, other: str) -> bool:
    """Whether two answers have so much in common that their differences are marked."""
    return _matched(first, other).shared >= _LEAST_SHARED


@lru_cache(maxsize=64)
def _matched(first: str, other: str) -> _Match:
    """Blanks do not count: every second part is one, which would make the search some times as long."""
    (words, places), (others, others_places) = _words(first), _words(other)
    matcher = SequenceMatcher(None, words, others, autojunk=False)
    differ: list[int] = []
    others_differ: list[int] = []
    common = 0
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            common += b - a
        else:
            differ += places[a:b]
            others_differ += others_places[c:d]
    total = len(words) + len(others)
    return _Match(2 * common / total if total else 1.0, tuple(differ), tuple(others_differ))


def _words(text: str) -> tuple[list[str], list[int]]:
    """The parts of a text's beginning that are no blanks, and their places among all parts."""
    found = [(part, place) for place, part in enumerate(_cut(text)[0]) if not part.isspace()]
    return [part for part, _ in found], [place for _, place in found]


def _cut(text: str) -> tuple[list[str], str]:
    parts = _PART.findall(text)
    return parts[:_MOST_PARTS], "".join(parts[_MOST_PARTS:])


def _joined(text: str, differ: set[int]) -> list[Segment]:
    """Neighbours of one kind as one piece; blanks between two words that differ go with them."""
    parts, rest = _cut(text)
    segments: list[Segment] = []
    for place, part in enumerate(parts):
        mark = place in differ or (part.isspace() and place - 1 in differ and place + 1 in differ)
        if segments and segments[-1].differs == mark:
            segments[-1] = Segment(segments[-1].text + part, mark)
        else:
            segments.append(Segment(part, mark))
    if rest:
        segments.append(Segment(rest, False))
    return segments
