"""What a JPEG 2000 codestream says of itself, read and checked before a decoder sees it.

ISO 15444-1 annex A. The decoder's memory and time follow from these numbers, so each is bounded; and a
stream whose tile-parts do not end where they say was cut.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

_SOC_SIZ = b"\xff\x4f\xff\x51"
_EOC = b"\xff\xd9"
_COD, _COC, _SOT, _SOD, _POC, _PPM, _PPT = 0x52, 0x53, 0x90, 0x93, 0x5F, 0x60, 0x61
_MAX_TILES = 64
"""Scanners store a slide's tile as one tile of the codestream; a decoder takes kilobytes for each."""
_MAX_PARTS = 1024
_MAX_PRECINCTS = 2**16
_MAX_PACKETS = 2**20
_MAX_LEVELS = 32
_SUBSAMPLING = (1, 2, 4)


class BadStreamError(Exception):
    """Why a codestream must not be decoded; the caller adds whose it is."""


@dataclass(frozen=True, slots=True)
class Frame:
    """A codestream's header: its size, how each component is subsampled (across, down), how often all of
    it can be halved, whether its colours were transformed (the decoder undoes that), and the largest side of
    a code block, the least that a decoder can decode."""

    width: int
    height: int
    subsampling: tuple[tuple[int, int], ...]
    reductions: int
    transformed: bool
    block_px: int

    @property
    def components(self) -> int:
        """How many components there are."""
        return len(self.subsampling)


def codestream_of(data: bytes) -> bytes:
    """The codestream of a JP2 file (its jp2c box, ISO 15444-1 I.4), or the data when it is one."""
    if data[4:8] != b"jP  ":
        return data
    position = 0
    while position + 16 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        head = 16 if length == 1 else 8
        if kind == b"jp2c":
            return data[position + head :]
        if length == 1:
            (length,) = struct.unpack(">Q", data[position + 8 : position + 16])
        if length < head:
            break
        position += length
    raise BadStreamError("it is a JP2 file without a codestream")


def read_frame(data: bytes) -> Frame:
    """The Frame of a codestream (its first kilobytes are enough); BadStreamError when it must not be decoded."""
    if data[:4] != _SOC_SIZ or len(data) < 42:
        raise BadStreamError("it is not a JPEG 2000 codestream")
    return _frame(data)[0]


def check_complete(data: bytes) -> Frame:
    """The Frame of a whole codestream, of which nothing is missing at the end."""
    if data[:4] != _SOC_SIZ or len(data) < 42:
        raise BadStreamError("it is not a JPEG 2000 codestream")
    frame, tiles, position = _frame(data)
    seen: set[int] = set()
    for _ in range(_MAX_PARTS):
        if data[position : position + 2] == _EOC:
            if len(seen) != tiles:
                raise BadStreamError(f"it holds {len(seen)} of its {tiles} tiles")
            return frame
        number, position = _tile_part(data, position)
        if number >= tiles:
            raise BadStreamError(f"it names a tile {number} of {tiles}")
        seen.add(number)
    raise BadStreamError(f"it is in more than {_MAX_PARTS} parts")


