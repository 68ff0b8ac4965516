"""What validation decides while heads are trained: which weights are kept, and who has stopped."""

from __future__ import annotations

import torch
from torch import Tensor


def macro_accuracy(truth: Tensor, predicted: Tensor, n_classes: int) -> Tensor:
    """What eva selects by, (heads,) float32: predictions (heads, n), truth (n,), both int64.

    Mean recall over the classes that occur in truth or predictions; for two classes the mean of
    sensitivity and specificity, whatever occurs. In float32, as torchmetrics, since ties decide.
    """
    heads, n = predicted.shape
    first = torch.arange(heads, device=predicted.device).unsqueeze(1) * n_classes

    def count(classes: Tensor) -> Tensor:
        return torch.bincount((classes + first).flatten(), minlength=heads * n_classes)

    asked = count(predicted).view(heads, n_classes)
    there = count(truth.expand(heads, n)).view(heads, n_classes)
    right = predicted == truth
    found = torch.zeros_like(asked).scatter_add_(1, predicted, right.to(asked.dtype))
    recall = found.float() / there.clamp(min=1).float()
    if n_classes == 2:
        return 0.5 * (recall[:, 0] + recall[:, 1])
    occurs = (asked + there) > 0
    return (recall * occurs / occurs.sum(dim=1, keepdim=True)).sum(dim=1)


class Kept:
    """What did best on validation so far, and which heads have stopped: lightning's ModelCheckpoint and
    EarlyStopping, a head each."""

    def __init__(
        self, heads: Tensor, shape: tuple[int, int], patience: int, min_delta: float
    ) -> None:
        """heads (runs, d + 1, rates * outputs); shape (runs, rates)."""
        self.patience, self.min_delta = patience, min_delta
        self.outputs = heads.shape[2] // shape[1]
        self.heads = heads.clone()
        self.score = torch.full(shape, -torch.inf, device=heads.device)
        self.reference = self.score.clone()
        self.step = torch.zeros(shape, dtype=torch.int64, device=heads.device)
        self.waited, self.stopped_step = torch.zeros_like(self.step), torch.zeros_like(self.step)

    @property
    def all_stopped(self) -> bool:
        """Whether no head can change any more."""
        return bool((self.stopped_step > 0).all())

    def update(self, score: Tensor, heads: Tensor, steps: int) -> None:
        """Takes the scores (runs, rates) after so many steps into account."""
        going = self.stopped_step == 0
        better = going & (score > self.score)  # strictly: the first of equals stays
        if bool(better.any()):
            self.score = torch.where(better, score, self.score)
            self.step[better] = steps
            columns = better.repeat_interleave(self.outputs, dim=1).unsqueeze(1)
            self.heads = torch.where(columns, heads, self.heads)
        resets = score - self.min_delta > self.reference
        self.reference = torch.where(resets, score, self.reference)
        self.waited = torch.where(resets, 0, self.waited + 1)
        self.stopped_step[going & (self.waited >= self.patience)] = steps
