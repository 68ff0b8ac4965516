"""Vectorised mask look-ups against a loop over cells, for masks of all sizes in one call."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_patching import Corpus, ForegroundMask, SlideIndex, bitmaps
from online_patching.errors import MaskError
from online_patching.slide_index import Codec, Level

SHAPES = [(1, 1), (1, 9), (7, 1), (37, 53), (64, 64), (20, 131), (3, 200), (90, 65), (12, 8)]


def slide(name: str, width: int, height: int) -> SlideIndex:
    level = Level(
        width, height, 256, 240, 1.0, 1.0, 0.31, 0.31, Codec("jpeg"), np.zeros(0, np.uint64)
    )
    level = Level(**{**level.__dict__, "rows": np.arange(level.n_tiles, dtype=np.uint64)})
    return SlideIndex(name, f"/{name}.svs", "svs", "aperio", 0.31, 0.31, "file", (level,))


@pytest.fixture(scope="module")
def corpus() -> tuple[Corpus, list[np.ndarray]]:
    """One slide a shape, with masks from nearly empty to full."""
    rng = np.random.default_rng(11)
    slides, masks, arrays = [], [], []
    for k, shape in enumerate(SHAPES):
        tissue = rng.random(shape) < (0.05, 0.5, 1.0)[k % 3]
        tissue[-1, -1] = True
        size = (shape[1] * 37 + 11 * k, shape[0] * 41 + 5 * k)
        slides.append(slide(f"s{k}", *size))
        masks.append(ForegroundMask.from_array(tissue, size, (0.31, 0.31)))
        arrays.append(tissue)
    return Corpus.from_slides(slides, masks), arrays


def share_by_cell(tissue: np.ndarray, size: tuple[int, int], box: tuple[float, ...]) -> float:
    """Share of a box that is tissue, cell by cell, in exact arithmetic."""
    x, y, w, h = (Fraction(value) for value in box)
    (rows, columns), total = tissue.shape, Fraction(0)
    cell_w, cell_h = Fraction(size[0], columns), Fraction(size[1], rows)
    for r, c in zip(*np.nonzero(tissue), strict=True):
        across = min((int(c) + 1) * cell_w, x + w) - max(int(c) * cell_w, x)
        down = min((int(r) + 1) * cell_h, y + h) - max(int(r) * cell_h, y)
        total += max(across, Fraction(0)) * max(down, Fraction(0))
    return float(total / (w * h))


SIDES = st.floats(-0.4, 1.3, allow_subnormal=False)
BOXES = st.tuples(
    st.integers(0, len(SHAPES) - 1),
    SIDES,
    SIDES,
    st.floats(0.001, 1.6),
    st.floats(0.001, 1.6),
    st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(BOXES, min_size=1, max_size=6))
def test_shares_of_boxes_are_exact_and_the_same_alone_or_together(corpus, boxes):
    packed, arrays = corpus
    rows = np.array([box[0] for box in boxes])
    sizes = [packed.mask(int(row)).size_px0 for row in rows]
    scaled = []
    for (_, x, y, w, h, whole), (width, height) in zip(boxes, sizes, strict=True):
        box = (x * width, y * height, w * width, h * height)
        scaled.append(tuple(float(max(1, round(v))) if whole else v for v in box))
    together = packed.tissue_fractions(rows, *np.array(scaled).T)
    for row, size, one, share in zip(rows, sizes, scaled, together, strict=True):
        assert share == packed.mask(int(row)).fraction(*one)
        assert share == pytest.approx(share_by_cell(arrays[row], size, one), abs=1e-9)


def test_every_tissue_cell_of_every_mask_is_found_in_one_call(corpus):
    packed, arrays = corpus
    wanted = [(s, k, r, c) for s, a in enumerate(arrays) for k, (r, c) in enumerate(np.argwhere(a))]
    np.random.default_rng(3).shuffle(wanted)
    rows, cells, at_row, at_column = np.array(wanted).T
    u, v = np.random.default_rng(4).random((2, len(rows)))
    x, y = packed.tissue_points(rows, cells, u, v)
    for i in range(len(rows)):
        (height, width), (w, h) = arrays[rows[i]].shape, packed.mask(int(rows[i])).size_px0
        assert x[i] == (at_column[i] + u[i]) * w / width
        assert y[i] == (at_row[i] + v[i]) * h / height
        if i % 50 == 0:
            assert (x[i], y[i]) == packed.mask(int(rows[i])).tissue_point(cells[i], u[i], v[i])


def test_masks_larger_than_a_piece_are_looked_up_in_pieces(corpus, monkeypatch):
    packed, _ = corpus
    rng = np.random.default_rng(9)
    rows = rng.integers(0, len(SHAPES), 300)
    cells = (rng.random(300) * packed.records["tissue_cells"][rows]).astype(int)
    sizes = np.stack([packed.records["width_px0"], packed.records["height_px0"]])[:, rows]
    box = (*(rng.uniform(-0.2, 1, (2, 300)) * sizes), *(rng.uniform(0, 1.2, (2, 300)) * sizes))
    at_once = packed.tissue_fractions(rows, *box), packed.tissue_points(rows, cells, box[0], box[1])
    for limit in (1, 7, 64):
        monkeypatch.setattr(bitmaps, "_PIECE_WORDS", limit)
        assert (packed.tissue_fractions(rows, *box) == at_once[0]).all()
        points = packed.tissue_points(rows, cells, box[0], box[1])
        assert (np.array(points) == np.array(at_once[1])).all()


def test_boxes_outside_the_slide_or_of_no_size_hold_nothing(corpus):
    packed, _ = corpus
    w, h = packed.mask(4).size_px0
    boxes = np.array(
        [(-50, 0, 50, h), (w, 0, 10, h), (0, -9, w, 9), (0, h, w, 5), (5, 5, 0, 9), (5, 5, 9, 0)],
        float,
    )
    assert (packed.tissue_fractions([4] * len(boxes), *boxes.T) == 0).all()
    assert packed.tissue_fractions([], [], [], [], []).shape == (0,)
    assert packed.tissue_points([], [], [], [])[0].shape == (0,)


@pytest.mark.parametrize("cell", [-1, 10**6])
def test_a_cell_that_is_not_there_is_one_clear_error(corpus, cell):
    with pytest.raises(MaskError, match="no tissue cell number"):
        corpus[0].mask(3).tissue_point(cell, 0.5, 0.5)
