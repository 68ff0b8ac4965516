"""From thumbnails to probabilities of tissue: whole, in tiles when large, several at a time.

A picture is padded by repeating its edge to a multiple of `PADDED_TO_PX`; pictures whose padded
sizes agree go through the network together. Larger ones than `MOST_AT_ONCE_PX` are cut into tiles
that overlap by twice `MARGIN_PX`, and each tile gives the part that is that far from its cuts.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pathfm.runtime import PathfmError

PADDED_TO_PX = 64
"""Both U-Nets pad to 32 by themselves; every tile begins at a multiple of this."""
MARGIN_PX = 256
"""Further than either U-Net sees: 245 px (stem 2) and 235 px (stem 4) to each side."""
MOST_AT_ONCE_PX = 2048 * 2048
"""Pixels in one go: about 0.5 GB for the U-Net."""
_TILE_PX = 2048

Rgb = NDArray[np.uint8]
Probability = NDArray[np.float32]


def ready(
    model: nn.Module,
    device: str | torch.device = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> nn.Module:
    """A copy of the model that predicts faster: in eval mode, on the device, batch norms folded into
    the convolutions before them, channels last.

    fp32 gives the same logits to rounding. bf16 halves the time on CPUs that have AVX-512 BF16 or
    AMX, and moves probabilities by some 0.01. Weights that change later do not reach the copy.
    """
    quick = copy.deepcopy(model).eval()
    for module in quick.modules():
        if isinstance(module, nn.Sequential):
            _fold(module)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    quick = quick.to(device=device, dtype=dtype)
    return quick.to(memory_format=torch.channels_last)


def _fold(layers: nn.Sequential) -> None:
    """Batch norms right after a convolution become part of it."""
    for k in range(len(layers) - 1):
        convolution, norm = layers[k], layers[k + 1]
        if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layers[k], layers[k + 1] = fuse_conv_bn_eval(convolution, norm), nn.Identity().eval()


def tissue_probability(
    model: nn.Module, thumbnail: Rgb, device: str | torch.device = "cpu"
) -> Probability:
    """Probability of tissue per pixel: (h, w, 3) uint8 -> (h, w) float32.

    The model (of one class) is put on the device; one from `ready` is two to three times faster.
    Thumbnails of more than `MOST_AT_ONCE_PX` go in tiles, so memory does not grow with them (but
    for 16 bytes a pixel). For U-Nets tiles give what the whole would, to rounding (< 1e-5). A
    SegFormer attends to everything it is shown, so its tiles differ from the whole.
    """
    return tissue_probabilities(model, [thumbnail], device)[0]


def tissue_probabilities(
    model: nn.Module, thumbnails: Sequence[Rgb], device: str | torch.device = "cpu"
) -> list[Probability]:
    """`tissue_probability` of each, those of one padded size computed together.

    Equal to one at a time, to rounding (< 1e-5 in fp32), whatever else is in the list.
    Raises ``PathfmError`` for a model of several classes.
    """
    if getattr(model, "classes", 1) != 1:
        raise PathfmError("a foreground model has one class; this one has several: give another")
    model = model.to(device)
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for k, thumbnail in enumerate(thumbnails):
        alike[_padded_size(thumbnail)].append(k)
    out: list[Probability] = [np.empty((0, 0), np.float32)] * len(thumbnails)
    for (height, width), numbers in alike.items():
        at_once = max(1, MOST_AT_ONCE_PX // (height * width))
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            batch = np.stack([_padded(thumbnails[k], height, width) for k in some])
            for k, probability in zip(some, _probabilities(model, batch, device), strict=True):
                out[k] = probability[: thumbnails[k].shape[0], : thumbnails[k].shape[1]].copy()
    return out


def _padded_size(thumbnail: Rgb) -> tuple[int, int]:
    height, width = (int(side) for side in thumbnail.shape[:2])
    return height + -height % PADDED_TO_PX, width + -width % PADDED_TO_PX


def _padded(thumbnail: Rgb, height: int, width: int) -> Rgb:
    below, right = height - thumbnail.shape[0], width - thumbnail.shape[1]
    return np.pad(thumbnail, ((0, below), (0, right), (0, 0)), mode="edge")


def _probabilities(model: nn.Module, batch: Rgb, device: str | torch.device) -> Probability:
    """(B, h, w, 3) uint8, sides multiples of PADDED_TO_PX -> (B, h, w)."""
    height, width = batch.shape[1:3]
    if height * width <= MOST_AT_ONCE_PX:
        return _forward(model, batch, device)
    out = np.empty(batch.shape[:3], np.float32)
    for top, bottom in _parts(height):
        for left, right in _parts(width):
            y, x = max(0, top - MARGIN_PX), max(0, left - MARGIN_PX)
            tile = batch[:, y : bottom + MARGIN_PX, x : right + MARGIN_PX]
            got = _forward(model, tile, device)
            out[:, top:bottom, left:right] = got[:, top - y : bottom - y, left - x : right - x]
    return out


def _parts(side_px: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of what each tile along a side gives."""
    if side_px <= _TILE_PX:
        yield 0, side_px
        return
    inner = _TILE_PX - 2 * MARGIN_PX
    for start in range(0, side_px, inner):
        yield start, min(start + inner, side_px)


def _forward(model: nn.Module, batch: Rgb, device: str | torch.device) -> Probability:
    like = next(model.parameters())
    with torch.inference_mode():
        # (B, h, w, 3) seen as (B, 3, h, w) is channels-last already
        rgb = torch.from_numpy(np.ascontiguousarray(batch)).to(device).permute(0, 3, 1, 2)
        logits: Tensor = model(rgb.to(like.dtype) / 255)
        return np.asarray(logits.float().sigmoid().cpu().numpy(), np.float32)
