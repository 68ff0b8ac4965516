"""Where each frame of a DICOM instance lies: from its offset tables, or item by item.

PS3.5 A.4 (encapsulation), PS3.3 C.7.6.3 (extended offset table). A frame is one range of bytes: its one fragment,
or, where a basic table tells which fragments are whose, all of them with their item headers.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from online_patching.formats.dicom_attributes import (
    LENGTHS,
    OFFSETS,
    UNDEFINED,
    Attributes,
    BadDicomError,
    PastEndError,
    StoredOtherwiseError,
)
from online_patching.formats.dicom_tags import Source
from online_patching.formats.dicom_walk import walk_items
from online_patching.fragments import ITEM

MAX_FRAMES = 2 * 2**20
"""Of one instance. A slide has about 150,000."""

_MAX_FRAGMENTS = 4096  # of the last frame, which nothing but its items tells the end of


class Ranges(NamedTuple):
    """First byte and bytes of each frame in the instance; 0 bytes: nothing is stored.

    `fragments`: of the items that hold the frame, with their headers.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    fragments: bool = False

    def with_headers(self) -> Ranges:
        """The same frames as items with their headers, as others of a level are."""
        if self.fragments:
            return self
        return Ranges(self.starts - 8, np.where(self.lengths > 0, self.lengths + 8, 0), True)


def frame_ranges(source: Source, found: Attributes, frames: int, frame_bytes: int) -> Ranges:
    """Start and length of each frame. `frame_bytes` is what one takes when it is not encapsulated.

    Raises BadDicomError when tables, items and the number of frames do not fit each other.
    """
    if found.pixels is None:
        raise BadDicomError("it holds no pixel data")
    if not 0 < frames <= MAX_FRAMES:
        raise BadDicomError(f"it claims {frames:,} frames")
    start, length = found.pixels
    if length != UNDEFINED:
        return _native(source, start, length, frames, frame_bytes)
    table_bytes = _item(source, start)
    first = start + 8 + table_bytes
    if first > source.size_bytes:
        raise PastEndError(start, first)
    if OFFSETS in found.tables:
        return _extended(source, found, first, frames)
    if table_bytes:
        return _basic(source, start + 8, table_bytes, frames)
    return _walk(source, first, frames)


def _native(source: Source, start: int, length: int, frames: int, frame_bytes: int) -> Ranges:
    """Frames one after another, as they are."""
    if length < frames * frame_bytes:
        raise BadDicomError(
            f"{frames:,} frames of {frame_bytes:,} bytes do not fit its {length:,} bytes of pixels"
        )
    if start + frames * frame_bytes > source.size_bytes:
        raise PastEndError(start, start + frames * frame_bytes)
    starts = start + np.arange(frames, dtype=np.int64) * frame_bytes
    return Ranges(starts, np.full(frames, frame_bytes, np.int64))


def _item(source: Source, at: int) -> int:
    """Bytes in the item at a place."""
    head = source.read(at, 8)
    length = int.from_bytes(head[4:], "little")
    if head[:4] != ITEM or length == UNDEFINED:
        raise BadDicomError(f"no fragment begins at {at:,}")
    return length


def _extended(source: Source, found: Attributes, first: int, frames: int) -> Ranges:
    """From the extended offset table and its lengths, 64 bits each."""
    parts = []
    for tag in (OFFSETS, LENGTHS):
        at, length = found.tables.get(tag, (0, 0))
        if length != 8 * frames:
            raise BadDicomError(
                f"its extended offset tables hold {length // 8:,} numbers for {frames:,} frames"
            )
        parts.append(np.frombuffer(source.read(at, length), "<u8"))
    limit = np.uint64(source.size_bytes)
    if max(int(part.max()) for part in parts) > limit:
        raise PastEndError(first, first + max(int(part.max()) for part in parts))
    starts, lengths = (part.astype(np.int64) for part in parts)
    starts += first + 8
    _check_end(source, starts, lengths)
    for number in _some(lengths):
        stored = _item(source, int(starts[number]) - 8)
        if stored < lengths[number]:  # PS3.3 C.7.6.3.1.8 wants one fragment a frame
            raise StoredOtherwiseError(
                f"frame {number:,} is stored in several fragments, which its extended offset table rules out"
            )
        if stored > lengths[number] + 1:
            raise _not_as_listed(number, stored, lengths)
    return Ranges(starts, lengths)


def _basic(source: Source, at: int, table_bytes: int, frames: int) -> Ranges:
    """From the basic offset table; its 32 bits may have run over, and then the items are walked."""
    if table_bytes != 4 * frames:
        raise BadDicomError(
            f"its offset table holds {table_bytes // 4:,} numbers for {frames:,} frames"
        )
    offsets = np.frombuffer(source.read(at, table_bytes), "<u4").astype(np.int64)
    first = at + table_bytes
    if offsets[0] != 0 or np.any(np.diff(offsets) < 8):
        if source.size_bytes > 2**32:
            return _walk(source, first, frames)
        raise BadDicomError("its offset table is not in order")
    starts = offsets + first + 8
    lengths = np.empty(frames, np.int64)
    lengths[:-1] = np.diff(offsets) - 8
    lengths[-1] = max(0, source.size_bytes - int(starts[-1]))
    _check_end(source, starts[:-1], lengths[:-1])
    fragments = False
    for number in _some(lengths[:-1]):
        stored = _item(source, int(starts[number]) - 8)
        if stored > lengths[number]:
            raise _not_as_listed(number, stored, lengths)
        fragments = fragments or stored < lengths[number]
    ends = _ends(source, int(starts[-1]) - 8)
    lengths[-1] = ends[-1] - starts[-1]
    found = Ranges(starts, lengths)
    return found.with_headers() if fragments or len(ends) > 1 else found


def _ends(source: Source, at: int) -> list[int]:
    """Where each fragment of the last frame ends, whose first item is at a place."""
    ends = [at + 8 + _item(source, at)]
    while ends[-1] + 8 <= source.size_bytes and source.read(ends[-1], 4) == ITEM:
        if len(ends) == _MAX_FRAGMENTS:
            raise BadDicomError(f"its last frame is in more than {_MAX_FRAGMENTS:,} fragments")
        ends.append(ends[-1] + 8 + _item(source, ends[-1]))
    if ends[-1] > source.size_bytes:
        raise PastEndError(at + 8, ends[-1])
    return ends


def _walk(source: Source, at: int, frames: int) -> Ranges:
    """From the items themselves, each behind the last."""
    starts, lengths = walk_items(source, at, frames)
    return Ranges(np.array(starts, np.int64), np.array(lengths, np.int64))


def _check_end(source: Source, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
    past = np.flatnonzero(starts + lengths > source.size_bytes)
    if len(past):
        start = int(starts[past[0]])
        raise PastEndError(start, start + int(lengths[past[0]]))


def _some(lengths: NDArray[np.int64]) -> list[int]:
    """First, middle, last and longest: a writer splits all frames, or those above a size."""
    count = len(lengths)
    return sorted({0, count // 2, count - 1, int(lengths.argmax())}) if count else []


def _not_as_listed(number: int, stored: int, lengths: NDArray[np.int64]) -> BadDicomError:
    return BadDicomError(
        f"frame {number:,} takes {stored:,} bytes, its table says {int(lengths[number]):,}"
    )
