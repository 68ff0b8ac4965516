"""Zarr chunks -> pixels: checksums and one compressor undone, then the axes put in order.

The portable way, and the oracle of native/_chunks.c, which decodes only what a patch needs.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

import google_crc32c
import imagecodecs
import numpy as np
from numpy.typing import NDArray

from online_patching.decode.bad_tile import BadTileError
from online_patching.slide_index import Codec

_CRC_BYTES = 4
_MAX_MEMBERS = 64

Buffer = Any  # bytes, or what decoders fill: memoryviews and arrays of bytes


def decode(codec: Codec, data: Buffer, width: int, height: int) -> NDArray[np.uint8]:
    """Channels of one chunk: its filters undone, last first."""
    filters = codec.filters
    stored = "cyx" if codec.planar else "yxc"
    if filters and filters[0].get("id") == "transpose":
        stored, filters = filters[0]["stored"], filters[1:]
    # What each filter was given: checksums add to it, a compressor's output has no size of its own.
    sizes = [width * height * codec.samples]
    for config in filters:
        sizes.append(sizes[-1] + _CRC_BYTES if _name(config) == "crc32c" else 0)
    for config, wanted in zip(reversed(filters), reversed(sizes[:-1]), strict=True):
        data = _undo(config, data, wanted)
    if len(data) != sizes[0]:
        raise BadTileError(f"its chunk holds {len(data):,} bytes, not {sizes[0]:,}")
    return _in_order(np.frombuffer(data, np.uint8), stored, width, height, codec.samples)


def _in_order(
    flat: NDArray[np.uint8], stored: str, width: int, height: int, samples: int
) -> NDArray[np.uint8]:
    """The first three channels as a view (height, width, channels)."""
    lengths = {"y": height, "x": width, "c": samples}
    axes = stored if "c" in stored else f"{stored}c"
    pixels = flat.reshape([lengths[axis] for axis in axes])
    return pixels.transpose([axes.index(axis) for axis in "yxc"])[:, :, :3]


def _name(config: dict[str, Any]) -> str:
    return str(config.get("id") or config.get("name"))


def _room(size: int) -> memoryview:
    return memoryview(np.empty(size, np.uint8))  # type: ignore[arg-type]


def _undo(config: dict[str, Any], data: Buffer, wanted: int) -> Buffer:
    """Undo one filter, refusing declared sizes larger than the chunk."""
    name = _name(config)
    if name == "crc32c":
        body, crc = data[:-_CRC_BYTES], int.from_bytes(data[-_CRC_BYTES:], "little")
        if len(data) < _CRC_BYTES or google_crc32c.value(bytes(body)) != crc:
            raise BadTileError("its chunk has another checksum (crc32c) than it says")
        return body
    if name == "blosc":
        check_blosc(data, wanted)
        return imagecodecs.blosc_decode(data, out=_room(wanted))
    if name == "zstd":
        return imagecodecs.zstd_decode(data, out=_room(wanted))
    if name in ("gzip", "zlib"):
        return _inflate(data, wanted, name == "gzip")
    raise BadTileError(f"codec {name!r} is not known")


def check_blosc(data: Buffer, wanted: int) -> None:
    """Refuse a Blosc 1 buffer that does not hold exactly `wanted` bytes in all of `data`."""
    if len(data) < 16:
        raise BadTileError("its blosc header is cut short")
    version, _, _, _, declared, block, size = struct.unpack("<BBBBIII", data[:16])
    if version != 2:
        raise BadTileError(f"it is in Blosc format {version}, not 2")
    if declared != wanted:
        raise BadTileError(f"its blosc header says {declared:,} bytes, not {wanted:,}")
    if size != len(data) or not 0 < block <= max(wanted, 1):
        raise BadTileError(
            f"its blosc header says {size:,} bytes in blocks of {block:,}; it has {len(data):,}"
        )


def _inflate(data: Buffer, wanted: int, gzip: bool) -> Buffer:
    """A zlib or gzip stream; libdeflate is nearly twice as fast as zlib, and reads one gzip member only."""
    decode = imagecodecs.gzip_decode if gzip else imagecodecs.deflate_decode
    try:
        out = decode(data, out=_room(wanted))
        if len(out) == wanted:
            return out
    except (RuntimeError, ValueError):
        pass
    return _members(data, wanted, 31 if gzip else 15)


def _members(data: Buffer, wanted: int, wbits: int) -> bytes:
    """What gzip members one after another hold together."""
    out = b""
    for _ in range(_MAX_MEMBERS):
        engine = zlib.decompressobj(wbits)
        out += engine.decompress(data, wanted + 1 - len(out))
        if len(out) > wanted:
            raise BadTileError(f"it inflates to more than {wanted:,} bytes")
        if not engine.eof:
            raise BadTileError("it ends before its data does")
        data = engine.unused_data
        if wbits == 15 or not bytes(data).strip(b"\0"):
            break
    return out
