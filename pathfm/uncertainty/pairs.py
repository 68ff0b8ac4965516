"""McNemar's test of two models on the same independent samples: exact and mid-p."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from pathfm.runtime import PathfmError


@dataclass(frozen=True)
class McNemar:
    """How often only one of two models is right, and how surprising that is if they are equally good.

    `p_exact` and `p_mid` are two-sided. The test takes samples as independent: of patches it says too
    much when slides have many of them. There `compare(...).p_swap` is the test to report.
    """

    n: int
    only_a_right: int
    only_b_right: int
    p_exact: float
    p_mid: float


def mcnemar(truth: ArrayLike, a: ArrayLike, b: ArrayLike) -> McNemar:
    """Two models' predicted classes (n,) for the same true classes (n,).

    Exact: twice the smaller tail of Binomial(only a + only b, 1/2); 1 where both are equal. Mid-p: that
    minus the probability of the observed split, or 1 minus half of it where both are equal (Fagerland,
    Lydersen and Laake 2013, BMC Med Res Methodol 13:91, supplement, eq. 1 and 2); it is less conservative
    and hardly ever above its level. Both are 1 without a discordant pair.
    """
    from scipy.stats import binom

    t, x, y = np.asarray(truth), np.asarray(a), np.asarray(b)
    if not t.shape == x.shape == y.shape or t.ndim != 1:
        raise PathfmError(
            f"an unpaired comparison: truth {t.shape}, predictions {x.shape} and {y.shape}; McNemar's test "
            "wants both models' classes for the same samples"
        )
    only_a = int(((x == t) & (y != t)).sum())
    only_b = int(((y == t) & (x != t)).sum())
    discordant = only_a + only_b
    if only_a == only_b:
        observed = float(binom.pmf(only_a, discordant, 0.5)) if discordant else 0.0
        return McNemar(len(t), only_a, only_b, 1.0, 1.0 - observed / 2)
    exact = 2 * float(binom.cdf(min(only_a, only_b), discordant, 0.5))
    observed = float(binom.pmf(only_a, discordant, 0.5))
    return McNemar(len(t), only_a, only_b, exact, exact - observed)
