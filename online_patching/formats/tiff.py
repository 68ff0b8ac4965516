"""Tiled TIFF -> SlideIndex: Aperio SVS, generic pyramids, OME-TIFF (levels in SubIFDs).

tifffile reads the tags; we decide which directories are the pyramid. Label and macro pages,
which can carry a patient's name, are recognised by what they are not (tiled, and of the slide's
shape) and their pixels are never read.
"""

from __future__ import annotations

import io
import logging
from typing import Any, cast

import numpy as np
import tifffile

from online_patching.errors import (
    DamagedSlideError,
    NotASlideError,
    ShortReadError,
    SlideError,
    UnsupportedSlideError,
)
from online_patching.formats import vendors
from online_patching.formats.vendors import Mpp
from online_patching.slide_index import CODEC_KINDS, Codec, Level, SlideIndex, pack_rows
from online_patching.stores import Stores, redact

_MAX_PAGES = 4096
_MAX_TILES = 50_000_000
_MAX_TILE_PX = 2**24
_BLOCK_BYTES = 64 * 2**10
_COMPRESSIONS = {
    1: "raw", 5: "lzw", 7: "jpeg", 8: "deflate", 32946: "deflate", 50000: "zstd",
    33003: "jpeg2000", 33005: "jpeg2000", 34712: "jpeg2000",
}  # fmt: skip
_RGB, _YCBCR, _MINISBLACK = 2, 6, 1
_MACRO_FLAG = 8

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # we raise or list; it would print


def is_tiff(head: bytes) -> bool:
    """Whether a file starts as a TIFF or BigTIFF does."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_index(
    uri: str, slide_id: str, override: Mpp | None, stores: Stores, size: int, token: str
) -> SlideIndex | None:
    """The index of a tiled 8-bit RGB TIFF; None when it needs a fallback reader."""
    name = redact(uri)
    try:
        with tifffile.TiffFile(cast(Any, HeaderFile(uri, stores, size, token))) as file:
            return _from_file(file, uri, slide_id, override, size)
    except SlideError:
        raise
    except (tifffile.TiffFileError, ValueError, KeyError, IndexError, TypeError, MemoryError, OSError,
            AttributeError, RuntimeError, OverflowError, ZeroDivisionError) as error:  # fmt: skip
        raise DamagedSlideError(
            name, f"its TIFF headers cannot be read ({type(error).__name__}: {str(error)[:100]})."
        ) from None


def _from_file(
    file: tifffile.TiffFile, uri: str, slide_id: str, override: Mpp | None, size: int
) -> SlideIndex | None:
    name = redact(uri)
    if not len(file.pages):
        raise NotASlideError(
            name,
            "a TIFF without a single image. It is truncated or still uploading: copy it again.",
        )
    first = cast(tifffile.TiffPage, file.pages[0])
    description = first.description or ""
    vendors.refuse_fluorescence(name, description)
    if file.is_ndpi:
        return None
    _refuse_channels(name, file, first)
    pages = _pyramid(file, first)
    if not pages:
        return None
    codecs = [_codec(page) for page in pages]
    if any(codec is None for codec in codecs):
        return None
    svs = description.startswith("Aperio")
    found = vendors.require_mpp(
        name,
        override,
        vendors.aperio_mpp(description) if svs else None,
        vendors.ome_mpp(description) if file.is_ome else None,
        _resolution(first),
    )
    levels = tuple(
        _level(name, page, cast(Codec, codec), first, found, size)
        for page, codec in zip(pages, codecs, strict=True)
    )
    container = "svs" if svs else "ome-tiff" if file.is_ome else "tiff"
    vendor = "aperio" if svs else "ome" if file.is_ome else "generic"
    return SlideIndex(slide_id, uri, container, vendor, found.x, found.y, found.source, levels)


def _refuse_channels(name: str, file: tifffile.TiffFile, first: tifffile.TiffPage) -> None:
    if first.dtype is None or first.dtype.itemsize != 1 or first.samplesperpixel not in (1, 3, 4):
        raise UnsupportedSlideError(
            name,
            f"{first.samplesperpixel} channel(s) of {first.dtype}: not 8-bit RGB; fluorescence or multiplex.",
        )
    if first.samplesperpixel == 1 and len(file.pages) > 1:
        same = sum(1 for p in list(file.pages)[:_MAX_PAGES] if cast(Any, p).shape == first.shape)
        if same > 1:
            raise UnsupportedSlideError(name, f"{same} gray channels: fluorescence or multiplex.")


def _pyramid(file: tifffile.TiffFile, first: tifffile.TiffPage) -> list[tifffile.TiffPage]:
    """Page 0 and the smaller tiled pages of its shape, largest first; [] when page 0 is not tiled."""
    if not first.is_tiled:
        return []
    others: list[Any] = [file.pages[i] for i in range(1, min(len(file.pages), _MAX_PAGES))]
    if first.subifds and first.pages is not None:
        others.extend(first.pages[i] for i in range(min(len(first.pages), 64)))
    levels = [first]
    for page in others:
        full = page.aspage() if hasattr(page, "aspage") else page
        if _is_reduction(first, full):
            levels.append(full)
    levels.sort(key=lambda p: -p.imagewidth)
    unique = {p.imagewidth: p for p in reversed(levels)}
    return [unique[w] for w in sorted(unique, reverse=True)]


def _is_reduction(first: tifffile.TiffPage, page: tifffile.TiffPage) -> bool:
    if (
        not page.is_tiled
        or page.samplesperpixel != first.samplesperpixel
        or page.dtype != first.dtype
    ):
        return False
    if int(page.subfiletype) & _MACRO_FLAG or page.imagewidth >= first.imagewidth:
        return False
    text = (page.description or "").lower()
    if "label" in text.split("\n")[-1][:40] or "macro" in text.split("\n")[-1][:40]:
        return False
    rx, ry = first.imagewidth / page.imagewidth, first.imagelength / page.imagelength
    slack = 2 * max(
        rx / page.imagewidth, ry / page.imagelength
    )  # sizes are rounded to whole pixels
    return abs(rx - ry) <= max(slack, 0.01 * rx)


def _codec(page: tifffile.TiffPage) -> Codec | None:
    """How the page's tiles are stored; None when only a fallback reader can tell."""
    compression, photometric = int(page.compression), int(page.photometric)
    kind = _COMPRESSIONS.get(compression)
    if kind not in CODEC_KINDS or page.planarconfig != 1 or page.bitspersample != 8:
        return None
    if page.predictor not in (1, 2) or photometric not in (_RGB, _YCBCR, _MINISBLACK):
        return None
    if kind not in ("jpeg", "jpeg2000") and photometric == _YCBCR:
        return None
    colour = {_RGB: "rgb", _YCBCR: "ycbcr", _MINISBLACK: "gray"}[photometric]
    if compression == 33003:
        colour = "ycbcr"
    elif compression == 33005:
        colour = "rgb"
    return Codec(
        kind,
        colour,
        bytes(page.jpegtables or b""),
        int(page.predictor),
        int(page.samplesperpixel),
    )


