"""Laws over µm/px by how much training at one helps at another: MaxAvg and MinMax.

Those of Möllers et al., "Mind the Gap: Continuous Magnification Sampling for Pathology Foundation
Models" (arXiv 2601.02198). Training at x helps at y by K(x, y), so a law p gives y the signal
S(y) = integral of p(x) K(x, y) dx, with one of the kernels

    "info"   K(x, y) = (min(x, y) / max(x, y))²        the share of a field of view in common
    "abs"    K(x, y) = 1 / (1 + |x - y|)

MaxAvg maximises the integral of S plus `temperature` times the entropy of p (their Eq. 5, 6),
which gives p(x) proportional to exp(k(x) / temperature), k(x) the integral of K(x, y) dy (Eq. 10).
MinMax maximises the least S (Eq. 7), a linear program on a grid in the paper (Eq. 11). We need no
program: K is symmetric, so a p >= 0 for which S is the same everywhere is an optimum of the game
and of its dual. For "info" it has a closed form, see `MinMax`.

The equations are as wsistream's published sampler cites and states them; see docs/sampling.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from online_patching.errors import SamplerError
from online_patching.sampling.reach import Floats, Interval

KERNELS = ("info", "abs")

_TABLE = 2.0**40
"""Tabled probabilities are multiples of 2^-40: the last bit of a sum or a solved system differs
between machines, and a stream must not."""
_CELLS = 256


@dataclass(frozen=True)
class _Kernelled(Interval):
    kernel: str = "info"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel not in KERNELS:
            raise SamplerError(f"kernel {self.kernel!r} is none of {', '.join(KERNELS)}.")


@dataclass(frozen=True)
class MaxAvg(_Kernelled):
    """Most transfer on average: density proportional to exp(k(x) / temperature) (Eq. 10).

    k(x) is the integral of K(x, y) over y in [low, high]. The coarser half of the interval gets
    more than its share with the "info" kernel. A high temperature gives the uniform law, a low one
    a single µm/px. Which temperature the paper trained with is not known to us; 1 is a peer's
    default (wsistream), and makes the favourite of [0.25, 2] twice as likely as its finest.
    """

    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.01 <= self.temperature < np.inf:
            raise SamplerError(f"temperature {self.temperature:g} must be at least 0.01.")

    def cdf(self, mpp: Floats) -> Floats:
        """The share of draws at most as coarse as `mpp`."""
        return np.asarray(np.interp(mpp, *_max_avg_table(self)))

    def quantile(self, share: Floats) -> Floats:
        """The µm/px that a share of the draws does not exceed."""
        nodes, table = _max_avg_table(self)
        return np.asarray(np.interp(share, table, nodes))


@dataclass(frozen=True)
class MinMax(_Kernelled):
    """Most transfer to the µm/px that gets least: S(y) is the same for all y in [low, high].

    With the "info" kernel: the log law with a share of L / (1 + L), L = ln(high / low), and
    half of the rest on `low` and on `high` each; S is 1 / (1 + L). For, with u = ln x, K is
    exp(-2|u - v|), and a density d with d / 2 on both ends gives S = d everywhere. With the "abs" kernel
    the ends and 256 intervals are solved for S = const at their middles.
    """

    def cdf(self, mpp: Floats) -> Floats:
        """The share of draws at most as coarse as `mpp`."""
        nodes, table = _min_max_table(self)
        inner = table[0] + (table[-1] - table[0]) * self._inner(mpp, nodes, table)
        return np.asarray(np.where(mpp >= self.high, 1.0, inner))

    def quantile(self, share: Floats) -> Floats:
        """The least µm/px that a share of the draws does not exceed."""
        nodes, table = _min_max_table(self)
        inner = np.clip((share - table[0]) / (table[-1] - table[0]), 0.0, 1.0)
        if self.kernel == "info":
            return np.asarray(self.low * np.exp(inner * np.log(self.high / self.low)))
        return np.asarray(np.interp(share, table, nodes))

    def _inner(self, mpp: Floats, nodes: Floats, table: Floats) -> Floats:
        if self.kernel == "info":
            return np.asarray(np.log(mpp / self.low) / np.log(self.high / self.low))
        return np.asarray((np.interp(mpp, nodes, table) - table[0]) / (table[-1] - table[0]))


def transfer(kernel: str, x: Floats, y: Floats) -> Floats:
    """K(x, y): how much training at x µm/px helps at y."""
    if kernel == "info":
        return np.asarray((np.minimum(x, y) / np.maximum(x, y)) ** 2)
    return np.asarray(1 / (1 + np.abs(x - y)))


def _total_transfer(kernel: str, x: Floats, low: float, high: float) -> Floats:
    """k(x): the integral of K(x, y) over y in [low, high]."""
    if kernel == "info":
        return np.asarray(4 * x / 3 - low**3 / (3 * x**2) - x**2 / high)
    return np.asarray(np.log1p(x - low) + np.log1p(high - x))


@lru_cache(maxsize=32)
def _max_avg_table(law: MaxAvg) -> tuple[Floats, Floats]:
    """µm/px and the share of draws at most as coarse, at the ends of small intervals."""
    nodes = np.linspace(law.low, law.high, 8 * _CELLS + 1)
    height = _total_transfer(law.kernel, nodes, law.low, law.high) / law.temperature
    density = np.exp(height - height.max())
    mass = np.floor((density[1:] + density[:-1]) / density.sum() * _TABLE)
    table = np.concatenate([[0.0], np.cumsum(mass)])
    return nodes, table / table[-1]


@lru_cache(maxsize=32)
def _min_max_table(law: MinMax) -> tuple[Floats, Floats]:
    """The same, where the first share is what lies on `low`, and the last lacks what lies on `high`."""
    if law.kernel == "info":
        end = 0.5 / (1 + np.log(law.high / law.low))
        end = np.floor(end * _TABLE) / _TABLE
        return np.asarray([law.low, law.high]), np.asarray([end, 1 - end])
    nodes = np.linspace(law.low, law.high, _CELLS + 1)
    at = np.concatenate([[law.low], (nodes[1:] + nodes[:-1]) / 2, [law.high]])
    # The mean of K over each interval, in closed form: log(1 + distance) is its integral.
    integral = np.sign(nodes - at[:, None]) * np.log1p(np.abs(nodes - at[:, None]))
    inner = np.diff(integral, axis=1) / (nodes[1] - nodes[0])
    ends = transfer("abs", at[:, None], np.asarray([law.low, law.high]))
    solved = np.linalg.solve(
        np.concatenate([ends[:, :1], inner, ends[:, 1:]], axis=1), np.ones(len(at))
    )
    mass = np.floor(np.maximum(solved, 0) / solved.sum() * _TABLE)
    table = np.cumsum(mass)
    return nodes, table[:-1] / table[-1]
