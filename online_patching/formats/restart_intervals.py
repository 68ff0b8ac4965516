"""A JPEG stream as a grid of tiles: its restart intervals, and where each of them lies.

Between two restart markers nothing depends on what came before, so an interval decodes alone under the
stream's own head (ISO 10918-1 E.1.4). It is as wide as its MCUs and one MCU high. Where the intervals
are, some container says; what it says is tried here on some markers, or found by reading the stream.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

MAX_HEAD_BYTES = 64 * 2**10
"""What a stream's head is looked for in; NDPI's has 660 bytes."""

JPEG_MAX_PX = 65_500
"""The longest side libjpeg decodes."""

SCAN_BLOCK_BYTES = 4 * 2**20

_MARKER_BYTES = 2
_KEPT = frozenset({0xDB, 0xC4})  # DQT, DHT
_FRAMES = frozenset({0xC0, 0xC1})
_NOT_FRAMES = frozenset({0xC4, 0xC8, 0xCC})  # DHT, JPG, DAC
_BARE = frozenset({0x00, 0x01, 0xFF, *range(0xD0, 0xDA)})
_SOI, _SOS, _DRI, _RST0 = 0xD8, 0xDA, 0xDD, 0xD0
_IDS_RGB = b"RGB"


class BadHeadError(Exception):
    """Why a stream's head is none that we cut into intervals."""


