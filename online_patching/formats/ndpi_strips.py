"""The strip of one NDPI level: what its stream says, and where its restart intervals lie.

The directory's table of markers is believed after its numbers were found to rise, its count to fit, and
some of the markers to be where it says. Otherwise the stream is read for them, within bounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import (
    DamagedSlideError,
    PatchingError,
    ShortReadError,
    UnsupportedSlideError,
)
from online_patching.formats.ndpi_tags import NdpiDirectory
from online_patching.formats.restart_intervals import (
    JPEG_MAX_PX,
    MAX_HEAD_BYTES,
    SCAN_BLOCK_BYTES,
    BadHeadError,
    JpegHead,
    find_intervals,
    marker_of,
    read_head,
    rising,
    sampled,
)
from online_patching.stores import Stores, is_remote

MAX_REMOTE_SCAN_BYTES = 64 * 2**20
"""What is read of a remote slide, at most, to find markers that it does not list."""

MARKERS_TRIED = 32
"""Markers of a listed table that are looked at, for each level."""

_MAX_SIDE_PX = 2**22
_MAX_TILE_PX = 2**24
_END_BYTES = 1024
_COMPRESSION, _STRIP, _STRIP_BYTES, _STARTS, _STARTS_HIGH = 259, 273, 279, 65426, 65432
_JPEG = 7


@dataclass(frozen=True)
class NdpiFile:
    """The file, as far as reading parts of it is concerned."""

    uri: str
    name: str
    stores: Stores
    token: str
    size_bytes: int

    def read(self, start: int, stop: int) -> bytes:
        """Its bytes start..stop."""
        return self.stores.read(self.uri, start, stop, self.token)

    def read_many(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each range, asked for at once; the first error is raised."""
        found = []
        for answer in self.stores.read_many([(self.uri, a, b, self.token) for a, b in ranges]):
            if isinstance(answer, PatchingError):
                raise answer
            found.append(answer)
        return found


