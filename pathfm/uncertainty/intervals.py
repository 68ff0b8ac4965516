"""Percentile and BCa intervals out of bootstrap replicates (Efron and Tibshirani 1993, ch. 13, 14)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pathfm.runtime import PathfmError

Method = Literal["bca", "percentile"]
Floats = NDArray[np.float64]

MOST_UNDEFINED = 0.05
"""Share of resamples in which a metric may have no value before there is no interval."""
FEW_GROUPS = 20
"""Below so many groups bootstrap intervals are known to be too short."""


@dataclass(frozen=True)
class Interval:
    """An estimate and where its true value may lie, for a sample of groups like this one.

    In the metric's own unit (0..1 for accuracies). `se` is the standard deviation of the replicates.
    `n` samples lie in `n_groups` groups, resampled `n_resamples` times; `undefined` of these gave no
    value and are left out. `groups_of_rarest_class` is the smallest number of groups that any class
    occurs in (0: not about classes).
    """

    estimate: float
    low: float
    high: float
    level: float
    method: Method
    se: float
    n: int
    n_groups: int
    n_resamples: int
    undefined: int = 0
    groups_of_rarest_class: int = 0

    def told(self, scale: float = 100.0, digits: int = 1) -> str:
        """As tables print it: "81.2 [79.0, 83.1]", in percent by default."""
        value, low, high = (scale * x for x in (self.estimate, self.low, self.high))
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    @property
    def caveats(self) -> tuple[str, ...]:
        """What a reader must know to trust it, a sentence each; empty where nothing is wrong."""
        found = []
        if self.high - self.low < 1e-12:  # a mean over runs rounds
            found.append(
                f"No resample of the {self.n_groups:,} groups differs from the estimate: the interval says nothing."
            )
        elif self.n_groups < FEW_GROUPS:
            found.append(
                f"The interval rests on {self.n_groups} groups; below {FEW_GROUPS} it is too short."
            )
        if 0 < self.groups_of_rarest_class < 5:
            found.append(
                f"A class occurs in {self.groups_of_rarest_class} group(s) only, and is missing from some resamples."
            )
        return tuple(found)


def interval(
    estimate: float,
    replicates: Floats,
    jackknife: Floats,
    *,
    level: float,
    method: Method,
    n: int,
    n_groups: int,
    groups_of_rarest_class: int = 0,
) -> Interval:
    """The interval of an estimate from its replicates (B,) and leave-one-group-out values (groups,).

    BCa: quantiles of the replicates at Phi(z0 + (z0 + z) / (1 - a (z0 + z))), with z0 the normal
    quantile of the share of replicates below the estimate (ties by half) and the acceleration a =
    sum d^3 / (6 (sum d^2)^1.5), d = mean jackknife value - each (eq. 14.9 to 14.15). Where all
    replicates lie on one side, or leaving a group out changes nothing or is undefined, there is no
    BCa interval: then it is the percentile interval, and `method` says so.
    """
    defined = replicates[np.isfinite(replicates)]
    undefined = len(replicates) - len(defined)
    if not math.isfinite(estimate) or undefined > MOST_UNDEFINED * len(replicates):
        raise PathfmError(
            f"no interval: the metric has no value in {undefined:,} of {len(replicates):,} resamples of "
            f"{n_groups} groups. Test on more groups, or use another metric"
        )
    tail = (1 - level) / 2
    at = np.array([tail, 1 - tail])
    moved = _accelerated(estimate, defined, jackknife, at) if method == "bca" else None
    low, high = np.quantile(defined, at if moved is None else moved)
    return Interval(
        estimate=estimate,
        low=float(low),
        high=float(high),
        level=level,
        method="percentile" if moved is None else "bca",
        se=float(defined.std(ddof=1)),
        n=n,
        n_groups=n_groups,
        n_resamples=len(replicates),
        undefined=undefined,
        groups_of_rarest_class=groups_of_rarest_class,
    )


def _accelerated(
    estimate: float, replicates: Floats, jackknife: Floats, at: Floats
) -> Floats | None:
    """Where BCa takes its two quantiles, or None where it is not defined."""
    from scipy.special import ndtr, ndtri  # late: --help starts sooner

    below = (replicates < estimate).mean()
    share = (below + (replicates <= estimate).mean()) / 2
    d = jackknife.mean() - jackknife
    squares = (d**2).sum()
    if not 0 < share < 1 or not np.isfinite(squares) or squares <= 1e-24:
        return None
    a = (d**3).sum() / (6 * squares**1.5)
    z0 = ndtri(share)
    z = z0 + ndtri(at)
    if (1 - a * z).min() <= 0:
        return None  # past the pole the order of the ends turns round
    return np.asarray(ndtr(z0 + z / (1 - a * z)))
