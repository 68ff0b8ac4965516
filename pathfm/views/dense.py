"""Views on a GPU: all views of one size in a handful of batched kernels, without a synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from pathfm.views.colour import Finish
from pathfm.views.resampling import Axis, dense, to_device
from pathfm.views.stain import DARKEST


def dense_views(
    patches: Tensor, across: Axis, down: Axis, finish: Finish, *, compiled: bool = False
) -> Tensor:
    """(n, 3, s, s) views of patches (B, S, 3, S): row, channel, column, on 0..1.

    n is a multiple of B; view number n is of patch n % B.
    """
    batch, size_in, _, _ = patches.shape
    device, size, n = patches.device, down.size_out, len(down.start)
    weights, rows = dense(across, device), patches.flatten(1, 2)
    wide = torch.empty(n, size_in * 3, size, device=device)
    for k in range(0, n, batch):
        torch.bmm(rows, weights[k : k + batch].transpose(1, 2), out=wide[k : k + batch])
    picture = torch.bmm(dense(down, device), wide.view(n, size_in, 3 * size))
    numbers = to_device(_packed(finish), device)
    levels = np.stack([finish.lowest, finish.highest, finish.middle, finish.twice_middle])
    kinds = (down.filter.bicubic, bool(finish.restained.any()), bool(finish.solarize.any()))
    run = _compiled() if compiled else _finish
    return run(picture.view(n, size, 3, size), numbers, to_device(levels, device), *kinds)


def _packed(finish: Finish) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """(n, 36): three flags, shift, offset, stain, matrix, grey, so that one copy takes them all."""
    flags = np.stack([finish.transpose, finish.restained, finish.solarize], axis=1)
    parts = (flags, finish.shift, finish.offset, finish.stain, finish.matrix, finish.grey)
    packed = np.concatenate([part.reshape(len(flags), -1) for part in parts], axis=1)
    return packed.astype(np.float32)


def _finish(
    picture: Tensor, numbers: Tensor, levels: Tensor, bicubic: bool, stains: bool, solar: bool
) -> Tensor:
    """Turns, stains, colour, clamp, solarise, normalise: (n, s, 3, s) to (n, 3, s, s)."""
    flags, shift, offset = numbers[:, :3], numbers[:, 3:6], numbers[:, 6:9]
    stain, matrix, grey = numbers[:, 9:].reshape(-1, 3, 3, 3).unbind(1)
    transposed, restained, solarized = flags[:, :, None, None].bool().unbind(1)
    lowest, highest, middle, twice_middle = levels[:, :, None].unbind(0)
    turned = picture.permute(0, 2, 3, 1), picture.permute(0, 2, 1, 3)
    planes = torch.where(transposed[..., None], *turned).contiguous()
    flat = planes.flatten(2)
    if bicubic:
        flat = flat.clamp(0.0, 1.0)
    if stains:
        density = -torch.log(flat.clamp(min=DARKEST))
        mixed = torch.exp(-_affine(shift[:, :, None], stain, density)).clamp(max=1.0)
        flat = torch.where(restained, mixed, flat)
    # mean over channels first: one weighted sum over pixels instead of three
    mean = flat.mean(2, keepdim=True)
    flat = _affine(torch.baddbmm(offset[:, :, None], grey, mean), matrix, flat)
    flat = torch.clamp(flat, lowest, highest)
    if solar:
        flat = torch.where(solarized & (flat >= middle), twice_middle - flat, flat)
    return flat.view_as(planes)


def _affine(offset: Tensor, matrix: Tensor, flat: Tensor) -> Tensor:
    """offset (n, 3, 1) + matrix (n, 3, 3) @ flat (n, 3, pixels)."""
    if torch.compiler.is_compiling():  # as sums of products, which fuse with what is around them
        return offset + (matrix[..., None] * flat[:, None]).sum(2)
    return torch.baddbmm(offset, matrix, flat)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_finish, dynamic=False)