@dataclass(frozen=True)
class Strip:
    """A level: `stop` is where the codes of its stream end, `end` where the strip does.

    `tile` is the size of a restart interval in px; without one the level is a single tile.
    """

    tags: NdpiDirectory
    width: int
    height: int
    start: int
    stop: int
    end: int
    head: JpegHead
    tile: tuple[int, int] | None

    @property
    def tiles(self) -> int:
        """How many tiles the level has."""
        width, height = self.tile or (self.width, self.height)
        return -(-self.width // width) * -(-self.height // height)

    @property
    def first(self) -> int:
        """Where the first codes are: right behind the head."""
        return self.start + self.head.size_bytes

    @property
    def most_bytes(self) -> int:
        """No codes of a tile are longer: four times its samples and some."""
        width, height = self.tile or (self.width, self.height)
        return 12 * width * height + 2**16


def strip_of(file: NdpiFile, tags: NdpiDirectory, width: int, height: int) -> Strip | None:
    """The strip of a directory; None when its stream is neither a grid of intervals nor small enough for
    one tile (16 Mpx)."""
    if tags.number(_COMPRESSION) != _JPEG or tags.count(_STRIP) != 1:
        return None
    start, stop = tags.number(_STRIP), tags.number(_STRIP) + tags.number(_STRIP_BYTES)
    if not 0 < width <= _MAX_SIDE_PX or not 0 < height <= _MAX_SIDE_PX:
        raise DamagedSlideError(file.name, f"claims {width:,} x {height:,} px.")
    if stop > file.size_bytes:
        raise ShortReadError(file.name, start, stop, file.size_bytes)
    try:
        head = _head_at(file, start, stop)
    except BadHeadError:
        return None
    if head is None:
        return None
    if head.colour == "gray":
        raise UnsupportedSlideError(
            file.name, "one gray channel: fluorescence, not a stained slide.", code="fluorescence"
        )
    tile, says = head.tile_px(width, height), (head.width_px, head.height_px)
    if tile is None:  # the stream is right where both were rounded differently, as OpenSlide found
        fits = min(says) > 0 and max(says) <= JPEG_MAX_PX and says[0] * says[1] <= _MAX_TILE_PX
        whole = Strip(tags, *says, start, stop, stop, head, None)
        if fits and stop - start > whole.most_bytes:
            raise DamagedSlideError(
                file.name,
                f"a picture of {says[0]} x {says[1]} px claims {stop - start:,} bytes, more than its pixels need.",
            )
        return whole if fits else None
    if min(says) > 0 and max(width, height) <= JPEG_MAX_PX and says != (width, height):
        raise DamagedSlideError(
            file.name, f"a level of {width} x {height} px holds a picture of {says[0]} x {says[1]}."
        )
    small = tile[0] * tile[1] <= _MAX_TILE_PX
    return Strip(tags, width, height, start, stop, stop, head, tile) if small else None


def _head_at(file: NdpiFile, start: int, stop: int) -> JpegHead | None:
    for most in (2048, MAX_HEAD_BYTES):
        head = read_head(file.read(start, min(start + most, stop)))
        if head is not None or stop - start <= most:
            return head
    return None


def ended(file: NdpiFile, strips: Sequence[Strip]) -> list[Strip]:
    """The strips with `stop` at their stream's end marker, where there is one within the last kilobyte."""
    ends = [(max(strip.start, strip.end - _END_BYTES), strip.end) for strip in strips]
    found = []
    for strip, (start, _), data in zip(strips, ends, file.read_many(ends), strict=True):
        at = data.rfind(b"\xff\xd9")
        found.append(replace(strip, stop=start + at) if at >= 0 else strip)
    return found


def starts_of(file: NdpiFile, strips: Sequence[Strip]) -> list[NDArray[np.uint64]] | None:
    """For each strip the offset of each tile in the file; None when the markers of one make no grid.

    Asks for the sampled markers of all strips at once.
    """
    listed = [_listed(strip) for strip in strips]
    asked: list[list[int]] = []
    ranges: list[tuple[int, int]] = []
    for strip, starts in zip(strips, listed, strict=True):
        asked.append([] if starts is None else sampled(strip.tiles, MARKERS_TRIED))
        if starts is not None:
            ranges += [(int(starts[k]) - 2, int(starts[k])) for k in asked[-1]]
    answers = iter(file.read_many(ranges) if ranges else [])
    left = MAX_REMOTE_SCAN_BYTES
    found = []
    for strip, said, those in zip(strips, listed, asked, strict=True):
        right = [next(answers) == marker_of(k) for k in those]
        starts = said if all(right) else None
        if starts is None:
            left = _allowed(file, strip, left)
            block = partial(_block, file)
            starts = find_intervals(block, strip.first, strip.stop, strip.tiles, strip.most_bytes)
        if starts is None:
            return None
        found.append(starts)
    return found


def _allowed(file: NdpiFile, strip: Strip, left: int) -> int:
    """How much may still be read of a remote file after this strip."""
    size = strip.stop - strip.start
    if size > left and is_remote(file.uri):
        raise UnsupportedSlideError(
            file.name,
            f"does not say where the tiles of its {strip.width} x {strip.height} px level lie: {size:,} "
            "bytes would have to be read to find them. Copy the slide to disk, or index it there.",
        )
    return left - size


def _block(file: NdpiFile, start: int, stop: int) -> bytes:
    """Bytes of a stream; of a remote file as four requests at a time."""
    if not is_remote(file.uri):
        return file.read(start, stop)
    edges = [*range(start, stop, SCAN_BLOCK_BYTES // 4), stop]
    return b"".join(file.read_many(list(pairwise(edges))))


def _listed(strip: Strip) -> NDArray[np.uint64] | None:
    """Offsets of the tiles as the directory lists them; None when it does not, or they cannot be right."""
    count, size = strip.tiles, strip.stop - strip.start
    if strip.tile is None:
        return np.asarray([strip.start], np.uint64)
    if strip.tags.count(_STARTS) != count or strip.tags.count(_STARTS_HIGH) not in (0, count):
        return None
    if size < 3 * count:  # a byte of codes each, and markers between
        return None
    starts, at = np.empty(count, np.uint64), 0
    for part in _parts(strip.tags, size):
        if not at:
            part[0] = strip.head.size_bytes  # whatever is listed: the first codes follow the head
        starts[at : at + len(part)] = part
        if not rising(starts[max(0, at - 1) : at + len(part)], strip.most_bytes):
            return None
        at += len(part)
    if not 0 < size - int(starts[-1]) <= strip.most_bytes:
        return None
    starts += np.uint64(strip.start)
    return starts


def _parts(tags: NdpiDirectory, size: int) -> Iterator[NDArray[np.uint64]]:
    """The listed offsets, from the strip's start, a part at a time.

    Where only the low halves of a long strip are listed, each fall is another 4 GiB: starts rise, and no
    interval is that long.
    """
    highs = tags.table(_STARTS_HIGH) if tags.count(_STARTS_HIGH) else None
    wraps = last = np.uint64(0)
    for low in tags.table(_STARTS):
        if highs is not None:
            yield low | next(highs) << np.uint64(32)
        elif size > 2**32:
            falls = low < np.concatenate([[last], low[:-1]])
            high = wraps + np.cumsum(falls, dtype=np.uint64)
            wraps, last = high[-1], low[-1]
            yield low | high << np.uint64(32)
        else:
            yield low
