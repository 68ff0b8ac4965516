"""Zarr chunks -> pixels: checksums and one compressor undone, then the axes put in order.

Only as much is decoded as a box needs: Blosc's blocks that it touches, streams up to its last row (partial.py).
Pixels are views of the decoded bytes, in whatever order these are.
"""

from __future__ import annotations

import struct
from math import prod
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from online_patching.decode import partial
from online_patching.decode.bad_tile import BadTileError
from online_patching.geometry import Box
from online_patching.slide_index import Codec

_CRC_BYTES = 4

Buffer = Any  # bytes, or what decoders fill: memoryviews and arrays of bytes


def decode(codec: Codec, data: Buffer, width: int, height: int) -> NDArray[np.uint8]:
    """Channels of one chunk: its filters undone, last first."""
    whole = Box(0, 0, width, height)
    return decode_box(codec, data, width, height, 1, whole)


def decode_box(
    codec: Codec, data: Buffer, width: int, height: int, _scale: int, box: Box
) -> NDArray[np.uint8]:
    """Channels of a box of one chunk, decoding as little else as its compressor allows."""
    filters = codec.filters
    stored = "cyx" if codec.planar else "yxc"
    if filters and filters[0].get("id") == "transpose":
        stored, filters = filters[0]["stored"], filters[1:]
    lengths = {"y": height, "x": width, "c": codec.samples}
    # What each filter was given: checksums add to it, a compressor's output has no size of its own.
    sizes = [width * height * codec.samples]
    for config in filters:
        sizes.append(sizes[-1] + _CRC_BYTES if _name(config) == "crc32c" else 0)
    spans = _spans(stored, lengths, box)
    for config, wanted in zip(reversed(filters), reversed(sizes[:-1]), strict=True):
        # A checksum inside a compressor is of everything.
        data = _undo(config, data, wanted, spans if wanted == sizes[0] else [(0, wanted)])
    if len(data) != sizes[0]:
        raise BadTileError(f"its chunk holds {len(data):,} bytes, not {sizes[0]:,}")
    pixels = _in_order(np.frombuffer(data, np.uint8), stored, lengths)
    return pixels[box.top : box.bottom, box.left : box.right]


Span = tuple[int, int]


def _spans(stored: str, lengths: dict[str, int], box: Box) -> list[Span]:
    """Stretches of a decoded chunk that hold a box: whole rows of it, of each of three channels where they
    are stored one after another."""
    wanted = {"y": (box.top, box.bottom), "x": (box.left, box.right)}
    if stored[0] != "c":
        step = prod(lengths[axis] for axis in (stored if "c" in stored else f"{stored}c")[1:])
        first, stop = wanted[stored[0]]
        return [(first * step, stop * step)]
    first, stop = wanted[stored[1]]
    step, plane = lengths[stored[2]], lengths["x"] * lengths["y"]
    channels = range(min(3, lengths["c"]))
    return [(c * plane + first * step, c * plane + stop * step) for c in channels]


def _in_order(flat: NDArray[np.uint8], stored: str, lengths: dict[str, int]) -> NDArray[np.uint8]:
    """The first three channels as a view (height, width, channels)."""
    axes = stored if "c" in stored else f"{stored}c"
    pixels = flat.reshape([lengths[axis] for axis in axes])
    return pixels.transpose([axes.index(axis) for axis in "yxc"])[:, :, :3]


def _name(config: dict[str, Any]) -> str:
    return str(config.get("id") or config.get("name"))


def _undo(config: dict[str, Any], data: Buffer, wanted: int, spans: list[Span]) -> Buffer:
    """Undo one filter, refusing declared sizes larger than the chunk; only `spans` need be right."""
    name = _name(config)
    if name == "crc32c":
        body, crc = data[:-_CRC_BYTES], int.from_bytes(data[-_CRC_BYTES:], "little")
        if len(data) < _CRC_BYTES or google_crc32c.value(bytes(body)) != crc:
            raise BadTileError("its chunk has another checksum (crc32c) than it says")
        return body
    if name == "blosc":
        check_blosc(data, wanted)
        return partial.blosc(data, wanted, spans)
    if name == "zstd":
        return partial.zstd(data, wanted, spans[-1][1])
    if name in ("gzip", "zlib"):
        return partial.inflate(data, wanted, spans[-1][1], name == "gzip")
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
