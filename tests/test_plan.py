from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_patching.errors import SamplerError
from online_patching.geometry import Box
from online_patching.plan import can_serve, choose_level, merge_ranges, plan_window, tiles_of
from online_patching.slide_index import Codec, Level, pack_rows


def level(w=1000, h=700, tile=(256, 240), ds=1.0, mpp=0.5) -> Level:
    return Level(w, h, tile[0], tile[1], ds, ds, mpp * ds, mpp * ds, Codec("jpeg"))


@pytest.mark.parametrize(
    ("levels", "asked", "chosen"),
    [
        ([0.25, 1.0, 4.0], 0.25, 0),
        ([0.25, 1.0, 4.0], 0.5, 0),
        ([0.25, 1.0, 4.0], 1.0, 1),
        ([0.25, 1.0, 4.0], 0.99, 1),  # 1 % coarser than asked: within the tolerance
        ([0.25, 1.0, 4.0], 0.97, 0),  # 3 % coarser: not
        ([0.25, 1.0, 4.0], 2.0, 1),
        ([0.25, 1.0, 4.0], 100.0, 2),
        ([0.5, 2.0], 0.25, 0),  # upscaled exactly 2x
    ],
)
def test_the_coarsest_level_that_is_fine_enough(levels, asked, chosen):
    assert choose_level(levels, asked) == chosen


@pytest.mark.parametrize("mpp", [0, -1.0, float("nan"), float("inf")])
def test_a_senseless_mpp_is_refused(mpp):
    with pytest.raises(SamplerError, match="is not a magnification"):
        choose_level([0.25, 1.0], mpp)


def test_more_than_2x_upscaling_is_refused_with_the_numbers():
    assert not can_serve([0.51, 2.0], 0.25)
    with pytest.raises(
        SamplerError, match=r"finest level has 0\.51 µm/px: 0\.25 µm/px would upscale it 2\.0x"
    ):
        choose_level([0.51, 2.0], 0.25)


boxes = st.tuples(
    st.integers(-300, 1200), st.integers(-300, 900), st.integers(1, 600), st.integers(1, 600)
)


@given(boxes)
def test_tiles_are_exactly_those_whose_pixels_the_box_holds(box):
    lv, (x, y, w, h) = level(), box
    owner = np.arange(lv.height_px)[:, None] // 240 * lv.columns + np.arange(lv.width_px) // 256
    expected = np.unique(owner[max(0, y) : max(0, y + h), max(0, x) : max(0, x + w)]).tolist()
    tiles = tiles_of(lv, Box(x, y, x + w, y + h))
    assert [t.number for t in tiles] == expected
    assert all((t.left, t.top) == (t.column * 256, t.row * 240) for t in tiles)


ranges = st.lists(
    st.tuples(st.integers(0, 5000), st.integers(0, 400)).map(lambda r: (r[0], r[0] + r[1]))
)


@given(ranges, st.integers(0, 500), st.integers(100, 3000))
def test_merged_ranges_cover_what_was_asked_and_no_more_than_gaps(asked, gap, most):
    merged = merge_ranges(asked, gap, most)
    wanted = {b for start, stop in asked for b in range(start, stop)}
    read = {b for start, stop in merged for b in range(start, stop)}
    assert wanted <= read
    assert merged == sorted(merged)
    assert all(a[1] < b[0] or a[1] == b[0] for a, b in pairwise(merged))
    for start, stop in asked:
        assert start == stop or any(a <= start and stop <= b for a, b in merged)
    if gap == 0:
        assert read == wanted


def test_neighbours_within_the_gap_are_one_request():
    assert merge_ranges([(0, 100), (110, 200), (500, 600)], 10) == [(0, 200), (500, 600)]
    assert merge_ranges([(0, 100), (110, 200)], 9) == [(0, 100), (110, 200)]
    assert merge_ranges([(0, 100), (100, 200)], 100, max_bytes=150) == [(0, 100), (100, 200)]


def test_an_exact_level_is_cut_at_the_nearest_pixel_and_not_resampled():
    plan = plan_window(level(), 0, (10.5, 20.4, 234.5, 244.4), (224, 224))
    assert plan.window is None
    assert plan.box == Box(11, 20, 235, 244)


@given(st.floats(0, 500), st.floats(0.5, 4.0))
def test_a_resampled_window_has_its_filter_margin(left, scale):
    plan = plan_window(level(), 0, (left, left, left + 64 * scale, left + 64 * scale), (64, 64))
    if plan.window is not None:
        assert plan.window[0] >= max(1, scale)
        assert plan.box.width - plan.window[2] >= max(1, scale)
        assert plan.box.left + plan.window[0] == pytest.approx(left)
        assert plan.window[2] - plan.window[0] == pytest.approx(64 * scale)


def test_packed_rows_survive_huge_offsets_and_lengths():
    offsets, lengths = [0, 5, 2**41, 7], [10, 2**24 - 1, 3, 2**25]
    rows, overflow = pack_rows(offsets, lengths)
    lv = Level(**{**level(1024, 240).__dict__, "rows": rows, "overflow": overflow})
    assert [lv.byte_range(i) for i in range(4)] == [
        (o, o + n) for o, n in zip(offsets, lengths, strict=True)
    ]