def _level(
    name: str, page: tifffile.TiffPage, codec: Codec, first: tifffile.TiffPage, mpp: Mpp, size: int
) -> Level:
    dx, dy = first.imagewidth / page.imagewidth, first.imagelength / page.imagelength
    level = Level(
        page.imagewidth,
        page.imagelength,
        page.tilewidth,
        page.tilelength,
        dx,
        dy,
        mpp.x * dx,
        mpp.y * dy,
        codec,
    )
    if level.tile_width_px * level.tile_height_px > _MAX_TILE_PX:
        raise UnsupportedSlideError(
            name,
            f"tiles of {level.tile_width_px} x {level.tile_height_px} px are too large to read at random.",
        )
    if level.n_tiles > _MAX_TILES:
        raise DamagedSlideError(name, f"claims {level.n_tiles:,} tiles in one level.")
    offsets = np.asarray(page.dataoffsets, np.uint64)
    lengths = np.asarray(page.databytecounts, np.uint64)
    if not len(offsets) == len(lengths) == level.n_tiles:
        raise DamagedSlideError(
            name,
            f"a level of {level.n_tiles} tiles lists {len(offsets)} offsets and {len(lengths)} lengths.",
        )
    limit = np.uint64(size)
    past = np.flatnonzero(
        (lengths > limit) | ((lengths > 0) & (offsets > limit - np.minimum(lengths, limit)))
    )
    if len(past):
        start, length = int(offsets[past[0]]), int(lengths[past[0]])
        raise ShortReadError(name, start, start + length, size)
    rows, overflow = pack_rows(np.where(lengths > 0, offsets, 0), lengths)
    return Level(**{**level.__dict__, "rows": rows, "overflow": overflow})


def _resolution(page: tifffile.TiffPage) -> Mpp | None:
    tags = [page.tags.get(code) for code in (282, 283, 296)]
    x, y = (tag.value if tag else None for tag in tags[:2])
    return vendors.resolution_mpp(x, y, tags[2].value if tags[2] else 2)


class HeaderFile(io.RawIOBase):
    """A seekable file over a store that reads aligned blocks once: enough to parse headers."""

    def __init__(self, uri: str, stores: Stores, size: int, token: str) -> None:
        self.name = "slide"
        self._uri, self._stores, self._size, self._token = uri, stores, size, token
        self._position = 0
        self._blocks: dict[int, bytes] = {}

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position; past the end is allowed, as in files."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, count: int | None = -1) -> bytes:
        """Up to `count` bytes, fewer at the end."""
        left = max(0, self._size - self._position)
        count = left if count is None or count < 0 else min(count, left)
        first, last = self._position // _BLOCK_BYTES, (self._position + count - 1) // _BLOCK_BYTES
        if count == 0:
            return b""
        self._load(first, last)
        data = b"".join(self._blocks[i] for i in range(first, last + 1))
        skip = self._position - first * _BLOCK_BYTES
        self._position += count
        return data[skip : skip + count]

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; returns how much."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _load(self, first: int, last: int) -> None:
        """Fetch the blocks that are missing, each run of neighbours in one request."""
        missing = [i for i in range(first, last + 1) if i not in self._blocks]
        while missing:
            run = [missing.pop(0)]
            while missing and missing[0] == run[-1] + 1:
                run.append(missing.pop(0))
            start = run[0] * _BLOCK_BYTES
            data = self._stores.read(
                self._uri, start, min(self._size, (run[-1] + 1) * _BLOCK_BYTES), self._token
            )
            for k, block in enumerate(run):
                self._blocks[block] = data[k * _BLOCK_BYTES : (k + 1) * _BLOCK_BYTES]
