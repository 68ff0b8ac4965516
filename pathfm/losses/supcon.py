"""Supervised contrastive losses (Khosla et al. 2020, arXiv 2004.11362), and with them SimCLR's NT-Xent.

Conventions that differ elsewhere, and ours: anchors without a positive are left out of the mean (the
authors' code counts them as 0); the mean is not multiplied by temperature / 0.07 (theirs is); the
paper sums over anchors, we take the mean.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pathfm.runtime import PathfmError

Kind = Literal["out", "in"]


def supcon_loss(
    z: Tensor,
    labels: Tensor,
    temperature: float,
    kind: Kind = "out",
    anchors: slice | None = None,
) -> Tensor:
    """L_out (eq. 2) or L_in (eq. 3) as a mean over the anchors with a positive; a scalar in fp32.

    z: (N, d), rows of length 1: every view of every sample of the global batch, in any order.
    labels: (N,) integers, a row's class; views of one sample share it. -1: no class, never a
    positive of anything, still a negative of all. With s = z z^T / temperature, A(i) all rows but
    i, P(i) those of them with i's class:

        out: -1/|P(i)| sum_{p in P(i)} log( exp s_ip / sum_{a in A(i)} exp s_ia )
        in:  -log( 1/|P(i)| sum_{p in P(i)} exp s_ip / sum_{a in A(i)} exp s_ia )

    in <= out (Jensen), equal where every |P(i)| is 1. One label a sample makes both NT-Xent (Chen
    et al. 2020, arXiv 2002.05709, eq. 1). anchors: the terms of these rows only, times N over how
    many they are: cut into parts of one size, the mean of the parts' losses is the whole's, however
    unequally positives fall. 0, with a gradient of 0, where no row has a positive.
    Raises PathfmError for fewer than 2 rows, other shapes, a temperature not above 0.
    """
    _check(z, labels, temperature, kind)
    mine = anchors or slice(None)
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        logits = z[mine] @ z.T / temperature
        logits = logits.masked_fill(_themselves(len(z), mine, z.device), -math.inf)
        positive = positive_pairs(labels, mine)
        count = positive.sum(1)
        normaliser = torch.logsumexp(logits, dim=1)
        if kind == "out":
            likeness = logits.masked_fill(~positive, 0).sum(1) / count.clamp(min=1)
        else:
            likeness = torch.logsumexp(logits.masked_fill(~positive, -math.inf), dim=1)
            likeness = likeness - count.clamp(min=1).to(z.dtype).log()
        # a row without a positive is masked: its value is infinite (in), its gradient 0
        total = (normaliser - likeness).masked_fill(count == 0, 0).sum()
        return total / n_anchors(labels).clamp(min=1) * (len(z) / len(count))


def positive_pairs(labels: Tensor, anchors: slice) -> Tensor:
    """(anchors, N) bool: where row j is a positive of anchor i: of its class, and not itself."""
    same = (labels[anchors, None] == labels) & (labels >= 0)
    return same & ~_themselves(len(labels), anchors, labels.device)


def n_anchors(labels: Tensor) -> Tensor:
    """How many rows have a positive, a 0-d integer tensor; O(N log N), and waits for no device."""
    ordered = labels.sort().values
    twins = ordered[1:] == ordered[:-1]
    alone = twins.new_zeros(1)
    return ((torch.cat([twins, alone]) | torch.cat([alone, twins])) & (ordered >= 0)).sum()


def _themselves(n: int, anchors: slice, device: torch.device) -> Tensor:
    """(anchors, N) bool: where a row meets itself."""
    rows = torch.arange(n, device=device)
    return rows[anchors, None] == rows


def _check(z: Tensor, labels: Tensor, temperature: float, kind: str) -> None:
    if z.ndim != 2 or len(z) < 2 or labels.shape != z.shape[:1] or labels.is_floating_point():
        raise PathfmError(
            f"SupCon wants rows (N, d), N >= 2, and as many integer labels, got {tuple(z.shape)} "
            f"and {labels.dtype} {tuple(labels.shape)}"
        )
    if not temperature > 0:
        raise PathfmError(f"SupCon's temperature is {temperature}: it must be above 0")
    if kind not in ("out", "in"):
        raise PathfmError(f"SupCon's kind is {kind!r}: choose 'out' or 'in'")
