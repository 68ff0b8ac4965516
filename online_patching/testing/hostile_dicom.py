"""Hostile DICOM: small valid series of every kind with their numbers found, and structures that explode."""

from __future__ import annotations

import builtins
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from online_patching.stores import Answers, Listed, Request, Stores
from online_patching.stores.listing import MOST_LISTED
from online_patching.testing.dicom import Element, Written, instance, text
from online_patching.testing.hostile import Field, HostileFile, Seed
from online_patching.testing.writers import shrink

FOLDER = "memory://hostile"
_TAGS = (0x00080008, 0x00080016, 0x00080018, 0x00080019, 0x0020000E, 0x00209161, 0x00209228, 0x00209311,
         0x00280002, 0x00280004, 0x00280006, 0x00280008, 0x00280010, 0x00280011, 0x00280100, 0x00480006,
         0x00480007, 0x00480105, 0x00480302, 0x00480303, 0x52009229, 0x52009230, 0x0048021A, 0x00289110,
         0x7FE00001, 0x7FE00002, 0x7FE00010, 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0)  # fmt: skip
_KINDS = tuple(
    int.from_bytes(kind, "little")
    for kind in b"OB OD OV OW SQ UC UN UT AE CS DS FL IS LO SH SL UI UL US XX".split()
)
_LENGTHS = (
    0,
    1,
    2,
    4,
    8,
    0xFF,
    0xFFFE,
    0xFFFF,
    0x10000,
    0xFFFFFF,
    0x7FFFFFFF,
    0xFFFFFFFE,
    0xFFFFFFFF,
)
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_SEQUENCES = frozenset((0x00289110, 0x00480105, 0x00220016, 0x00480008, 0x52009229, 0x52009230, 0x0048021A,
                        0x00480207, 0x00209111))  # fmt: skip
_NUMBERS = {b"US": 2, b"UL": 4, b"SL": 4, b"FL": 4, b"OV": 8}
_PIXELS = 0x7FE00010


class HostileSeries(Stores):
    """Stores whose only folder holds a hostile file and its sound siblings; counts what was asked."""

    def __init__(self, file: HostileFile, siblings: tuple[tuple[str, bytes], ...] = ()) -> None:
        super().__init__()
        sound = (HostileFile("", data, (), len(data)) for _, data in siblings)
        self.files = {f"{FOLDER}/a.dcm": file} | {
            f"{FOLDER}/{name}": other for (name, _), other in zip(siblings, sound, strict=True)
        }
        self.requests = 0

    def list(self, prefix: str, most: int = MOST_LISTED) -> builtins.list[Listed]:
        """All files, whatever the prefix."""
        return [Listed(uri, file.size_bytes, "t") for uri, file in sorted(self.files.items())]

    def read(self, uri: str, start: int, stop: int | None, token: str = "") -> bytes:
        """Bytes of one file."""
        self.requests += 1
        file = self.files[uri]
        return file.read(start, file.size_bytes if stop is None else stop)

    def read_many(self, requests: Sequence[Request]) -> Answers:
        """Bytes of each, one after another."""
        return [self.read(*request) for request in requests]


@cache
def dicom_seeds() -> tuple[Seed, ...]:
    """About 20 valid files of 3 to 8 KB: tables, organizations, transfer syntaxes, lengths, a label."""
    out = []
    for name, how, part, parts in _kinds():
        data = instance(_picture(), 0, 1.0, how, part, parts)
        out.append(dicom_seed(name, data, implicit=how.syntax == "implicit"))
    kind = text(0x00080008, "CS", "ORIGINAL\\PRIMARY\\LABEL\\NONE")
    label = Written(tile_px=(32, 16), values={kind[0]: kind})
    return (*out, dicom_seed("label", instance(_picture(), 9, 1.0, label, 0, 1)))


def _picture() -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    rows, columns = np.mgrid[:30, :50]
    return np.stack([rows * 4 + 90, columns * 3 + 80, rows + columns + 100], 2).astype(np.uint8)


def _kinds() -> Iterator[tuple[str, Written, int, int]]:
    usual = Written(tile_px=(32, 16))
    gone = frozenset({(0, 1, 1)})
    for name, how in {
        "basic": usual, "extended": replace(usual, table="extended"), "walked": replace(usual, table="none"),
        "undefined": replace(usual, undefined=True),
        "sparse": replace(usual, organization="TILED_SPARSE", missing=gone),
        "sparse undefined": replace(usual, organization="TILED_SPARSE", undefined=True),
        "implicit": replace(usual, syntax="implicit"),
        "implicit sparse": replace(usual, syntax="implicit", organization="TILED_SPARSE", undefined=True),
        "native": replace(usual, syntax="explicit"), "planar": replace(usual, syntax="explicit", planar=True),
        "rle": replace(usual, syntax="rle"), "jpeg 2000": replace(usual, syntax="jpeg2000"),
        "planes": replace(usual, planes=2), "fragments": replace(usual, fragments=2),
    }.items():  # fmt: skip
        yield name, how, 0, 1
    yield "first part", Written(tile_px=(32, 16), parts=2), 0, 2
    yield "second level", Written(tile_px=(32, 16)), 0, 1


