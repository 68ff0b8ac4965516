"""Crop, resize, flip and blur along one axis, as matrices: dense ones, and their non-zero blocks.

Both axes are independent, so a view's geometry is `down @ picture @ across.T`. A GPU multiplies
dense matrices; a CPU core skips the zeros, which are nine tenths of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfm.views.params import MAX_BLUR_SIGMA_PX, ViewSpec, ViewTable

BLOCK_ROWS = 32
"""Rows a block: 24 to 48 are alike, fewer and more slower (`benchmarks/views_speed.py`)."""

_SIGMAS = 6.0  # the blur's taps end there: below 1e-8 of the middle one

_Array = NDArray[np.float64]


@dataclass(frozen=True)
class Filter:
    """How pixels between pixels are found: PIL's BILINEAR (a triangle) or BICUBIC (a = -0.5)."""

    bicubic: bool = False
    antialias: bool = True

    @property
    def support(self) -> float:
        """Half the filter's width, in the wider of input and output pixels."""
        return 2.0 if self.bicubic else 1.0

    def widths(self, step: _Array) -> _Array:
        """How many input pixels the filter's unit is, at steps of so many input pixels."""
        return np.maximum(step, 1.0) if self.antialias else np.ones_like(step)

    def weigh(self, away: Tensor) -> Tensor:
        """The filter at distances `away`, which are overwritten; not yet normalised."""
        away = away.abs_()
        if not self.bicubic:
            return away.neg_().add_(1.0).clamp_(min=0.0)
        # Keys 1981 with a = -0.5, which is (m² (2 m + 1) - u² (u + 1) / 2) with m and u the
        # distances above 1 and 2, cut off at 0: half the passes of three cases
        above = (away - 1.0).clamp_(max=0.0)
        near = above * above
        near.mul_(above.mul_(2.0).add_(1.0))
        above = away.sub_(2.0).clamp_(max=0.0)
        far = above * above
        return near.addcmul_(far, above.add_(1.0), value=-0.5)


BILINEAR = Filter()


@dataclass(frozen=True)
class Shape:
    """What views made in one go have in common.

    size_px: their side. longest: no crop's side is above this share of the patch's. softest: no
    blur's sigma is above this. So sums have as many terms in every batch, and round equally.
    """

    size_px: int
    filter: Filter = BILINEAR
    longest: float = 1.0
    softest: float = MAX_BLUR_SIGMA_PX

    @classmethod
    def of(cls, spec: ViewSpec) -> Shape:
        """The shape of views drawn from a spec."""
        low, high = spec.ratio
        longest = math.sqrt(spec.scale[1] * max(high, 1.0 / low))
        chosen = Filter(spec.interpolation == "bicubic", spec.antialias)
        return cls(spec.size_px, chosen, min(1.0, longest), spec.blur_sigma_px[1])


@dataclass(frozen=True)
class Axis:
    """One axis of n views of one size: the crop [start, start + length), whether reversed, the blur.

    start, length, sigma_px: (n,), in input pixels and, of the blur (0 = none), output pixels.
    longest, softest: no length and no sigma is above them.
    """

    start: _Array
    length: _Array
    flipped: NDArray[np.bool_]
    sigma_px: _Array
    size_in: int
    size_out: int
    longest: float
    softest: float = MAX_BLUR_SIGMA_PX
    filter: Filter = BILINEAR

    def rows(self, which: NDArray[np.int64]) -> Axis:
        """The same of some of the views."""
        return replace(
            self,
            start=self.start[which],
            length=self.length[which],
            flipped=self.flipped[which],
            sigma_px=self.sigma_px[which],
        )


def axes(table: ViewTable, shape: Shape, size_in: int) -> tuple[Axis, Axis]:
    """How the views of a table lie along and down their patches."""
    sizes = size_in, shape.size_px, shape.longest * size_in, shape.softest, shape.filter
    return (
        Axis(table.x, table.width, table.flip_x, table.sigma_px, *sizes),
        Axis(table.y, table.height, table.flip_y, table.sigma_px, *sizes),
    )


def dense_numbers(axis: Axis) -> NDArray[np.float32]:
    """(n, 4): start, step, the filter's unit, reversed or not: what `dense` wants on its device."""
    step = axis.length / axis.size_out
    columns = [axis.start, step, axis.filter.widths(step), axis.flipped]
    return np.stack(columns, axis=1).astype(np.float32)


def dense(numbers: Tensor, axis: Axis) -> Tensor:
    """(n, size_out, size_in): each row an average of input pixels, without the blur.

    numbers: what `dense_numbers` gave of the axis, on any device.
    Taps beyond the picture are left out and the rest normalised to sum 1. This is PIL's
    `resize(..., box=...)`, and for whole pictures
    `torch.nn.functional.interpolate(..., antialias=True)`.
    """
    start, step, width, flipped = numbers[:, :, None, None].unbind(1)
    out = torch.arange(axis.size_out, device=numbers.device, dtype=torch.float32)[None, :, None]
    taps = torch.arange(axis.size_in, device=numbers.device, dtype=torch.float32)[None, None, :]
    out = torch.where(flipped > 0, axis.size_out - 1 - out, out)
    centre = start + (out + 0.5) * step
    weights = axis.filter.weigh((taps + (0.5 - centre)).div_(width))
    return weights.div_(weights.sum(2, keepdim=True))


