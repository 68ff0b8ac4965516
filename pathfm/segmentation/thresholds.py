"""Masks by thresholds: what a model has to be better than. No weights, no torch.

Each method of `THRESHOLDS` is a pure function, thumbnail (h, w, 3) uint8 -> (h, w) bool, with the
constants of its source; whoever compares them gives all the same `tidy`, so that a method is neither
helped nor harmed by the clean-up its source adds. CLAM's contour filter, for example, is left out.

    otsu              grey below Otsu's threshold                  Otsu 1979; histolab, tiatoolbox
    saturation        median-blurred saturation above 8, closed    CLAM, create_patches_fp.py
    saturation_otsu   the same with Otsu's threshold               CLAM, use_otsu
    hsv               hue, saturation and value in a box           kaiko's Midnight, its tile filter
    entropy           local entropy of grey above 5 bits           IBM's deep-histopath
    saturated_or_dark Otsu on saturation, or on brightness         this project's own: `otsu_mask`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Thumbnail = NDArray[np.uint8]
Plane = NDArray[np.uint8]


def otsu_threshold(values: Plane) -> int:
    """The grey level t that separates values <= t from values > t best (Otsu 1979).

    Maximises the variance between the two classes; the lowest such level when several tie.
    """
    counts = np.bincount(values.ravel(), minlength=256).astype(np.float64)
    levels = np.arange(256)
    below, mass = counts.cumsum(), (counts * levels).cumsum()
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mass[-1] * below / below[-1] - mass) ** 2 / (below * above)
    return int(np.nanargmax(np.where(np.isfinite(between), between, -1.0)))


def grey(thumbnail: Thumbnail) -> Plane:
    """Luma of ITU-R 601, rounded: (h, w, 3) -> (h, w) uint8."""
    weighted = thumbnail.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.asarray(np.rint(weighted), np.uint8)


def hsv(thumbnail: Thumbnail) -> NDArray[np.uint8]:
    """Hue 0..179 (steps of 2 degrees), saturation and value 0..255: (h, w, 3), as OpenCV has them.

    Grey pixels have hue 0, black ones saturation 0.
    """
    rgb = thumbnail.astype(np.int16)
    high, low = rgb.max(axis=2), rgb.min(axis=2)
    spread = (high - low).astype(np.float32)
    safe = np.where(spread == 0, 1, spread)
    r, g, b = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    sextant = np.where(
        high == r, (g - b) / safe, np.where(high == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    hue = np.where(spread == 0, 0, np.rint(30 * sextant) % 180)
    saturation = np.rint(255 * spread / np.maximum(high, 1))
    return np.stack([hue, saturation, high], axis=2).astype(np.uint8)


def otsu(thumbnail: Thumbnail) -> Mask:
    """Grey at or below Otsu's threshold: the plainest method, and the most used.

    It always finds something dark: bare glass of one grey is empty, of two half full.
    """
    levels = grey(thumbnail)
    return np.asarray((levels <= otsu_threshold(levels)) & (levels.min() < levels.max()))


def saturation(
    thumbnail: Thumbnail, above: int | None = 8, median_px: int = 7, close_px: int = 4
) -> Mask:
    """Saturation, median-blurred, above a threshold (None: Otsu's), closed: CLAM's way.

    The defaults are those of CLAM's `create_patches_fp.py` (sthresh 8, mthresh 7, close 4; Lu et al.
    2021). Edges are repeated for the median. The closing is a true one; OpenCV's with an even side
    moves the mask by a pixel.
    """
    from scipy import ndimage

    blurred = ndimage.median_filter(hsv(thumbnail)[..., 1], size=median_px, mode="nearest")
    mask = blurred > (otsu_threshold(blurred) if above is None else above)
    if close_px <= 1:
        return np.asarray(mask)
    padded = np.pad(mask, close_px)  # so that the closing does not feel the picture's edge
    closed = ndimage.binary_closing(padded, np.ones((close_px, close_px), np.bool_))
    return np.asarray(closed[close_px:-close_px, close_px:-close_px] | mask)


def saturation_otsu(thumbnail: Thumbnail) -> Mask:
    """`saturation` with Otsu's threshold in place of 8: CLAM's `use_otsu`."""
    return saturation(thumbnail, above=None)


def hsv_box(thumbnail: Thumbnail) -> Mask:
    """Hue 90-180 (180-360 degrees: blue to red), saturation >= 8, value >= 103.

    The pixel rule of the tile filter of kaiko's Midnight (Karasikov et al. 2025), where a tile is
    kept when 60 % of its pixels pass. Made for H&E: DAB's brown has another hue.
    """
    planes = hsv(thumbnail)
    return np.asarray((planes[..., 0] >= 90) & (planes[..., 1] >= 8) & (planes[..., 2] >= 103))


def local_entropy(levels: Plane, side_px: int = 9) -> NDArray[np.float32]:
    """Shannon entropy, bits, of the grey levels in the square around each pixel: (h, w) float32.

    `side_px` is odd. At the picture's edge the square is cut off. As scikit-image's `rank.entropy`.
    """
    height, width = levels.shape
    half = side_px // 2
    bottom, top = _span(height, half)
    right, left = _span(width, half)
    pixels = ((bottom - top)[:, None] * (right - left)).astype(np.float32)
    n = np.arange(side_px**2 + 1, dtype=np.float32)
    n_log_n = n * np.log2(np.maximum(n, 1))
    total = np.zeros(levels.shape, np.float32)
    for level in np.flatnonzero(np.bincount(levels.ravel(), minlength=256)):
        # sums over a rectangle are four corners of the running sum
        summed = np.zeros((height + 1, width + 1), np.int32)
        (levels == level).cumsum(axis=0, dtype=np.int32).cumsum(axis=1, out=summed[1:, 1:])
        strip = summed[bottom] - summed[top]
        total += n_log_n[strip[:, right] - strip[:, left]]
    return np.asarray(np.log2(pixels) - total / pixels, np.float32)


def _span(length_px: int, half_px: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """(end, start) of the window around each pixel of a line."""
    at = np.arange(length_px)
    return np.minimum(at + half_px + 1, length_px), np.maximum(at - half_px, 0)


def entropy(thumbnail: Thumbnail, above_bits: float = 5.0) -> Mask:
    """Where grey is varied: local entropy in 9 x 9 px above 5 bits.

    The defaults of `filter_entropy` in IBM's deep-histopath. Blind to smooth tissue by design.
    """
    return np.asarray(local_entropy(grey(thumbnail)) > above_bits)


def otsu_mask(thumbnail: Thumbnail, least_contrast: int = 12) -> Mask:
    """Tissue where a pixel is saturated or dark for its picture: (h, w, 3) uint8 -> (h, w) bool.

    This project's own baseline, not one of the literature's. Two Otsu thresholds: on saturation
    (max - min over RGB) and on brightness (max over RGB). A threshold is used only when its two
    classes' means differ by `least_contrast` grey levels, so an empty slide stays empty. Nearly black
    pixels without colour (scanner padding, ink, the edge of a coverslip) are left out. It cannot tell
    coloured ink from tissue.
    """
    high, low = thumbnail.max(axis=2), thumbnail.min(axis=2)
    chroma = high - low
    tissue = np.zeros(high.shape, np.bool_)
    for values, sign in ((chroma, 1), (high, -1)):
        over = values > otsu_threshold(values)
        if not over.any() or over.all():
            continue
        if values[over].mean() - values[~over].mean() >= least_contrast:
            tissue |= over if sign > 0 else ~over
    return np.asarray(tissue & ~((high < 60) & (chroma < 25)))


THRESHOLDS: Mapping[str, Callable[[Thumbnail], Mask]] = {
    "otsu": otsu,
    "saturation": saturation,
    "saturation_otsu": saturation_otsu,
    "hsv": hsv_box,
    "entropy": entropy,
    "saturated_or_dark": otsu_mask,
}
"""Every method by name."""
