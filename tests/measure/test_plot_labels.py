"""Names beside points do not cover each other, nor the points, nor leave the frame."""

from __future__ import annotations

import itertools

import pytest

from burnish.measure.plot_labels import _overlap, place_labels

BOUNDS = (0.0, 0.0, 320.0, 180.0)
SIZE = 9.5


def boxes(names: list[str], places: list[tuple[float, float]]) -> list[tuple[float, float, float, float]]:
    return [(x, y - 0.22 * SIZE, x + 0.6 * SIZE * len(name), y + 0.78 * SIZE) for name, (x, y) in zip(names, places)]


@pytest.mark.parametrize("apart", [0.0, 5.0, 20.0, 60.0])
def test_labels_of_close_points_do_not_overlap(apart: float) -> None:
    names = ["base", "tuned", "merged", "gptq-8bit", "gptq-4bit"]
    blocks = [(100 + apart * n - 4, 90.0, 100 + apart * n + 4, 110.0) for n in range(5)]
    placed = boxes(names, place_labels(names, blocks, bounds=BOUNDS, font_size=SIZE))
    assert all(_overlap(first, second) == 0 for first, second in itertools.combinations(placed, 2))
    assert all(_overlap(label, block) == 0 for label in placed for block in blocks)


def test_labels_at_the_edges_stay_within_the_frame() -> None:
    names = ["left-most", "right-most"]
    blocks = [(0.0, 170.0, 8.0, 180.0), (312.0, 0.0, 320.0, 8.0)]
    for left, bottom, right, top in boxes(names, place_labels(names, blocks, bounds=BOUNDS, font_size=SIZE)):
        assert left >= 0
        assert bottom >= 0
        assert right <= 320.001
        assert top <= 180.001
