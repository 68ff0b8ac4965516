"""What one model's runs predicted of the same samples, and the groups these samples come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathfm.runtime import PathfmError

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Predictions:
    """Classes predicted by several runs: `truth` (n,), `predicted` (runs, n) or (n,), int.

    -1 in `predicted`: this run did not judge that sample (it was in its training half). `groups` (n,)
    name the patient or slide of each sample; "" is not known and makes a group of its own, and no
    groups at all make one of every sample. Raises PathfmError for what does not belong together.
    """

    truth: Ints
    predicted: Ints
    n_classes: int
    groups: tuple[str, ...] = ()
    name: str = "predictions"

    def __init__(
        self,
        truth: ArrayLike,
        predicted: ArrayLike,
        n_classes: int,
        groups: Sequence[str] = (),
        name: str = "predictions",
    ) -> None:
        t, p = _classes(truth, f"{name}: truth"), _classes(predicted, f"{name}: predicted classes")
        p = p[None] if p.ndim == 1 else p
        if t.ndim != 1 or p.ndim != 2 or p.shape[1] != len(t) or not p.size:
            raise PathfmError(
                f"{name}: predicted classes {np.shape(predicted)} are not (runs, samples) of truth {t.shape}"
            )
        if groups and len(groups) != len(t):
            raise PathfmError(f"{name}: {len(groups):,} groups for {len(t):,} samples")
        for what, array, least in (("true", t, 0), ("predicted", p, -1)):
            if array.min() < least or array.max() >= n_classes:
                raise PathfmError(
                    f"{name}: {what} classes {array.min()} to {array.max()}, wanted {least} to {n_classes - 1}"
                )
        if not (p >= 0).any(axis=1).all():
            run = int(np.argmin((p >= 0).any(axis=1)))
            raise PathfmError(f"{name}: run {run} judged no sample")
        for field, value in (("truth", t), ("predicted", p), ("n_classes", n_classes)):
            object.__setattr__(self, field, value)
        object.__setattr__(self, "groups", tuple(groups))
        object.__setattr__(self, "name", name)

    @property
    def runs(self) -> int:
        """How many runs."""
        return len(self.predicted)

    @property
    def n(self) -> int:
        """Samples that any run judged."""
        return int(self._judged.sum())

    @property
    def n_groups(self) -> int:
        """Groups of these samples."""
        return int(self.group_of.max()) + 1

    @cached_property
    def _judged(self) -> NDArray[np.bool_]:
        return np.asarray((self.predicted >= 0).any(axis=0))

    @cached_property
    def group_of(self) -> Ints:
        """The number of each judged sample's group, from 0; -1 for samples that no run judged."""
        out = np.full(len(self.truth), -1, np.int64)
        rows = np.flatnonzero(self._judged)
        out[rows] = number_groups(
            [self.groups[row] for row in rows] if self.groups else (), len(rows)
        )
        return out

    @property
    def groups_of_rarest_class(self) -> int:
        """The smallest number of groups that any class of the truth occurs in."""
        pairs = np.unique(np.stack([self.truth, self.group_of])[:, self._judged], axis=1)
        return int(np.unique(pairs[0], return_counts=True)[1].min())


def number_groups(groups: Sequence[str], n: int) -> Ints:
    """Group numbers 0, 1, ... of n samples; a sample without a name is a group of its own."""
    if not groups:
        return np.arange(n)
    # a name that no group can have: its place, after a NUL
    own = [group or f"\0{place}" for place, group in enumerate(groups)]
    numbers: Ints = np.unique(np.asarray(own), return_inverse=True)[1].astype(np.int64)
    return numbers


def _classes(given: ArrayLike, what: str) -> Ints:
    array = np.asarray(given)
    if array.dtype.kind not in "iu":
        raise PathfmError(f"{what}: wanted whole class numbers, got {array.dtype}")
    return array.astype(np.int64)
