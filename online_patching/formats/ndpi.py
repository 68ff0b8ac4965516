"""Hamamatsu NDPI -> SlideIndex: one giant JPEG a level, read restart interval by restart interval.

A level is a strip of one JPEG stream with restart markers; a tile is what lies between two of them, as
wide as the interval and one MCU high (decision 18). Only directories with a lens above 0 and of focal
plane 0 are levels: the macro picture, which shows the label, and the map are never read. Of the texts a
file carries only an excitation wavelength and whether a filter is named are looked at; nothing is kept.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import DamagedSlideError, ShortReadError, UnsupportedSlideError
from online_patching.formats import vendors
from online_patching.formats.ndpi_strips import NdpiFile, Strip, ended, starts_of, strip_of
from online_patching.formats.ndpi_tags import NdpiDirectory, ndpi_directories
from online_patching.formats.tiff_tags import BadTagError, HeaderReader, PastEndError
from online_patching.formats.vendors import Mpp
from online_patching.slide_index import Codec, Level, SlideIndex, pack_rows
from online_patching.stores import Stores, redact

FLAG = 65420
"""The tag that every directory of an NDPI file has."""

MAX_TILES = 2**23
"""Intervals of all levels together: a slide of 2 x 4 cm at 0.22 µm has up to 5 million of 640 x 8 px."""

_MAX_LEVELS = 16
_MAX_LARGE_TILES = 4096
_MAX_TEXT_BYTES = 64 * 2**10
_ROWS_A_STEP = 2**18
_LARGE = np.uint64(2**24 - 1)  # the length that pack_rows gives to what does not fit
_WIDTH, _HEIGHT, _X_RESOLUTION, _Y_RESOLUTION, _UNIT = 256, 257, 282, 283, 296
_LENS, _FOCUS = 65421, 65424
_FILTER, _CAPTURE_MODE, _PROPERTIES, _WAVELENGTH = 65434, 65441, 65449, 65451
_SIXTEEN_BITS = 7  # capture modes from here on hold 16-bit fluorescence


def read_index(
    uri: str,
    slide_id: str,
    override: Mpp | None,
    stores: Stores,
    size: int,
    token: str,
    reader: HeaderReader | None = None,
) -> SlideIndex | None:
    """The index of an NDPI slide; None when only a fallback reader can tell what it is.

    Reads the directories, the marker tables (4 or 8 bytes a tile), 2 bytes at up to 32 markers of each
    level and the last kilobyte of each. A level whose table is missing or wrong is read whole for its markers
    where the file is local, and remotely up to ndpi_strips.MAX_REMOTE_SCAN_BYTES in all. `reader` may hold
    headers that were read already.
    """
    file = NdpiFile(uri, redact(uri), stores, token, size)
    try:
        directories = _directories(reader or HeaderReader(file.read, size))
        if not directories:
            return None
        _refuse_fluorescence(file.name, directories)
        return index_of(file, directories, slide_id, override)
    except PastEndError as error:
        raise ShortReadError(file.name, error.start, error.stop, size) from None
    except BadTagError as error:
        raise DamagedSlideError(file.name, f"its NDPI headers cannot be read: {error}.") from None


def _directories(reader: HeaderReader) -> list[NdpiDirectory]:
    """All directories, or none where the first is not an NDPI's: a TIFF that says more than its offsets can."""
    chain = ndpi_directories(reader)
    try:
        first = next(chain, None)
    except BadTagError:
        return []
    return [first, *chain] if first is not None and FLAG in first else []


def _refuse_fluorescence(name: str, directories: list[NdpiDirectory]) -> None:
    for tags in directories:
        if (tags.real(_LENS) or 0.0) <= 0:
            continue
        vendors.refuse_fluorescence(name, tags.note(_PROPERTIES, _MAX_TEXT_BYTES))
        wavelength = tags.real(_WAVELENGTH) or 0.0
        lit = tags.note(_FILTER, 64).strip()
        named = bool(lit) and "bright" not in lit.lower()
        if named or wavelength > 0 or tags.number(_CAPTURE_MODE) >= _SIXTEEN_BITS:
            raise UnsupportedSlideError(
                name,
                "fluorescence (it names a filter set or a wavelength), not a stained slide.",
                code="fluorescence",
            )


