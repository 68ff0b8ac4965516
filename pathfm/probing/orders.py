"""What chance decides in a head's training: its first weights and the order of its batches.

Both are functions of (seed, run) and (seed, run, epoch) alone, by Philox: a run is the same whether it
is trained alone or beside others, on any device.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from online_patching.philox import uniform, words
from pathfm.probing.parts import Rows
from pathfm.runtime import PathfmError

_STREAM_START, _STREAM_ORDER, _STREAM_SHOTS = 441, 442, 443


class Orders(Protocol):
    """Which rows a run sees in an epoch, in which order."""

    @property
    def n_train(self) -> int:
        """Rows an epoch, the same for all runs."""

    def rows(self, run: int, epoch: int) -> Rows:
        """(n_train,) row numbers of the feature matrix; both numbers count from 0."""


class Shuffled:
    """The same training rows for every run, shuffled anew every epoch: torch's `shuffle=True`."""

    def __init__(self, train: Rows, seed: int) -> None:
        self.train, self.seed = train, seed

    @property
    def n_train(self) -> int:
        """All training rows."""
        return len(self.train)

    def rows(self, run: int, epoch: int) -> Rows:
        """A permutation of all rows, of its own for every run and epoch."""
        keys = words(self.seed, (epoch << 32) + np.arange(self.n_train), run, _STREAM_ORDER, 1)
        return self.train[np.argsort(keys[:, 0], kind="stable")]


class Balanced:
    """`k` rows of each class, drawn anew for every run and seen in one order: eva's BalancedSampler.

    Raises `PathfmError` for a class with fewer than `k` training rows.
    """

    def __init__(self, train: Rows, labels: NDArray[np.int64], k: int, seed: int) -> None:
        self.train, self.labels, self.k, self.seed = train, labels, k, seed
        self._drawn: dict[
            int, Rows
        ] = {}  # a draw orders all training rows: once a run, not an epoch
        self.classes, counts = np.unique(labels[train], return_counts=True)
        if counts.min() < k:
            raise PathfmError(
                f"class {self.classes[counts.argmin()]} has {counts.min():,} training samples, "
                f"fewer than the {k} a class that are drawn: lower k"
            )

    @property
    def n_train(self) -> int:
        """`k` a class."""
        return self.k * len(self.classes)

    def rows(self, run: int, epoch: int) -> Rows:
        """The run's rows, in the same order in every epoch."""
        if run not in self._drawn:
            self._drawn[run] = draw_shots(self.train, self.labels, self.k, self.seed, run)
        return self._drawn[run]


def draw_shots(train: Rows, labels: NDArray[np.int64], k: int, seed: int, resample: int) -> Rows:
    """`k` training rows of each class without replacement, (k * classes,), in random order.

    Draws of one resample are nested: those for k are among those for k + 1.
    """
    keys = words(seed, np.arange(len(train)), resample, _STREAM_SHOTS, 2)
    order = np.argsort(keys[:, 0], kind="stable")
    shuffled = labels[train[order]]
    kept = np.concatenate(
        [order[np.flatnonzero(shuffled == label)[:k]] for label in np.unique(shuffled)]
    )
    rows: Rows = train[kept[np.argsort(keys[kept, 1], kind="stable")]]
    return rows


def linear_start(dim: int, outputs: int, seed: int, run: int) -> NDArray[np.float32]:
    """A head as `nn.Linear` starts, (dim + 1, outputs): uniform in ±1/sqrt(dim), the last row the bias."""
    drawn = uniform(words(seed, np.arange(dim + 1), run, _STREAM_START, outputs))
    return np.asarray((2 * drawn - 1) / np.sqrt(dim), np.float32)
