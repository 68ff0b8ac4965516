"""Views on a CPU core: one after the other, so that a patch stays in the cache; zeros are skipped."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pathfm.views.colour import Finish, finishing
from pathfm.views.params import ViewTable
from pathfm.views.resampling import Axis, Block, Shape, axes, blocks
from pathfm.views.stain import DARKEST

CHUNK = 8
"""Patches whose matrices are held at once: more of them leave the cache."""


def banded_views(
    pixels: Tensor,
    groups: Sequence[tuple[ViewTable, Shape]],
    mean: Sequence[float],
    std: Sequence[float],
) -> list[Tensor]:
    """One tensor (n, 3, s, s) for each group of views; n is a multiple of B.

    pixels: (B, S, S, 3), uint8 or float on 0..1. Row n of a table is a view of patch n % B.
    """
    batch, size_in = pixels.shape[:2]
    made = [torch.empty(len(table), 3, shape.size_px, shape.size_px) for table, shape in groups]
    patch = torch.empty(size_in, 3, size_in)
    for first in range(0, batch, CHUNK):
        some = np.arange(first, min(first + CHUNK, batch))
        work = []
        for (table, shape), out in zip(groups, made, strict=True):
            rows = (np.arange(0, len(table), batch)[:, None] + some).ravel()
            part = table.rows(rows)
            views = BandedViews(*axes(part, shape, size_in), finishing(part, mean, std))
            work.append((views, rows, out))
        for k, p in enumerate(some):
            patch.copy_(pixels[p].permute(0, 2, 1))
            if not pixels.dtype.is_floating_point:
                patch.div_(255.0)
            for views, rows, out in work:
                for n in range(k, len(rows), len(some)):
                    views.make(n, patch, out[rows[n]])
    return made


class BandedViews:
    """Makes n views of one size, one at a time, in buffers that are used again and again."""

    def __init__(self, across: Axis, down: Axis, finish: Finish) -> None:
        self.across, self.down = blocks(across), blocks(down)
        self.bicubic = down.filter.bicubic
        size = down.size_out
        self.wide = torch.empty(down.size_in, 3, size)
        self.picture = torch.empty(size, 3, size)
        self.planes = torch.empty(3, size, size)
        self.flags = [
            *zip(
                finish.transpose.tolist(),
                finish.restained.tolist(),
                finish.solarize.tolist(),
                strict=True,
            )
        ]
        self.contrasted = [bool(grey.any()) for grey in finish.grey]
        self.stain = torch.from_numpy(-finish.stain)
        self.shift = torch.from_numpy(-finish.shift)[:, :, None]
        self.matrix, self.grey = torch.from_numpy(finish.matrix), torch.from_numpy(finish.grey)
        self.offset = torch.from_numpy(finish.offset)[:, :, None]
        self.bounds = [*zip(finish.lowest.tolist(), finish.highest.tolist(), strict=True)]
        self.middle = torch.from_numpy(finish.middle)[:, None]
        self.twice_middle = torch.from_numpy(finish.twice_middle)[:, None]

    def make(self, n: int, patch: Tensor, out: Tensor) -> None:
        """View n of a patch (S, 3, S), row, channel, column, on 0..1; into out (3, s, s)."""
        self._resample(self.across[n], self.down[n], patch)
        transpose, restained, solarize = self.flags[n]
        order = (1, 2, 0) if transpose else (1, 0, 2)
        flat = self.planes.copy_(self.picture.permute(order)).flatten(1)
        if self.bicubic:
            flat.clamp_(0.0, 1.0)
        if restained:
            flat.clamp_(min=DARKEST).log_().neg_()
            flat = torch.addmm(self.shift[n], self.stain[n], flat).exp_().clamp_(max=1.0)
        offset = self.offset[n]
        if self.contrasted[n]:
            offset = torch.addmm(offset, self.grey[n], flat.mean(1, keepdim=True))
        out = out.flatten(1)
        torch.addmm(offset, self.matrix[n], flat, out=out)
        for channel, (low, high) in zip(out.unbind(), self.bounds, strict=True):
            channel.clamp_(low, high)  # one call with (3, 1) bounds takes eight times as long
        if solarize:
            out.copy_(torch.where(out >= self.middle, self.twice_middle - out, out))

    def _resample(self, across: list[Block], down: list[Block], patch: Tensor) -> None:
        """Crop, resize, flip and blur into `picture`; rows of no use are left out of the first pass."""
        top = min(block.start for block in down)
        height = max(block.stop for block in down) - top
        rows = patch.narrow(0, top, height).flatten(0, 1)
        wide = self.wide.narrow(0, 0, height)
        out = wide.flatten(0, 1)
        for b in across:
            torch.mm(
                rows[:, b.start : b.stop], b.weights.t(), out=out[:, b.first : b.first + b.rows]
            )
        wide, picture = wide.flatten(1), self.picture.flatten(1)
        for b in down:
            part = wide[b.start - top : b.stop - top]
            torch.mm(b.weights, part, out=picture[b.first : b.first + b.rows])
