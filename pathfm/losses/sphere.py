"""How embeddings lie on the sphere: alignment and uniformity (Wang & Isola 2020, arXiv 2005.10242).

Sums over pairs first, which ranks add up, then the figures: exact over any split of the anchors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pathfm.losses.supcon import positive_pairs

UNIFORMITY_T = 2.0
"""t of the Gaussian kernel exp(-t |x - y|^2), as in the paper's experiments."""


@torch.no_grad()
def sphere_sums(z: Tensor, labels: Tensor, anchors: slice) -> Tensor:
    """What `sphere_facts` wants of these anchors against all rows, (6,) float64; sums over ranks add.

    z: (N, d) of length 1. labels: (N,), -1 for none. In order: squared distances of positive pairs,
    positive pairs, kernels of pairs, pairs, anchors with a positive, anchors.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.float()
        squared = (2 - 2 * (z[anchors] @ z.T)).clamp(min=0)
        positive = positive_pairs(labels, anchors)
        n = len(squared)
        # each row meets itself once, at distance 0 but for rounding: taken off as exactly that
        rows = torch.arange(len(z), device=z.device)
        squared = squared.masked_fill(rows[anchors, None] == rows, 0)
        sums = (
            (squared * positive).sum(dtype=torch.float64),
            positive.sum(),
            torch.exp(-UNIFORMITY_T * squared).sum(dtype=torch.float64) - n,
            squared.new_full((), n * (len(z) - 1), dtype=torch.float64),
            positive.any(1).sum(),
            squared.new_full((), n),
        )
        return torch.stack([value.double() for value in sums])


def sphere_facts(sums: Tensor) -> dict[str, Tensor]:
    """alignment, uniformity, positives_per_anchor, anchors_without_positive from added-up sums.

    alignment: mean squared distance of positive pairs (0: views of a class are one point; NaN
    without any). uniformity: log of the mean of exp(-2 |x - y|^2) over pairs (0: all are one point;
    towards -4 in many dimensions: even). The last is the share of anchors that teach nothing.
    """
    squared, pairs, kernels, n_pairs, with_positive, anchors = sums.unbind()
    facts = {
        "alignment": squared / pairs,
        "uniformity": (kernels / n_pairs).log(),
        "positives_per_anchor": pairs / anchors,
        "anchors_without_positive": 1 - with_positive / anchors,
    }
    return {name: value.float() for name, value in facts.items()}
