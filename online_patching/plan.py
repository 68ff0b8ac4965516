"""Which level, which tiles, which byte ranges, pasted where. Pure arithmetic, no I/O.

The level rule, in one place: the coarsest level whose µm/px is at most 2 % coarser than asked; if
there is none, the finest, and then never more than 2x upscaled. A JPEG level at least 2, 4 or 8 times finer
than asked is decoded at 1/2, 1/4 or 1/8 of its size, which libjpeg does in the inverse transform; a JPEG 2000
level likewise, by leaving out its finest wavelet bands.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from online_patching.errors import SamplerError
from online_patching.geometry import Box, PatchRef
from online_patching.slide_index import Codec, Level, SlideIndex

LEVEL_TOLERANCE = 0.02
MAX_UPSCALE = 2.0
EXACT_WITHIN_PX = 0.5
"""A read whose size at the level rounds to the asked size is not resampled: the whole patch is
off by less than half a pixel at its far edge."""


HALF = 0.5 + 1e-6
"""What is added before rounding down to the nearest pixel."""

DCT_SCALES = (8, 4, 2)
"""How much smaller a JPEG tile can be decoded, the largest first."""

MAX_REDUCTIONS = 5
"""How many times a JPEG 2000 tile is halved at most, whatever its stream allows."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A stored tile that a box touches: its number and where its upper left corner lies (level px)."""

    number: int
    row: int
    column: int
    left: int
    top: int


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """How to read one patch: cut `box` (px of the level reduced by `scale`, may overhang it) out of
    `tiles`, then resample `window` (left, top, right, bottom within the box, fractional) to
    `size_px` (width, height); a window of None means that the box is the patch.
    """

    level: int
    box: Box
    tiles: tuple[Tile, ...]
    size_px: tuple[int, int]
    window: tuple[float, float, float, float] | None
    scale: int = 1


def can_serve(level_mpps: Sequence[float], mpp: float) -> bool:
    """Whether a slide with these levels serves `mpp` without upscaling more than 2x."""
    return min(level_mpps) <= MAX_UPSCALE * mpp * (1 + 1e-9)


def choose_level(level_mpps: Sequence[float], mpp: float) -> int:
    """The number of the level to read for `mpp`; levels may be in any order."""
    if not 0 < mpp < math.inf:
        raise SamplerError(
            f"{mpp} µm/px is not a magnification; ask for a number above 0, such as 0.5."
        )
    fine_enough = [(m, i) for i, m in enumerate(level_mpps) if m <= mpp * (1 + LEVEL_TOLERANCE)]
    if fine_enough:
        return max(fine_enough)[1]
    if can_serve(level_mpps, mpp):
        return min((m, i) for i, m in enumerate(level_mpps))[1]
    raise SamplerError(
        f"the finest level has {min(level_mpps):g} µm/px: {mpp:g} µm/px would upscale it "
        f"{min(level_mpps) / mpp:.1f}x, more than {MAX_UPSCALE:g}x. Ask for coarser patches."
    )


def plan_patch(index: SlideIndex, ref: PatchRef) -> ReadPlan:
    """The read that gives a patch at its exact µm/px."""
    sides = (ref.width_px0, ref.height_px0)
    return plan_square(index, ref.mpp, (ref.x_px0, ref.y_px0), sides, ref.size_px)


def plan_square(
    index: SlideIndex,
    mpp: float,
    corner_px0: tuple[float, float],
    sides_px0: tuple[float, float],
    size_px: int,
) -> ReadPlan:
    """The read that gives `size_px` x `size_px` pixels at `mpp` of a box of level-0 pixels (fractional)."""
    number = choose_level([level.mpp for level in index.levels], mpp)
    level = index.levels[number]
    across = sides_px0[0] / level.downsample_x / size_px
    down = sides_px0[1] / level.downsample_y / size_px
    scale = choose_scale(level, min(across, down))
    level = level.reduced(scale)
    phase = phase_px(level.codec, scale)
    left = corner_px0[0] / level.downsample_x + phase
    top = corner_px0[1] / level.downsample_y + phase
    width, height = sides_px0[0] / level.downsample_x, sides_px0[1] / level.downsample_y
    window = (left, top, left + width, top + height)
    return plan_window(level, number, window, (size_px, size_px), scale)


