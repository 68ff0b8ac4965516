"""The attributes of a DICOM file that we ask for, read in bounded time, memory and requests.

DICOM PS3.5 (encoding) and PS3.10 (files), little endian, explicit or implicit value representations.
Only attributes named in WANTED are read: a patient's are skipped by their length and never touched.
Nothing a file says is believed before it is compared with the file's size.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_HEADER_BYTES = 128 * 2**20
"""Fetched for the attributes of one file: 100,000 frames with a place each take 50 MB."""

MAX_ELEMENTS = 2**22
"""Attributes looked at in one file, those inside sequences included."""

_MAX_DEPTH = 16
_MAX_ITEMS = 256  # of a sequence that is kept; per-frame groups are packed as they come
_MAX_VALUE_BYTES = 1024
_FIRST_AHEAD, _MOST_AHEAD = 64 * 2**10, 4 * 2**20
UNDEFINED = 0xFFFFFFFF

IMAGE_TYPE, SOP_CLASS, SOP_INSTANCE, PYRAMID = 0x00080008, 0x00080016, 0x00080018, 0x00080019
MANUFACTURER, SERIES, CONCATENATION = 0x00080070, 0x0020000E, 0x00209161
IN_CONCATENATION, PARTS, FRAME_OFFSET = 0x00209162, 0x00209163, 0x00209228
ORGANIZATION, SAMPLES, PHOTOMETRIC, PLANAR = 0x00209311, 0x00280002, 0x00280004, 0x00280006
FRAMES, ROWS, COLUMNS, ALLOCATED = 0x00280008, 0x00280010, 0x00280011, 0x00280100
STORED, SIGNED, VOLUME_WIDTH, VOLUME_HEIGHT = 0x00280101, 0x00280103, 0x00480001, 0x00480002
MATRIX_COLUMNS, MATRIX_ROWS, LABEL_IN_IMAGE = 0x00480006, 0x00480007, 0x00480010
OPTICAL_PATHS, N_PATHS, N_PLANES = 0x00480105, 0x00480302, 0x00480303
ILLUMINATION, CODE_VALUE, PATH_ID = 0x00220016, 0x00080100, 0x00480106
SHARED, PER_FRAME = 0x52009229, 0x52009230
MEASURES, SPACING = 0x00289110, 0x00280030
_PLACE, _FRAME_PATH = 0x0048021A, 0x00480207
_COLUMN, _ROW, _HEIGHT = 0x0048021E, 0x0048021F, 0x0040074A
OFFSETS, LENGTHS, PIXELS = 0x7FE00001, 0x7FE00002, 0x7FE00010

Wanted = Mapping[int, "Wanted | None"]
"""Tags to read; those of a sequence name what is read of its items."""

_MEASURES: Wanted = {MEASURES: {SPACING: None}}
WANTED: Wanted = {
    **dict.fromkeys(
        (IMAGE_TYPE, SOP_CLASS, SOP_INSTANCE, PYRAMID, MANUFACTURER, SERIES, CONCATENATION,
         IN_CONCATENATION, PARTS, FRAME_OFFSET, ORGANIZATION, SAMPLES, PHOTOMETRIC, PLANAR, FRAMES,
         ROWS, COLUMNS, ALLOCATED, STORED, SIGNED, VOLUME_WIDTH, VOLUME_HEIGHT, MATRIX_COLUMNS,
         MATRIX_ROWS, LABEL_IN_IMAGE, N_PATHS, N_PLANES)
    ),
    OPTICAL_PATHS: {PATH_ID: None, ILLUMINATION: {CODE_VALUE: None}},
    SHARED: _MEASURES,
}  # fmt: skip
_PER_FRAME: Wanted = {
    _PLACE: {_COLUMN: None, _ROW: None, _HEIGHT: None},
    _FRAME_PATH: {PATH_ID: None},
    **_MEASURES,
}

_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_SHORT = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
_SQ, _UN = b"SQ", b"UN"
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_EXPLICIT, _IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
_DEFLATED, _BIG_ENDIAN = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
_META_LENGTH, _SYNTAX = 0x00020000, 0x00020010


class BadDicomError(Exception):
    """Why a file's attributes cannot be read; the caller adds which file."""


