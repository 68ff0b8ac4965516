"""The directories and tags of a TIFF or BigTIFF, read in bounded time, memory and requests.

TIFF 6.0 section 2; BigTIFF as in libtiff's specification. Nothing a file says is believed before
it is compared with the file's size: a count, an offset or a chain that lies is a BadTagError, and a
file that makes us read more than the budget is refused, whatever it is. Only numbers, texts, blobs
and tables of tags somebody asks for are read. `docs/decisions/0011-tiff-parser.md` has the measurements.
"""

from __future__ import annotations

import struct
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_DIRECTORIES = 512
"""Images in one file, SubIFDs included: a slide has about ten."""

MAX_HEADER_BYTES = 32 * 2**20
"""What the directories and their values may add up to, tile tables apart."""

MAX_REQUESTS = 1024
"""Reads of the store for one slide's headers, tile tables included."""

_MAX_ENTRIES = 2**16  # over all directories: a slide's have about 20 each
_BLOCK_BYTES = 64 * 2**10
_KEPT_BLOCKS = 32
_ROWS_A_READ = 2**18
_KEPT_SPANS = 64
_MOST_HELD_BYTES = 8 * 2**10
"""Values up to this size are fetched with their directory; longer ones when somebody asks for them."""
_SPAN_GAP_BYTES = 64
_USUAL_ENTRIES = 20
# BYTE SHORT LONG IFD LONG8 IFD8, and their signed twins, whose negative values turn out absurd.
_NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q", 6: "B", 8: "H", 9: "I", 17: "Q"}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
          16: 8, 17: 8, 18: 8}  # fmt: skip
_RATIONAL = 5
_SUB_DIRECTORIES = 330


class BadTagError(Exception):
    """Why a file's directories cannot be read; the caller adds which file."""


class PastEndError(BadTagError):
    """The directories, a value or a tile table lie past the end: most likely the file was cut."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__(f"bytes {start:,}-{stop:,} of its headers lie past its end")
        self.start, self.stop = start, stop


class FarOffsetsError(BadTagError):
    """A classic TIFF larger than 4 GiB: its 32-bit offsets mean something of a vendor's own (NDPI)."""


