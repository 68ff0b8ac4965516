"""TIFFs written tag by tag: everything a writer that means well would not let you store.

Either byte order, classic or BigTIFF, any tag of any type, tiles of length 0, SubIFDs, as many images
as you like. The tags of size, tiling and offsets are worked out; whatever `tags` says overrides, and
None leaves a tag out.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Value = tuple[int, tuple[float, ...] | bytes]
"""A TIFF type (3 SHORT, 4 LONG, 5 RATIONAL, ...) and its values; bytes for types 1, 2, 6 and 7."""

_CODES = {3: "H", 4: "I", 8: "h", 9: "i", 11: "f", 12: "d", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_RATIONALS = {5: "II", 10: "ii"}


@dataclass(frozen=True)
class RawImage:
    """One directory. `pieces` are its stored tiles (or strips when `tile_px` is None), in order.

    An empty piece gets offset 0 and length 0. `size_px` and `tile_px` are (width, height).
    """

    size_px: tuple[int, int]
    pieces: Sequence[bytes]
    tile_px: tuple[int, int] | None
    photometric: int = 2
    compression: int = 7
    samples: int = 3
    tags: Mapping[int, Value | None] = field(default_factory=dict)
    sub_images: Sequence[RawImage] = ()


def shorts(*values: int) -> Value:
    """A tag of SHORTs."""
    return 3, values


def longs(*values: int) -> Value:
    """A tag of LONGs."""
    return 4, values


def ascii_text(text: str) -> Value:
    """A tag of characters, UTF-8, with the NUL that TIFF asks for."""
    return 2, text.encode() + b"\0"


def rational(numerator: int, denominator: int) -> Value:
    """A tag of one RATIONAL."""
    return 5, (numerator, denominator)


def build_tiff(
    images: Sequence[RawImage], *, big: bool = False, order: Literal["<", ">"] = "<"
) -> bytes:
    """The whole file: per image its pieces, its SubIFDs, its long values, its directory."""
    writer = _Writer(big, order)
    for image in images:
        place, following = writer.add(image)
        writer.point(writer.link, place)
        writer.link = following
    return bytes(writer.out)


class _Writer:
    def __init__(self, big: bool, order: str) -> None:
        self.big, self.order = big, order
        mark = b"II" if order == "<" else b"MM"
        self.pointer = "Q" if big else "I"
        self.out = bytearray(mark + struct.pack(f"{order}H", 43 if big else 42))
        if big:
            self.out += struct.pack(f"{order}HH", 8, 0)
        self.link = len(self.out)
        """Where the offset of the next directory of the chain is to be written."""
        self.out += self._pack(0)

    def add(self, image: RawImage) -> tuple[int, int]:
        """Write an image; returns the place of its directory and of its link to the next."""
        places = [self._put(piece) if piece else 0 for piece in image.pieces]
        subs = [self.add(sub)[0] for sub in image.sub_images]
        tags = self._tags(image, places, subs)
        stored = {code: self._value(*tags[code]) for code in sorted(tags)}
        start = self._align()
        self.out += struct.pack(self.order + ("Q" if self.big else "H"), len(stored))
        for code, (kind, count, inline) in stored.items():
            self.out += struct.pack(f"{self.order}HH", code, kind) + self._pack(count) + inline
        self.out += self._pack(0)
        return start, len(self.out) - struct.calcsize(self.pointer)

    def point(self, link: int, place: int) -> None:
        """Write an offset where a link was left open."""
        data = self._pack(place)
        self.out[link : link + len(data)] = data

    def _tags(
        self, image: RawImage, places: Sequence[int], subs: Sequence[int]
    ) -> dict[int, Value]:
        width, height = image.size_px
        lengths = tuple(len(piece) for piece in image.pieces)
        kind = 16 if self.big else 4
        tags: dict[int, Value] = {
            256: longs(width),
            257: longs(height),
            258: shorts(*[8] * image.samples),
            259: shorts(image.compression),
            262: shorts(image.photometric),
            277: shorts(image.samples),
            284: shorts(1),
        }
        if image.tile_px:
            tags |= {322: shorts(image.tile_px[0]), 323: shorts(image.tile_px[1])}
            tags |= {324: (kind, tuple(places)), 325: longs(*lengths)}
        else:
            rows = -(-height // max(1, len(places)))
            tags |= {273: (kind, tuple(places)), 278: longs(rows), 279: longs(*lengths)}
        if subs:
            tags[330] = (18 if self.big else 13, tuple(subs))
        wanted = {**tags, **image.tags}
        return {code: value for code, value in wanted.items() if value is not None}

    def _value(self, kind: int, values: tuple[float, ...] | bytes) -> tuple[int, int, bytes]:
        """(type, count, the four or eight bytes of the entry's value field)."""
        if isinstance(values, bytes):
            data, count = values, len(values)
        else:
            codes = _RATIONALS.get(kind) or _CODES[kind]
            count = len(values) // len(codes)
            data = struct.pack(self.order + codes * count, *values)
        room = struct.calcsize(self.pointer)
        if len(data) > room:
            data = self._pack(self._put(data))
        return kind, count, data.ljust(room, b"\0")

    def _put(self, data: bytes) -> int:
        start = self._align()
        self.out += data
        return start

    def _align(self) -> int:
        self.out += bytes(-len(self.out) % 8)
        return len(self.out)

    def _pack(self, number: int) -> bytes:
        return struct.pack(self.order + self.pointer, number)
