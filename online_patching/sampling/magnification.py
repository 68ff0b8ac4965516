"""At which µm/px patches are drawn: policies as small values.

A policy is a law over µm/px. Every slide draws from that law *given* the µm/px it can serve: the
inverse of the distribution function, truncated to them. So a slide whose finest level has
1.1 µm/px follows the law from 0.55 µm/px on, and a needle biopsy follows it up to the field of
view at which it runs out of tissue.

    Weighted(mpps, weights)        a list, as most foundation models use: (0.25, 0.5, 1, 2)
    Continuous(low, high, law)     "uniform" in µm/px, or "log": the same share for every doubling
    MaxAvg(low, high, kernel)      most transfer on average, with an entropy term (transfer.py)
    MinMax(low, high, kernel)      most transfer to the worst-served µm/px (transfer.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import SamplerError
from online_patching.sampling.reach import Floats, Interval
from online_patching.sampling.reach import Reach as Reach
from online_patching.sampling.transfer import MaxAvg as MaxAvg
from online_patching.sampling.transfer import MinMax as MinMax

LAWS = ("uniform", "log")


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
class Continuous(Interval):
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
