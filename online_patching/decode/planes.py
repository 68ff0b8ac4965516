"""DICOM frames whose samples are stored plane by plane, run-length encoded, or as YCbCr -> RGB."""

from __future__ import annotations

import struct

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from online_patching.decode.bad_tile import BadTileError
from online_patching.decode.channels import three_channels, ycbcr_to_rgb
from online_patching.slide_index import Codec

_RLE_HEAD = struct.Struct("<16I")


def planes(codec: Codec, data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """Samples that are not compressed; `planar`: one plane after another (PlanarConfiguration 1)."""
    wanted = width * height * codec.samples
    if len(data) != wanted:
        raise BadTileError(f"it holds {len(data):,} bytes, not {wanted:,}")
    pixels = np.frombuffer(data, np.uint8)
    if codec.planar:
        pixels = pixels.reshape(codec.samples, height, width).transpose(1, 2, 0)
    return _rgb(codec, pixels.reshape(height, width, codec.samples))


def rle(codec: Codec, data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """DICOM's RLE (PS3.5 annex G): a header of 16 numbers, then each plane as runs of bytes."""
    if len(data) < _RLE_HEAD.size:
        raise BadTileError("its RLE header is cut short")
    count, *offsets = _RLE_HEAD.unpack_from(data)
    if count != codec.samples or count > len(offsets):
        raise BadTileError(f"it has {count} RLE segments, not {codec.samples}")
    bounds = [*offsets[:count], len(data)]
    if bounds[0] < _RLE_HEAD.size or sorted(bounds) != bounds:
        raise BadTileError("its RLE segments are not in order")
    out = np.empty((height, width, count), np.uint8)
    for number in range(count):
        segment = data[bounds[number] : bounds[number + 1]]
        found = bytes(imagecodecs.packbits_decode(segment, out=width * height))
        if len(found) != width * height:
            raise BadTileError(
                f"RLE segment {number} holds {len(found):,} bytes, not {width * height:,}"
            )
        out[:, :, number] = np.frombuffer(found, np.uint8).reshape(height, width)
    return _rgb(codec, out)


def _rgb(codec: Codec, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return ycbcr_to_rgb(pixels) if codec.colour == "ycbcr" else three_channels(pixels)