class PastEndError(BadDicomError):
    """Attributes, a table or a frame lie past the end: most likely the file was cut."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__(f"bytes {start:,}-{stop:,} of it lie past its end")
        self.start, self.stop = start, stop


class StoredOtherwiseError(BadDicomError):
    """A sound file in an encoding that we do not read."""


class Source:
    """Bytes of an object by position, through a window that grows as it is read on.

    `fetch(start, stop)` gives exactly those bytes; `head` are the first ones, if they are known.
    """

    def __init__(
        self, fetch: Callable[[int, int], bytes], size_bytes: int, head: bytes = b""
    ) -> None:
        self.size_bytes = size_bytes
        self.requests, self.bytes_fetched = 0, len(head)
        self._fetch, self._window, self._start, self._ahead = fetch, head, 0, _FIRST_AHEAD

    def read(self, start: int, count: int) -> bytes:
        """Exactly `count` bytes from `start`; PastEndError when there are fewer."""
        at = start - self._start
        if at < 0 or at + count > len(self._window):
            if start + count > self.size_bytes:
                raise PastEndError(start, start + count)
            self._move(start, count)
            at = 0
        return self._window[at : at + count]

    def _move(self, start: int, count: int) -> None:
        """A window from `start` on: twice as long as the last where reading goes on, else short."""
        goes_on = start <= self._start + len(self._window) and self._start > 0
        self._ahead = min(2 * self._ahead, _MOST_AHEAD) if goes_on else _FIRST_AHEAD
        stop = min(self.size_bytes, start + max(count, self._ahead))
        self.bytes_fetched += stop - start
        if self.bytes_fetched > MAX_HEADER_BYTES:
            raise BadDicomError(f"its attributes say to read more than {MAX_HEADER_BYTES:,} bytes")
        self.requests += 1
        self._window, self._start = self._fetch(start, stop), start


@dataclass
class Attributes:
    """What was read of one file. `values` maps a tag to its bytes, or to a list of such maps."""

    syntax: str
    values: dict[int, Any]
    columns: array[int] = field(default_factory=lambda: array("q"))
    rows: array[int] = field(default_factory=lambda: array("q"))
    """Each frame's place in the total pixel matrix, counted from 1: empty without per-frame groups."""
    heights: array[float] = field(default_factory=lambda: array("d"))
    """Each frame's height over the glass (ZOffsetInSlideCoordinateSystem); 0 where it has none."""
    paths: set[str] = field(default_factory=set)
    """Identifiers of the optical paths that frames name."""
    tables: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Start and bytes of the extended offset tables."""
    pixels: tuple[int, int] | None = None
    """Start and bytes (UNDEFINED: encapsulated) of the pixel data."""

    def text(self, tag: int) -> str:
        """A text without its padding; "" where there is none."""
        value = self.values.get(tag, b"")
        return value.decode("latin-1").strip(" \0") if isinstance(value, bytes) else ""

    def words(self, path: tuple[int, ...], values: dict[int, Any] | None = None) -> set[str]:
        """The texts at the end of a path of sequences, in all their items."""
        here = self.values if values is None else values
        value = here.get(path[0], b"")
        if isinstance(value, list):
            return (
                {text for item in value for text in self.words(path[1:], item)}
                if path[1:]
                else set()
            )
        return {value.decode("latin-1").strip(" \0")} if value and not path[1:] else set()

    def number(self, tag: int, default: int = 0) -> int:
        """An unsigned integer of 2 or 4 bytes, or one written in digits (FRAMES)."""
        value = self.values.get(tag, b"")
        if not value:
            return default
        if tag == FRAMES:
            digits = self.text(tag)
            if not (digits.isascii() and digits.isdigit() and len(digits) <= 12):
                raise BadDicomError(f"its number of frames is {digits[:20]!r}")
            return int(digits)
        if len(value) not in (2, 4):
            raise BadDicomError(f"{name_of(tag)} takes {len(value)} bytes, not 2 or 4")
        return int.from_bytes(value, "little")

    def spacing_mm(self) -> tuple[float, float] | None:
        """Pixel spacing (down, across) in mm; None when the file says nothing usable."""
        for item in self.values.get(SHARED, []):
            for measures in item.get(MEASURES, []):
                found = decimals(measures.get(SPACING, b""))
                if len(found) == 2 and min(found) > 0:
                    return found[0], found[1]
        return None

    def volume_mm(self) -> tuple[float, float] | None:
        """Width and height of the imaged volume in mm."""
        sides = [self.values.get(tag, b"") for tag in (VOLUME_WIDTH, VOLUME_HEIGHT)]
        if not all(len(side) == 4 for side in sides):
            return None
        width, height = (struct.unpack("<f", side)[0] for side in sides)
        return (width, height) if width > 0 and height > 0 else None


def decimals(value: bytes) -> list[float]:
    """The numbers of a decimal string; [] when it is none."""
    try:
        return [float(part) for part in value.decode("ascii").strip(" \0").split("\\")]
    except ValueError:
        return []


def name_of(tag: int) -> str:
    """A tag as DICOM writes it."""
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"


def is_dicom(head: bytes) -> bool:
    """Whether a file starts as DICOM files do: DICM after a preamble of 128 bytes."""
    return head[128:132] == b"DICM"


def read_attributes(source: Source, go_on: Callable[[Attributes], bool]) -> Attributes:
    """The wanted attributes of a file, and where its pixels lie.

    `go_on` is asked before the functional groups, which may be long: where it says no, those and all
    after them are left. Raises BadDicomError.
    """
    if not is_dicom(source.read(0, min(132, source.size_bytes))):
        raise BadDicomError("it does not start as a DICOM file does")
    syntax, start = _meta(source)
    if syntax in (_DEFLATED, _BIG_ENDIAN):
        told = "deflated" if syntax == _DEFLATED else "big-endian"
        raise StoredOtherwiseError(f"{told} attributes ({syntax}) are not read")
    walk = _Walk(source, syntax == _IMPLICIT)
    walk.dataset(Attributes(syntax, {}), start, go_on)
    return walk.found


def _meta(source: Source) -> tuple[str, int]:
    """Transfer syntax, and where the data set begins. The group is always explicit."""
    walk = _Walk(source, implicit=False)
    tag, _, length, at = walk.element(132)
    if tag != _META_LENGTH or length != 4:
        raise BadDicomError("its file meta information has no length")
    stop = at + 4 + int.from_bytes(source.read(at, 4), "little")
    at += 4
    syntax = ""
    while at < stop:
        tag, _, length, value = walk.element(at)
        if tag >> 16 != 2 or value + length > stop:
            raise BadDicomError("its file meta information is not as long as it says")
        if tag == _SYNTAX:
            syntax = source.read(value, min(length, 64)).decode("latin-1").strip(" \0")
        at = value + length
    if not syntax or not set(syntax) <= set("0123456789."):
        raise BadDicomError("it names no transfer syntax")
    return syntax, stop


class _Walk:
    """One pass over a data set."""

    def __init__(self, source: Source, implicit: bool) -> None:
        self._source, self._implicit, self._left = source, implicit, MAX_ELEMENTS
        self.found = Attributes("", {})

    def element(self, at: int) -> tuple[int, bytes, int, int]:
        """Tag, value representation (b"" when implicit), length and where the value begins."""
        self._left -= 1
        if self._left < 0:
            raise BadDicomError(f"it holds more than {MAX_ELEMENTS:,} attributes")
        head = self._source.read(at, 8)
        tag = (head[1] << 24) | (head[0] << 16) | (head[3] << 8) | head[2]
        if self._implicit or tag >> 16 == 0xFFFE:
            return tag, b"", int.from_bytes(head[4:8], "little"), at + 8
        kind = head[4:6]
        if kind in _SHORT:
            return tag, kind, int.from_bytes(head[6:8], "little"), at + 8
        if kind not in _LONG:
            raise BadDicomError(f"{name_of(tag)} at {at:,} is of no known kind")
        return tag, kind, int.from_bytes(self._source.read(at + 8, 4), "little"), at + 12

    def dataset(self, found: Attributes, at: int, go_on: Callable[[Attributes], bool]) -> None:
        """The file's own attributes, from `at` up to its pixels."""
        self.found, size, asked = found, self._source.size_bytes, False
        while at < size:
            tag, kind, length, value = self.element(at)
            if tag >> 16 >= 0x5200 and not asked:
                asked = True
                if not go_on(found):
                    return
            if tag >= PIXELS:
                if tag == PIXELS:
                    found.pixels = (value, length)
                return
            if tag in (OFFSETS, LENGTHS) and length != UNDEFINED:
                found.tables[tag] = (value, length)
            if tag == PER_FRAME and kind in (b"", _SQ):
                at = self._items(value, length, _PER_FRAME, 0, self._frame)
            else:
                at = self._value(found.values, tag, kind, length, value, WANTED, 0)
            if at > size:
                raise PastEndError(value, at)

    def _frame(self, item: dict[int, Any]) -> None:
        """One frame's functional groups, packed."""
        found, place = self.found, (item.get(_PLACE) or [{}])[0]
        for tag, column in ((_COLUMN, found.columns), (_ROW, found.rows)):
            value = place.get(tag, b"")
            column.append(int.from_bytes(value, "little", signed=True) if len(value) == 4 else 0)
        height = decimals(place.get(_HEIGHT, b""))
        found.heights.append(height[0] if len(height) == 1 else 0.0)
        for path in item.get(_FRAME_PATH, []):
            if len(found.paths) < 2:  # more than one is all that matters
                found.paths.add(path.get(PATH_ID, b"").decode("latin-1").strip(" \0"))
        if len(found.columns) == 1 and MEASURES in item:
            found.values.setdefault(SHARED, []).append({MEASURES: item[MEASURES]})

    def _value(
        self, into: dict[int, Any], tag: int, kind: bytes, length: int, at: int, wanted: Wanted,
        depth: int,
    ) -> int:  # fmt: skip
        """Keep one attribute if it is wanted; where the next begins."""
        inner = wanted.get(tag)
        if inner is not None and kind in (b"", _SQ):
            kept: list[dict[int, Any]] = []
            into[tag] = kept

            def keep(item: dict[int, Any]) -> None:
                if len(kept) < _MAX_ITEMS:
                    kept.append(item)

            return self._items(at, length, inner, depth + 1, keep)
        if length != UNDEFINED:
            if tag in wanted and inner is None:
                if length > _MAX_VALUE_BYTES:
                    raise BadDicomError(f"{name_of(tag)} takes {length:,} bytes")
                into[tag] = self._source.read(at, length)
            return at + length
        if kind in (b"", _SQ):
            return self._items(at, length, {}, depth + 1, _forget)
        if kind == _UN:  # PS3.5 6.2.2: its items are implicit whatever the rest is
            before, self._implicit = self._implicit, True
            at = self._items(at, length, {}, depth + 1, _forget)
            self._implicit = before
            return at
        return self._fragments(at)

    def _items(
        self, at: int, length: int, wanted: Wanted, depth: int, keep: Callable[[dict[int, Any]], None]
    ) -> int:  # fmt: skip
        """Hand over each item of a sequence; where what follows it begins."""
        if depth > _MAX_DEPTH:
            raise BadDicomError(f"its sequences are nested more than {_MAX_DEPTH} deep")
        stop = self._source.size_bytes if length == UNDEFINED else at + length
        if stop > self._source.size_bytes:
            raise PastEndError(at, stop)
        while at < stop:
            tag, _, size, value = self.element(at)
            if tag == _SEQUENCE_END and length == UNDEFINED:
                return value
            if tag != _ITEM:
                raise BadDicomError(f"{name_of(tag)} at {at:,} where an item should be")
            item: dict[int, Any] = {}
            at = self._item(item, value, size, stop, wanted, depth)
            keep(item)
        if length == UNDEFINED or at > stop:
            raise PastEndError(at, stop)
        return at

    def _item(
        self, item: dict[int, Any], at: int, size: int, stop: int, wanted: Wanted, depth: int
    ) -> int:
        """Read an item's attributes; where the next item begins."""
        end = stop if size == UNDEFINED else at + size
        if end > stop:
            raise PastEndError(at, end)
        if not wanted and size != UNDEFINED:
            return end
        while at < end:
            tag, kind, length, value = self.element(at)
            if tag == _ITEM_END and size == UNDEFINED:
                return value
            at = self._value(item, tag, kind, length, value, wanted, depth)
        if size == UNDEFINED or at > end:
            raise PastEndError(at, end)
        return at

    def _fragments(self, at: int) -> int:
        """Past encapsulated bytes inside the attributes (an icon)."""
        while True:
            tag, _, size, value = self.element(at)
            if tag == _SEQUENCE_END:
                return value
            if tag != _ITEM or size == UNDEFINED:
                raise BadDicomError(f"{name_of(tag)} at {at:,} where a fragment should be")
            at = value + size


def _forget(_: dict[int, Any]) -> None:
    """Of a sequence nobody asked for only the end matters."""
