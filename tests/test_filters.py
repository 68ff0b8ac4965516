"""Pixel filters: HSV as OpenCV defines it, sharpness, and decisions that no batch can change."""

from __future__ import annotations

import colorsys
import hashlib

import numpy as np
import pytest
from scipy.ndimage import correlate, gaussian_filter

from online_patching import PatchSampler
from online_patching.errors import SamplerError
from online_patching.sampling import filters
from online_patching.sampling.filters import (
    BlurFilter,
    HsvFilter,
    PixelFilter,
    rgb_to_hsv,
    sharpness,
)
from tests.sampling import three_corpus

BOTH = [HsvFilter(), BlurFilter()]


def colours(step: int) -> np.ndarray:
    levels = np.arange(0, 256, step, dtype=np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)


def test_hsv_is_opencv_s():
    """SHA-256 of cv2 5.0.0's COLOR_RGB2HSV of these 140,608 colours."""
    digest = hashlib.sha256(rgb_to_hsv(colours(5)).tobytes()).hexdigest()
    assert digest == "17d015b0e2005a2548a0746373ffc8e075495af198fd224e1f9636be91ad2e3f"


def test_hsv_is_the_textbook_s_to_one_step():
    """Against colorsys, colour by colour; fixed point may round one step the other way."""
    some = colours(15)
    got = rgb_to_hsv(some).astype(int)
    for (r, g, b), (hue, saturation, value) in zip(some.tolist(), got.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(r / 255, g / 255, b / 255)
        assert value == round(v * 255)
        assert abs(saturation - s * 255) <= 1
        assert min(abs(hue - h * 180), 180 - abs(hue - h * 180)) <= 1


def patch_of(*parts: tuple[int, tuple[int, int, int]]) -> np.ndarray:
    """A patch of 10 x 10 pixels: so many of each colour."""
    pixels = [colour for count, colour in parts for _ in range(count)]
    return np.asarray(pixels, np.uint8).reshape(1, 10, 10, 3)


TISSUE, GLASS, BLACK, GREEN = (200, 120, 190), (240, 240, 240), (60, 20, 50), (40, 180, 60)


@pytest.mark.parametrize("other", [GLASS, BLACK, GREEN])
def test_a_patch_needs_its_share_of_tissue_coloured_pixels(other):
    assert HsvFilter().keep(patch_of((60, TISSUE), (40, other))).tolist() == [True]
    assert HsvFilter().keep(patch_of((59, TISSUE), (41, other))).tolist() == [False]


def kept_by_loop(one: HsvFilter, patch: np.ndarray) -> bool:
    good = 0
    for h, s, v in rgb_to_hsv(patch).reshape(-1, 3).tolist():
        good += (
            (one.hue[0] <= h <= one.hue[1])
            and (one.saturation[0] <= s <= one.saturation[1])
            and (one.value[0] <= v <= one.value[1])
        )
    return good >= one.min_share * (patch.size // 3)


@pytest.mark.parametrize(
    "one",
    [
        HsvFilter(),
        HsvFilter(0.3, (20, 70), (0, 255), (50, 200)),
        HsvFilter(0.15, (0, 90), (80, 200)),
    ],
)
def test_ranges_are_closed_and_counted_pixel_by_pixel(one):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 12, 9, 3), dtype=np.uint8)
    pixels[:, :, :5] = rng.integers(150, 220, (40, 1, 1, 3))
    expected = [kept_by_loop(one, patch) for patch in pixels]
    assert one.keep(pixels).tolist() == expected
    assert 0 < sum(expected) < 40


def test_that_test_fails_on_blue_first_pixels(monkeypatch):
    right = filters.hexagon
    monkeypatch.setattr(filters, "hexagon", lambda pixels: right(pixels[..., ::-1]))
    assert HsvFilter().keep(patch_of((100, (220, 160, 120)))).tolist() == [True]
    monkeypatch.undo()
    assert HsvFilter().keep(patch_of((100, (220, 160, 120)))).tolist() == [False]


def test_sharpness_is_the_variance_of_the_laplacian():
    patch = np.random.default_rng(1).integers(0, 256, (31, 20, 3), dtype=np.uint8)
    gray = np.rint(patch @ np.asarray([0.299, 0.587, 0.114]))
    kernel = np.asarray([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    expected = correlate(gray, kernel)[1:-1, 1:-1].var()
    assert sharpness(patch) == pytest.approx(expected, rel=2e-3)


def test_sharpness_is_opencv_s():
    """cv2 5.0.0: Laplacian (CV_64F) of COLOR_RGB2GRAY, inner pixels."""
    patch = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert sharpness(patch) == pytest.approx(49756.85942523234, rel=1e-12)


def test_blurred_patches_are_dropped():
    sharp = np.random.default_rng(2).integers(100, 160, (6, 64, 64, 3), dtype=np.uint8)
    soft = np.stack([gaussian_filter(patch, (2, 2, 0)) for patch in sharp])
    assert BlurFilter().keep(sharp).all()
    assert not BlurFilter().keep(soft).any()
    assert not BlurFilter().keep(np.full((1, 8, 8, 3), 200, np.uint8)).any()
    assert sharpness(np.zeros((2, 9, 3), np.uint8)) == 0


@pytest.mark.parametrize("one", BOTH, ids=lambda f: f.name)
def test_a_patch_gets_the_same_answer_alone_and_in_a_batch(one):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (30, 16, 16, 3), dtype=np.uint8) // rng.integers(
        1, 60, (30, 1, 1, 1)
    )
    pixels = pixels.astype(np.uint8)
    whole = one.keep(pixels)
    assert whole.shape == (30,)
    assert whole.dtype == bool
    assert [one.keep(patch[None])[0] for patch in pixels] == whole.tolist()
    assert one.keep(pixels[:0]).shape == (0,)
    strided = np.empty((16, 16, 30, 3), np.uint8)
    strided[:] = pixels.transpose(1, 2, 0, 3)
    assert (one.keep(strided.transpose(2, 0, 1, 3)) == whole).all()


@pytest.mark.parametrize("one", BOTH, ids=lambda f: f.name)
def test_filters_are_part_of_a_stream_s_identity(one):
    assert isinstance(one, PixelFilter)
    corpus = three_corpus()
    plain = PatchSampler(corpus, size_px=64, mpp=1.0)
    filtered = PatchSampler(corpus, size_px=64, mpp=1.0, filters=[one])
    assert filtered.filters == (one,)
    assert filtered.digest != plain.digest
    assert filtered.config["filters"] == [one.config]
    assert (filtered.draw_batch([1, 2]).x_px0 == plain.draw_batch([1, 2]).x_px0).all()


@pytest.mark.parametrize(
    "bad",
    [
        lambda: HsvFilter(min_share=1.5),
        lambda: HsvFilter(hue=(200, 100)),
        lambda: HsvFilter(value=(-1, 10)),
        lambda: BlurFilter(min_variance=-1.0),
        lambda: BlurFilter(min_variance=float("nan")),
    ],
)
def test_senseless_filters_are_refused(bad):
    with pytest.raises(SamplerError):
        bad()
