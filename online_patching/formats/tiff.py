"""Tiled TIFF -> SlideIndex: Aperio SVS, generic pyramids, OME-TIFF (levels in SubIFDs).

tiff_tags.py reads the tags; we decide which directories are the pyramid. Label and macro pages,
which can carry a patient's name, are recognised by what they are not (tiled, and of the slide's
shape) and their pixels are never read. Every number is checked before memory is taken for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import (
    DamagedSlideError,
    NotASlideError,
    ShortReadError,
    UnsupportedSlideError,
)
from online_patching.formats import ndpi, vendors
from online_patching.formats.tiff_tags import (
    BadTagError,
    Directory,
    FarOffsetsError,
    PastEndError,
    TiffTags,
)
from online_patching.formats.vendors import Mpp
from online_patching.slide_index import CODEC_KINDS, Codec, Level, SlideIndex, pack_rows
from online_patching.stores import Stores, redact

_MAX_TILES = 4 * 2**20
"""Tiles of all levels together: their rows are 32 MiB. A slide has about 150,000."""
_MAX_SIDE_PX = 2**22
"""A glass slide is 75 mm long: 1.5 million pixels at 0.05 µm."""
_MAX_TILE_PX = 2**24
_MAX_SUB_DIRECTORIES = 64
_MAX_TEXT_BYTES = 2**20
_MAX_TABLES_BYTES = 64 * 2**10
_MAX_LARGE_TILES = 4096
_COMPRESSIONS = {
    1: "raw", 5: "lzw", 7: "jpeg", 8: "deflate", 32946: "deflate", 50000: "zstd",
    33003: "jpeg2000", 33005: "jpeg2000", 34712: "jpeg2000",
}  # fmt: skip
_RGB, _YCBCR, _MINISBLACK = 2, 6, 1
_MACRO_FLAG = 8
_DESCRIPTION, _JPEG_TABLES = 270, 347
_TILE_OFFSETS, _STRIP_OFFSETS, _TILE_LENGTHS, _STRIP_LENGTHS = 324, 273, 325, 279


def is_tiff(head: bytes) -> bool:
    """Whether a file starts as a TIFF or BigTIFF does."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_index(
    uri: str, slide_id: str, override: Mpp | None, stores: Stores, size: int, token: str
) -> SlideIndex | None:
    """The index of a tiled 8-bit RGB TIFF, or of an NDPI (ndpi.py); None when it needs a fallback reader.

    Takes at most about 64 MiB and a second whatever the file says, and over a network at most
    `tiff_tags.MAX_REQUESTS` requests.
    """
    try:
        tags = TiffTags(partial(_fetch, uri, stores, token), size)
        if tags.directories and ndpi.FLAG in tags.directories[0]:
            return ndpi.read_index(uri, slide_id, override, stores, size, token)
        return _from_tags(tags, uri, slide_id, override)
    except FarOffsetsError:  # beyond 4 GiB only an NDPI says what a classic TIFF's offsets mean
        return ndpi.read_index(uri, slide_id, override, stores, size, token)
    except PastEndError as error:
        raise ShortReadError(redact(uri), error.start, error.stop, size) from None
    except BadTagError as error:
        raise DamagedSlideError(redact(uri), f"its TIFF headers cannot be read: {error}.") from None


def _fetch(uri: str, stores: Stores, token: str, start: int, stop: int) -> bytes:
    return stores.read(uri, start, stop, token)


@dataclass(frozen=True)
class _Page:
    """What one directory says about its image, as far as the pyramid needs it."""

    tags: Directory
    width: int
    height: int
    tile_width: int
    tile_height: int
    samples: int
    bits: tuple[int, ...]
    sample_format: int

    @classmethod
    def of(cls, tags: Directory) -> _Page:
        width, height, tile_width, tile_height = (
            tags.number(code) for code in (256, 257, 322, 323)
        )
        return cls(
            tags, width, height, tile_width, tile_height,
            tags.number(277, 1), tags.numbers(258, 4) or (1,), tags.number(339, 1),
        )  # fmt: skip

    @property
    def is_tiled(self) -> bool:
        return min(self.width, self.height, self.tile_width, self.tile_height) > 0

    @property
    def pixel(self) -> str:
        """The type of a sample, as numpy would name it."""
        kind = {1: "uint", 2: "int", 3: "float"}.get(self.sample_format, "sample")
        return f"{kind}{'/'.join(str(b) for b in dict.fromkeys(self.bits))}"


def _from_tags(tags: TiffTags, uri: str, slide_id: str, override: Mpp | None) -> SlideIndex | None:
    name = redact(uri)
    if not tags.directories:
        raise NotASlideError(
            name,
            "a TIFF without a single image. It is truncated or still uploading: copy it again.",
        )
    pages = [_Page.of(directory) for directory in tags.directories]
    first = pages[0]
    description = first.tags.text(_DESCRIPTION, _MAX_TEXT_BYTES)
    vendors.refuse_fluorescence(name, description)
    _refuse_channels(name, pages)
    levels = _pyramid(tags, pages)
    codecs = [_codec(page) for page in levels]
    known = [codec for codec in codecs if codec is not None]
    if not levels or len(known) < len(levels):
        return None
    svs = description.startswith("Aperio")
    ome = description[-10:].strip().endswith("OME>")
    found = vendors.require_mpp(
        name,
        override,
        vendors.aperio_mpp(description) if svs else None,
        vendors.ome_mpp(description) if ome else None,
        vendors.resolution_mpp(
            first.tags.rational(282), first.tags.rational(283), first.tags.number(296, 2)
        ),
    )
    container, vendor = (
        ("svs", "aperio") if svs else ("ome-tiff", "ome") if ome else ("tiff", "generic")
    )
    return SlideIndex(
        slide_id, uri, container, vendor, found.x, found.y, found.source,
        _levels(name, levels, known, found, tags.reader.size_bytes),
    )  # fmt: skip


