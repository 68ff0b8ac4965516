"""Tiles whose samples are stored as they are, or packed without loss: raw, Deflate, LZW, Zstandard."""

from __future__ import annotations

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from online_patching.decode.bad_tile import BadTileError
from online_patching.decode.channels import three_channels
from online_patching.decode.inflate import inflate
from online_patching.slide_index import Codec


def raw(codec: Codec, data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """Stored bytes, after the predictor."""
    wanted = width * height * codec.samples
    if len(data) != wanted:
        raise BadTileError(f"it holds {len(data):,} bytes, not {wanted:,}")
    pixels = np.frombuffer(data, np.uint8).reshape(height, width, codec.samples)
    if codec.predictor == 2:
        pixels = np.cumsum(pixels, axis=1, dtype=np.uint8)
    return three_channels(pixels)


def deflate(codec: Codec, data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """Adobe's and PKZIP's deflate."""
    return raw(codec, inflate(data, width * height * codec.samples), width, height)


def lzw(codec: Codec, data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """LZW as TIFF has it."""
    wanted = width * height * codec.samples
    return raw(codec, bytes(imagecodecs.lzw_decode(data, out=wanted + 1)), width, height)


def zstd(codec: Codec, data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """Zstandard."""
    wanted = width * height * codec.samples
    return raw(codec, bytes(imagecodecs.zstd_decode(data, out=wanted)), width, height)