def index_of(
    file: NdpiFile, directories: list[NdpiDirectory], slide_id: str, override: Mpp | None
) -> SlideIndex | None:
    """The index of directories that are not refused; `read_index` says what it reads."""
    strips = _pyramid(file, directories)
    if not strips:
        return None
    strips = ended(file, strips)
    starts = starts_of(file, strips)
    if starts is None:
        return None
    first = strips[0].tags
    per_unit = (first.rational(_X_RESOLUTION), first.rational(_Y_RESOLUTION))
    carried = vendors.resolution_mpp(*per_unit, first.number(_UNIT, 2))
    mpp = vendors.require_mpp(file.name, override, carried)
    levels = tuple(
        _level(file.name, strips[0], strip, its, mpp)
        for strip, its in zip(strips, starts, strict=True)
    )
    return SlideIndex(slide_id, file.uri, "ndpi", "hamamatsu", mpp.x, mpp.y, mpp.source, levels)


def _pyramid(file: NdpiFile, directories: list[NdpiDirectory]) -> list[Strip]:
    """The levels, largest first; [] when the largest is stored in a way we do not cut up."""
    found = [tags for tags in directories if _is_level(tags)]
    found.sort(key=lambda tags: -tags.number(_WIDTH))
    strips: list[Strip] = []
    for tags in found[:_MAX_LEVELS]:
        sides = (tags.number(_WIDTH), tags.number(_HEIGHT))
        if strips and not _is_reduction(strips[0], *sides):
            continue
        strip = strip_of(file, tags, *sides)
        if strip is None and not strips:
            return []
        if strip is not None and (
            not strips or _is_reduction(strips[-1], strip.width, strip.height)
        ):
            strips.append(strip)
    if sum(strip.tiles for strip in strips) > MAX_TILES:
        raise DamagedSlideError(file.name, f"claims more than {MAX_TILES:,} restart intervals.")
    return strips


def _is_level(tags: NdpiDirectory) -> bool:
    return (tags.real(_LENS) or 0.0) > 0 and tags.number(_FOCUS) == 0


def _is_reduction(first: Strip, width: int, height: int) -> bool:
    if not 0 < width < first.width or not 0 < height <= first.height:
        return False
    rx, ry = first.width / width, first.height / height
    return abs(rx - ry) <= max(2 * rx / width, 2 * ry / height, 0.01 * rx)


def _level(name: str, first: Strip, strip: Strip, starts: NDArray[np.uint64], mpp: Mpp) -> Level:
    """The level; `starts` become its tile rows."""
    width, height = strip.tile or (strip.width, strip.height)
    dx, dy = first.width / strip.width, first.height / strip.height
    if strip.tile is None:
        codec = Codec("jpeg", strip.head.colour)
        rows, overflow = pack_rows(starts, [min(strip.stop + 2, strip.end) - strip.start])
    else:
        tables = strip.head.tables(width, height)
        codec = Codec("jpeg", strip.head.colour, tables, headless=True)
        rows, overflow = _packed(name, starts, strip.stop)
    sides = (strip.width, strip.height, width, height)
    return Level(*sides, dx, dy, mpp.x * dx, mpp.y * dy, codec, rows, overflow)


def _packed(
    name: str, starts: NDArray[np.uint64], stop: int
) -> tuple[NDArray[np.uint64], tuple[tuple[int, int], ...]]:
    """Tile rows in the room of the starts, made a part at a time: there may be millions."""
    large: list[tuple[int, int]] = []
    for at in range(0, len(starts), _ROWS_A_STEP):
        part = starts[at : at + _ROWS_A_STEP]
        ends = np.append(starts[at + 1 : at + 1 + len(part)] - np.uint64(2), np.uint64(stop))
        packed, overflow = pack_rows(part, ends[: len(part)] - part)
        packed[(packed & _LARGE) == _LARGE] += np.uint64(len(large) << 24)  # from the level's first
        large.extend(overflow)
        if len(large) > _MAX_LARGE_TILES:
            raise DamagedSlideError(name, "lists thousands of tiles of 16 MB, or beyond 1 TB.")
        part[:] = packed
    return starts, tuple(large)
