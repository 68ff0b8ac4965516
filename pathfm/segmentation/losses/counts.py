"""Soft counts of a segmentation, the core of every loss here: TP, FP, FN, TN from logits.

With p = sigmoid(logits), or softmax over the classes, and y the truth, both 0..1:

    TP = sum p y    FP = sum p (1 - y)    FN = sum (1 - p) y    TN = sum (1 - p)(1 - y)

Each is summed by itself: taken as differences (FP = sum p - TP) they would cancel in float32.
Two kinds of input, told apart by their axes:

    binary        logits (B, h, w), truth (B, h, w) bool or 0..1: one class, the foreground
    multi-class   logits (B, C, h, w), truth (B, h, w) integers 0..C-1

Any number of axes, none included, may stand in for (h, w). One-hot truth (B, C, h, w) therefore looks
like binary volumes, and is counted as such: give class numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pathfm.runtime import PathfmError
from pathfm.segmentation.loss_terms import LARGEST, EmptyRule, Reduction

# A class is absent where its truth, and predicted empty where its prediction, is less than this.
ABSENT_PX = 1e-3
# torch has too few operations for these
_UNCOUNTABLE = (torch.uint16, torch.uint32, torch.uint64)


@dataclass(frozen=True, eq=False)
class Averaging:
    """How the losses of classes and pictures become one number.

    reduction     "image": count every picture by itself, then take the mean over pictures, so that
                  a small piece of tissue weighs as much as a large one. "batch": count the whole
                  batch as one picture; steadier where most pictures lack most classes.
    empty         what a class does that the truth of a picture (or batch) does not hold. "count": it
                  takes part, and scores 1 where it is predicted empty too. "skip": it takes no part,
                  so that false positives of absent classes cost nothing.
    class_weights one weight a class of multi-class logits, >= 0: sum_c w_c loss_c / sum_c w_c over
                  the classes that take part.
    classes       the classes that take part; (1, 2) of three drops the background.

    Raises ``PathfmError`` for unknown words, and for weights that are below 0, above 10^6 or all 0.
    """

    reduction: Reduction = "image"
    empty: EmptyRule = "count"
    class_weights: Sequence[float] | None = None
    classes: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _one_of("reduction", self.reduction, ("image", "batch"))
        _one_of("empty", self.empty, ("count", "skip"))
        checked_weights(self.class_weights)

    def weights(self, n_classes: int, like: Tensor) -> Tensor:
        """(C,) weights of all classes, 0 for those that take no part; dtype and device of ``like``.

        Binary logits (one class) have nothing to choose or weigh: asking for it is refused.
        """
        if n_classes == 1 and not (self.class_weights is None and self.classes is None):
            raise PathfmError(
                "classes and class_weights are for multi-class logits (B, C, h, w); these logits are "
                "binary and have the foreground as their one class: leave both out"
            )
        return class_weights(n_classes, self.class_weights, self.classes, like)


@dataclass(frozen=True, eq=False)
class Memberships:
    """p and y of every pixel in every class, 0 where ignored: (B, C, N); kept: (B, 1, N), 1 or 0.

    float32, or float64 when the logits were. ``p`` carries the gradient.
    """

    p: Tensor
    y: Tensor
    kept: Tensor

    def total(self, values: Tensor, reduction: Reduction) -> Tensor:
        """(B, C, N) summed over the pixels: (B, C) for "image", (1, C) for "batch"."""
        sums = values.sum(2)
        return sums if reduction == "image" else sums.sum(0, keepdim=True)


@dataclass(frozen=True, eq=False)
class SoftCounts:
    """TP, FP, FN and TN in pixels, (G, C): G pictures (or 1, the batch), C classes (1 if binary)."""

    tp: Tensor
    fp: Tensor
    fn: Tensor
    tn: Tensor

    @property
    def pixels(self) -> Tensor:
        """Pixels that took part, (G, C)."""
        return self.tp + self.fp + self.fn + self.tn

    @property
    def absent(self) -> Tensor:
        """Where the truth holds (next to) nothing of the class, (G, C) bool."""
        return self.tp + self.fn < ABSENT_PX

    @property
    def everywhere(self) -> Tensor:
        """Where the truth holds (next to) nothing but the class, (G, C) bool."""
        return self.fp + self.tn < ABSENT_PX


def soft_counts(
    logits: Tensor, target: Tensor, ignore: Tensor | None = None, reduction: Reduction = "image"
) -> SoftCounts:
    """TP, FP, FN, TN of every class, a picture each or over the batch; see ``memberships``."""
    _one_of("reduction", reduction, ("image", "batch"))
    return count(memberships(logits, target, ignore), reduction)


def count(m: Memberships, reduction: Reduction) -> SoftCounts:
    """The soft counts of memberships."""
    wrong_p, left_out = m.kept - m.y, m.kept - m.p  # 1 - y and 1 - p, and 0 where ignored
    return SoftCounts(
        tp=m.total(m.p * m.y, reduction),
        fp=m.total(m.p * wrong_p, reduction),
        fn=m.total(left_out * m.y, reduction),
        tn=m.total(left_out * wrong_p, reduction),
    )


def memberships(logits: Tensor, target: Tensor, ignore: Tensor | None = None) -> Memberships:
    """p and y of every pixel and class, in float32 whatever the model ran in.

    logits, target: binary or multi-class (the top of this file); ignore: bool like target, True
    where a pixel takes no part, and where logits and target may hold anything, NaN and 255 too.

    Raises ``PathfmError`` when shapes or types do not fit, or (on the CPU, where looking costs
    nothing) when a target lies outside 0..1 or 0..C-1.
    """
    z, y, kept = prepared(logits, target, ignore)
    p = z.sigmoid() if z.shape[1] == 1 else z.softmax(1)
    return Memberships(p * kept, y * kept, kept)


def prepared(
    logits: Tensor, target: Tensor, ignore: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits (B, C, N), one-hot y (B, C, N), kept (B, 1, N)) as floats; C = 1 when binary."""
    multi = _is_multi_class(logits, target, ignore)
    z = logits.flatten(2) if multi else logits.flatten(1).unsqueeze(1)
    z = z.double() if logits.dtype == torch.float64 else z.float()
    truth = target.flatten(1).unsqueeze(1)
    if ignore is None:
        kept = z.new_ones(truth.shape)
    else:
        ignored = ignore.flatten(1).unsqueeze(1)
        z, truth, kept = z.masked_fill(ignored, 0), truth.masked_fill(ignored, 0), (~ignored).to(z)
    _check_range(truth, z.shape[1] if multi else None)
    y = torch.zeros_like(z).scatter_(1, truth.long(), 1) if multi else truth.to(z)
    return z, y, kept


