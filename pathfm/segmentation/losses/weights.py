"""Class weights from how often each class occurs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pathfm.runtime import PathfmError


def class_pixels(target: Tensor, n_classes: int, ignore: Tensor | None = None) -> Tensor:
    """Pixels of every class, (C,) int64 on the target's device; add them up over batches.

    target: integers 0..C-1 of any shape; ignore: bool alike, True = not counted.
    Raises ``PathfmError`` for a class beyond C-1, and for an ignore mask that does not fit.
    """
    if n_classes < 1:
        raise PathfmError(f"n_classes = {n_classes}: there is at least one class")
    if ignore is not None and (ignore.shape != target.shape or ignore.dtype != torch.bool):
        raise PathfmError(
            f"target {tuple(target.shape)}, ignore {tuple(ignore.shape)} ({ignore.dtype}): ignore wants "
            "booleans like target"
        )
    labels = target.flatten() if ignore is None else target[~ignore]
    if labels.is_floating_point():
        raise PathfmError(f"target ({labels.dtype}): class numbers are integers")
    labels = labels.long()
    if labels.numel() and not (labels.min() >= 0 and labels.max() < n_classes):
        raise PathfmError(
            f"the target holds classes {int(labels.min())} to {int(labels.max())}, wants 0 to "
            f"{n_classes - 1}: pixels that are to take no part go into ignore"
        )
    return torch.bincount(labels, minlength=n_classes)


def inverse_frequency_weights(pixels: Sequence[float] | Tensor) -> tuple[float, ...]:
    """1 / share of every class, scaled to mean 1: the class_weights of multi-class losses.

    pixels: how many (or which share) each class has; shares 3/4 and 1/4 give weights 0.5 and 1.5. A
    class that never occurs gets 0, since there is nothing to learn it from, and the mean of the
    others is 1. Raises ``PathfmError`` for negative or infinite counts, and when all are 0.
    """
    counts = torch.as_tensor(pixels, dtype=torch.float64).cpu()
    if counts.ndim != 1 or not bool(torch.isfinite(counts).all() and (counts >= 0).all()):
        raise PathfmError(
            f"pixels a class = {counts.tolist()}: wants a list of finite numbers >= 0"
        )
    if not bool((counts > 0).any()):
        raise PathfmError(f"all {len(counts)} classes have 0 pixels: there is nothing to weigh")
    smallest = counts[counts > 0].min()  # not the sum: over a tiny count it would overflow
    inverse = torch.where(counts > 0, smallest / counts, 0.0)
    return tuple((inverse / inverse[counts > 0].mean()).tolist())
