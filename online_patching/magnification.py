"""At which µm/px patches are drawn: policies as small values, and what each slide can serve.

A policy is a law over µm/px. Every slide draws from that law *given* the µm/px it can serve: the
inverse of the distribution function, truncated to them. So a slide whose finest level has
1.1 µm/px follows the law from 0.55 µm/px on, and a needle biopsy follows it up to the field of
view at which it runs out of tissue.

    Weighted(mpps, weights)        a list, as most foundation models use: (0.25, 0.5, 1, 2)
    Continuous(low, high, law)     "uniform" in µm/px, or "log": the same share for every doubling
    MaxAvg(low, high, kernel)      most transfer on average, with an entropy term
    MinMax(low, high, kernel)      most transfer to the worst-served µm/px

The last two are those of Möllers et al., "Mind the Gap: Continuous Magnification Sampling for
Pathology Foundation Models" (arXiv 2601.02198). Training at x helps at y by K(x, y), so a law p
gives y the signal S(y) = integral of p(x) K(x, y) dx, with one of the kernels

    "info"   K(x, y) = (min(x, y) / max(x, y))²        the share of a field of view in common
    "abs"    K(x, y) = 1 / (1 + |x - y|)

MaxAvg maximises the integral of S plus `temperature` times the entropy of p (their Eq. 5, 6),
which gives p(x) proportional to exp(k(x) / temperature), k(x) the integral of K(x, y) dy (Eq. 10).
MinMax maximises the least S (Eq. 7), a linear program on a grid in the paper (Eq. 11). We need no
program: K is symmetric and positive, so a p >= 0 for which S is the same everywhere is an optimum
of the game and of its dual. For "info" it has a closed form, see `MinMax`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import SamplerError

Floats = NDArray[np.float64]

KERNELS = ("info", "abs")
LAWS = ("uniform", "log")

_ROUND = 2.0**24
"""Continuous laws give multiples of 2^-24 µm/px: the last bit of log and exp differs between
machines, and a stream must not."""
_TABLE = 2.0**40
"""Tabled probabilities are multiples of 2^-40, for the same reason."""
_CELLS = 256
_RICH_TOLERANCE = 1e-6


class Reach(NamedTuple):
    """What n slides can serve.

    `least_mpp` (n): the finest µm/px that may be asked of each. `rich` (n, sides): the tissue share
    that its best boxes reach, for boxes of 2^log2_sides µm, linear in between and constant
    outside. A µm/px m is served when it is at least the finest and the share of a box of
    size_px * m µm is at least `min_foreground`.
    """

    least_mpp: Floats
    rich: NDArray[np.floating]
    log2_sides: Floats
    size_px: int
    min_foreground: float

    def serves(self, mpps: Floats, strictly: bool = False) -> NDArray[np.bool_]:
        """Which of m magnifications each slide serves: (n, m); `strictly`: with tissue to spare."""
        side = np.clip(np.log2(self.size_px * mpps), self.log2_sides[0], self.log2_sides[-1])
        k = np.clip(np.searchsorted(self.log2_sides, side) - 1, 0, len(self.log2_sides) - 2)
        part = (side - self.log2_sides[k]) / (self.log2_sides[k + 1] - self.log2_sides[k])
        share = self.rich[:, k] * (1 - part) + self.rich[:, k + 1] * part
        fine = self.least_mpp[:, None] <= mpps
        enough = self.min_foreground - (0 if strictly else _RICH_TOLERANCE)
        return np.asarray(fine & (share >= enough))

    def pieces(self, low: float, high: float) -> tuple[Floats, Floats]:
        """The intervals of [low, high] each slide serves: starts and stops (n, sides + 1), in order.

        Empty ones have stop <= start. Neighbouring ones touch.
        """
        threshold = self.min_foreground - _RICH_TOLERANCE
        share = np.concatenate([self.rich[:, :1], self.rich, self.rich[:, -1:]], axis=1) - threshold
        step = np.diff(self.log2_sides, prepend=self.log2_sides[0], append=self.log2_sides[-1])
        knots = np.concatenate([self.log2_sides[:1], self.log2_sides])
        before, after = share[:, :-1].astype(np.float64), share[:, 1:].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            crossing = np.exp2(knots + step * (before / (before - after))) / self.size_px
        edges = np.exp2(knots) / self.size_px
        edges = np.concatenate([[0.0], edges[1:], [np.inf]])
        start = np.where(before >= 0, edges[:-1], np.where(after >= 0, crossing, np.inf))
        stop = np.where(after >= 0, edges[1:], np.where(before >= 0, crossing, -np.inf))
        least = np.maximum(low, self.least_mpp)[:, None]
        return np.maximum(start, least), np.minimum(stop, high)


@runtime_checkable
class Policy(Protocol):
    """A law over µm/px."""

    @property
    def range(self) -> tuple[float, float]:
        """The finest and coarsest µm/px it may draw."""

    @property
    def config(self) -> dict[str, Any]:
        """What it is, as JSON types."""

    def servable(self, reach: Reach) -> NDArray[np.bool_]:
        """Which of n slides can serve anything of it."""

    def draw(self, u: Floats, reach: Reach) -> Floats:
        """µm/px for n draws from slides that can serve something: `u` are uniform in [0, 1)."""

    def served(self, reach: Reach) -> list[list[Any]]:
        """For each slide the µm/px, or the intervals (low, high) of them, that it serves."""


@dataclass(frozen=True)
class Weighted:
    """A list of µm/px and their weights; `Weighted((0.5,))` is one fixed magnification."""

    mpps: tuple[float, ...]
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        weights = self._weights
        if not self.mpps or not (np.isfinite(self.mpps).all() and min(self.mpps) > 0):
            raise SamplerError(f"mpp {list(self.mpps)}: give at least one µm/px above 0.")
        if len(weights) != len(self.mpps) or not (np.isfinite(weights) & (weights > 0)).all():
            raise SamplerError(
                f"{len(self.mpps)} µm/px need as many weights > 0, not {weights.tolist()}."
            )

    @property
    def _weights(self) -> Floats:
        given = self.weights or (1.0,) * len(self.mpps)
        return np.asarray(given, np.float64)

    @property
    def range(self) -> tuple[float, float]:
        """The finest and the coarsest of the list."""
        return min(self.mpps), max(self.mpps)

    @property
    def config(self) -> dict[str, Any]:
        """What it is, as JSON types."""
        return {"policy": "weighted", "mpp": list(self.mpps), "weights": self._weights.tolist()}

    def servable(self, reach: Reach) -> NDArray[np.bool_]:
        """Which of n slides can serve one of the list."""
        return np.asarray(reach.serves(np.asarray(self.mpps)).any(axis=1))

    def draw(self, u: Floats, reach: Reach) -> Floats:
        """One of the list for each draw, by weight among those its slide serves."""
        mpps = np.asarray(self.mpps)
        serves = reach.serves(mpps)
        mass = np.cumsum(serves * self._weights, axis=1)
        choice = (u[:, None] * mass[:, -1:] >= mass).sum(axis=1)
        last = len(mpps) - 1 - np.argmax(serves[:, ::-1], axis=1)
        return np.asarray(mpps[np.minimum(choice, last)])

    def served(self, reach: Reach) -> list[list[Any]]:
        """For each slide the µm/px of the list it serves."""
        return [[m for m, yes in zip(self.mpps, row, strict=True) if yes]
                for row in reach.serves(np.asarray(self.mpps)).tolist()]  # fmt: skip


@dataclass(frozen=True)
class _Interval:
    """What the laws over [low, high] share: validation, and the truncated inverse."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < np.inf:
            raise SamplerError(
                f"µm/px from {self.low:g} to {self.high:g} is not an interval; give 0 < low < high, "
                "or a single number."
            )

    @property
    def range(self) -> tuple[float, float]:
        """The finest and coarsest µm/px it may draw."""
        return self.low, self.high

    @property
    def config(self) -> dict[str, Any]:
        """What it is, as JSON types."""
        return {"policy": type(self).__name__.lower(), **self.__dict__}

    def cdf(self, mpp: Floats) -> Floats:
        """The share of draws at most as coarse as `mpp`, for values in [low, high]."""
        raise NotImplementedError

    def quantile(self, share: Floats) -> Floats:
        """The least µm/px whose `cdf` reaches `share`."""
        raise NotImplementedError

    def servable(self, reach: Reach) -> NDArray[np.bool_]:
        """Which of n slides serve a piece of the interval."""
        # Most slides serve its coarsest end, and so something next to it: no need to look on.
        most = np.asarray([self.high])
        out = (reach.serves(most, strictly=True) & (reach.least_mpp[:, None] < self.high))[:, 0]
        rest = np.flatnonzero(~out)
        if len(rest):
            some = reach._replace(least_mpp=reach.least_mpp[rest], rich=reach.rich[rest])
            start, stop = some.pieces(self.low, self.high)
            out[rest] = (stop > start).any(axis=1)
        return np.asarray(out)

    def draw(self, u: Floats, reach: Reach) -> Floats:
        """µm/px by the law given what each slide serves."""
        start, stop = reach.pieces(self.low, self.high)
        some = stop > start
        start, stop = np.where(some, start, self.low), np.where(some, stop, self.low)
        # What lies on `low` itself belongs to the piece that begins there, and to no other.
        before = np.where(start > self.low, self.cdf(start), 0.0)
        mass = np.where(some, self.cdf(stop) - before, 0.0)
        sums = np.cumsum(mass, axis=1)
        target = u * sums[:, -1]
        last = some.shape[1] - 1 - np.argmax(some[:, ::-1], axis=1)
        at = np.arange(len(u)), np.minimum((target[:, None] >= sums).sum(axis=1), last)
        share = before[at] + (target - (sums[at] - mass[at]))
        mpp = np.floor(self.quantile(share) * _ROUND + 0.5) / _ROUND
        return np.clip(mpp, start[at], stop[at])

    def served(self, reach: Reach) -> list[list[Any]]:
        """For each slide the intervals it serves; touching pieces are one."""
        out = []
        for starts, stops in zip(*(a.tolist() for a in reach.pieces(self.low, self.high)),
                                 strict=True):  # fmt: skip
            joined: list[Any] = []
            for start, stop in zip(starts, stops, strict=True):
                if stop > start and joined and start <= joined[-1][1]:
                    joined[-1] = (joined[-1][0], stop)
                elif stop > start:
                    joined.append((start, stop))
            out.append(joined)
        return out


