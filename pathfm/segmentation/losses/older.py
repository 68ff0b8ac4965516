"""What the first training loop used: BCE + Dice in one call, and coefficients of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from pathfm.segmentation.losses.entropy import bce_loss
from pathfm.segmentation.losses.overlap import dice_loss


def bce_dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """BCE + Dice: the first keeps every pixel's gradient alive, the second the overlap honest."""
    return bce_loss(logits, target) + dice_loss(logits, target, smooth=smooth)


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
