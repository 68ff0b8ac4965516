"""Batched augmentation: uint8 patches in, normalised float views out, on whatever device they are.

Everything geometric is linear and separable, so a view is two matrix products: one matrix per
sample and axis holds the crop, the antialiased (triangle) filter, the flip and the Gaussian blur.
Brightness, contrast, saturation, hue and greyscale are one affine 3 x 4 colour matrix per sample.
The numbers come from `pathfm.views.params`; nothing here is random.

What differs from a chain of torchvision transforms, on purpose:
- values are clamped to 0..1 once, after colour and blur, not after each step;
- the colour order is fixed: brightness, contrast, saturation, hue, grey;
- hue is a rotation about the grey axis in YIQ (linear), not a shift in HSV.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfm.views.params import MAX_BLUR_SIGMA_PX, ViewSpec, ViewTable, draw_views

LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601 weights, as PIL and torchvision use them for greyscale."""

_RGB_TO_YIQ = (
    (0.299, 0.587, 0.114),
    (0.59590059, -0.27455667, -0.32134392),
    (0.21153661, -0.52273617, 0.31119955),
)


def make_views(
    pixels: Tensor,
    draws: NDArray[np.int64],
    specs: Sequence[ViewSpec],
    *,
    seed: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> list[Tensor]:
    """One tensor (B, 3, s, s) per spec; view v of draw d depends on (seed, d, v) alone.

    pixels: uint8 (B, S, S, 3) on any device; draws: int64 (B,). `mean` and `std` are those the
    backbone wants, on 0..1. Another batch changes a view by rounding at most (below 1e-5).
    """
    planes = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    planes = planes.div_(255.0)
    return [
        render(
            planes, draw_views(spec, seed, draws, view, pixels.shape[1]), spec.size_px, mean, std
        )
        for view, spec in enumerate(specs)
    ]


def render(
    planes: Tensor, table: ViewTable, size_px: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Normalised views (B, 3, size_px, size_px) of float images (B, 3, S, S) on 0..1."""
    batch, channels, patch_px, _ = planes.shape
    column = {
        name: torch.from_numpy(getattr(table, name)).to(planes.device, torch.float32).view(-1, 1, 1)
        for name in ViewTable.__dataclass_fields__
    }
    blur = blur_matrix(column["sigma_px"], size_px)
    across = resample_matrix(column["x"], column["width"], column["flip_x"], patch_px, size_px)
    down = resample_matrix(column["y"], column["height"], column["flip_y"], patch_px, size_px)
    rows = planes.view(batch, channels * patch_px, patch_px)
    picture = torch.bmm(rows, (blur @ across).transpose(1, 2))
    picture = (blur @ down)[:, None] @ picture.view(batch, channels, patch_px, size_px)
    turned = column["transpose"].bool()[..., None]
    picture = torch.where(turned, picture.transpose(2, 3), picture)
    return _finish(picture, column, mean, std)


def resample_matrix(
    start: Tensor, length: Tensor, flipped: Tensor, size_in: int, size_out: int
) -> Tensor:
    """(n, size_out, size_in): the antialiased resampling of [start, start + length) to size_out.

    start, length: (n, 1, 1) in input pixels, fractional; flipped: (n, 1, 1), rows in reverse order
    where not 0. Triangle filter whose half width is
    max(1, length / size_out) input pixels, normalised to sum 1; taps beyond the image are left
    out. This is PIL's `resize(..., BILINEAR, box=...)`, and for whole-pixel boxes at the image's
    border `torch.nn.functional.interpolate(mode="bilinear", antialias=True)`.
    """
    step = length / size_out
    out = torch.arange(size_out, device=start.device, dtype=start.dtype)[None, :, None]
    taps = torch.arange(size_in, device=start.device, dtype=start.dtype)[None, None, :]
    out = torch.where(flipped.bool(), size_out - 1 - out, out)
    centre = start + (out + 0.5) * step
    width = step.clamp(min=1.0)
    weights = ((taps + (0.5 - centre)).abs_().div_(-width)).add_(1.0).clamp_(min=0.0)
    return weights.div_(weights.sum(2, keepdim=True))


def blur_matrix(sigma_px: Tensor, size_px: int) -> Tensor:
    """(n, size_px, size_px): a Gaussian blur with reflected borders; sigma 0 is the identity.

    sigma_px: (n, 1, 1). Taps up to 3 times the largest sigma allowed, normalised to sum 1.
    """
    radius = min(math.ceil(3 * MAX_BLUR_SIGMA_PX), size_px - 1)
    offsets = torch.arange(-radius, radius + 1, device=sigma_px.device, dtype=sigma_px.dtype)
    taps = torch.exp(-0.5 * (offsets / sigma_px.view(-1, 1).clamp(min=1e-3)) ** 2)
    taps = taps / taps.sum(1, keepdim=True)
    place = torch.arange(size_px, device=sigma_px.device)
    source = place[:, None] + torch.arange(-radius, radius + 1, device=sigma_px.device)[None, :]
    source = (size_px - 1) - ((size_px - 1) - source.abs()).abs()
    matrix = taps.new_zeros(len(taps), size_px, size_px)
    return matrix.scatter_add_(
        2, source.expand(len(taps), -1, -1), taps[:, None, :].expand(-1, size_px, -1).contiguous()
    )


def colour_matrix(
    brightness: Tensor, contrast: Tensor, saturation: Tensor, hue_turns: Tensor, gray: Tensor
) -> tuple[Tensor, Tensor]:
    """(matrix (n, 3, 3), share (n, 1, 1)) so that a pixel becomes matrix @ rgb + share * g.

    Arguments have shape (n, 1, 1). g is the mean grey of the picture before any change: contrast
    c around it after brightness b adds (1 - c) b g to every channel, and neither saturation, hue
    nor greyscale changes a grey offset. So the five steps are one matrix and one scalar.
    """
    luma = brightness.new_tensor(LUMA)
    grey = luma.expand(3, 3)
    eye = torch.eye(3, device=luma.device, dtype=luma.dtype)
    saturate = saturation * eye + (1.0 - saturation) * grey
    to_yiq = brightness.new_tensor(_RGB_TO_YIQ)
    angle = 2.0 * math.pi * hue_turns
    cos, sin = torch.cos(angle), torch.sin(angle)
    spin = brightness.new_zeros(
        3, 3, 3
    )  # the constant, cosine and sine parts of a rotation of I, Q
    spin[0, 0, 0] = spin[1, 1, 1] = spin[1, 2, 2] = spin[2, 2, 1] = 1.0
    spin[2, 1, 2] = -1.0
    turn = torch.linalg.inv(to_yiq) @ (spin[0] + cos * spin[1] + sin * spin[2]) @ to_yiq
    last = torch.where(gray.bool(), grey, eye)
    return (contrast * brightness) * (last @ turn @ saturate), (1.0 - contrast) * brightness


def _finish(
    picture: Tensor, column: dict[str, Tensor], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Colour, clamp, solarise, normalise: the steps after geometry, on (n, 3, s, s)."""
    matrix, share = colour_matrix(
        *(column[name] for name in ("brightness", "contrast", "saturation", "hue", "gray"))
    )
    flat = picture.flatten(2)
    # mean over channels first: one weighted sum over pixels instead of three
    grey = (flat.mean(2, keepdim=True) * flat.new_tensor(LUMA).view(1, 3, 1)).sum(1, keepdim=True)
    flat = torch.baddbmm(share * grey, matrix, flat).clamp_(0.0, 1.0)
    flat = torch.where(column["solarize"].bool() & (flat >= 0.5), 1.0 - flat, flat)
    centre, spread = flat.new_tensor(mean).view(1, 3, 1), flat.new_tensor(std).view(1, 3, 1)
    return flat.sub_(centre).div_(spread).view_as(picture)
