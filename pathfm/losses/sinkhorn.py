"""Sinkhorn-Knopp: soft assignments in which every prototype gets an equal share of the samples.

DINOv2's centring, after SwAV (Caron et al. 2020, arXiv 2006.09882, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pathfm import ranks
from pathfm.runtime import PathfmError

SLAB_ELEMENTS = 1 << 24
"""Numbers held besides the scores themselves, at most about so many at a time (64 MiB)."""


@torch.no_grad()
def sinkhorn(scores: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Assignments Q (N, K), fp32, without gradient: rows sum to 1, columns nearly to N / K.

    scores: (N, K), products with the K prototypes; the rows of all micro-batches. Under several
    ranks each gives the rows it has (how many may differ; none, too) and gets its own back: the
    columns are balanced over all. exp(scores / temperature) is scaled `iterations` times, first
    its columns to sum to 1, then its rows. The rows come last, so after few iterations they are
    exact and the columns roughly balanced.

    SwAV's code also divides by K and by N: constants that the next scaling takes away. The two
    scalings are kept as logarithms, never Q itself: exp(s - max) is 0 from 104 below the largest
    score on, and a prototype all of whose scores lie there would be 0 / 0.
    Raises PathfmError for a temperature that is not above 0, or fewer than 1 iteration.
    """
    if not temperature > 0 or iterations < 1:
        raise PathfmError(
            f"sinkhorn: temperature {temperature}, {iterations} iterations: both must be above 0"
        )
    with torch.autocast(scores.device.type, enabled=False):
        logits = (scores if scores.dtype == torch.float64 else scores.float()) / temperature
        log_rows = logits.new_zeros((len(logits), 1))
        for _ in range(iterations):
            log_columns = -_over_ranks(_log_sums(logits, log_rows, dim=0))
            log_rows = -_log_sums(logits, log_columns, dim=1)[:, None]
        return logits.add_(log_columns).add_(log_rows).exp_()


def _log_sums(logits: Tensor, scaling: Tensor, dim: int) -> Tensor:
    """log of the sum of exp(logits + scaling) over `dim`, a slab at a time: (N, K) is gigabytes."""
    kept = 1 - dim
    slab = max(1, SLAB_ELEMENTS // max(1, logits.shape[dim]))
    parts = torch.split(logits, slab, dim=kept)
    return torch.cat([torch.logsumexp(part + scaling, dim=dim) for part in parts])


def _over_ranks(ours: Tensor) -> Tensor:
    """log of the sum of exp over all ranks, of each column (K,)."""
    if ranks.world_size() == 1:
        return ours
    # every rank fills in its own row: a gather that needs neither counts nor a common maximum
    everybody = ours.new_zeros((ranks.world_size(), len(ours)))
    everybody[ranks.rank()] = ours
    return torch.logsumexp(ranks.sum_over_ranks(everybody), dim=0)