def _refuse_channels(name: str, pages: list[_Page]) -> None:
    first = pages[0]
    if set(first.bits) != {8} or first.sample_format != 1 or first.samples not in (1, 3, 4):
        raise UnsupportedSlideError(
            name,
            f"{first.samples} channel(s) of {first.pixel}: not 8-bit RGB; fluorescence or multiplex.",
        )
    same = sum(1 for p in pages if (p.width, p.height, p.samples) == (first.width, first.height, 1))
    if same > 1:
        raise UnsupportedSlideError(name, f"{same} gray channels: fluorescence or multiplex.")


def _pyramid(tags: TiffTags, pages: list[_Page]) -> list[_Page]:
    """Page 0 and the smaller tiled pages of its shape, largest first; [] when page 0 is not tiled."""
    first = pages[0]
    if not first.is_tiled:
        return []
    others = tags.sub_directories(first.tags, _MAX_SUB_DIRECTORIES)
    candidates = [*pages[1:], *(_Page.of(directory) for directory in others)]
    levels = {first.width: first}
    for page in candidates:
        if page.width not in levels and _is_reduction(first, page):
            levels[page.width] = page
    return [levels[width] for width in sorted(levels, reverse=True)]


def _is_reduction(first: _Page, page: _Page) -> bool:
    if not page.is_tiled or (page.samples, page.pixel) != (first.samples, first.pixel):
        return False
    if page.tags.number(254) & _MACRO_FLAG or page.width >= first.width:
        return False
    text = page.tags.text(_DESCRIPTION, _MAX_TEXT_BYTES).lower().rpartition("\n")[2][:40]
    if "label" in text or "macro" in text:
        return False
    rx, ry = first.width / page.width, first.height / page.height
    slack = 2 * max(rx / page.width, ry / page.height)  # sizes are rounded to whole pixels
    return abs(rx - ry) <= max(slack, 0.01 * rx)


def _codec(page: _Page) -> Codec | None:
    """How the page's tiles are stored; None when only a fallback reader can tell."""
    tags, compression = page.tags, page.tags.number(259, 1)
    photometric, predictor = tags.number(262), tags.number(317, 1)
    kind = _COMPRESSIONS.get(compression)
    if kind not in CODEC_KINDS or set(page.bits) != {8}:
        return None
    if tags.number(284, 1) != 1 or tags.number(32997, 1) != 1:  # planes apart, or a volume
        return None
    if predictor not in (1, 2) or photometric not in (_RGB, _YCBCR, _MINISBLACK):
        return None
    if kind not in ("jpeg", "jpeg2000") and photometric == _YCBCR:
        return None
    colour = {_RGB: "rgb", _YCBCR: "ycbcr", _MINISBLACK: "gray"}[photometric]
    if compression == 33003:
        colour = "ycbcr"
    elif compression == 33005:
        colour = "rgb"
    tables = tags.blob(_JPEG_TABLES, _MAX_TABLES_BYTES)
    return Codec(kind, colour, tables, predictor, page.samples)


def _levels(
    name: str, pages: list[_Page], codecs: list[Codec], mpp: Mpp, size: int
) -> tuple[Level, ...]:
    first, out, tiles = pages[0], [], 0
    for page, codec in zip(pages, codecs, strict=True):
        dx, dy = first.width / page.width, first.height / page.height
        level = Level(
            page.width, page.height, page.tile_width, page.tile_height,
            dx, dy, mpp.x * dx, mpp.y * dy, codec,
        )  # fmt: skip
        tiles += level.n_tiles
        _check_sizes(name, level, tiles)
        rows, overflow = _tile_rows(name, page.tags, level, size)
        out.append(Level(**{**level.__dict__, "rows": rows, "overflow": overflow}))
    return tuple(out)


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
    name: str, tags: Directory, level: Level, size: int
) -> tuple[NDArray[np.uint64], tuple[tuple[int, int], ...]]:
    """The level's packed tile table, read and checked in parts."""
    starts = _TILE_OFFSETS if _TILE_OFFSETS in tags else _STRIP_OFFSETS
    sizes = _TILE_LENGTHS if _TILE_LENGTHS in tags else _STRIP_LENGTHS
    if not tags.count(starts) == tags.count(sizes) == level.n_tiles:
        raise DamagedSlideError(
            name,
            f"a level of {level.n_tiles} tiles lists {tags.count(starts)} offsets "
            f"and {tags.count(sizes)} lengths.",
        )
    # No codec makes a tile four times larger than its pixels; a loader would read what this says.
    most = 4 * level.tile_width_px * level.tile_height_px * level.codec.samples + 2**16
    rows, at = np.empty(level.n_tiles, np.uint64), 0
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
