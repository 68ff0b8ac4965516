"""Batched augmentation: uint8 patches in, normalised float views out, on whatever device they are.

Everything geometric is linear and separable, so a view is two matrix products: one matrix a
view and axis holds the crop, the antialiased filter, the flip and the Gaussian blur
(`resampling`). Stain jitter is a 3 x 3 matrix of optical densities; brightness, contrast, saturation,
hue, greyscale and normalisation are one affine colour matrix (`colour`). The numbers come from
`params`; nothing here is random. `dense` multiplies whole matrices for all views at once (GPU),
`banded` skips their zeros view by view (CPU).

What differs from a chain of torchvision transforms, on purpose (docs/views.md):
- values are cut off at 0 and 1 once, after colour and blur, not after each step;
- the colour order is fixed: stains, brightness, contrast, saturation, hue, grey;
- hue is a rotation about the grey axis in YIQ (linear), not a shift in HSV.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfm.runtime import PathfmError
from pathfm.views.banded import banded_views
from pathfm.views.colour import finishing
from pathfm.views.dense import dense_views
from pathfm.views.params import ViewSpec, ViewTable, draw_views
from pathfm.views.resampling import Shape, axes

Engine = Literal["auto", "banded", "dense", "compiled"]
"""How pixels are made: "auto" is banded on a CPU and dense elsewhere; "compiled" is dense with its
pointwise steps fused by torch.compile. All agree up to rounding."""


def make_views(
    pixels: Tensor,
    draws: NDArray[np.int64],
    specs: Sequence[ViewSpec],
    *,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
    engine: Engine = "auto",
    only: Sequence[int] | None = None,
) -> list[Tensor]:
    """One tensor (B, 3, s, s) per spec; view v of draw d depends on (seed, d, v) alone.

    only: the numbers of the views to make, in the order they are returned in; None: all.
    pixels: uint8 (B, S, S, 3) on any device; draws: int64 (B,). `mean` and `std` are those the
    backbone wants, on 0..1. Another batch or engine changes a view by rounding at most (below 1e-5
    of the range 0..1). Views of one size are parts of one tensor. Raises PathfmError for pixels that
    are not square uint8 RGB, or not as many as draws.
    """
    batch, patch_px = len(draws), pixels.shape[-2] if pixels.ndim > 1 else 0
    if pixels.dtype != torch.uint8 or pixels.shape != (batch, patch_px, patch_px, 3):
        raise PathfmError(
            f"views are made of uint8 patches ({batch}, S, S, 3), one for each draw, not of "
            f"{str(pixels.dtype).removeprefix('torch.')} {tuple(pixels.shape)}"
        )
    wanted = range(len(specs)) if only is None else only
    numbers: dict[Shape, list[int]] = {}
    for view in wanted:
        numbers.setdefault(Shape.of(specs[view]), []).append(view)
    groups = [
        (ViewTable.join(_draw(specs, some, seed, draws, patch_px)), shape)
        for shape, some in numbers.items()
    ]
    views = [pixels] * len(specs)
    for some, made in zip(numbers.values(), render(pixels, groups, mean, std, engine), strict=True):
        for view, one in zip(some, made.view(len(some), batch, *made.shape[1:]), strict=True):
            views[view] = one
    return [views[view] for view in wanted]


def _draw(
    specs: Sequence[ViewSpec], views: Sequence[int], seed: int, draws: NDArray[np.int64], px: int
) -> list[ViewTable]:
    """The views' tables; neighbours of one spec are drawn together, which is a third of the time."""
    tables, left = [], list(views)
    while left:
        alike = [view for view in left if specs[view] == specs[left[0]]]
        alike = alike[: next((k for k, v in enumerate(alike) if left[k] != v), len(alike))]
        every = np.repeat(np.asarray(alike, np.int64), len(draws))
        tables.append(draw_views(specs[left[0]], seed, np.tile(draws, len(alike)), every, px))
        left = left[len(alike) :]
    return tables


@torch.no_grad()
def render(
    pixels: Tensor,
    groups: Sequence[tuple[ViewTable, Shape]],
    mean: Sequence[float],
    std: Sequence[float],
    engine: Engine = "auto",
) -> list[Tensor]:
    """Normalised views (n, 3, s, s) for each group of them, of patches (B, S, S, 3).

    pixels: uint8, or float on 0..1. n is a multiple of B; row n of a table is a view of patch n % B.
    """
    with torch.autocast(pixels.device.type, enabled=False):  # bf16 would cost half a grey level
        if engine == "banded" or (engine == "auto" and pixels.device.type == "cpu"):
            return banded_views(pixels, groups, mean, std)
        return _dense(pixels, groups, mean, std, compiled=engine == "compiled")


def _dense(
    pixels: Tensor,
    groups: Sequence[tuple[ViewTable, Shape]],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    compiled: bool,
) -> list[Tensor]:
    """`render` by whole matrices."""
    patches = pixels.permute(0, 1, 3, 2)  # rows of channels, so that products need no copies
    patches = patches.to(torch.float32, memory_format=torch.contiguous_format)
    if not pixels.dtype.is_floating_point:
        patches = patches.div_(255.0)
    size_in = pixels.shape[1]
    return [
        dense_views(
            patches, *axes(table, shape, size_in), finishing(table, mean, std), compiled=compiled
        )
        for table, shape in groups
    ]