def blur_matrix(sigma_px: Tensor, size_px: int) -> Tensor:
    """(n, size_px, size_px): Gaussian blurs with mirrored borders (the edge is not repeated).

    sigma_px: (n,), above 0 and at most `MAX_BLUR_SIGMA_PX`. Taps up to 3 times the largest sigma
    allowed, normalised to sum 1. An output takes from its mirror images too, so the weight of
    pixel j in pixel i is g(i - j) + g(i + j) + g(2 (size - 1) - i - j).
    """
    reach = _reach(MAX_BLUR_SIGMA_PX, size_px)
    at = torch.arange(size_px, device=sigma_px.device)
    i, j = at[:, None], at[None, :]
    sigma = sigma_px[:, None, None]
    total = _gauss((i - j).expand(len(sigma_px), -1, -1), sigma, reach)
    total = total + _gauss(i + j, sigma, reach) * (j > 0)
    total = total + _gauss(2 * (size_px - 1) - i - j, sigma, reach) * (j < size_px - 1)
    return total / total.sum(2, keepdim=True)


def _gauss(away: Tensor, sigma: Tensor, reach: int) -> Tensor:
    return torch.exp(-0.5 * (away / sigma) ** 2) * (away.abs() <= reach)


def _reach(sigma_px: float, size_px: int) -> int:
    """Taps of a blur on either side of a pixel; a mirror shows no more than the picture."""
    return min(math.ceil(min(_SIGMAS * sigma_px, 3 * MAX_BLUR_SIGMA_PX)), size_px - 1)


@dataclass(frozen=True)
class Block:
    """Some rows of a view's matrix: output [first, first + rows) = weights @ input [start, stop)."""

    first: int
    start: int
    stop: int
    weights: Tensor

    @property
    def rows(self) -> int:
        """How many rows of output."""
        return len(self.weights)


def blocks(axis: Axis) -> list[list[Block]]:
    """The matrices of `dense`, blurred, as the blocks of rows that hold all that is not zero (CPU)."""
    found: list[list[Block]] = [[] for _ in range(len(axis.start))]
    blurred = axis.sigma_px > 0
    for which in (np.flatnonzero(blurred), np.flatnonzero(~blurred)):
        if len(which):
            for n, some in zip(which.tolist(), _blocks_of(axis.rows(which)), strict=True):
                found[n] = some
    return found


def _blocks_of(axis: Axis) -> list[list[Block]]:
    """`blocks` for views all blurred or all sharp."""
    size, rows = axis.size_out, min(BLOCK_ROWS, axis.size_out)
    reach = _reach(axis.softest, size) if axis.sigma_px.any() else 0
    first = np.minimum(np.arange(0, size, rows), size - rows)
    place = first[:, None] + np.arange(-reach, rows + reach)
    place = (size - 1) - np.abs((size - 1) - np.abs(place))  # mirrored at the borders
    place = np.where(axis.flipped[:, None, None], size - 1 - place, place)
    step = axis.length / size
    width = axis.filter.widths(step)
    centre = axis.start[:, None, None] + (place + 0.5) * step[:, None, None]
    half = (axis.filter.support * width)[:, None]
    start = np.clip(np.floor(centre.min(2) - half), 0, axis.size_in - 1)
    stop = np.clip(np.ceil(centre.max(2) + half), start + 1, axis.size_in)
    # as many taps as the widest crop could need: equal for every batch, so that sums round equally
    widest = max(axis.longest / size, 1.0)
    taps = math.ceil((rows + 2 * reach - 1) * axis.longest / size + 2 * half_taps(axis, widest)) + 2
    from_start = torch.from_numpy((centre - 0.5 - start[:, :, None]).astype(np.float32))
    scale = torch.from_numpy((1.0 / width).astype(np.float32))[:, None, None, None]
    weights = torch.arange(taps, dtype=torch.float32) - from_start[..., None]
    weights = axis.filter.weigh(weights.mul_(scale))
    if (start + taps > axis.size_in).any():
        left = torch.from_numpy((axis.size_in - start).astype(np.float32))
        weights.mul_(torch.arange(taps) < left[:, :, None, None])
    weights.div_(weights.sum(3, keepdim=True))
    done: Iterable[Tensor] = weights
    if reach:  # one product a view: a batched one rounds differently from batch to batch
        blur = _gauss_rows(axis.sigma_px, rows, reach)
        done = [torch.matmul(one, some) for one, some in zip(blur, weights, strict=True)]
    spans = zip(start.astype(int).tolist(), stop.astype(int).tolist(), done, strict=True)
    return [
        [
            Block(f, a, b, block[:, : b - a])
            for f, a, b, block in zip(first.tolist(), starts, stops, of_view, strict=True)
        ]
        for starts, stops, of_view in spans
    ]


def half_taps(axis: Axis, widest: float) -> float:
    """The filter's half width in input pixels, at the longest crop."""
    return axis.filter.support * (widest if axis.filter.antialias else 1.0)


def _gauss_rows(sigma_px: _Array, rows: int, reach: int) -> Tensor:
    """(n, rows, rows + 2 reach): row i has a Gaussian around column i + reach, of sum 1."""
    taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma_px[:, None]) ** 2)
    padded = np.zeros((len(sigma_px), 2 * (rows - 1) + 2 * reach + 1), np.float32)
    padded[:, rows - 1 : rows + 2 * reach] = taps / taps.sum(axis=1, keepdims=True)
    return torch.from_numpy(padded).unfold(1, rows + 2 * reach, 1).flip(1)
