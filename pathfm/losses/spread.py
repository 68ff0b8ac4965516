"""Regularisers that spread embeddings over the sphere: both fall when the points move apart.

The sign is the point: a term that grows with spreading, added to a loss, pulls all embeddings into
one. tests/test_spread.py takes a gradient step on each term alone and watches the cosines fall.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pathfm.runtime import PathfmError

EPS = 1e-8
"""Added to a distance before its logarithm, as DINOv2 and lightly do."""


def koleo(z: Tensor) -> Tensor:
    """KoLeo, a scalar in fp32: -mean_i log(min_j |z_i - z_j| + 1e-8) of the rows at length 1.

    z: (n, d), all rows of the global batch, n >= 2; normalised in here. The gradient reaches both
    ends of each pair. Two equal rows give a large, finite value and no gradient between them.
    The Kozachenko-Leonenko estimate of entropy with its sign turned and constants left out
    (Sablayrolles et al. 2019, arXiv 1806.03198; in DINOv2, arXiv 2304.07193, section 4).
    Raises PathfmError for fewer than two rows.
    """
    _want_two(z, "KoLeo")
    with torch.autocast(z.device.type, enabled=False):
        z = _unit(z)
        with torch.no_grad():
            cosines = z @ z.T
            nearest = cosines.fill_diagonal_(-math.inf).argmax(dim=1)
        distance = torch.linalg.vector_norm(z - z[nearest], dim=1)
        return -torch.log(distance + EPS).mean()


def kde(z: Tensor, concentration: float) -> Tensor:
    """Mean log density of each row under the others, a scalar in fp32 within [-2 kappa, 0].

    mean_i log( 1/(n-1) sum_{j != i} exp(kappa (z_i.z_j - 1)) ) of the rows at length 1: a kernel
    density estimate with von Mises-Fisher kernels of concentration kappa; 0 where all rows are one.
    z: (n, d), all rows of the global batch, n >= 2; normalised in here. The negative of the
    resubstitution estimate of entropy, up to the kernel's constant (Wang & Isola 2020, arXiv
    2005.10242); Virchow2 (arXiv 2408.00738) and Midnight (arXiv 2504.05186) put it in KoLeo's place.
    Raises PathfmError for fewer than two rows or a concentration not above 0.
    """
    _want_two(z, "KDE")
    if not concentration > 0:
        raise PathfmError(f"KDE's concentration is {concentration}: it must be above 0")
    with torch.autocast(z.device.type, enabled=False):
        z = _unit(z)
        logits = concentration * (z @ z.T - 1)
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        densities = torch.logsumexp(logits.masked_fill(itself, -math.inf), dim=1)
        return densities.mean() - math.log(len(z) - 1)


def _unit(z: Tensor) -> Tensor:
    """Rows at length 1, in fp32 at least (float64 stays: gradients are checked in it)."""
    return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=1, eps=EPS)


def _want_two(z: Tensor, name: str) -> None:
    if z.ndim != 2 or len(z) < 2:
        raise PathfmError(
            f"{name} wants two or more rows (n, d), got {tuple(z.shape)}: give a larger batch, or "
            "weigh the term with 0"
        )
