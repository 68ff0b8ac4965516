"""Groups drawn again with replacement: how often each is in resample r follows from (seed, r) alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from online_patching.philox import integers, words

Floats = NDArray[np.float64]

_STREAM_DRAW, _STREAM_SWAP = 431, 432
_WORDS = 1024  # a key of Philox yields so many; more groups take the next attempt number
_BLOCK = 1 << 22  # draws in memory at once: 32 MB


def draw_counts(
    seed: int, resamples: NDArray[np.int64], kind_of: NDArray[np.int64], n_kinds: int
) -> Floats:
    """How many groups of each kind are in each resample: (len(resamples), n_kinds).

    A resample draws as many groups as there are (len(kind_of)), with replacement; `kind_of` is the
    kind of each group, so that thousands of groups with one content are counted together.
    """
    n_groups = len(kind_of)
    drawn = integers(_keyed(seed, resamples, n_groups, _STREAM_DRAW), n_groups)
    cell = kind_of[drawn] + np.arange(len(resamples))[:, None] * n_kinds
    counts = np.bincount(cell.ravel(), minlength=len(resamples) * n_kinds)
    return counts.reshape(len(resamples), n_kinds).astype(np.float64)


def draw_swaps(seed: int, resamples: NDArray[np.int64], n_groups: int) -> Floats:
    """A fair coin for each group of each resample: 0.0 or 1.0, (len(resamples), n_groups)."""
    return (_keyed(seed, resamples, n_groups, _STREAM_SWAP) >> np.uint32(31)).astype(np.float64)


def in_blocks(n_resamples: int, n_groups: int) -> Iterator[NDArray[np.int64]]:
    """The numbers of all resamples, as many at a time as fit into memory."""
    step = max(1, _BLOCK // max(n_groups, 1))
    for first in range(0, n_resamples, step):
        yield np.arange(first, min(first + step, n_resamples))


def replicate(
    statistic: Callable[[Floats], Floats],
    kind_of: NDArray[np.int64],
    n_kinds: int,
    n_resamples: int,
    seed: int,
) -> Floats:
    """The statistic of every resample, (n_resamples,); it is given counts (r, n_kinds)."""
    parts = [
        statistic(draw_counts(seed, block, kind_of, n_kinds))
        for block in in_blocks(n_resamples, len(kind_of))
    ]
    return np.concatenate(parts)


def _keyed(
    seed: int, resamples: NDArray[np.int64], n_groups: int, stream: int
) -> NDArray[np.uint32]:
    parts = [
        words(seed, resamples, attempt, stream, min(_WORDS, n_groups - attempt * _WORDS))
        for attempt in range(-(-n_groups // _WORDS))
    ]
    return np.concatenate(parts, axis=1)
