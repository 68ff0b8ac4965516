"""Which patches of a view are hidden: block-wise masks, a function of (seed, draw, view) alone.

Blocks as in BEiT (Bao et al. 2021, arXiv 2106.08254, Algorithm 1), shares as in iBOT (Zhou et al.
2021, arXiv 2111.07832, section 3): a view is masked with a probability; how much of it, is drawn
from a range; rectangles of random size and shape are laid until that many patches are hidden. BEiT
may stop a few patches short, ours never does: the last blocks are as small as they must be.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching import philox

MASK_STREAM_BASE = (1 << 18) + 4096
"""Philox stream of the masks of view 0; view v draws from MASK_STREAM_BASE + v."""

MIN_BLOCK = 4
"""Patches in the smallest block while so many are still to be hidden (DINOv2's value)."""

ASPECT = (0.3, 1 / 0.3)
"""Smallest and largest height / width of a block, drawn evenly in its logarithm (BEiT)."""

TRIES = 128
"""Blocks tried a view; what is then still to be hidden is chosen patch by patch."""

_TRIES_A_ROUND = 16

_Array = NDArray[np.float64]


def block_masks(
    draws: ArrayLike,
    grid: tuple[int, int],
    *,
    seed: int,
    view: int,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> NDArray[np.bool_]:
    """Masks (n, rows * cols), True where the patch is hidden, row by row, one for each draw.

    A view is masked with `probability`; then the number of hidden patches is the nearest whole
    number to `rows * cols` times a value drawn from `ratio`, at least 1: exactly that many. Equal
    arguments give equal masks whatever else is in the batch.
    """
    draw = np.atleast_1d(np.asarray(draws, np.int64))
    rows, cols = grid
    stream = MASK_STREAM_BASE + view
    masked, share = philox.uniform(philox.words(seed, draw, 0, stream, 2)).T
    share = ratio[0] + (ratio[1] - ratio[0]) * share
    count = np.clip(np.floor(share * rows * cols + 0.5).astype(np.int64), 1, rows * cols)
    wanted = np.where(masked < probability, count, 0)
    masks = np.zeros((len(draw), rows, cols), np.bool_)
    chosen = np.flatnonzero(wanted)
    if len(chosen):
        masks[chosen] = _lay(draw[chosen], grid, wanted[chosen], seed, stream)
    return masks.reshape(len(draw), rows * cols)


def _lay(
    draws: NDArray[np.int64],
    grid: tuple[int, int],
    wanted: NDArray[np.int64],
    seed: int,
    stream: int,
) -> NDArray[np.bool_]:
    """Masks (n, rows, cols) with `wanted` patches each; all views lay their t-th block at once."""
    masks = np.zeros((len(draws), *grid), np.bool_)
    missing = wanted.copy()
    for attempt in range(1, 1 + TRIES // _TRIES_A_ROUND):
        active = np.flatnonzero(missing)
        if not len(active):
            return masks
        words = philox.words(seed, draws[active], attempt, stream, 4 * _TRIES_A_ROUND)
        numbers = philox.uniform(words).reshape(len(active), _TRIES_A_ROUND, 4)
        for t in range(_TRIES_A_ROUND):
            going = np.flatnonzero(missing[active])
            if not len(going):
                return masks
            _try_blocks(masks, missing, active[going], numbers[going, t])
    for i in np.flatnonzero(missing):
        _hide_singly(masks[i], int(missing[i]), seed, int(draws[i]), stream)
    return masks


def _try_blocks(
    masks: NDArray[np.bool_], missing: NDArray[np.int64], which: NDArray[np.int64], u: _Array
) -> None:
    """One block in each of the masks `which`, where it fits and hides not more than is missing."""
    _, rows, cols = masks.shape
    left = missing[which]
    smallest = np.minimum(MIN_BLOCK, left)
    area = smallest + (left - smallest) * u[:, 0]
    low, high = math.log(ASPECT[0]), math.log(ASPECT[1])
    aspect = np.exp(low + (high - low) * u[:, 1])
    height = np.floor(np.sqrt(area * aspect) + 0.5).astype(np.int64)
    width = np.floor(np.sqrt(area / aspect) + 0.5).astype(np.int64)
    fits = (height <= rows) & (width <= cols)
    top = np.floor((rows - height + 1) * u[:, 2]).astype(np.int64)[:, None]
    start = np.floor((cols - width + 1) * u[:, 3]).astype(np.int64)[:, None]
    y, x = np.arange(rows), np.arange(cols)
    tall = (y >= top) & (y < top + height[:, None])
    wide = (x >= start) & (x < start + width[:, None])
    fresh = tall[:, :, None] & wide[:, None, :] & ~masks[which]
    new = fresh.sum((1, 2))
    laid = fits & (new > 0) & (new <= left)
    masks[which[laid]] |= fresh[laid]
    missing[which[laid]] -= new[laid]


def _hide_singly(mask: NDArray[np.bool_], missing: int, seed: int, draw: int, stream: int) -> None:
    """Hides `missing` more patches of one mask, each drawn from those still seen."""
    flat = mask.reshape(-1)
    attempt = 1 + TRIES // _TRIES_A_ROUND
    for i in range(missing):
        word = philox.words(seed, draw, attempt + i, stream, 1)
        seen = np.flatnonzero(~flat)
        flat[seen[philox.integers(word, len(seen))[0, 0]]] = True
