"""The wanted attributes of a DICOM file, read in bounded time, memory and requests.

DICOM PS3.5 (encoding) and PS3.10 (files), little endian, explicit or implicit value representations.
Attributes that are not in dicom_attributes.WANTED, a patient's among them, are skipped by their length.
Nothing a file says is believed before it is compared with the file's size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from online_patching.formats.dicom_attributes import (
    FRAME_COLUMN,
    FRAME_HEIGHT,
    FRAME_PATH,
    FRAME_ROW,
    FRAMES,
    LENGTHS,
    MEASURES,
    OFFSETS,
    PATH_ID,
    PER_FRAME,
    PIXELS,
    PLACE,
    SHARED,
    UNDEFINED,
    WANTED,
    WANTED_PER_FRAME,
    Attributes,
    BadDicomError,
    PastEndError,
    StoredOtherwiseError,
    Wanted,
    decimals,
    name_of,
)

MAX_HEADER_BYTES = 128 * 2**20
"""Fetched for the attributes of one file: 100,000 frames with a place each take 50 MB."""

MAX_ELEMENTS = 2**22
"""Attributes looked at in one file, those inside sequences included."""

_MAX_DEPTH = 16
_MAX_ITEMS = 256  # of a sequence that is kept; per-frame groups are packed as they come
_MAX_VALUE_BYTES = 1024
_FIRST_AHEAD, _MOST_AHEAD = 64 * 2**10, 4 * 2**20
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_SHORT = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())
_SQ, _UN = b"SQ", b"UN"
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_EXPLICIT, _IMPLICIT = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2"
_DEFLATED, _BIG_ENDIAN = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
_FIRST_TAG = 0x00020000  # of commands there are none in files
_META_LENGTH, _SYNTAX = 0x00020000, 0x00020010


Fetch = Callable[[list[tuple[int, int]]], list[bytes]]
"""Ranges (start, stop) -> exactly those bytes of each, fetched at the same time where that helps."""


class Source:
    """Bytes of an object by position, through a window that grows as it is read on.

    `head` are the first bytes, if they are known. A window has `ahead_bytes` at first. `remote` says
    that a request takes long.
    """

    def __init__(
        self, fetch: Fetch, size_bytes: int, head: bytes = b"", ahead_bytes: int = _FIRST_AHEAD,
        remote: bool = False,
    ) -> None:  # fmt: skip
        self.size_bytes, self.remote = size_bytes, remote
        self.requests, self.bytes_fetched = 0, len(head)
        self._fetch, self._window, self._start = fetch, head, 0
        self._ahead = self._first_ahead = ahead_bytes

    def peek(self, places: list[int], count: int = 8) -> list[bytes]:
        """A few bytes at each of many places, fewer at the end, all at the same time."""
        first, stop = self._start, self._start + len(self._window)
        inside = [first <= at and min(at + count, self.size_bytes) <= stop for at in places]
        wanted = [at for at, known in zip(places, inside, strict=True) if not known]
        self.requests += len(wanted)
        found = iter(self._fetch([(at, min(self.size_bytes, at + count)) for at in wanted]))
        return [
            self._window[at - first : at - first + count] if known else next(found)
            for at, known in zip(places, inside, strict=True)
        ]

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
        self._ahead = min(2 * self._ahead, _MOST_AHEAD) if goes_on else self._first_ahead
        stop = min(self.size_bytes, start + max(count, self._ahead))
        self.bytes_fetched += stop - start
        if self.bytes_fetched > MAX_HEADER_BYTES:
            raise BadDicomError(f"its attributes say to read more than {MAX_HEADER_BYTES:,} bytes")
        self.requests += 1
        [self._window], self._start = self._fetch([(start, stop)]), start


def is_dicom(head: bytes) -> bool:
    """Whether a file starts as DICOM files do: DICM after a preamble of 128 bytes."""
    return head[128:132] == b"DICM"


def read_attributes(
    source: Source, go_on: Callable[[Attributes], bool], until: int = PIXELS
) -> Attributes:
    """The wanted attributes of a file, and where its pixels lie.

    `go_on` is asked before the functional groups, which may be long: where it says no, those and all
    after them are left. So is all from the tag `until` on, if that comes before. Raises BadDicomError.
    """
    if not is_dicom(source.read(0, min(132, source.size_bytes))):
        raise BadDicomError("it does not start as a DICOM file does")
    syntax, start = _meta(source)
    if syntax in (_DEFLATED, _BIG_ENDIAN):
        told = "deflated" if syntax == _DEFLATED else "big-endian"
        raise StoredOtherwiseError(f"{told} attributes ({syntax}) are not read")
    walk = _Walk(source, syntax == _IMPLICIT)
    walk.dataset(Attributes(syntax, {}), start, go_on, until)
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
        if tag < _FIRST_TAG:
            raise BadDicomError(f"{name_of(tag)} at {at:,} is no attribute of an image")
        if self._implicit or tag >> 16 == 0xFFFE:
            return tag, b"", int.from_bytes(head[4:8], "little"), at + 8
        kind = head[4:6]
        if kind in _SHORT:
            return tag, kind, int.from_bytes(head[6:8], "little"), at + 8
        if kind not in _LONG:
            raise BadDicomError(f"{name_of(tag)} at {at:,} is of no known kind")
        return tag, kind, int.from_bytes(self._source.read(at + 8, 4), "little"), at + 12

    def dataset(
        self, found: Attributes, at: int, go_on: Callable[[Attributes], bool], until: int
    ) -> None:
        """The file's own attributes, from `at` up to its pixels."""
        self.found, size, asked = found, self._source.size_bytes, False
        while at < size:
            tag, kind, length, value = self.element(at)
            if tag >> 16 >= 0x5200 and not asked:
                asked = True
                if not go_on(found):
                    return
            if tag >= until:
                if tag == PIXELS:
                    found.pixels = (value, length)
                return
            if tag in (OFFSETS, LENGTHS) and length != UNDEFINED:
                found.tables[tag] = (value, length)
            if tag == PER_FRAME and kind in (b"", _SQ):
                at = self._items(value, length, WANTED_PER_FRAME, 0, self._frame)
            else:
                at = self._value(found.values, tag, kind, length, value, WANTED, 0)
            if at > size:
                raise PastEndError(value, at)

    def _frame(self, item: dict[int, Any]) -> None:
        """One frame's functional groups, packed."""
        found, place = self.found, (item.get(PLACE) or [{}])[0]
        if len(found.columns) >= found.number(FRAMES, 1):
            raise BadDicomError(
                f"it has functional groups for more than {len(found.columns):,} frames"
            )
        for tag, column in ((FRAME_COLUMN, found.columns), (FRAME_ROW, found.rows)):
            value = place.get(tag, b"")
            column.append(int.from_bytes(value, "little", signed=True) if len(value) == 4 else 0)
        height = decimals(place.get(FRAME_HEIGHT, b""))
        found.heights.append(height[0] if len(height) == 1 else 0.0)
        for path in item.get(FRAME_PATH, []):
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
