"""Losses of binary segmentation, on logits, computed in float32 whatever the model ran in.

Soft counts: p = sigmoid(logits), I = sum p y, P = sum p, Y = sum y.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def bce_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean binary cross-entropy, -1/N sum [y log p + (1 - y) log(1 - p)]; a scalar.

    logits, target: any equal shape; target 0..1. Stable for logits of any size.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), target.float())


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - (2 I + s) / (P + Y + s) per picture, then the mean over pictures; a scalar.

    logits, target: (B, ...). Counts are summed over everything but the first axis, so that a small
    piece of tissue weighs as much as a large one. With s > 0 an empty picture predicted empty
    costs 0; with s = 0 it is 0/0 and refused by nobody: keep s > 0 when pictures may be empty.
    """
    p = logits.float().sigmoid().flatten(1)
    y = target.float().flatten(1)
    overlap, total = (p * y).sum(1), p.sum(1) + y.sum(1)
    return (1 - (2 * overlap + smooth) / (total + smooth)).mean()


def bce_dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """BCE + Dice: the first keeps every pixel's gradient alive, the second the overlap honest."""
    return bce_loss(logits, target) + dice_loss(logits, target, smooth)


def soft_dice(probabilities: Tensor, target: Tensor, smooth: float = 0.0) -> Tensor:
    """Dice coefficient (2 I + s) / (P + Y + s) of probabilities, over all elements; a scalar."""
    p, y = probabilities.float(), target.float()
    return (2 * (p * y).sum() + smooth) / (p.sum() + y.sum() + smooth)


def iou(predicted: Tensor, target: Tensor) -> Tensor:
    """Intersection over union of boolean masks over all elements; 1 when both are empty."""
    union = (predicted | target).sum()
    if union == 0:
        return torch.ones(())
    return (predicted & target).sum() / union
