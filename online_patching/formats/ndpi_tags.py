"""The directories of an NDPI file: classic TIFF whose offsets have grown to 64 bits.

As OpenSlide's page on the format tells (openslide.org/formats/hamamatsu): an offset to a directory, in the
file's head and behind each directory, has 8 bytes; behind that lie 4 bytes for each entry of the
directory, the high half of its value or offset. Text is never kept inside an entry, however short.
A file that fits 32 bits needs no high halves, so there they are not believed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from online_patching.formats.tiff_tags import (
    MAX_DIRECTORIES,
    BadTagError,
    Directory,
    Entry,
    HeaderReader,
)

_MOST_TAGS = 2**12  # a directory's; scanners write about 50
_TEXT, _LONG, _SLONG, _FLOAT = 2, 4, 9, 11
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_ENTRY = struct.Struct("<HHII")
_NEXT_BYTES = 8


class NdpiDirectory(Directory):
    """The tags of one image; a number that has outgrown its entry is whole.

    Of values that lie elsewhere just their own bytes are read: next to them may be parts of the macro.
    """

    def __init__(
        self, reader: HeaderReader, entries: dict[int, Entry], grown: Mapping[int, int]
    ) -> None:
        super().__init__(reader, "<", entries)
        self._grown = grown

    def numbers(self, tag: int, most: int) -> tuple[int, ...]:
        """The first `most` values of a tag of integers; () when it is absent."""
        if tag in self._grown:
            return (self._grown[tag],)
        self._hold(tag, 8 * most)
        return super().numbers(tag, most)

    def rational(self, tag: int) -> tuple[int, int] | None:
        """Numerator and denominator of a tag; None when it is absent or of another type."""
        self._hold(tag, 8)
        return super().rational(tag)

    def _hold(self, tag: int, most_bytes: int) -> None:
        entry = self.entries.get(tag)
        if entry is not None:
            self._reader.hold(entry.start, entry.start + min(entry.size_bytes, most_bytes))

    def real(self, tag: int) -> float | None:
        """The first value of a tag of FLOATs or integers; None when it is absent."""
        entry = self.entries.get(tag)
        if entry is None or not entry.count:
            return None
        if entry.kind != _FLOAT:
            return float(self.number(tag))
        (value,) = struct.unpack("<f", self._reader.read(entry.start, 4))
        return float(value)

    def note(self, tag: int, most: int) -> str:
        """The first `most` characters of a text, whatever its length; "" when it is absent or no text."""
        entry = self.entries.get(tag)
        if entry is None or _SIZES[entry.kind] != 1:
            return ""
        self._hold(tag, most)
        data = self._reader.read(entry.start, min(entry.count, most))
        return data.partition(b"\0")[0].decode("latin-1")


def ndpi_directories(reader: HeaderReader) -> Iterator[NdpiDirectory]:
    """The directories of the chain, in order; BadTagError when it loops, is too long or leaves the file."""
    reader.hold(0, 12)
    head = reader.read(0, 12)
    if head[:4] != b"II*\0":
        raise BadTagError("it does not start as an NDPI file does")
    far = reader.size_bytes > 2**32
    offset = _offset(head[4:], far)
    seen: set[int] = set()
    while offset:
        if offset in seen:
            raise BadTagError(f"its directories run in a loop (at {offset:,})")
        seen.add(offset)
        if len(seen) > MAX_DIRECTORIES:
            raise BadTagError(f"it holds more than {MAX_DIRECTORIES} images: a stack, not a slide")
        directory, offset = _directory(reader, offset, far)
        yield directory


def _directory(reader: HeaderReader, offset: int, far: bool) -> tuple[NdpiDirectory, int]:
    reader.hold(offset, offset + 2)
    (count,) = struct.unpack("<H", reader.read(offset, 2))
    if count > _MOST_TAGS:
        raise BadTagError(f"a directory of it holds {count:,} tags, more than {_MOST_TAGS:,}")
    start = offset + 2
    tail = _NEXT_BYTES + 4 * count if far else 4
    reader.hold(start, start + count * _ENTRY.size + tail)
    data = reader.read(start, count * _ENTRY.size + tail)
    after = count * _ENTRY.size
    high = struct.unpack_from(f"<{count}I", data, after + _NEXT_BYTES) if far else (0,) * count
    entries: dict[int, Entry] = {}
    grown: dict[int, int] = {}
    for number, (tag, kind, values, low) in enumerate(_ENTRY.iter_unpack(data[:after])):
        size = _SIZES.get(kind)
        if size is None or tag in entries:
            continue
        if size * values > 4 or kind == _TEXT:
            entries[tag] = Entry(kind, values, low | high[number] << 32)
            continue
        entries[tag] = Entry(kind, values, start + number * _ENTRY.size + 8)
        if high[number] and values == 1 and kind in (_LONG, _SLONG):
            grown[tag] = low | high[number] << 32
    return NdpiDirectory(reader, entries, grown), _offset(data[after:], far)


def _offset(data: bytes, far: bool) -> int:
    (offset,) = struct.unpack_from("<Q" if far else "<I", data)
    return int(offset)