@dataclass(frozen=True)
class JpegHead:
    """What a stream says before its first code. Sizes are what SOF says, and 0 where it does not.

    `interval` is MCUs from one restart marker to the next, 0 without any; `colour` is what libjpeg would
    guess from the markers: ycbcr, rgb or gray. `size_bytes` reaches to the end of the SOS header.
    """

    width_px: int
    height_px: int
    mcu_width_px: int
    mcu_height_px: int
    interval: int
    colour: str
    size_bytes: int
    before: bytes = field(repr=False)
    frame: bytes = field(repr=False)
    after: bytes = field(repr=False)

    def tables(self, width_px: int, height_px: int) -> bytes:
        """A complete head for a picture of another size without restart markers: SOI to SOS."""
        frame = self.frame[:5] + struct.pack(">HH", height_px, width_px) + self.frame[9:]
        return b"\xff\xd8" + self.before + frame + self.after

    def tile_px(self, width_px: int, height_px: int) -> tuple[int, int] | None:
        """Width and height of an interval of a picture of this size; None when there is no grid.

        As OpenSlide: intervals must divide a row of MCUs. libjpeg cannot make a tile wider than 65,500.
        """
        across = -(-width_px // self.mcu_width_px)
        if not self.interval or across % self.interval or min(width_px, height_px) < 1:
            return None
        width = self.interval * self.mcu_width_px
        return (width, self.mcu_height_px) if width <= JPEG_MAX_PX else None


def read_head(data: bytes) -> JpegHead | None:
    """The head of a stream from its first bytes; None when more of them are needed.

    BadHeadError for what is no baseline stream of 8-bit samples in one scan.
    """
    if data[:2] != b"\xff\xd8":
        raise BadHeadError("it is no JPEG stream")
    position, interval, frame = 2, 0, b""
    jfif, transform = False, -1
    kept: tuple[list[bytes], list[bytes]] = ([], [])
    while position + 4 <= len(data):
        marker = data[position + 1]
        length = data[position + 2] << 8 | data[position + 3]
        if data[position] != 0xFF or marker in _BARE or length < 2:
            raise BadHeadError("its JPEG head is damaged")
        segment = data[position : position + 2 + length]
        position += 2 + length
        if position > len(data):
            break
        if marker in _FRAMES:
            frame = _frame(segment, frame)
        elif 0xC0 <= marker <= 0xCF and marker not in _NOT_FRAMES:
            raise BadHeadError(f"its frame is SOF{marker - 0xC0}, not baseline")
        elif marker in _KEPT:
            kept[bool(frame)].append(segment)
        elif marker == _DRI and length == 4:
            (interval,) = struct.unpack(">H", segment[4:6])
        elif marker == 0xE0 and segment[4:9] == b"JFIF\0" and length >= 16:
            jfif = True
        elif marker == 0xEE and segment[4:9] == b"Adobe" and length >= 14:
            transform = segment[15]
        elif marker == _SOS:
            _check_scan(segment, frame)
            colour = _colour(frame, jfif, transform)
            kept[1].append(segment)
            return _head(frame, interval, colour, position, kept)
    return None


def _frame(segment: bytes, before: bytes) -> bytes:
    count = segment[9] if len(segment) > 9 else 0
    if before or len(segment) != 10 + 3 * count or segment[4] != 8 or count not in (1, 3):
        raise BadHeadError(
            f"its frame has {count} components of {segment[4] if count else 0} bits, not 3 of 8"
        )
    return segment


def _check_scan(segment: bytes, frame: bytes) -> None:
    if not frame:
        raise BadHeadError("its scan comes before its frame")
    count = frame[9]
    if len(segment) != 8 + 2 * count or segment[4] != count or segment[-3:] != b"\x00\x3f\x00":
        raise BadHeadError("its components lie in several scans")


def _colour(frame: bytes, jfif: bool, transform: int) -> str:
    """The colour space as libjpeg's default_decompress_parms tells it."""
    if frame[9] == 1:
        return "gray"
    if jfif:
        return "ycbcr"
    if transform >= 0:
        return "ycbcr" if transform else "rgb"
    return "rgb" if bytes(frame[10::3]) == _IDS_RGB else "ycbcr"


def _head(
    frame: bytes, interval: int, colour: str, size: int, kept: tuple[list[bytes], list[bytes]]
) -> JpegHead:
    factors = [(n >> 4, n & 15) for n in frame[11::3]]
    if not all(1 <= n <= 4 for pair in factors for n in pair):
        raise BadHeadError("its sampling factors are none")
    # A scan of one component has blocks for MCUs, whatever its factors (ISO 10918-1 A.2.2).
    across = max(x for x, _ in factors) if len(factors) > 1 else 1
    down = max(y for _, y in factors) if len(factors) > 1 else 1
    height, width = struct.unpack(">HH", frame[5:9])
    before, after = (b"".join(some) for some in kept)
    return JpegHead(width, height, 8 * across, 8 * down, interval, colour, size, before, frame, after)  # fmt: skip


# --- where they lie -------------------------------------------------------------------------------


def rising(starts: NDArray[np.uint64], most_bytes: int) -> bool:
    """Whether starts rise, each leaving a code and a marker to the next and no more than `most_bytes`."""
    steps = starts[1:] - starts[:-1]  # unsigned: a fall comes out as far too long
    return not len(steps) or bool(steps.min() > _MARKER_BYTES and steps.max() <= most_bytes)


def sampled(count: int, most: int) -> list[int]:
    """At most `most` intervals of `count` to look at, spread evenly, the first apart: it has no marker."""
    return sorted({int(n) for n in np.linspace(1, count - 1, most)}) if count > 1 else []


def marker_of(interval: int) -> bytes:
    """The restart marker that stands before an interval: they count from 0 to 7 over and over."""
    return bytes((0xFF, _RST0 + (interval - 1) % 8))


def find_intervals(
    read: Callable[[int, int], bytes], first: int, stop: int, count: int, most_bytes: int
) -> NDArray[np.uint64] | None:
    """Starts of `count` intervals, the first at `first`, by reading all of a stream up to `stop`.

    None as soon as markers do not count up, are too many or too few, or are further apart than
    `most_bytes`: that is no such stream. In codes FF is followed by 0, so markers cannot be mistaken.
    """
    found, last = [np.asarray([first], np.uint64)], first
    number = 0  # of the next marker
    for begin in range(first, stop, SCAN_BLOCK_BYTES):
        end = min(stop, begin + SCAN_BLOCK_BYTES)
        spots, numbers = _markers(read(begin, min(stop, end + 1)))
        expected = np.arange(number, number + len(spots)) % 8
        number += len(spots)
        if number >= count or not np.array_equal(numbers, expected):
            return None
        if len(spots):
            found.append(np.uint64(begin + _MARKER_BYTES) + spots.astype(np.uint64))
            last = int(found[-1][-1])
        if end - last > most_bytes:
            return None
    starts = np.concatenate(found)
    return starts if len(starts) == count and rising(starts, most_bytes) else None


def _markers(data: bytes) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Where restart markers begin in some bytes, and their numbers."""
    values = np.frombuffer(data, np.uint8)
    spots = np.flatnonzero(values[:-1] == 0xFF)
    spots = spots[(values[spots + 1] & 0xF8) == _RST0]
    return spots, values[spots + 1] & 7
