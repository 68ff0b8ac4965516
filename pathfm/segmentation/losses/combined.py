"""Every loss as a module, and weighted sums of them from config.

loss = build_loss([LossTerm(name="bce"), LossTerm(name="dice", smooth=1.0, weight=0.5)])
loss(logits, target, ignore)          # a scalar
loss.parts(logits, target, ignore)    # {"bce": ..., "dice": ...}, unweighted, for the log
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pathfm.runtime import PathfmError
from pathfm.segmentation.loss_terms import LossTerm
from pathfm.segmentation.losses.correlation import mcc_loss
from pathfm.segmentation.losses.counts import Averaging, checked
from pathfm.segmentation.losses.entropy import bce_loss, focal_loss, soft_bce_loss
from pathfm.segmentation.losses.overlap import (
    dice_loss,
    focal_tversky_loss,
    jaccard_loss,
    tversky_loss,
)


class SegmentationLoss(nn.Module):
    """A loss function with its options chosen: ``loss(logits, target, ignore=None)`` -> a scalar.

    Options are the function's keywords, with its defaults, by name; those of ``Averaging``
    (reduction, empty, class_weights, classes) where the function takes them. Raises
    ``PathfmError`` for an option the loss does not have. No parameters, no state.
    """

    function: ClassVar[Callable[..., Tensor]]
    known: ClassVar[frozenset[str]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        if unknown := sorted(set(options) - self.known):
            raise PathfmError(
                f"{type(self).__name__} has no option {unknown[0]!r}; it has {', '.join(sorted(self.known))}"
            )
        self.options = options

    def __init_subclass__(cls) -> None:
        cls.known = frozenset(options_of(cls.function))

    def forward(self, logits: Tensor, target: Tensor, ignore: Tensor | None = None) -> Tensor:
        """The loss of a batch, a scalar; shapes as the function tells."""
        return type(self).function(logits, target, ignore, **self.options)

    def extra_repr(self) -> str:
        """The options that were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def options_of(function: Callable[..., Tensor]) -> list[str]:
    """The names of a loss function's options, those of ``Averaging`` spelt out."""
    names: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            names.append(parameter.name)
        elif parameter.kind is parameter.VAR_KEYWORD:
            names += list(inspect.signature(Averaging).parameters)
    return names


class BCELoss(SegmentationLoss):
    """Mean cross-entropy of the pixels, binary or over classes; options of ``bce_loss``."""

    function = staticmethod(bce_loss)


class SoftBCEWithLogitsLoss(SegmentationLoss):
    """Mean cross-entropy against smoothed labels; options of ``soft_bce_loss``."""

    function = staticmethod(soft_bce_loss)


class FocalLoss(SegmentationLoss):
    """Cross-entropy that turns away from pixels that are right already; options of ``focal_loss``."""

    function = staticmethod(focal_loss)


class DiceLoss(SegmentationLoss):
    """1 - Dice, smooth, F-beta or V-Net squared, binary or over classes; options of ``dice_loss``."""

    function = staticmethod(dice_loss)


class JaccardLoss(SegmentationLoss):
    """1 - intersection over union; options of ``jaccard_loss``."""

    function = staticmethod(jaccard_loss)


class TverskyLoss(SegmentationLoss):
    """Dice with false positives and false negatives weighed apart; options of ``tversky_loss``."""

    function = staticmethod(tversky_loss)


class FocalTverskyLoss(SegmentationLoss):
    """Tversky to the power 1/gamma, class by class; options of ``focal_tversky_loss``."""

    function = staticmethod(focal_tversky_loss)


class MCCLoss(SegmentationLoss):
    """1 - Matthews correlation of the soft counts; options of ``mcc_loss``."""

    function = staticmethod(mcc_loss)


LOSSES: dict[str, type[SegmentationLoss]] = {
    "bce": BCELoss,
    "soft_bce": SoftBCEWithLogitsLoss,
    "focal": FocalLoss,
    "dice": DiceLoss,
    "jaccard": JaccardLoss,
    "tversky": TverskyLoss,
    "focal_tversky": FocalTverskyLoss,
    "mcc": MCCLoss,
}


class WeightedLoss(nn.Module):
    """sum_k weight_k loss_k(logits, target, ignore); a scalar."""

    def __init__(self, losses: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        if not losses or len(losses) != len(weights):
            raise PathfmError(
                f"a loss wants at least one term and a weight each: {len(losses)} terms, {len(weights)} weights"
            )
        self.losses = nn.ModuleList(losses)
        self.weights = tuple(checked("weight", float(weight), 0) for weight in weights)
        self.names: tuple[str, ...] = _unique([type(loss).__name__ for loss in losses])

    def forward(self, logits: Tensor, target: Tensor, ignore: Tensor | None = None) -> Tensor:
        """The weighted sum, a scalar; shapes as each loss wants them."""
        parts = [loss(logits, target, ignore) for loss in self.losses]
        return torch.stack([w * part for w, part in zip(self.weights, parts, strict=True)]).sum()

    def parts(
        self, logits: Tensor, target: Tensor, ignore: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Each loss by its name, unweighted; a name that comes again is numbered: dice, dice_2."""
        each = [loss(logits, target, ignore) for loss in self.losses]
        return dict(zip(self.names, each, strict=True))


def build_loss(terms: Sequence[LossTerm]) -> WeightedLoss:
    """The weighted sum that the terms describe, in their order.

    Raises ``PathfmError`` when there are none; a term cannot be built wrong.
    """
    built = [LOSSES[term.name](**term.options) for term in terms]
    loss = WeightedLoss(built, [term.weight for term in terms])
    loss.names = _unique([term.name for term in terms])
    return loss


def _unique(names: Sequence[str]) -> tuple[str, ...]:
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return tuple(unique)
