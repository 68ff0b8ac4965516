"""JPEG tiles -> RGB: strict, with the colour space that the container says."""

from __future__ import annotations

import struct
from dataclasses import replace
from functools import lru_cache

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from online_patching.decode.bad_tile import BadTileError
from online_patching.slide_index import Codec

_APP0, _APP14, _SOS = 0xE0, 0xEE, 0xDA
_EOI_SEARCH_BYTES = 1024
_FRAMES = frozenset({0xC0, 0xC1})
# Progressive ones too: what they show while a scan is missing is a guess. DHT, JPG and DAC are no frames.
_OTHER_FRAMES = frozenset(range(0xC2, 0xD0)) - {0xC4, 0xC8, 0xCC}
# These have no length: to read one would leave libjpeg to see other segments than we do.
_BARE = frozenset({0x00, 0x01, 0xFF, *range(0xD0, 0xDA)})
_ADOBE_TRANSFORM = {"rgb": 0, "ycbcr": 1}


def decode(codec: Codec, data: bytes, width: int, height: int, scale: int = 1) -> NDArray[np.uint8]:
    """RGB pixels of one stream, or bare restart interval, decoded at 1/scale."""
    if codec.headless:
        data = codec.tables + data + b"\xff\xd9"
        codec = replace(codec, tables=b"", headless=False)
    stream = rebuild_jpeg(codec, data, width, height)
    # A truncated tile has lost its end marker; nothing inside a scan looks like one.
    if b"\xff\xd9" not in data[-_EOI_SEARCH_BYTES:]:
        raise BadTileError("it ends before its picture does")
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        stream, "RGB", min_height=height // scale, min_width=width // scale, strict=True
    )
    return pixels


def rebuild_jpeg(codec: Codec, data: bytes, width: int, height: int) -> bytes:
    """A complete JPEG stream whose colour space is what the container says.

    Tables are spliced in after SOI. JFIF and Adobe markers, and component ids, are what libjpeg
    guesses the colour space from, and scanners get them wrong (Aperio stores RGB without a word):
    the markers are replaced by one Adobe marker that says what the TIFF's photometric tag says.
    """
    if data[:2] != b"\xff\xd8":
        raise BadTileError("it is not a JPEG stream")
    pieces = [b"\xff\xd8"]
    if codec.tables:
        pieces.append(_only_tables(codec.tables))
    if codec.colour in _ADOBE_TRANSFORM:
        pieces.append(
            b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
            + bytes([_ADOBE_TRANSFORM[codec.colour]])
        )
    position = 2
    while True:
        marker, length = _segment(data, position)
        if marker in _OTHER_FRAMES:
            raise BadTileError(
                f"its frame is of a kind (SOF{marker - 0xC0}) that slides do not use"
            )
        if marker in _FRAMES:
            found = struct.unpack(">HH", data[position + 5 : position + 9])
            if found != (height, width):
                raise BadTileError(
                    f"its frame says {found[1]} x {found[0]} px, not {width} x {height}"
                )
            allowed = (1,) if codec.colour == "gray" else (1, 3)
            if data[position + 9] not in allowed:
                raise BadTileError(
                    f"it has {data[position + 9]} components, not {' or '.join(map(str, allowed))}"
                )
        if marker == _SOS:
            pieces.append(data[position:])
            return b"".join(pieces)
        if marker not in (_APP0, _APP14) or codec.colour == "gray":
            pieces.append(data[position : position + 2 + length])
        position += 2 + length


@lru_cache(maxsize=64)
def _only_tables(tables: bytes) -> bytes:
    """The segments of an abbreviated stream, without SOI and EOI; a frame among them is refused."""
    position = 2
    while position + 4 <= len(tables) - 2:
        marker, length = _segment(tables, position)
        if marker in _FRAMES | _OTHER_FRAMES or marker == _SOS:
            raise BadTileError("its JPEG tables hold a picture")
        position += 2 + length
    return tables[2:-2]


def _segment(data: bytes, position: int) -> tuple[int, int]:
    if position + 4 > len(data) or data[position] != 0xFF or data[position + 1] in _BARE:
        raise BadTileError("its JPEG header is damaged")
    length = (data[position + 2] << 8) | data[position + 3]
    if length < 2:
        raise BadTileError("its JPEG header is damaged")
    return data[position + 1], length