def weighted_mean(losses: Tensor, takes_part: Tensor, weights: Tensor) -> Tensor:
    """sum_c w_c loss_c / sum_c w_c of every picture, then the mean over pictures; a scalar.

    losses: (G, C); takes_part: (G, C) bool; weights: (C,). A picture where no class takes part has
    no say; where there is no other, the loss is 0 and so is its gradient.
    """
    w = weights * takes_part
    total = w.sum(1)
    has_a_say = total > 0
    each = (w * losses).sum(1) / torch.where(has_a_say, total, 1)
    return each.sum() / has_a_say.sum().clamp_min(1)


def class_weights(
    n_classes: int, weights: Sequence[float] | None, classes: Sequence[int] | None, like: Tensor
) -> Tensor:
    """(C,) weights, all 1 unless given, 0 for the classes that are not in ``classes``."""
    if weights is not None and len(weights) != n_classes:
        raise PathfmError(
            f"class_weights has {len(weights)} numbers, the logits have {n_classes} classes: give one "
            "each, also for the classes that take no part"
        )
    if classes is not None and (
        not classes
        or len(set(classes)) != len(classes)
        or not all(0 <= number < n_classes for number in classes)
    ):
        raise PathfmError(
            f"classes = {list(classes)}: wants different numbers from 0 to {n_classes - 1}, at least one"
        )
    values = [1.0] * n_classes if weights is None else [float(w) for w in weights]
    if classes is not None:
        values = [w if number in classes else 0.0 for number, w in enumerate(values)]
    if not any(values):
        raise PathfmError(
            f"class_weights are 0 for all of classes {classes}: nothing is left to learn"
        )
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def checked_weights(weights: Sequence[float] | None) -> None:
    """Raises ``PathfmError`` unless weights are 0 to ``LARGEST`` and not all 0."""
    if weights is not None and not (
        all(0 <= w <= LARGEST for w in weights) and any(w > 0 for w in weights)
    ):
        raise PathfmError(
            f"class_weights = {list(weights)}: wants numbers >= 0 and <= {LARGEST:,.0f}, one of them above 0"
        )


def checked(name: str, value: float, low: float, high: float = LARGEST) -> float:
    """``value``, or ``PathfmError`` unless low <= value <= high."""
    if not low <= value <= high:
        raise PathfmError(f"{name} = {value}: wants a number >= {low:g} and <= {high:,.12g}")
    return value


def _is_multi_class(logits: Tensor, target: Tensor, ignore: Tensor | None) -> bool:
    shapes = f"logits {tuple(logits.shape)}, target {tuple(target.shape)}"
    multi = logits.ndim == target.ndim + 1
    fits = (logits.shape[:1] + logits.shape[2:] if multi else logits.shape) == target.shape
    if not fits or target.ndim < 1 or not logits.is_floating_point():
        raise PathfmError(
            f"{shapes} ({logits.dtype}): wants floating logits (B, h, w) and a target alike, or logits "
            "(B, C, h, w) and a target (B, h, w)"
        )
    if target.is_complex() or target.dtype in _UNCOUNTABLE:
        raise PathfmError(f"{shapes}: a target of {target.dtype} is not read: give target.long()")
    if multi and (target.is_floating_point() or target.dtype == torch.bool):
        raise PathfmError(f"{shapes}: a multi-class target holds integers, not {target.dtype}")
    if multi and logits.shape[1] < 2:
        raise PathfmError(f"{shapes}: one class alone is binary: drop the axis, logits[:, 0]")
    if ignore is not None and (ignore.shape != target.shape or ignore.dtype != torch.bool):
        raise PathfmError(
            f"{shapes}, ignore {tuple(ignore.shape)} ({ignore.dtype}): ignore wants booleans like target"
        )
    return multi


def _check_range(truth: Tensor, n_classes: int | None) -> None:
    # On a GPU looking would stop the queue at every step; there scatter_ asserts by itself.
    if truth.device.type != "cpu" or truth.dtype == torch.bool or not truth.numel():
        return
    low, high = truth.min().item(), truth.max().item()
    most = 1 if n_classes is None else n_classes - 1
    if not (low >= 0 and high <= most):
        raise PathfmError(
            f"the target holds values from {low:g} to {high:g}, wants 0 to {most}: pixels that are to "
            "take no part (255, say) go into ignore"
        )


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise PathfmError(f"{name} = {value!r}: wants one of {', '.join(known)}")
