"""The levels of a tiled TIFF: their tile tables, read and checked in parts, and their JPEG 2000 headers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from online_patching.codestream import BadStreamError, codestream_of, read_frame
from online_patching.errors import DamagedSlideError, ShortReadError, UnsupportedSlideError
from online_patching.formats.tiff_page import Page
from online_patching.formats.tiff_tags import Directory, HeaderReader
from online_patching.formats.vendors import Mpp
from online_patching.slide_index import Codec, Level, pack_rows

_MAX_TILES = 4 * 2**20
"""Tiles of all levels together: their rows are 32 MiB. A slide has about 150,000."""
_MAX_SIDE_PX = 2**22
"""A glass slide is 75 mm long: 1.5 million pixels at 0.05 µm."""
_MAX_TILE_PX = 2**24
_MAX_LARGE_TILES = 4096
_FRAME_BYTES = 8 * 2**10
"""Enough of a JPEG 2000 stream to see its header."""
_TILE_OFFSETS, _STRIP_OFFSETS, _TILE_LENGTHS, _STRIP_LENGTHS = 324, 273, 325, 279

Overflow = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Source:
    """A page that is a level: how it is stored and, where its tags say too much, how large it is."""

    page: Page
    codec: Codec
    size_px: tuple[int, int]
    downsample: tuple[float, float]


def read_levels(
    name: str, sources: list[Source], mpp: Mpp, reader: HeaderReader
) -> tuple[Level, ...]:
    """The levels with their tile rows; refuses what is too large to be true before memory is taken."""
    out, tiles = [], 0
    for source in sources:
        page, codec, (dx, dy) = source.page, source.codec, source.downsample
        level = Level(
            page.width, page.height, page.tile_width, page.tile_height,
            dx, dy, mpp.x * dx, mpp.y * dy, codec, parts=min(page.planes, 3),
        )  # fmt: skip
        tiles += level.n_tiles * page.planes
        _check_sizes(name, level, tiles)
        rows, overflow = _tile_rows(name, page.tags, level, page.planes, reader.size_bytes)
        rows = _seen_rows(level, rows, source.size_px)
        level = replace(level, rows=rows, overflow=overflow,
                        width_px=source.size_px[0], height_px=source.size_px[1])  # fmt: skip
        if codec.kind == "jpeg2000":
            level = replace(level, codec=_with_frame(level, page, reader))
        out.append(level)
    return tuple(out)


def without_gaps(levels: tuple[Level, ...]) -> tuple[Level, ...]:
    """The largest level, and those that lack no tile where the largest has pixels.

    Aperio's reduced images can lack tiles of tissue. OpenSlide draws those from the level before; to be
    white would be wrong, and from a level that is not there a read falls back to a finer one.
    """
    first = levels[0]
    return (first, *(level for level in levels[1:] if not _has_gap(first, level)))


def _has_gap(first: Level, level: Level) -> bool:
    missing = np.flatnonzero(~_is_stored(level))
    if not len(missing):
        return False
    stored = _is_stored(first).reshape(-1, first.columns)
    counts = np.pad(stored.cumsum(0, np.int64).cumsum(1), ((1, 0), (1, 0)))
    row, column = np.divmod(missing, level.columns)

    def edges(number: NDArray[np.int64], tile: float, limit: int) -> NDArray[np.int64]:
        return np.asarray(np.minimum(np.rint(number * tile), limit), np.int64)

    down = level.tile_height_px * level.downsample_y / first.tile_height_px
    across = level.tile_width_px * level.downsample_x / first.tile_width_px
    top, bottom = (edges(row + n, down, stored.shape[0]) for n in (0, 1))
    left, right = (edges(column + n, across, stored.shape[1]) for n in (0, 1))
    seen = counts[bottom, right] - counts[top, right] - counts[bottom, left] + counts[top, left]
    return bool(np.any(seen > 0))


def _is_stored(level: Level) -> NDArray[np.bool_]:
    """For each tile whether any piece of it is stored."""
    assert level.rows is not None
    stored = (level.rows & np.uint64(0xFFFFFF)) != 0
    return np.asarray(stored.reshape(-1, level.parts).any(axis=1))


def _check_sizes(name: str, level: Level, tiles: int) -> None:
    if max(level.width_px, level.height_px) > _MAX_SIDE_PX:
        raise DamagedSlideError(name, f"claims {level.width_px:,} x {level.height_px:,} px.")
    if level.tile_width_px * level.tile_height_px > _MAX_TILE_PX:
        raise UnsupportedSlideError(
            name,
            f"tiles of {level.tile_width_px} x {level.tile_height_px} px are too large to read at random.",
        )
    if tiles > _MAX_TILES:
        raise DamagedSlideError(name, f"claims {tiles:,} tiles; a slide has about 150,000.")


def _tile_rows(
    name: str, tags: Directory, level: Level, planes: int, size: int
) -> tuple[NDArray[np.uint64], Overflow]:
    """The level's packed tile table, read and checked in parts: all of plane 0, then of plane 1, ..."""
    starts = _TILE_OFFSETS if _TILE_OFFSETS in tags else _STRIP_OFFSETS
    sizes = _TILE_LENGTHS if _TILE_LENGTHS in tags else _STRIP_LENGTHS
    count = level.n_tiles * planes
    if not tags.count(starts) == tags.count(sizes) == count:
        raise DamagedSlideError(
            name,
            f"a level of {count} tiles lists {tags.count(starts)} offsets "
            f"and {tags.count(sizes)} lengths.",
        )
    # No codec makes a tile four times larger than its pixels; a loader would read what this says.
    most = 4 * level.tile_width_px * level.tile_height_px * level.codec.samples + 2**16
    rows, at = np.empty(count, np.uint64), 0
    large: list[tuple[int, int]] = []
    for offsets, lengths in zip(tags.table(starts), tags.table(sizes), strict=True):
        _check_ranges(name, offsets, lengths, size, most)
        packed, overflow = pack_rows(np.where(lengths > 0, offsets, 0), lengths)
        escaped = (packed & np.uint64(0xFFFFFF)) == np.uint64(0xFFFFFF)
        packed[escaped] += np.uint64(len(large) << 24)  # they count from the level's first
        rows[at : at + len(packed)] = packed
        large.extend(overflow)
        at += len(packed)
        if len(large) > _MAX_LARGE_TILES:
            raise DamagedSlideError(name, "lists thousands of tiles of 16 MB, or beyond 1 TB.")
    return rows, tuple(large)


