"""Pictures and class masks cut and resized alike, for heads on frozen tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathfm.datasets import Benchmark
from pathfm.datasets.preparing import fit
from pathfm.runtime import PathfmError

Pixels = NDArray[np.uint8]


def tiles(pixels: Pixels, mask: Pixels, tile_px: int) -> Iterator[tuple[Pixels, Pixels]]:
    """Squares of `tile_px` from the upper left on, row by row; what is left over is dropped. 0: all of it.

    pixels: (h, w, 3); mask: (h, w). Raises PathfmError for a mask of another size and for a picture
    smaller than one tile.
    """
    if mask.shape != pixels.shape[:2]:
        raise PathfmError(
            f"a mask {mask.shape} for a picture {pixels.shape[:2]}: wants equal sizes"
        )
    if not tile_px:
        yield pixels, mask
        return
    height, width = mask.shape
    if min(height, width) < tile_px:
        raise PathfmError(f"a picture of {width} x {height} px holds no tile of {tile_px} px")
    for y in range(0, height - tile_px + 1, tile_px):
        for x in range(0, width - tile_px + 1, tile_px):
            at = slice(y, y + tile_px), slice(x, x + tile_px)
            yield pixels[at], mask[at]


def fit_mask(mask: Pixels, size_px: int) -> Pixels:
    """A mask whose shorter side is brought to `size_px`, nearest neighbour, centre-cropped to a square.

    The nearest as torchvision has it, floor(i * before / after): what eva does to masks, while the
    picture is resized bilinearly (`datasets.preparing.fit`).
    """
    height, width = mask.shape
    short = min(height, width)
    if short == 0:
        raise PathfmError("the mask is empty")
    new_h, new_w = (size_px * side // short for side in (height, width))
    rows, columns = _nearest(height, new_h), _nearest(width, new_w)
    top, left = round((new_h - size_px) / 2), round((new_w - size_px) / 2)
    return mask[np.ix_(rows[top : top + size_px], columns[left : left + size_px])]


def _nearest(before: int, after: int) -> NDArray[np.int64]:
    scale = np.float32(before) / np.float32(after)  # in float32, as torch has it
    found = np.floor(np.arange(after, dtype=np.float32) * scale).astype(np.int64)
    return np.asarray(np.minimum(found, before - 1))


@dataclass(frozen=True, eq=False)
class Pictures:
    """All tiles at the input size with masks, splits, and who must not be on two sides of a split.

    of: the number of the picture that each tile was cut from.
    """

    pixels: Pixels
    masks: Pixels
    splits: tuple[str, ...]
    groups: tuple[str, ...]
    of: NDArray[np.int64]


def read_pictures(data: Benchmark, input_px: int, tile_px: int) -> Pictures:
    """Every picture of a segmentation data set cut into tiles, resized with its mask.

    Raises PathfmError that names the first picture that cannot be cut or read.
    """
    pixels, masks, of = [], [], []
    for i, name in enumerate(data.paths):
        try:
            for part, mask in tiles(data.read(i), data.mask(i), tile_px):
                pixels.append(fit(part, input_px, name))
                masks.append(fit_mask(mask, input_px))
                of.append(i)
        except PathfmError as error:
            raise PathfmError(f"{data.name}, {name}: {error}") from None
    return Pictures(
        np.stack(pixels),
        np.stack(masks),
        tuple(data.splits[i] for i in of),
        tuple(data.groups[i] or data.paths[i] for i in of),
        np.asarray(of, np.int64),
    )
