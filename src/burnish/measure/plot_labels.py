"""Where to write names beside points so that none covers another. Torch-free, and free of matplotlib."""

from __future__ import annotations

from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""left, bottom, right, top; y grows upwards."""

_LETTER = 0.6  # mean width of a letter over the font's size, a little generous
_GAP = 4.0


def place_labels(
    names: Sequence[str], blocks: Sequence[Box], *, bounds: Box, font_size: float
) -> list[tuple[float, float]]:
    """Choose each name's left end and baseline.

    Every place around a point is tried in a fixed order, nearest first, and the first that covers nothing is taken;
    where all are covered, the one that covers least.

    Args:
        names: one per point.
        blocks: what each point covers, its interval included.
        bounds: the frame that names stay within.
        font_size: in the same units as the boxes.
    """
    taken: list[Box] = list(blocks)
    places: list[tuple[float, float]] = []
    for name, block in zip(names, blocks):
        width, height = _LETTER * font_size * len(name), font_size
        boxes = [_moved_inside(box, bounds) for box in _candidates(block, width, height)]
        costs = [sum(_overlap(box, other) for other in taken) for box in boxes]
        best = boxes[min(range(len(boxes)), key=lambda number: (costs[number] > 0, costs[number], number))]
        taken.append(best)
        places.append((best[0], best[1] + 0.22 * height))
    return places


def _candidates(block: Box, width: float, height: float) -> list[Box]:
    left, bottom, right, top = block
    middle, level = (left + right) / 2, (bottom + top) / 2
    corners: list[tuple[float, float]] = []
    for step in range(4):
        away = _GAP + step * (height + 1)
        corners.append((middle - width / 2, top + away))
        corners.append((middle - width / 2, bottom - away - height))
        if step == 0:
            corners.append((right + _GAP, level - height / 2))
            corners.append((left - _GAP - width, level - height / 2))
        corners.append((middle - _GAP, top + away))
        corners.append((middle + _GAP - width, top + away))
        corners.append((middle - _GAP, bottom - away - height))
        corners.append((middle + _GAP - width, bottom - away - height))
    return [(x, y, x + width, y + height) for x, y in corners]


def _moved_inside(box: Box, bounds: Box) -> Box:
    left, bottom, right, top = box
    across = max(bounds[0] - left, 0) + min(bounds[2] - right, 0)
    up = max(bounds[1] - bottom, 0) + min(bounds[3] - top, 0)
    return (left + across, bottom + up, right + across, top + up)


def _overlap(first: Box, second: Box) -> float:
    across = min(first[2], second[2]) - max(first[0], second[0])
    up = min(first[3], second[3]) - max(first[1], second[1])
    return max(0.0, across) * max(0.0, up)
