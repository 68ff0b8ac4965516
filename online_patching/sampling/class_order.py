"""Which class draw i is of: every class its number of times in each block of draws, in random order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import SamplerError
from online_patching.philox import words

Ints = NDArray[np.int64]

ORDER_STREAM = (1 << 18) + 8192
MAX_BLOCK_DRAWS = 1024
"""As many words as one stream has: the most draws in a block, and so the most classes."""


class ClassOrder:
    """Consecutive blocks of sum(weights) draws hold class c exactly `weights[c]` times each.

    The order within block b is a permutation of its places by the words of (seed, b): sorting random
    32-bit words, equal ones (one pair in 2^32) left as they are. So n draws anywhere in the stream hold
    a class of weight w at most w times more or less often than its share of them.
    """

    def __init__(self, weights: Sequence[int], seed: int) -> None:
        self.weights = np.asarray(weights, np.int64)
        if not len(self.weights) or (self.weights < 1).any():
            raise SamplerError(f"class weights {list(weights)}: whole numbers of at least 1.")
        self.block_draws = int(self.weights.sum())
        if self.block_draws > MAX_BLOCK_DRAWS:
            raise SamplerError(
                f"{len(self.weights)} classes of weights {int(self.weights.min())} to {int(self.weights.max())} make "
                f"blocks of {self.block_draws:,} draws; at most {MAX_BLOCK_DRAWS:,}. Use fewer classes or "
                "smaller weights."
            )
        self.seed = seed
        self._class_of = np.repeat(np.arange(len(self.weights)), self.weights)
        self._first = np.cumsum(self.weights) - self.weights

    def classes(self, numbers: Ints) -> Ints:
        """The class of each draw number."""
        return np.asarray(self._class_of[self._places(numbers)[1]])

    def ordinals(self, numbers: Ints) -> tuple[Ints, Ints]:
        """The class of each draw, and which of that class's draws it is: 0, 1, ... each once."""
        block, place = self._places(numbers)
        which = self._class_of[place]
        return which, np.asarray(block * self.weights[which] + place - self._first[which])

    def _places(self, numbers: Ints) -> tuple[Ints, Ints]:
        """Block of each draw, and its place among the block's, which go by class."""
        block, at = np.divmod(np.asarray(numbers, np.int64), self.block_draws)
        blocks, of = np.unique(block, return_inverse=True)
        drawn = words(self.seed, blocks, 0, ORDER_STREAM, self.block_draws)
        return block, np.asarray(np.argsort(drawn, axis=1, kind="stable")[of.reshape(-1), at])
