"""JPEG 2000 tiles -> RGB."""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from online_patching.decode.bad_tile import BadTileError
from online_patching.decode.channels import three_channels, ycbcr_to_rgb
from online_patching.slide_index import Codec


def decode(codec: Codec, data: bytes, width: int, height: int, scale: int = 1) -> NDArray[np.uint8]:
    """RGB pixels of one codestream."""
    if scale != 1:
        raise BadTileError(f"it is not decoded at 1/{scale}")
    # SIZ is the first segment of a codestream (ISO 15444-1 A.5.1). Exactly these bytes are decoded, so
    # that the size checked is the size allocated.
    data = _codestream(data)
    if data[:4] != b"\xff\x4f\xff\x51" or len(data) < 24:
        raise BadTileError("it is not a JPEG 2000 codestream")
    right, bottom, left, top = struct.unpack(">IIII", data[8:24])
    if (right - left, bottom - top) != (width, height):
        raise BadTileError(
            f"its frame says {right - left} x {bottom - top} px, not {width} x {height}"
        )
    pixels = imagecodecs.jpeg2k_decode(data)
    if codec.colour == "ycbcr":
        return ycbcr_to_rgb(pixels)
    return three_channels(pixels)


def _codestream(data: bytes) -> bytes:
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
    raise BadTileError("it is a JP2 file without a codestream")
