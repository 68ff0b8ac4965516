"""Tiles whose samples are stored as they are, or packed without loss; and WebP.

Raw, Deflate, LZW, PackBits and Zstandard, with TIFF's horizontal predictor. Of a part of a tile, only
its rows are unpacked where that saves work: raw, PackBits not at all costly, LZW down to the last row wanted,
Deflate by zlib when that is less than half of the tile (libdeflate, which is twice as fast, knows no half).
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from online_patching.decode.bad_tile import BadTileError
from online_patching.decode.channels import over_white, three_channels
from online_patching.decode.inflate import inflate
from online_patching.geometry import Box
from online_patching.slide_index import Codec

_VP8X_ANIMATED = 2


def raw(
    codec: Codec, data: bytes, width: int, height: int, scale: int = 1, box: Box | None = None
) -> NDArray[np.uint8]:
    """Stored bytes, after the predictor."""
    wanted = width * height * codec.samples
    if len(data) != wanted:
        raise BadTileError(f"it holds {len(data):,} bytes, not {wanted:,}")
    return _pixels(codec, data, width, height, box)


def deflate(
    codec: Codec, data: bytes, width: int, height: int, scale: int = 1, box: Box | None = None
) -> NDArray[np.uint8]:
    """Adobe's and PKZIP's deflate."""
    return _unpacked(_inflated, codec, data, width, height, box)


def lzw(
    codec: Codec, data: bytes, width: int, height: int, scale: int = 1, box: Box | None = None
) -> NDArray[np.uint8]:
    """LZW as TIFF has it."""
    return _unpacked(_lzw, codec, data, width, height, box)


def packbits(
    codec: Codec, data: bytes, width: int, height: int, scale: int = 1, box: Box | None = None
) -> NDArray[np.uint8]:
    """Apple's runs of bytes (TIFF 6.0 section 9)."""
    return _unpacked(_packbits, codec, data, width, height, box)


def zstd(
    codec: Codec, data: bytes, width: int, height: int, scale: int = 1, box: Box | None = None
) -> NDArray[np.uint8]:
    """Zstandard."""
    return _unpacked(_zstd, codec, data, width, height, box)


def webp(codec: Codec, data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """WebP, lossy or lossless: always RGB, whatever the container's tags say."""
    found = _webp_size(data)
    if found != (width, height):
        raise BadTileError(f"its frame says {found[0]} x {found[1]} px, not {width} x {height}")
    pixels = np.asarray(imagecodecs.webp_decode(data))
    return over_white(pixels) if pixels.shape[2] == 4 else pixels


def _unpacked(
    unpack: Callable[[bytes, int, int], bytes],
    codec: Codec,
    data: bytes,
    width: int,
    height: int,
    box: Box | None,
) -> NDArray[np.uint8]:
    """Pixels out of what `unpack(data, least, most)` gives: at least that many bytes of the tile's."""
    row = width * codec.samples
    least = row * (height if box is None else box.bottom)
    found = unpack(data, least, row * height)
    if len(found) < least:
        raise BadTileError(f"it holds {len(found):,} bytes, not {row * height:,}")
    return _pixels(codec, found, width, height, box)


def _inflated(data: bytes, least: int, most: int) -> bytes:
    if 2 * least <= most:
        return inflate(data, least, more=True)
    return bytes(imagecodecs.deflate_decode(data, out=most))


def _lzw(data: bytes, least: int, most: int) -> bytes:
    found = bytes(imagecodecs.lzw_decode(data, out=least if least < most else most + 1))
    if len(found) > most:
        raise BadTileError(f"it unpacks to more than {most:,} bytes")
    return found


def _packbits(data: bytes, least: int, most: int) -> bytes:
    return bytes(imagecodecs.packbits_decode(data, out=most))


def _zstd(data: bytes, least: int, most: int) -> bytes:
    return bytes(imagecodecs.zstd_decode(data, out=most))


def _pixels(
    codec: Codec, data: bytes, width: int, height: int, box: Box | None
) -> NDArray[np.uint8]:
    """Channels of unpacked rows: three, or the one that a plane of its own holds."""
    box = box or Box(0, 0, width, height)
    row = width * codec.samples
    first, stop = box.top * row, box.bottom * row
    pixels = np.frombuffer(data, np.uint8, stop - first, first)
    pixels = pixels.reshape(box.height, width, codec.samples)[:, : box.right]
    if codec.predictor == 2:
        pixels = np.asarray(imagecodecs.delta_decode(pixels, axis=1))
    pixels = pixels[:, box.left :]
    if codec.planar:
        return pixels
    return over_white(pixels) if codec.samples == 4 else three_channels(pixels)


def _webp_size(data: bytes) -> tuple[int, int]:
    """The size in a WebP file's first chunk (RFC 9649)."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        raise BadTileError("it is not a WebP picture")
    kind = data[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind != b"VP8X" or data[20] & _VP8X_ANIMATED:
        raise BadTileError("it is not a single WebP picture")
    return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
