"""What tests of samplers share: three unequal slides, and p-values of the claims they make.

A test of a claim asserts `p > ALPHA`; the same function on a sampler broken on purpose must give
`p < ALPHA`. Seeds are fixed, so a sampler that is right is not refused by chance from day to day.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from online_patching import ForegroundMask, SlideIndex
from online_patching.corpus import Corpus
from online_patching.slide_index import Codec, Level

ALPHA = 1e-4
N = 100_000


def index(
    name: str, w: int, h: int, mpp: float, mpp_y: float | None = None, tile: int = 256
) -> SlideIndex:
    """Levels of downsample 1, 4 and, for the larger ones, 16; sizes that do not divide."""
    mpp_y = mpp if mpp_y is None else mpp_y
    downs = (1, 4, 16) if w > 3000 else (1, 4)
    levels = tuple(
        Level(w // d, h // d, tile, tile, w / (w // d), h / (h // d),
              mpp * w / (w // d), mpp_y * h / (h // d), Codec("raw"))
        for d in downs
    )  # fmt: skip
    return SlideIndex(
        name, f"/nowhere/{name}", "openslide", "test", mpp, mpp_y, "override table", levels
    )


def mask_of(ix: SlideIndex, tissue: np.ndarray) -> ForegroundMask:
    return ForegroundMask.from_array(tissue, ix.dimensions, (ix.mpp_x, ix.mpp_y))


def islands() -> np.ndarray:
    tissue = np.zeros((62, 100), bool)
    tissue[5:25, 8:30] = True
    tissue[40:60, 60:95] = True
    return tissue


def three_slides() -> tuple[list[SlideIndex], list[ForegroundMask]]:
    """All tissue; two separate islands; coarse, µm/px that differ by axis, with an L of tissue."""
    a, b, c = (
        index("a", 900, 700, 0.25),
        index("b", 5000, 3100, 0.26),
        index("c", 2000, 2600, 1.1, 1.14),
    )
    ell = np.zeros((52, 40), bool)
    ell[:, :12] = True
    ell[40:, :] = True
    masks = [mask_of(a, np.ones((7, 9), bool)), mask_of(b, islands()), mask_of(c, ell)]
    return [a, b, c], masks


def three_corpus() -> Corpus:
    return Corpus.from_slides(*three_slides())


def p_of_counts(seen, shares) -> float:
    """Chi-square: are these counts drawn with these shares? A count where no share is: p = 0."""
    seen, shares = np.asarray(seen, float), np.asarray(shares, float)
    if seen[shares <= 0].any():
        return 0.0
    seen, shares = seen[shares > 0], shares[shares > 0]
    if len(seen) == 1:
        return 1.0
    return float(stats.chisquare(seen, shares / shares.sum() * seen.sum()).pvalue)


def p_of_law(values, cdf) -> float:
    """Kolmogorov-Smirnov: do these values follow a continuous law?"""
    return float(stats.kstest(values, cdf).pvalue)


def p_of_same_law(one, other) -> float:
    """Two-sample Kolmogorov-Smirnov."""
    return float(stats.ks_2samp(one, other).pvalue)