def _frame(data: bytes) -> tuple[Frame, int, int]:
    """The frame, how many tiles it is stored in, and where the first tile-part begins."""
    length, _, right, bottom, left, top, tw, th, tx, ty, count = struct.unpack(
        ">HHIIIIIIIIH", data[4:42]
    )
    if (left, top, tx, ty) != (0, 0, 0, 0):
        raise BadStreamError(f"its frame begins at ({left}, {top}), its tiles at ({tx}, {ty})")
    if not (right and bottom and tw and th):
        raise BadStreamError("its frame is empty")
    tiles = -(-right // tw) * -(-bottom // th)
    if tiles > _MAX_TILES:
        raise BadStreamError(f"it is stored in {tiles} tiles of its own, more than {_MAX_TILES}")
    if count not in (1, 3, 4) or length != 38 + 3 * count or len(data) < 42 + 3 * count:
        raise BadStreamError(f"it has {count} components, not 1, 3 or 4")
    parts = [tuple(data[at : at + 3]) for at in range(42, 42 + 3 * count, 3)]
    if any(depth != 7 for depth, _, _ in parts):
        raise BadStreamError("its samples are not of 8 bits without sign")
    if any(x not in _SUBSAMPLING or y not in _SUBSAMPLING for _, x, y in parts):
        raise BadStreamError("its components are subsampled by other than 1, 2 or 4")
    style = _Style((right, bottom), count, tiles)
    position = 4 + length
    while True:
        marker, size = _segment(data, position)
        if marker == _SOT:
            break
        if marker in (_POC, _PPM):
            raise BadStreamError("its packets are in an order, or place, of their own")
        if marker in (_COD, _COC):
            style.read(marker, data[position + 4 : position + 2 + size])
        position += 2 + size
    sampling = tuple((x, y) for _, x, y in parts)
    frame = Frame(right, bottom, sampling, style.reductions, style.mct, style.block_px)
    return frame, tiles, position


class _Style:
    """The coding style markers, and what they would have a decoder allocate and loop over."""

    def __init__(self, size_px: tuple[int, int], components: int, tiles: int) -> None:
        self.size_px, self.components, self.tiles = size_px, components, tiles
        self._layers, self._levels, self._precincts = 0, _MAX_LEVELS + 1, 0
        self.mct, self.block_px = False, 4

    @property
    def reductions(self) -> int:
        """How often all components can be halved."""
        if not self._layers:
            raise BadStreamError("it does not say how it is coded")
        return self._levels

    def read(self, marker: int, body: bytes) -> None:
        """Take in one COD or COC segment (without marker and length)."""
        if marker == _COD:
            if len(body) < 10:
                raise BadStreamError("its coding style is damaged")
            _, self._layers, mct = struct.unpack(">BHB", body[1:5])
            self.mct = mct == 1
            flags, style, times = body[0], body[5:], self.components
        else:
            if len(body) < 7:
                raise BadStreamError("its coding style is damaged")
            flags, style, times = body[1], body[2:], 1
        levels = style[0]
        if levels > _MAX_LEVELS or style[1] > 8 or style[2] > 8 or style[1] + style[2] > 8:
            raise BadStreamError(f"it claims {levels} levels of blocks 2^({style[1:3].hex()})")
        sizes = style[5:] if flags & 1 else b"\xff" * (levels + 1)
        if len(sizes) < levels + 1:
            raise BadStreamError("its coding style is damaged")
        self._levels = min(self._levels, levels)
        self.block_px = max(self.block_px, 4 << max(style[1], style[2]))
        self._precincts += times * self._count(levels, sizes)
        if (
            self._precincts > _MAX_PRECINCTS
            or self._precincts * max(1, self._layers) > _MAX_PACKETS
        ):
            raise BadStreamError(f"it claims {self._precincts} precincts in {self._layers} layers")

    def _count(self, levels: int, sizes: bytes) -> int:
        """Precincts of one component, none of which crosses a tile."""
        total = 0
        for number in range(levels + 1):
            across, down = (-(-side >> (levels - number)) for side in self.size_px)
            wide, high = sizes[number] & 15, sizes[number] >> 4
            total += (-(-across >> wide) + 1) * (-(-down >> high) + 1)
        return total + self.tiles * (levels + 1)


def _tile_part(data: bytes, position: int) -> tuple[int, int]:
    """The tile that a tile-part belongs to, and where the next one begins."""
    marker, size = _segment(data, position)
    if marker != _SOT or size != 10:
        raise BadStreamError("it ends before its picture does")
    number, length = struct.unpack(">HI", data[position + 4 : position + 10])
    stop = position + length if length else data.rfind(_EOC)
    at = position + 12
    while True:
        marker, size = _segment(data, at) if data[at : at + 2] != b"\xff\x93" else (_SOD, 0)
        if marker == _SOD:
            break
        if marker in (_COD, _COC, _POC, _PPT):
            raise BadStreamError("a tile of its own is coded otherwise than the rest")
        at += 2 + size
    if not at + 2 <= stop <= len(data) - 2:
        raise BadStreamError("it ends before its picture does")
    return number, stop


def _segment(data: bytes, position: int) -> tuple[int, int]:
    """A marker and the length that follows it."""
    if position + 4 > len(data):
        raise BadStreamError("it ends before its picture does")
    first, marker, size = struct.unpack(">BBH", data[position : position + 4])
    if first != 0xFF or size < 2:
        raise BadStreamError("its JPEG 2000 header is damaged")
    return marker, size
