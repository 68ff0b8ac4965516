"""Zarr chunks -> pixels."""

from __future__ import annotations

import struct
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from online_patching.decode.bad_tile import BadTileError
from online_patching.decode.inflate import inflate
from online_patching.slide_index import Codec


def decode(codec: Codec, data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    """Channels of one chunk: its filters undone, last first."""
    wanted = width * height * codec.samples
    for config in reversed(codec.filters):
        data = _undo(config, data, wanted)
    if len(data) != wanted:
        raise BadTileError(f"its chunk holds {len(data):,} bytes, not {wanted:,}")
    flat = np.frombuffer(data, np.uint8)
    if codec.planar:  # stored as (channel, y, x)
        pixels = np.reshape(flat, (codec.samples, height, width)).transpose(1, 2, 0)
    else:
        pixels = np.reshape(flat, (height, width, codec.samples))
    return pixels[:, :, :3]


def _undo(config: dict[str, Any], data: bytes, wanted: int) -> bytes:
    """Undo one Zarr compressor, refusing declared sizes larger than the chunk."""
    name = config.get("id") or config.get("name")
    if name == "blosc":
        declared = struct.unpack("<I", data[4:8])[0] if len(data) >= 16 else -1
        if declared != wanted:
            raise BadTileError(f"its blosc header says {declared:,} bytes, not {wanted:,}")
        return bytes(imagecodecs.blosc_decode(data))
    if name == "zstd":
        return bytes(imagecodecs.zstd_decode(data, out=wanted))
    if name == "zlib":
        return inflate(data, wanted)
    if name == "gzip":
        return inflate(data, wanted, gzip=True)
    raise BadTileError(f"codec {name!r} is not known")
