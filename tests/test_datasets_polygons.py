"""Polygons as pixels, beside scikit-image's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from skimage import draw

from pathfm.datasets import polygons
from pathfm.datasets.polygons import fill_polygon

HALVES = st.integers(-8, 60).map(lambda n: n / 2)
PLACES = st.one_of(HALVES, st.floats(-20, 50, allow_nan=False))


def by_scikit_image(vertices: np.ndarray, height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    columns, rows = draw.polygon(vertices[:, 0], vertices[:, 1], (width, height))
    mask[rows, columns] = 3
    return mask


def filled(vertices: np.ndarray, height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    fill_polygon(mask, vertices, 3)
    return mask


@example(
    [(0.0, 0.0), (2.0, 2.0), (0.0, 1.0), (1.5, 1.0)]
)  # (1, 1) on two edges: the ray's way decides
@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(PLACES, PLACES), min_size=1, max_size=12))
def test_every_pixel_is_scikit_images(points: list[tuple[float, float]]) -> None:
    vertices = np.asarray(points, np.float64)
    np.testing.assert_array_equal(filled(vertices, 25, 31), by_scikit_image(vertices, 25, 31))


@pytest.mark.parametrize("cells", [1, 100, 5000])
def test_work_in_small_blocks_gives_the_same(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vertices = rng.uniform(-5, 45, (40, 2))
    whole = filled(vertices, 40, 33)
    monkeypatch.setattr(polygons, "_MAX_CELLS", cells)
    np.testing.assert_array_equal(filled(vertices, 40, 33), whole)
    assert 0 < (whole > 0).sum() < whole.size


def test_a_square_holds_the_centres_in_and_on_it() -> None:
    square = np.asarray([(1, 2), (4, 2), (4, 3.5), (1, 3.5)], np.float64)
    rows, columns = np.nonzero(filled(square, 6, 7))
    assert sorted(set(rows.tolist())) == [2, 3]
    assert sorted(set(columns.tolist())) == [1, 2, 3, 4]
    assert len(rows) == 8


def test_what_has_no_pixels_fills_none() -> None:
    for points in ([], [(99, 99), (98, 99), (99, 98)], [(-9, -9), (-3, -4), (-8, -2)]):
        assert not filled(np.asarray(points, np.float64).reshape(-1, 2), 10, 10).any()
