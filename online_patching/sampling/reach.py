"""What slides can serve of an interval of µm/px, and laws over it truncated to that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import SamplerError

Floats = NDArray[np.float64]

_ROUND = 2.0**24
"""Continuous laws give multiples of 2^-24 µm/px: the last bit of log and exp differs between
machines, and a stream must not."""
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


@dataclass(frozen=True)
class Interval(ABC):
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

    @abstractmethod
    def cdf(self, mpp: Floats) -> Floats:
        """The share of draws at most as coarse as `mpp`, for values in [low, high]."""

    @abstractmethod
    def quantile(self, share: Floats) -> Floats:
        """The least µm/px whose `cdf` reaches `share`."""

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
