"""Parts of a level and their frames -> the level's table of tiles.

PS3.3 C.7.6.17.3: frames of TILED_FULL lie row by row, focal plane by focal plane; those of TILED_SPARSE
say where they lie. Of several focal planes the middle one is taken, as wsidicom does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import DamagedSlideError, UnsupportedSlideError
from online_patching.formats import dicom_attributes as tags
from online_patching.formats.dicom_attributes import BadDicomError
from online_patching.formats.dicom_frames import frame_ranges
from online_patching.formats.dicom_series import Instance
from online_patching.slide_index import pack_rows

_MAX_SIDE_PX = 2**22
_MAX_TILE_PX = 2**24
_MAX_TILES = 4 * 2**20
_MAX_LARGE_TILES = 4096


@dataclass(frozen=True)
class Table:
    """A level's tiles, row by row: where each begins in the slide's addresses, and its bytes (0: white)."""

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    fragments: bool
    """Whether a tile is stored as items with their headers."""

    @property
    def stored(self) -> NDArray[np.int64]:
        """Numbers of the tiles that are stored."""
        return np.flatnonzero(self.lengths)

    def range(self, tile: int) -> tuple[int, int]:
        """Address of a tile's first byte, and the one past its last."""
        start = int(self.starts[tile])
        return start, start + int(self.lengths[tile])

    def rows(self) -> tuple[NDArray[np.uint64], tuple[tuple[int, int], ...]]:
        """Packed, as levels of an index hold them."""
        return pack_rows(np.where(self.lengths > 0, self.starts, 0), self.lengths)


def check_sizes(uri: str, levels: list[list[Instance]]) -> None:
    """Refuse sizes that no slide has, before memory is taken for them."""
    tiles, largest = 0, levels[0][0]
    for part in (parts[0] for parts in levels):
        (tile_width, tile_height), sides = part.tile, (part.width, part.height)
        if min(*sides, *part.tile) < 1 or max(sides) > _MAX_SIDE_PX:
            raise DamagedSlideError(
                uri, f"{part.shown} claims {sides[0]:,} x {sides[1]:,} px in frames of "
                f"{tile_width:,} x {tile_height:,}.",
            )  # fmt: skip
        if tile_width * tile_height > _MAX_TILE_PX:
            raise UnsupportedSlideError(
                uri, f"frames of {tile_width:,} x {tile_height:,} px ({part.shown}) are too large to read at random."
            )  # fmt: skip
        tiles += _n_tiles(part)
        rx, ry = largest.width / sides[0], largest.height / sides[1]
        slack = 2 * max(rx / sides[0], ry / sides[1])  # sizes are rounded to whole pixels
        if abs(rx - ry) > max(slack, 0.01 * rx):
            raise UnsupportedSlideError(
                uri,
                f"{largest.shown} ({largest.width} x {largest.height} px) and {part.shown} ({sides[0]} x "
                f"{sides[1]} px) are no pyramid: regions of their own. Put each in a folder.",
            )
    if tiles > _MAX_TILES:
        raise DamagedSlideError(uri, f"claims {tiles:,} tiles; a slide has about 150,000.")


def level_table(uri: str, parts: list[Instance], bases: list[int]) -> Table:
    """The tiles of one level whose parts begin at these addresses.

    Raises BadDicomError, DamagedSlideError or UnsupportedSlideError.
    """
    first = parts[0]
    frame_bytes = first.tile[0] * first.tile[1] * first.samples
    found = [frame_ranges(part.source, part.found, part.frames, frame_bytes) for part in parts]
    fragments = any(one.fragments for one in found)
    if fragments:
        found = [one.with_headers() for one in found]
    starts = np.concatenate([one.starts + base for one, base in zip(found, bases, strict=True)])
    lengths = np.concatenate([one.lengths for one in found])
    # No codec makes a frame four times larger than its pixels; a loader would read what this says.
    if len(lengths) and int(lengths.max()) > 4 * frame_bytes + 2**16:
        raise DamagedSlideError(
            uri, f"a frame of {first.shown} claims {int(lengths.max()):,} bytes, more than its pixels need."
        )  # fmt: skip
    if np.count_nonzero(lengths >= 2**24 - 1) > _MAX_LARGE_TILES:
        raise DamagedSlideError(uri, f"{first.shown} lists thousands of frames of 16 MB.")
    frames, tiles = _placed(uri, parts, len(lengths))
    starts_of, lengths_of = np.zeros((2, _n_tiles(first)), np.int64)
    starts_of[tiles], lengths_of[tiles] = starts[frames], lengths[frames]
    return Table(starts_of, lengths_of, fragments)


def _n_tiles(part: Instance) -> int:
    return -(-part.width // part.tile[0]) * -(-part.height // part.tile[1])


Placed = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Numbers of frames, and of the tiles they are."""


def _placed(uri: str, parts: list[Instance], frames: int) -> Placed:
    organization = parts[0].found.text(tags.ORGANIZATION)
    sparse = organization == "TILED_SPARSE" or (
        organization != "TILED_FULL" and len(parts[0].found.columns) > 0
    )
    return _sparse(uri, parts, frames) if sparse else _full(uri, parts[0], frames)


def _full(uri: str, part: Instance, frames: int) -> Placed:
    """Every tile of every focal plane is there; the middle plane's."""
    tiles = _n_tiles(part)
    planes = part.focal_planes or max(1, frames // tiles)
    if frames != tiles * planes:
        raise DamagedSlideError(
            uri,
            f"{part.shown} holds {frames:,} frames for {tiles:,} tiles in {planes} focal plane(s). "
            "It is truncated, or a part of it is missing.",
        )
    numbers = np.arange(tiles, dtype=np.int64)
    return (planes - 1) // 2 * tiles + numbers, numbers


def _sparse(uri: str, parts: list[Instance], frames: int) -> Placed:
    """Frames where they say they are, those of the plane nearest the middle height."""
    for part in parts:
        if len(part.found.columns) != part.frames:
            raise DamagedSlideError(
                uri,
                f"{part.shown} places {len(part.found.columns):,} of its {part.frames:,} frames.",
            )
    first = parts[0]
    x, y = (
        np.concatenate([np.frombuffer(getattr(part.found, axis), np.int64) for part in parts]) - 1
        for axis in ("columns", "rows")
    )
    heights = np.concatenate([np.frombuffer(part.found.heights, np.float64) for part in parts])
    chosen = np.flatnonzero(heights == _middle(heights))
    x, y = x[chosen], y[chosen]
    width, height = first.tile
    if np.any((x < 0) | (y < 0) | (x >= first.width) | (y >= first.height)):
        raise DamagedSlideError(uri, f"{first.shown} places frames outside of its picture.")
    if np.any((x % width != 0) | (y % height != 0)):
        raise UnsupportedSlideError(
            uri, f"frames of {first.shown} do not lie on a grid of {width} x {height} px."
        )
    tiles = y // height * -(-first.width // width) + x // width
    if len(np.unique(tiles)) != len(tiles):
        raise DamagedSlideError(uri, f"{first.shown} places several frames on one tile.")
    return chosen.astype(np.int64), tiles


def _middle(heights: NDArray[np.float64]) -> float:
    """Of the heights there are, the one nearest to halfway between lowest and highest."""
    there = np.unique(heights)
    if not np.all(np.isfinite(there)):
        raise BadDicomError("a frame lies at no finite height")
    return float(there[np.argmin(np.abs(there - (there[0] + there[-1]) / 2))])
