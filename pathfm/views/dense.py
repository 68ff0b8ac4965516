"""Views on a GPU: all views of one size in a handful of batched kernels, without a synchronisation."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfm.views.colour import Finish
from pathfm.views.resampling import Axis, blur_matrix, dense, dense_numbers
from pathfm.views.stain import DARKEST


def dense_views(
    patches: Tensor, across: Axis, down: Axis, finish: Finish, *, compiled: bool = False
) -> Tensor:
    """(n, 3, s, s) views of patches (B, S, 3, S): row, channel, column, on 0..1.

    n is a multiple of B; view number n is of patch n % B.
    """
    batch, size_in, _, _ = patches.shape
    device, size, n = patches.device, down.size_out, len(down.start)
    packed = np.concatenate([dense_numbers(across), dense_numbers(down), _packed(finish)], axis=1)
    numbers = _to_device(packed, device)
    both = dense(numbers[:, :4], across), dense(numbers[:, 4:8], down)
    blurred = np.flatnonzero(down.sigma_px)
    if len(blurred):
        at = _to_device(blurred, device)
        sigma = _to_device(down.sigma_px[blurred].astype(np.float32), device)
        blur = blur_matrix(sigma, size)
        for weights in both:
            weights[at] = torch.bmm(blur, weights[at])
    rows = patches.flatten(1, 2)
    wide = torch.empty(n, size_in * 3, size, device=device)
    for k in range(0, n, batch):
        torch.bmm(rows, both[0][k : k + batch].transpose(1, 2), out=wide[k : k + batch])
    picture = torch.bmm(both[1], wide.view(n, size_in, 3 * size))
    kinds = (down.filter.bicubic, bool(finish.restained.any()), bool(finish.solarize.any()))
    run = _compiled() if compiled else _finish
    return run(picture.view(n, size, 3, size), numbers[:, 8:], *kinds)


def _to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    """A copy there that nothing waits for: from pinned memory where the device is a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def _packed(finish: Finish) -> NDArray[np.float32]:
    """(n, 48): three flags, shift, offset, four levels, stain, matrix, grey: one copy takes all."""
    n = len(finish.transpose)
    levels = (finish.lowest, finish.highest, finish.middle, finish.twice_middle)
    flags = np.stack([finish.transpose, finish.restained, finish.solarize], axis=1)
    parts = (flags, finish.shift, finish.offset, *(np.tile(level, (n, 1)) for level in levels))
    matrices = (finish.stain, finish.matrix, finish.grey)
    return np.concatenate(
        [*parts, *(matrix.reshape(n, 9) for matrix in matrices)], axis=1, dtype=np.float32
    )


def _finish(picture: Tensor, numbers: Tensor, bicubic: bool, stains: bool, solar: bool) -> Tensor:
    """Turns, stains, colour, clamp, solarise, normalise: (n, s, 3, s) to (n, 3, s, s)."""
    flags, shift, offset, *levels = numbers[:, :21].reshape(-1, 7, 3).unbind(1)
    stain, matrix, grey = numbers[:, 21:].reshape(-1, 3, 3, 3).unbind(1)
    transposed, restained, solarized = flags[:, :, None, None].bool().unbind(1)
    lowest, highest, middle, twice_middle = (level[:, :, None] for level in levels)
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
