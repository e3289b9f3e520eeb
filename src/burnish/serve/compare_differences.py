"""Where answers differ: word by word, each against the first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
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
    words, rest = _cut(first)
    marked = [False] * len(words)
    found: list[list[Segment]] = []
    for text in answers[1:]:
        if text is None:
            found.append([])
            continue
        others, others_rest = _cut(text)
        changed = [False] * len(others)
        matcher = SequenceMatcher(None, words, others, autojunk=False)
        enough = _shared(matcher, words, others) >= _LEAST_SHARED
        for kind, a, b, c, d in matcher.get_opcodes():
            if enough and kind != "equal":
                marked[a:b] = [True] * (b - a)
                changed[c:d] = [True] * (d - c)
        found.append(_joined(others, changed, others_rest))
    return [_joined(words, marked, rest), *found]


def share_enough(first: str, other: str) -> bool:
    """Whether two answers have so much in common that their differences are marked."""
    words, others = _cut(first)[0], _cut(other)[0]
    return _shared(SequenceMatcher(None, words, others, autojunk=False), words, others) >= _LEAST_SHARED


def _shared(matcher: SequenceMatcher[str], words: Sequence[str], others: Sequence[str]) -> float:
    """The share of both answers' words that they have in common in the same order; blanks do not count."""
    common = sum(
        not word.isspace() for match in matcher.get_matching_blocks() for word in words[match.a : match.a + match.size]
    )
    total = sum(not word.isspace() for word in [*words, *others])
    return 2 * common / total if total else 1.0


def _cut(text: str) -> tuple[list[str], str]:
    parts = _PART.findall(text)
    return parts[:_MOST_PARTS], "".join(parts[_MOST_PARTS:])


def _joined(parts: Sequence[str], differs: Sequence[bool], rest: str) -> list[Segment]:
    """Neighbours of one kind as one piece; blanks go with what stands before them."""
    segments: list[Segment] = []
    for place, part in enumerate(parts):
        mark = differs[place] and not part.isspace()
        if part.isspace() and segments and segments[-1].differs:
            mark = place + 1 < len(parts) and differs[place + 1] and differs[place]
        if segments and segments[-1].differs == mark:
            segments[-1] = Segment(segments[-1].text + part, mark)
        else:
            segments.append(Segment(part, mark))
    if rest:
        segments.append(Segment(rest, False))
    return segments