def scales_of(codec: Codec) -> tuple[int, ...]:
    """How many times smaller tiles of a codec can be decoded, the largest first; () for not at all."""
    if codec.kind == "jpeg":
        return DCT_SCALES
    if codec.kind == "jpeg2000":
        return tuple(2**n for n in range(min(codec.reductions, MAX_REDUCTIONS), 0, -1))
    return ()


def phase_px(codec: Codec, scale: int) -> float:
    """How far right and down a picture lies in a tile decoded at 1/scale, in px of that tile.

    A JPEG pixel is the mean of its block and lies in the block's middle. A wavelet's low-pass sample
    k lies at pixel scale * k, not in the middle of scale pixels: half a pixel less half a pixel of
    the whole tile. Without this a read differs by about three times as much from an antialiased one; and
    such a read is always resampled, even where it has the asked size, because it lies between pixels.
    """
    return 0.5 - 0.5 / scale if codec.kind == "jpeg2000" else 0.0


def choose_scale(level: Level, reduction: float) -> int:
    """By how much the tiles of a level are decoded smaller when it is `reduction` times too fine.

    The largest of `scales_of` its codec that leaves it no more than 2 % too coarse, among those that
    divide the tile's sides.
    """
    sides = (level.tile_width_px, level.tile_height_px)
    fits = (s for s in scales_of(level.codec) if s <= reduction * (1 + LEVEL_TOLERANCE))
    return next((s for s in fits if not any(side % s for side in sides)), 1)


def plan_window(
    level: Level,
    number: int,
    window: tuple[float, float, float, float],
    size_px: tuple[int, int],
    scale: int = 1,
) -> ReadPlan:
    """The read that gives `size_px` pixels of a fractional window on a level.

    `level` is level `number` of a slide, reduced by `scale`.
    """
    left, top, right, bottom = window
    width, height = size_px
    fits = (
        abs(right - left - width) < EXACT_WITHIN_PX and abs(bottom - top - height) < EXACT_WITHIN_PX
    )
    if fits and not phase_px(level.codec, scale):
        x, y = round_half_up(left), round_half_up(top)
        box = Box(x, y, x + width, y + height)
        return ReadPlan(number, box, tiles_of(level, box), size_px, None, scale)
    # The triangle filter reaches one output pixel beyond the window on each side.
    mx = math.ceil(max(1.0, (right - left) / width)) + 1
    my = math.ceil(max(1.0, (bottom - top) / height)) + 1
    box = Box(
        math.floor(left) - mx, math.floor(top) - my, math.ceil(right) + mx, math.ceil(bottom) + my
    )
    inner = (left - box.left, top - box.top, right - box.left, bottom - box.top)
    return ReadPlan(number, box, tiles_of(level, box), size_px, inner, scale)


def tiles_of(level: Level, box: Box) -> tuple[Tile, ...]:
    """The tiles a box touches, row by row; the part of the box outside the level touches none."""
    inside = box.intersect(Box(0, 0, level.width_px, level.height_px))
    if inside.empty:
        return ()
    w, h = level.tile_width_px, level.tile_height_px
    return tuple(
        Tile(row * level.columns + column, row, column, column * w, row * h)
        for row in range(inside.top // h, -(-inside.bottom // h))
        for column in range(inside.left // w, -(-inside.right // w))
    )


def merge_ranges(
    ranges: Iterable[tuple[int, int]], gap_bytes: int, max_bytes: int = 8 * 2**20
) -> list[tuple[int, int]]:
    """Ranges to request so that every given one lies in one of them: sorted, disjoint.

    Neighbours at most `gap_bytes` apart become one request of at most `max_bytes` (a single
    larger range stays whole). With a gap of 0 only touching ranges join, and exactly the bytes
    given are asked for. Empty ranges vanish.
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(r for r in ranges if r[1] > r[0]):
        if merged:
            first, last = merged[-1]
            joined = max(last, stop)
            if start < last or (start - last <= gap_bytes and joined - first <= max_bytes):
                merged[-1] = (first, joined)
                continue
        merged.append((start, stop))
    return merged


def round_half_up(value: float) -> int:
    """The nearest whole pixel; halves go up, so that neighbouring boxes tile.

    What is a millionth of a pixel short of a half counts as one: a place given in µm and the same one in
    pixels must not come out a pixel apart.
    """
    return math.floor(value + HALF)
