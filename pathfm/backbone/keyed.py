"""Stochastic depth whose draws are keyed by (seed, draw, view, layer): no global random state.

Huang et al. 2016, "Deep networks with stochastic depth" (arXiv 1603.09382), a sample at a time as
timm's DropPath has it: a residual branch is zeroed for a row with probability `rate`, and divided
by 1 - rate for the others, so that its mean stays. The same sample is dropped alike on any rank, in
any batch, and after any resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from online_patching.philox import uniform, words
from pathfm.runtime import PathfmError

DROP_STREAM = 1 << 18
"""Philox stream of stochastic depth in view 0; view v draws from the v-th stream after it."""
MAX_VIEWS = 4096
"""Views there are streams for: iBOT's masks begin after so many."""


@dataclass(frozen=True)
class SampleKeys:
    """What each row of a batch is: from it and the seed follow all random words of a forward pass.

    draws: (N,) int64, the row's sample number in the stream. views: (N,) int64, which of the
    sample's views it is, 0 to 4095. Raises PathfmError for other shapes or views.
    """

    seed: int
    draws: NDArray[np.int64]
    views: NDArray[np.int64]

    def __post_init__(self) -> None:
        if self.draws.ndim != 1 or self.draws.shape != self.views.shape:
            raise PathfmError(
                f"keys of {self.draws.shape} draws and {self.views.shape} views: one of each a row"
            )
        if len(self.views) and not 0 <= self.views.min() <= self.views.max() < MAX_VIEWS:
            raise PathfmError(
                f"views {self.views.min()} to {self.views.max()} have no random streams: "
                f"0 to {MAX_VIEWS - 1} have"
            )

    def __len__(self) -> int:
        return len(self.draws)

    @classmethod
    def of_views(cls, seed: int, draws: ArrayLike, views: Sequence[int]) -> SampleKeys:
        """Keys of `torch.cat` of whole views: all samples in the first view, then in the second."""
        of = np.asarray(draws, np.int64)
        numbers = np.asarray(views, np.int64)
        return cls(seed, np.tile(of, len(numbers)), np.repeat(numbers, len(of)))


class KeyedDropPath(nn.Module):
    """A branch (N, ...) times its row's factor: 0 or 1 / (1 - rate), set before each forward pass.

    factors: (N,), on the branch's device, or None: the branch as it is. Kept until they are set
    again, so that a recomputed forward pass drops alike.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.factors: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x, its rows kept or dropped."""
        if self.factors is None:
            return x
        return x * self.factors.to(x.dtype).view(-1, *[1] * (x.dim() - 1))

    def extra_repr(self) -> str:
        """The rate, where modules are printed."""
        return f"rate={self.rate:.4f}"


def keep_factors(keys: SampleKeys, rates: Sequence[float]) -> NDArray[np.float32]:
    """Each layer's factor of each row, (layers, N): 0 where dropped, else 1 / (1 - rate).

    Row n is dropped in layer l where word l of (seed, draw n, stream of view n), as a number in
    [0, 1), is below rate l.
    """
    drawn = uniform(words(keys.seed, keys.draws, 0, DROP_STREAM + keys.views, len(rates)))
    rate = np.asarray(rates, np.float64)
    return np.ascontiguousarray(((drawn >= rate) / (1 - rate)).T, np.float32)


def set_factors(layers: Sequence[KeyedDropPath], keys: SampleKeys | None, x: Tensor) -> None:
    """Gives every layer the factors of the next forward pass, of the batch x; without keys: none.

    Raises PathfmError when there are not as many keys as rows.
    """
    if keys is None:
        for layer in layers:
            layer.factors = None
        return
    if len(keys) != len(x):
        raise PathfmError(f"{len(keys)} keys for a batch of {len(x)}: give one a row")
    if not layers or not len(keys):
        return
    table = torch.from_numpy(keep_factors(keys, [layer.rate for layer in layers]))
    if x.is_cuda:  # from pageable memory the copy would wait for the kernels before it
        table = table.pin_memory()
    for layer, factors in zip(layers, table.to(x.device, non_blocking=True), strict=True):
        layer.factors = factors
