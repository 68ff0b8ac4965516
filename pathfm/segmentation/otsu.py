"""The baseline: Otsu's threshold on saturation and darkness. No weights, no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]


def otsu_threshold(values: NDArray[np.uint8]) -> int:
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


def otsu_mask(thumbnail: NDArray[np.uint8], least_contrast: int = 12) -> Mask:
    """Tissue where a pixel is saturated or dark for its picture: (h, w, 3) uint8 -> (h, w) bool.

    Two Otsu thresholds: on saturation (max - min over RGB) and on brightness (max over RGB).
    A threshold is used only when its two classes' means differ by `least_contrast` grey levels, so
    an empty slide stays empty. Nearly black pixels without colour (scanner padding, ink, the edge
    of a coverslip) are left out. It cannot tell coloured ink from tissue.
    """
    high, low = thumbnail.max(axis=2), thumbnail.min(axis=2)
    saturation = high - low
    tissue = np.zeros(high.shape, np.bool_)
    for values, sign in ((saturation, 1), (high, -1)):
        over = values > otsu_threshold(values)
        if not over.any() or over.all():
            continue
        if values[over].mean() - values[~over].mean() >= least_contrast:
            tissue |= over if sign > 0 else ~over
    return np.asarray(tissue & ~((high < 60) & (saturation < 25)))
