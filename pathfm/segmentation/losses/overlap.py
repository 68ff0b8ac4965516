"""Losses of overlap: Dice in its three forms, Jaccard, Tversky and focal Tversky.

All are one fraction of soft counts, errors / (errors + agreement + s), and differ in what they
call an error:

    Dice            agreement 2 TP          errors FP + FN
    Dice, F-beta    agreement (1 + b^2) TP  errors FP + b^2 FN
    Dice, V-Net     agreement 2 sum p y     errors sum (p - y)^2
    Jaccard         agreement TP            errors FP + FN
    Tversky         agreement TP            errors alpha FP + beta FN

which is 1 - (agreement + s) / (agreement + errors + s), the form in the papers, without its
cancellation near 0. None of them uses TN. Labels are not smoothed here: with y' = y(1 - e) + e/2 the
best prediction is no longer y', and absent classes would be counted in every pixel.

``smooth`` is counted once, in pixels, in numerator and denominator. A class that is absent and
predicted empty scores 1 (loss 0) at any s. Predicted P pixels of an absent class, it scores
s / (P + s): with s = 0 that is a step, 0 as soon as P exceeds ``ABSENT_PX``, and has no gradient.
Keep s > 0, or ``empty="skip"``, where classes may be absent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pathfm.runtime import PathfmError
from pathfm.segmentation.losses.counts import (
    ABSENT_PX,
    Averaging,
    Memberships,
    SoftCounts,
    checked,
    count,
    memberships,
    weighted_mean,
)

# Salehi et al. 2017 (arXiv:1706.05721) found these best under imbalance; 0.5 and 0.5 are Dice.
FALSE_POSITIVES_WEIGH, FALSE_NEGATIVES_WEIGH = 0.3, 0.7
STRAIGHT_BELOW = 1e-6


def dice_loss(
    logits: Tensor,
    target: Tensor,
    ignore: Tensor | None = None,
    *,
    smooth: float = 1.0,
    beta: float = 1.0,
    squared: bool = False,
    **averaging: Any,
) -> Tensor:
    """1 - (2 TP + s) / (sum p + sum y + s); a scalar, float32 (float64 if logits are).

    logits, target, ignore: binary or multi-class, see ``counts``. beta weighs recall: the F-beta form,
    1 - ((1 + b^2) TP + s) / ((1 + b^2) TP + b^2 FN + FP + s). squared: the V-Net form,
    1 - (2 sum(p y) + s) / (sum p^2 + sum y^2 + s), whose gradient is 0 at p = y = 0 and 1;
    with soft truth it is the one that is least at p = y. averaging: the fields of ``Averaging``.

    Raises ``PathfmError`` for what does not fit, and for beta other than 1 with squared.
    Sources: Milletari et al. 2016 (arXiv:1606.04797), eq. 2 of section 3; Sudre et al. 2017
    (arXiv:1707.03237) on class weights; van Rijsbergen 1979 for F-beta.
    """
    checked("smooth", smooth, 0)
    checked("beta", beta, 0)
    if squared and beta != 1:
        raise PathfmError(f"beta = {beta} with squared: the V-Net form has no beta, leave one out")
    how, m = Averaging(**averaging), memberships(logits, target, ignore)
    counts = count(m, how.reduction)
    if squared:
        agreement, errors = _squares(m, how)
    else:
        agreement = (1 + beta**2) * counts.tp
        errors = counts.fp + beta**2 * counts.fn
    return average(share_of_errors(errors, agreement, smooth), counts, how)


def jaccard_loss(
    logits: Tensor,
    target: Tensor,
    ignore: Tensor | None = None,
    *,
    smooth: float = 1.0,
    **averaging: Any,
) -> Tensor:
    """1 - (TP + s) / (TP + FP + FN + s), the soft intersection over union; a scalar.

    Inputs, averaging and errors as ``dice_loss``. With s = 0 and D the Dice coefficient it is
    1 - D / (2 - D): it orders predictions as Dice does and is steeper near 1.
    Source: Rahman & Wang 2016.
    """
    checked("smooth", smooth, 0)
    how = Averaging(**averaging)
    counts = count(memberships(logits, target, ignore), how.reduction)
    return average(share_of_errors(counts.fp + counts.fn, counts.tp, smooth), counts, how)


def tversky_loss(
    logits: Tensor,
    target: Tensor,
    ignore: Tensor | None = None,
    *,
    alpha: float = FALSE_POSITIVES_WEIGH,
    beta: float = FALSE_NEGATIVES_WEIGH,
    smooth: float = 1.0,
    **averaging: Any,
) -> Tensor:
    """1 - (TP + s) / (TP + alpha FP + beta FN + s); a scalar.

    alpha weighs false positives, beta false negatives (some papers have it the other way around);
    0.5, 0.5 and s is Dice with 2 s. Inputs, averaging and errors as ``dice_loss``.
    Source: Salehi et al. 2017 (arXiv:1706.05721), eq. 3 and 4.
    """
    how, counts, errors = _tversky(logits, target, ignore, alpha, beta, averaging)
    return average(share_of_errors(errors, counts.tp, checked("smooth", smooth, 0)), counts, how)


def focal_tversky_loss(
    logits: Tensor,
    target: Tensor,
    ignore: Tensor | None = None,
    *,
    alpha: float = FALSE_POSITIVES_WEIGH,
    beta: float = FALSE_NEGATIVES_WEIGH,
    gamma: float = 4 / 3,
    smooth: float = 1.0,
    **averaging: Any,
) -> Tensor:
    """(1 - Tversky index)^(1/gamma) of every class, then their mean; a scalar.

    gamma > 1 steepens the loss of what is nearly right; the paper takes 4/3 of 1..3. Below
    1 - index = 1e-6 the power, whose slope has no bound at 0, goes on as a straight line to 0.
    Inputs, averaging and errors as ``tversky_loss``. Source: Abraham & Khan 2018
    (arXiv:1810.07842), eq. 4, whose alpha weighs false *negatives*.
    """
    checked("gamma", gamma, 0.1, 10)
    how, counts, errors = _tversky(logits, target, ignore, alpha, beta, averaging)
    share = share_of_errors(errors, counts.tp, checked("smooth", smooth, 0))
    return average(_power(share, 1 / gamma), counts, how)


def share_of_errors(errors: Tensor, agreement: Tensor, smooth: float) -> Tensor:
    """errors / (errors + agreement + smooth), 0 where there are no errors at all."""
    return errors / (errors + agreement + smooth).clamp_min(ABSENT_PX)


def average(losses: Tensor, counts: SoftCounts, how: Averaging) -> Tensor:
    """(G, C) losses as one number: weights, absent classes and pictures without pixels seen to."""
    takes_part = counts.pixels > 0
    if how.empty == "skip":
        takes_part = takes_part & ~counts.absent
    return weighted_mean(losses, takes_part, how.weights(losses.shape[1], losses))


def _tversky(
    logits: Tensor,
    target: Tensor,
    ignore: Tensor | None,
    alpha: float,
    beta: float,
    averaging: dict[str, Any],
) -> tuple[Averaging, SoftCounts, Tensor]:
    if checked("alpha", alpha, 0) + checked("beta", beta, 0) == 0:
        raise PathfmError("alpha = beta = 0: no error would cost anything")
    how = Averaging(**averaging)
    counts = count(memberships(logits, target, ignore), how.reduction)
    return how, counts, alpha * counts.fp + beta * counts.fn


def _squares(m: Memberships, how: Averaging) -> tuple[Tensor, Tensor]:
    errors = m.total((m.p - m.y).square(), how.reduction)
    return 2 * m.total(m.p * m.y, how.reduction), errors


def _power(share: Tensor, exponent: float) -> Tensor:
    if exponent >= 1:
        return share.pow(exponent)
    line = share * STRAIGHT_BELOW ** (exponent - 1)
    return torch.where(share < STRAIGHT_BELOW, line, share.clamp_min(STRAIGHT_BELOW).pow(exponent))
