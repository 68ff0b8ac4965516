"""Numbers that judge a mask against its truth: any two boolean arrays (h, w) of one shape.

Pixels in `ignore` take part in nothing. Where a number cannot be formed (the share of fat kept where
no fat is) it is NaN, and means leave it out; what an empty mask scores is said with each function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]

TOLERANCE = 0.0075
"""Boundary tolerance as a share of the picture's diagonal, where none is given in px (BSDS's)."""
HIGHER_IS_BETTER = {
    "dice": True,
    "iou": True,
    "mcc": True,
    "boundary_f": True,
    "tissue_lost": False,
    "glass_taken": False,
}
"""The scores of `MaskScores`, and which way is better."""


@dataclass(frozen=True)
class Counts:
    """Pixels: found and true, found wrongly, missed, rightly left out."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN) = F1; 1 when both masks are empty, 0 when one is."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else 1.0

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN) = Dice / (2 - Dice); 1 when both masks are empty, 0 when one is."""
        total = self.tp + self.fp + self.fn
        return self.tp / total if total else 1.0

    @property
    def mcc(self) -> float:
        """Matthews' correlation coefficient of the hard masks, -1..1.

        Where a mask is all set or all unset the formula is 0/0: then 1 when the masks are equal and 0
        when they are not (scikit-learn says 0 to both).
        """
        if self.fp == self.fn == 0:
            return 1.0
        margins = (self.tp + self.fp, self.tp + self.fn, self.tn + self.fp, self.tn + self.fn)
        if 0 in margins:
            return 0.0
        over = self.tp * self.tn - self.fp * self.fn
        return over / math.sqrt(margins[0] * margins[1]) / math.sqrt(margins[2] * margins[3])

    @property
    def tissue_lost(self) -> float:
        """FN / (TP + FN), the share of true pixels missed; NaN when there are none."""
        total = self.tp + self.fn
        return self.fn / total if total else math.nan

    @property
    def glass_taken(self) -> float:
        """FP / (FP + TN), the share of other pixels taken for true; NaN when there are none."""
        total = self.fp + self.tn
        return self.fp / total if total else math.nan


@dataclass(frozen=True)
class MaskScores:
    """Every score of one mask on one picture."""

    dice: float
    iou: float
    mcc: float
    boundary_f: float
    tissue_lost: float
    glass_taken: float
    kind_px: Mapping[str, int] = field(default_factory=dict)
    """Pixels of each kind that are judged."""
    kind_inside_px: Mapping[str, int] = field(default_factory=dict)
    """Those of them that lie inside the mask."""


def count(predicted: Mask, truth: Mask, ignore: Mask | None = None) -> Counts:
    """The four counts. Raises ValueError for arrays of unequal shapes or not boolean."""
    for mask in (predicted, truth, *(() if ignore is None else (ignore,))):
        if mask.dtype != np.bool_ or mask.shape != predicted.shape:
            raise ValueError(
                f"masks to compare must be bool and of one shape, got {mask.dtype} {mask.shape} "
                f"beside {predicted.dtype} {predicted.shape}"
            )
    judged = np.ones(truth.shape, np.bool_) if ignore is None else ~ignore
    tp = int((predicted & truth & judged).sum())
    fp = int((predicted & ~truth & judged).sum())
    fn = int((~predicted & truth & judged).sum())
    return Counts(tp, fp, fn, int(judged.sum()) - tp - fp - fn)


def tolerance_px(shape: tuple[int, int]) -> float:
    """The boundary tolerance of a picture of (h, w): `TOLERANCE` of its diagonal, at least 1."""
    return max(1.0, TOLERANCE * math.hypot(*shape))


def boundary_f(
    predicted: Mask, truth: Mask, ignore: Mask | None = None, within_px: float | None = None
) -> float:
    """How well two outlines agree: the harmonic mean of boundary precision and recall, 0..1.

    A boundary pixel is set and has one of its four neighbours unset. Precision is the share of
    predicted boundary pixels whose centre lies at most `within_px` (default `tolerance_px`) from
    that of a true one, recall the other way round. By distance as in DAVIS (Perazzi et al. 2016,
    sec. 4, F), without BSDS's one-to-one assignment.

    An outline towards ignored pixels, or along the picture's edge, is none, and boundary pixels
    within the tolerance of ignored ones or of the picture's outermost are not judged, since what
    they should meet may lie there: tissue cut off by the picture has no outline, a mask that ends a
    pixel short of its edge has one. Without a judged boundary in both 1, in one of them 0.
    """
    from scipy import ndimage

    count(predicted, truth, ignore)  # shapes and types
    reach = tolerance_px(predicted.shape) if within_px is None else within_px
    known = np.ones(truth.shape, np.bool_) if ignore is None else ~ignore
    judged = _from_edge_px(known.shape) > reach
    if not known.all():
        judged &= ndimage.distance_transform_edt(known) > reach
    edges = _boundary(predicted, known), _boundary(truth, known)
    shares = []
    for own, other in (edges, edges[::-1]):
        asked = own & judged
        if asked.any():
            near = ndimage.distance_transform_edt(~other) <= reach if other.any() else other
            shares.append(float(near[asked].mean()))
    if len(shares) < 2:
        return 0.0 if shares else 1.0
    precision, recall = shares
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _from_edge_px(shape: tuple[int, ...]) -> NDArray[np.int64]:
    """(h, w): how far each pixel is from the nearest of the picture's outermost ones."""
    rows, columns = (np.minimum(np.arange(n), np.arange(n)[::-1]) for n in shape)
    return np.asarray(np.minimum(rows[:, None], columns))


def _boundary(mask: Mask, known: Mask) -> Mask:
    """Known set pixels with a known unset neighbour."""
    outside = np.pad(known & ~mask, 1)
    beside = outside[:-2, 1:-1] | outside[2:, 1:-1] | outside[1:-1, :-2] | outside[1:-1, 2:]
    return np.asarray(mask & known & beside)


def score_mask(
    predicted: Mask,
    truth: Mask,
    ignore: Mask | None = None,
    kinds: Mapping[str, Mask] | None = None,
    within_px: float | None = None,
) -> MaskScores:
    """All scores of a mask; `kinds` are regions whose pixels inside the mask are counted.

    Raises ValueError for arrays of unequal shapes.
    """
    counts = count(predicted, truth, ignore)
    judged = {k: m if ignore is None else m & ~ignore for k, m in (kinds or {}).items()}
    return MaskScores(
        **{name: getattr(counts, name) for name in HIGHER_IS_BETTER if name != "boundary_f"},
        boundary_f=boundary_f(predicted, truth, ignore, within_px),
        kind_px={name: int(mask.sum()) for name, mask in judged.items()},
        kind_inside_px={name: int((mask & predicted).sum()) for name, mask in judged.items()},
    )