class HeaderReader:
    """Bytes of an object by position, fetched in aligned blocks and counted against a budget.

    `fetch(start, stop)` gives exactly those bytes. The last blocks are kept; neighbours that are
    missing come in one request. What `hold` was told to have comes alone. `requests` and
    `bytes_fetched` tell what was asked of the store.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.requests = self.bytes_fetched = 0
        self._fetch = fetch
        self._left = MAX_HEADER_BYTES
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._spans: deque[tuple[int, bytes]] = deque(maxlen=_KEPT_SPANS)

    def hold(self, start: int, stop: int) -> None:
        """Have just the bytes start..stop at hand, and none around them: those may be a label's.

        What lies past the end of the file is left out.
        """
        stop = min(stop, self.size_bytes)
        block = start // _BLOCK_BYTES
        if block in self._blocks and stop <= (block + 1) * _BLOCK_BYTES:
            return
        if start < stop and self._held(start, stop - start) is None:
            self._spans.append((start, self._request(start, stop)))

    def _held(self, start: int, count: int) -> bytes | None:
        for first, data in reversed(self._spans):
            if first <= start and start + count <= first + len(data):
                return data[start - first :][:count]
        return None

    def read(self, start: int, count: int) -> bytes:
        """Exactly `count` bytes from `start`; PastEndError when there are fewer."""
        if start + count > self.size_bytes:
            raise PastEndError(start, start + count)
        self._left -= count
        if self._left < 0:
            raise BadTagError(f"its headers say to read more than {MAX_HEADER_BYTES:,} bytes")
        held = self._held(start, count)
        if held is not None:
            return held
        first, last = start // _BLOCK_BYTES, (start + max(count, 1) - 1) // _BLOCK_BYTES
        if first == last:
            block = self._blocks.get(first) or self._load(first, last)
            return block[start - first * _BLOCK_BYTES :][:count]
        if last - first < _KEPT_BLOCKS and all(i in self._blocks for i in range(first, last + 1)):
            joined = b"".join(self._blocks[i] for i in range(first, last + 1))
        else:
            joined = self._load(first, last)
        return joined[start - first * _BLOCK_BYTES :][:count]

    def read_rows(self, start: int, count: int) -> bytes:
        """A part of a tile table: like `read`, but not kept and not counted against the bytes."""
        if start + count > self.size_bytes:
            raise PastEndError(start, start + count)
        block = start // _BLOCK_BYTES
        if block in self._blocks and start + count <= (block + 1) * _BLOCK_BYTES:
            return self._blocks[block][start - block * _BLOCK_BYTES :][:count]
        held = self._held(start, count)
        return self._request(start, start + count) if held is None else held

    def _load(self, first: int, last: int) -> bytes:
        """Blocks first..last in one request; each is kept."""
        start = first * _BLOCK_BYTES
        data = self._request(start, min(self.size_bytes, (last + 1) * _BLOCK_BYTES))
        for number in range(max(first, last + 1 - _KEPT_BLOCKS), last + 1):
            at = (number - first) * _BLOCK_BYTES
            self._blocks[number] = data[at : at + _BLOCK_BYTES]
        while len(self._blocks) > _KEPT_BLOCKS:
            self._blocks.popitem(last=False)
        return data

    def _request(self, start: int, stop: int) -> bytes:
        self.requests += 1
        if self.requests > MAX_REQUESTS:
            raise BadTagError(f"its headers are scattered over more than {MAX_REQUESTS} places")
        self.bytes_fetched += stop - start
        return self._fetch(start, stop)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tag as stored: its type, how many values, and where they lie in the file."""

    kind: int
    count: int
    start: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the values."""
        return _SIZES[self.kind] * self.count


class Directory:
    """The tags of one image. Absent tags give the default; values that lie raise BadTagError."""

    def __init__(self, reader: HeaderReader, order: str, entries: dict[int, Entry]) -> None:
        self._reader, self._order, self.entries = reader, order, entries

    def __contains__(self, tag: int) -> bool:
        return tag in self.entries

    def numbers(self, tag: int, most: int) -> tuple[int, ...]:
        """The first `most` values of a tag of integers; () when it is absent."""
        entry = self.entries.get(tag)
        if entry is None or not entry.count:
            return ()
        code = _NUMBERS.get(entry.kind)
        if code is None:
            raise BadTagError(f"tag {tag} is of type {entry.kind}, not an integer")
        count = min(entry.count, most)
        data = self._reader.read(entry.start, count * _SIZES[entry.kind])
        return struct.unpack(f"{self._order}{count}{code}", data)

    def number(self, tag: int, default: int = 0) -> int:
        """The first value of a tag of integers."""
        found = self.numbers(tag, 1)
        return found[0] if found else default

    def rational(self, tag: int) -> tuple[int, int] | None:
        """Numerator and denominator of a tag; None when it is absent or of another type."""
        entry = self.entries.get(tag)
        if entry is None or entry.kind != _RATIONAL or not entry.count:
            return None
        numerator, denominator = struct.unpack(
            f"{self._order}2I", self._reader.read(entry.start, 8)
        )
        return numerator, denominator

    def blob(self, tag: int, most: int) -> bytes:
        """All bytes of a tag of bytes; BadTagError above `most`, b"" when it is absent."""
        entry = self.entries.get(tag)
        if entry is None:
            return b""
        if _SIZES[entry.kind] != 1:
            raise BadTagError(f"tag {tag} is of type {entry.kind}, not bytes")
        if entry.count > most:
            raise BadTagError(f"tag {tag} holds {entry.count:,} bytes, more than {most:,}")
        return self._reader.read(entry.start, entry.count)

    def first_bytes(self, tag: int, most: int) -> bytes:
        """The first `most` bytes of a tag of bytes; b"" when it is absent or holds something else."""
        entry = self.entries.get(tag)
        if entry is None or _SIZES[entry.kind] != 1:
            return b""
        return self._reader.read(entry.start, min(entry.count, most))

    def text(self, tag: int, most: int) -> str:
        """A tag of characters up to the first NUL, as UTF-8, else Latin-1."""
        data = self.blob(tag, most).partition(b"\0")[0]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return data.decode("latin-1")

    def count(self, tag: int) -> int:
        """How many values a tag claims to have."""
        entry = self.entries.get(tag)
        return 0 if entry is None else entry.count

    def table(self, tag: int) -> Iterator[NDArray[np.uint64]]:
        """The values of a tag of integers, in parts of at most 262,144: a tile table is long."""
        entry = self.entries[tag]
        code = _NUMBERS.get(entry.kind)
        if code is None:
            raise BadTagError(f"tag {tag} is of type {entry.kind}, not an integer")
        width = _SIZES[entry.kind]
        for first in range(0, entry.count, _ROWS_A_READ):
            rows = min(_ROWS_A_READ, entry.count - first)
            data = self._reader.read_rows(entry.start + first * width, rows * width)
            yield np.frombuffer(data, np.dtype(f"{self._order}{code}")).astype(np.uint64)


class TiffTags:
    """The directories of a file: the chain in order, and the SubIFDs of any of them on request.

    `fetch` and `size_bytes` are what HeaderReader takes. Raises BadTagError when the file is no TIFF
    or its chain loops, is too long, or leaves the file.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size_bytes: int) -> None:
        self.reader = HeaderReader(fetch, size_bytes)
        self._seen: set[int] = set()
        self._entries = 0
        head = self.reader.read(0, min(16, size_bytes)).ljust(16, b"\0")
        self._order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        (version,) = struct.unpack(f"{self._order}H", head[2:4])
        if not self._order or version not in (42, 43):
            raise BadTagError("it does not start as a TIFF does")
        self.big = version == 43
        if not self.big and size_bytes > 2**32:
            raise FarOffsetsError("its 32-bit offsets do not reach its end")
        if self.big and struct.unpack(f"{self._order}HH", head[4:8]) != (8, 0):
            raise BadTagError("a BigTIFF whose offsets are not of 8 bytes")
        count, kind, offset = ("Q", "Q", 8) if self.big else ("H", "I", 4)
        self._count = struct.Struct(self._order + count)
        self._entry = struct.Struct(f"{self._order}HH{kind}{kind}")
        self._next = struct.Struct(self._order + kind)
        self.directories = self._chain(self._next.unpack_from(head, offset)[0])

    def sub_directories(self, directory: Directory, most: int) -> list[Directory]:
        """The first `most` SubIFDs of a directory; their own chains are not followed."""
        return [
            self._directory(offset)[0]
            for offset in directory.numbers(_SUB_DIRECTORIES, most)
            if offset
        ]

    def _chain(self, offset: int) -> list[Directory]:
        found = []
        while offset:
            directory, offset = self._directory(offset)
            found.append(directory)
        return found

    def _directory(self, offset: int) -> tuple[Directory, int]:
        """The directory at an offset, and where the chain goes on (0: it ends)."""
        if offset in self._seen:
            raise BadTagError(f"its directories run in a loop (at {offset:,})")
        self._seen.add(offset)
        if len(self._seen) > MAX_DIRECTORIES:
            raise BadTagError(f"it holds more than {MAX_DIRECTORIES} images: a stack, not a slide")
        width = self._entry.size
        self.reader.hold(offset, offset + self._count.size + _USUAL_ENTRIES * width)
        (count,) = self._count.unpack(self.reader.read(offset, self._count.size))
        self._entries += count
        if self._entries > _MAX_ENTRIES:
            raise BadTagError(f"its directories hold more than {_MAX_ENTRIES:,} tags")
        start = offset + self._count.size
        self.reader.hold(start, start + count * width + self._next.size)
        data = self.reader.read(start, count * width + self._next.size)
        inline, value_at = self._next.size, width - self._next.size
        entries: dict[int, Entry] = {}
        for number, (tag, kind, values, where) in enumerate(
            self._entry.iter_unpack(data[: count * width])
        ):
            size = _SIZES.get(kind)  # TIFF 6.0: a reader skips types it does not know
            if size is not None and tag not in entries:
                here = start + number * width + value_at
                entries[tag] = Entry(kind, values, here if values * size <= inline else where)
        self._hold_values(entries, start, start + count * width)
        if _SUB_DIRECTORIES in entries and entries[_SUB_DIRECTORIES].count > MAX_DIRECTORIES:
            raise BadTagError(f"it holds more than {MAX_DIRECTORIES} images: a stack, not a slide")
        return Directory(self.reader, self._order, entries), self._next.unpack_from(
            data, count * width
        )[0]

    def _hold_values(self, entries: dict[int, Entry], start: int, stop: int) -> None:
        """Have the short values that lie outside of their directory (start..stop) at hand.

        Mostly they lie together, right after it, and come in one request. Blocks around them would hold
        what lies next to a directory: parts of other images, a label among them.
        """
        values = sorted(
            (entry.start, entry.start + entry.size_bytes)
            for entry in entries.values()
            if not start <= entry.start < stop and 0 < entry.size_bytes <= _MOST_HELD_BYTES
        )
        spans: list[tuple[int, int]] = []
        for first, last in values:
            if spans and first - spans[-1][1] <= _SPAN_GAP_BYTES:
                spans[-1] = (spans[-1][0], max(spans[-1][1], last))
            else:
                spans.append((first, last))
        for first, last in spans:
            self.reader.hold(first, last)
