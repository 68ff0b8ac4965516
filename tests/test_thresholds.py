"""Threshold methods against loops over pixels and windows, PIL and colorsys."""

from __future__ import annotations

import colorsys
import math
import statistics
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pathfm.segmentation import thresholds
from pathfm.segmentation.thresholds import THRESHOLDS, grey, hsv, local_entropy, otsu_threshold


@pytest.fixture
def noisy() -> np.ndarray:
    rng = np.random.default_rng(4)
    base = np.full((23, 31, 3), (236, 232, 238))
    base[5:17, 8:] = (190, 120, 170)  # reaches the picture's edge
    return np.clip(base + rng.integers(-14, 15, base.shape), 0, 255).astype(np.uint8)


def test_otsus_threshold_is_the_best_by_exhaustive_search(noisy: np.ndarray) -> None:
    values = noisy[..., 1]

    def between(t: int) -> float:
        low, high = values[values <= t], values[values > t]
        if not low.size or not high.size:
            return -1.0
        return low.size * high.size * (float(low.mean()) - float(high.mean())) ** 2

    assert otsu_threshold(values) == max(range(256), key=between)


def test_grey_and_hsv_are_pils_and_colorsyss() -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
    rgb[0, :4] = [(0, 0, 0), (255, 255, 255), (7, 7, 7), (255, 0, 0)]
    assert np.abs(grey(rgb).astype(int) - np.asarray(Image.fromarray(rgb).convert("L"))).max() <= 1
    got = hsv(rgb)
    for (r, g, b), (hue, saturation, value) in zip(
        rgb.reshape(-1, 3).tolist(), got.reshape(-1, 3).tolist(), strict=True
    ):
        h, s, v = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
        assert min(abs(hue - 180 * h), 180 - abs(hue - 180 * h)) <= 0.501
        assert abs(saturation - 255 * s) <= 0.501
        assert value == round(255 * v)


def test_local_entropy_equals_a_loop_over_windows(noisy: np.ndarray) -> None:
    levels = grey(noisy)
    got = local_entropy(levels, 5)
    for y in range(levels.shape[0]):
        for x in range(levels.shape[1]):
            window = levels[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].ravel().tolist()
            shares = [n / len(window) for n in Counter(window).values()]
            expected = -sum(p * math.log2(p) for p in shares)
            assert got[y, x] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("above_level", [20, 23, 26, 40])  # the first few are amid the noise
def test_clams_saturation_equals_a_loop(noisy: np.ndarray, above_level: int) -> None:
    plane = hsv(noisy)[..., 1]
    height, width = plane.shape

    def blurred(y: int, x: int) -> float:
        rows = [min(max(y + d, 0), height - 1) for d in range(-3, 4)]
        columns = [min(max(x + d, 0), width - 1) for d in range(-3, 4)]
        return statistics.median(int(plane[r, c]) for r in rows for c in columns)

    above = np.array([[blurred(y, x) > above_level for x in range(width)] for y in range(height)])
    assert (thresholds.saturation(noisy, above_level, close_px=0) == above).all()
    # closed: every pixel all of whose 4 x 4 squares meet the mask, the picture's edge left open
    meets = np.zeros((height + 9, width + 9), bool)
    padded = np.pad(above, 6)
    for y in range(height + 9):
        for x in range(width + 9):
            meets[y, x] = padded[y : y + 4, x : x + 4].any()
    closed = [
        [meets[y + 3 : y + 7, x + 3 : x + 7].all() for x in range(width)] for y in range(height)
    ]
    assert (thresholds.saturation(noisy, above_level) == np.array(closed)).all()


def test_a_gap_of_three_pixels_is_closed_and_one_of_four_is_not() -> None:
    for gap_px, filled in ((3, True), (4, False)):
        picture = np.full((30, 40, 3), 240, np.uint8)
        picture[:, :10] = picture[:, 10 + gap_px :] = (200, 120, 180)
        got = thresholds.saturation(picture, median_px=1)
        assert got[:, 10 : 10 + gap_px].all() == filled


def test_hsv_keeps_pink_and_purple_and_drops_glass_brown_and_black() -> None:
    colours = [(200, 120, 180), (120, 80, 160), (240, 240, 240), (140, 100, 60), (30, 20, 40)]
    got = thresholds.hsv_box(np.array([colours], np.uint8))
    assert got.tolist() == [[True, True, False, False, False]]


@pytest.mark.parametrize("name", sorted(set(THRESHOLDS) - {"entropy"}))
def test_each_method_finds_a_piece_of_tissue_on_glass(name: str) -> None:
    picture = np.full((40, 60, 3), 240, np.uint8)
    picture[10:30, 20:50] = (190, 110, 170)
    picture[:, ::2] -= 1
    truth = np.zeros((40, 60), bool)
    truth[10:30, 20:50] = True
    kept = picture.copy()
    got = THRESHOLDS[name](picture)
    assert (got == truth).mean() > 0.98
    assert got.dtype == np.bool_
    assert (picture == kept).all()


def test_entropy_finds_what_is_varied_and_not_what_is_smooth() -> None:
    rng = np.random.default_rng(1)
    picture = np.full((60, 80, 3), 240, np.uint8)
    picture[:, :40] = rng.integers(90, 220, (60, 40, 1))
    got = THRESHOLDS["entropy"](picture)
    assert got[4:-4, 4:34].all()
    assert not got[:, 46:].any()


@pytest.mark.parametrize("name", sorted(set(THRESHOLDS) - {"saturation_otsu"}))
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (17, 4)])
def test_bare_glass_of_any_size_is_empty(name: str, shape: tuple[int, int]) -> None:
    got = THRESHOLDS[name](np.full((*shape, 3), 241, np.uint8))
    assert got.shape == shape
    assert not got.any()


def test_our_own_baseline_leaves_out_black_padding_and_faint_noise(noisy: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    glass = (240 + rng.integers(-3, 4, (40, 60, 1))).astype(np.uint8).repeat(3, axis=2)
    assert not thresholds.otsu_mask(glass).any()
    glass[:8] = 0
    assert not thresholds.otsu_mask(glass).any()
    glass[15:35, 3:58] = (205, 120, 170)
    assert thresholds.otsu_mask(glass).sum() == 20 * 55
