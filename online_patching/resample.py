"""Paste tiles, fill what lies outside the slide, resample to the exact size. No I/O."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from online_patching.geometry import Box
from online_patching.plan import ReadPlan, Tile
from online_patching.slide_index import Level

OUTSIDE = 255
"""What lies outside the slide is white, like glass."""


def seen_box(level: Level, box: Box, tile: Tile) -> Box:
    """The part of a tile that a box of the level sees, px of the tile: edge tiles are padded past the level,
    and the padding is not image."""
    whole = Box(
        tile.left, tile.top, tile.left + level.tile_width_px, tile.top + level.tile_height_px
    )
    bounds = Box(0, 0, level.width_px, level.height_px)
    return whole.intersect(bounds).intersect(box).shift(-tile.left, -tile.top)


def paste(
    level: Level, box: Box, pieces: Iterable[tuple[Tile, int, NDArray[np.uint8]]]
) -> NDArray[np.uint8]:
    """The pixels of `box` (height, width, 3) from pieces (tile, part, pixels of its `seen_box`)."""
    canvas = np.full((box.height, box.width, 3), OUTSIDE, np.uint8)
    for tile, part, pixels in pieces:
        target = seen_box(level, box, tile).shift(tile.left - box.left, tile.top - box.top)
        channels = (
            slice(None)
            if level.parts == 1
            else slice(part * pixels.shape[2], (part + 1) * pixels.shape[2])
        )
        canvas[target.top : target.bottom, target.left : target.right, channels] = pixels
    return canvas


def resample(plan: ReadPlan, canvas: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The patch (height, width, 3) that a plan asks for, out of its box's pixels."""
    return canvas if plan.window is None else resize(canvas, plan.window, plan.size_px)


def resize(
    canvas: NDArray[np.uint8], window: tuple[float, float, float, float], size_px: tuple[int, int]
) -> NDArray[np.uint8]:
    """A window (left, top, right, bottom, fractional) of a canvas as `size_px` (width, height).

    Pillow's triangle filter with its support scaled to the reduction: antialiased when shrinking,
    bilinear when enlarging, at sub-pixel window edges. Down first, then across, each rounded to
    whole grey levels: in two calls, because Pillow's own order depends on its version. The native
    decoder does the same in the same integers. The distance from an exact area average in float64 is
    measured and bounded in the tests.
    """
    left, top, right, bottom = window
    height = size_px[1]
    rows = Image.fromarray(canvas).resize(
        (canvas.shape[1], height),
        Image.Resampling.BILINEAR,
        box=(0, top, canvas.shape[1], bottom),
    )
    picture = rows.resize(size_px, Image.Resampling.BILINEAR, box=(left, 0, right, height))
    return np.asarray(picture)