def _check_ranges(
    name: str, offsets: NDArray[np.uint64], lengths: NDArray[np.uint64], size: int, most: int
) -> None:
    limit = np.uint64(size)
    past = np.flatnonzero(
        (lengths > limit) | ((lengths > 0) & (offsets > limit - np.minimum(lengths, limit)))
    )
    if len(past):
        start, length = int(offsets[past[0]]), int(lengths[past[0]])
        raise ShortReadError(name, start, start + length, size)
    if len(lengths) and int(lengths.max()) > most:
        raise DamagedSlideError(
            name, f"a tile claims {int(lengths.max()):,} bytes, more than its pixels could need."
        )


def _seen_rows(
    level: Level, rows: NDArray[np.uint64], size_px: tuple[int, int]
) -> NDArray[np.uint64]:
    """Rows tile by tile, the pieces of one together; without tiles beyond the level's true size."""
    down = -(-level.height_px // level.tile_height_px)
    if level.parts == 1 and size_px == (level.width_px, level.height_px):
        return rows
    grid = rows.reshape(-1, down, level.columns)[: level.parts]
    seen = grid[
        :, : -(-size_px[1] // level.tile_height_px), : -(-size_px[0] // level.tile_width_px)
    ]
    return np.ascontiguousarray(seen.transpose(1, 2, 0)).reshape(-1)


def _with_frame(level: Level, page: Page, reader: HeaderReader) -> Codec:
    """A JPEG 2000 level's codec with what the header of its first stored tile says.

    A stream whose colours were transformed comes out as RGB, although the picture is said to be YCbCr;
    Aperio's two compressions say it themselves. A header that cannot be read says nothing: its tile will.
    """
    assert level.rows is not None
    stored = np.flatnonzero(level.rows & np.uint64(0xFFFFFF))
    if not len(stored):
        return level.codec
    start, stop = level.byte_range(int(stored[0]))
    try:
        data = reader.read_rows(start, min(stop - start, _FRAME_BYTES))  # and nothing beside them
        frame = read_frame(codestream_of(data))
    except BadStreamError:
        return level.codec
    codec = replace(level.codec, reductions=frame.reductions)
    if page.tags.number(259, 1) == 34712 and codec.colour == "ycbcr" and frame.transformed:
        return replace(codec, colour="rgb")
    return codec