@dataclass(frozen=True)
class Continuous(_Interval):
    """Every µm/px of [low, high]: `law` "uniform", or "log" for equal shares of every doubling."""

    law: str = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.law not in LAWS:
            raise SamplerError(f"law {self.law!r} is none of {', '.join(LAWS)}.")

    def cdf(self, mpp: Floats) -> Floats:
        """The share of draws at most as coarse as `mpp`."""
        if self.law == "log":
            return np.asarray(np.log(mpp / self.low) / np.log(self.high / self.low))
        return np.asarray((mpp - self.low) / (self.high - self.low))

    def quantile(self, share: Floats) -> Floats:
        """The µm/px that a share of the draws does not exceed."""
        if self.law == "log":
            return np.asarray(self.low * np.exp(share * np.log(self.high / self.low)))
        return np.asarray(self.low + share * (self.high - self.low))


@dataclass(frozen=True)
class _Kernelled(_Interval):
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


def policy_of(
    mpp: float | Sequence[float] | Policy, weights: Sequence[float] | None = None
) -> Policy:
    """A policy from what a caller gives: a number, a list with weights (equal by default), a policy."""
    if isinstance(mpp, Policy):
        if weights is not None:
            raise SamplerError("mpp_weights are the weights of a list of µm/px; a policy has none.")
        return mpp
    values = tuple(float(m) for m in np.atleast_1d(np.asarray(mpp, np.float64)))
    given = None if weights is None else tuple(float(w) for w in np.asarray(weights).ravel())
    return Weighted(values, given)


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