@cache
def siblings(name: str) -> tuple[tuple[str, bytes], ...]:
    """The sound files beside a seed: the other part, or the level above."""
    how = Written(tile_px=(32, 16), parts=2)
    if name == "first part":
        return (("b.dcm", instance(_picture(), 0, 1.0, how, 1, 2)),)
    if name == "second level":
        return (
            ("b.dcm", instance(shrink(_picture(), 2), 1, 2.0, Written(tile_px=(32, 16)), 0, 1)),
        )
    return ()


def dicom_seed(name: str, data: bytes, implicit: bool = False) -> Seed:
    """A valid file with every number of its headers found: by a walk of its own, not the reader's."""
    found: list[Field] = []
    (meta,) = struct.unpack_from("<I", data, 140)
    _walk(data, 132, 144 + meta, False, found)
    _walk(data, 144 + meta, len(data), implicit, found)
    inside = tuple(spot for spot in found if spot.start + spot.width <= len(data))
    return Seed(name, data, "<", inside, (132, 144 + meta))


def _walk(data: bytes, at: int, stop: int, implicit: bool, found: list[Field]) -> int:
    """Note the fields of elements and items up to `stop`, or to the end of what has no length."""
    while at + 8 <= stop:
        group, element = struct.unpack_from("<HH", data, at)
        tag, kind = group << 16 | element, b""
        swapped = tuple((t & 0xFFFF) << 16 | t >> 16 for t in _TAGS)
        found.append(Field(at, 4, "tag", swapped))
        wide, place = 4, at + 4
        if not implicit and group != 0xFFFE:
            kind = data[at + 4 : at + 6]
            found.append(Field(at + 4, 2, "type", _KINDS))
            wide, place = (4, at + 8) if kind in _LONG else (2, at + 6)
        length = int.from_bytes(data[place : place + wide], "little")
        found.append(Field(place, wide, "count", tuple(n for n in _LENGTHS if n < 1 << 8 * wide)))
        at = place + wide
        if tag in (0xFFFEE00D, 0xFFFEE0DD):
            return at
        if tag == _PIXELS:
            _items(data, at, found)
            return stop
        end = stop if length == 0xFFFFFFFF else at + length
        if tag == 0xFFFEE000 or kind == b"SQ" or (implicit and tag in _SEQUENCES):
            at = _walk(data, at, end, implicit, found)
        else:
            width = _NUMBERS.get(kind, 1)
            spots = range(at, end, width) if width > 1 else range(at, min(end, at + 24), 5)
            found.extend(Field(spot, width, "value") for spot in spots)
            at = end
    return at


def _items(data: bytes, at: int, found: list[Field]) -> None:
    """The offset table's numbers, and the tags and lengths of fragments."""
    first = True
    while at + 8 <= len(data) and data[at : at + 4] == b"\xfe\xff\x00\xe0":
        length = int.from_bytes(data[at + 4 : at + 8], "little")
        found += [
            Field(at, 4, "value"),
            Field(at + 4, 4, "count", (*_LENGTHS, length + 2, length - 2)),
        ]
        if first:
            found.extend(Field(spot, 4, "table") for spot in range(at + 8, at + 8 + length, 4))
        first, at = False, at + 8 + length


def dicom_bombs() -> list[Seed]:
    """Structures that a naive reader follows until time or memory ends; each of at most 4 MB."""
    whole = instance(_picture(), 0, 1.0, Written(tile_px=(32, 16)), 0, 1)
    pixels = whole.index(b"\xe0\x7f\x10\x00")
    head, tail = whole[:pixels], whole[pixels:]
    item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff"
    nested = b"\x09\x00\x10\x00SQ\0\0\xff\xff\xff\xff" + item
    frames = struct.pack("<HH4sI", 0x5200, 0x9230, b"SQ\0\0", 0xFFFFFFFF)
    zeros = bytes(8 * 2**18)
    claims: list[Element] = [
        text(0x00280008, "IS", str(2**18)),
        (0x00480006, "UL", struct.pack("<I", 2**9)),
        (0x00480007, "UL", struct.pack("<I", 2**9)),
        (0x7FE00001, "OV", zeros),
        (0x7FE00002, "OV", zeros),
    ]
    extended = Written(
        tile_px=(1, 1), table="extended", values={claim[0]: claim for claim in claims}
    )
    many = instance(_picture()[:1, :1], 0, 1.0, extended, 0, 1)
    named = {
        "nested sequences": whole[: _dataset(whole)] + nested * 100_000 + tail,
        "empty items": head + frames + b"\xfe\xff\x00\xe0\0\0\0\0" * 400_000 + tail,
        "empty attributes": whole[: _dataset(whole)] + b"\x09\x00\x10\x00SH\0\0" * 200_000 + tail,
        "empty fragments": head + tail[:12] + b"\xfe\xff\x00\xe0\0\0\0\0" * 400_000,
        "tables of zeros": many,
    }  # fmt: skip
    return [Seed(name, data) for name, data in named.items()]


def _dataset(data: bytes) -> int:
    """Where the data set begins."""
    return 144 + int(struct.unpack_from("<I", data, 140)[0])
