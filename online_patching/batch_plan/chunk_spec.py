"""What the native decoder must know of a Zarr chunk, or of a TIFF tile packed like one, in the form that it reads."""

from __future__ import annotations

import struct

from online_patching.slide_index import Codec

_COMPRESSORS = {"blosc": 1, "zstd": 2, "gzip": 3, "zlib": 4}
_LIKE_CHUNKS = {"raw": 0, "zstd": 2, "deflate": 4}
"""TIFF's and DICOM's ways of storing RGB that are those of a chunk (y, x, c), unless there is a predictor."""


def native_spec(codec: Codec) -> bytes | None:
    """The description of a chunk codec for the native decoder; None where only the portable one knows it.

    12 bytes: the axes y, x and c from the slowest to the fastest (c left out of a single channel), the
    compressor's number, how many checksums are inside and around it, the channels held.
    """
    if codec.kind != "chunk":
        plain = (codec.colour, codec.samples, codec.predictor) == ("rgb", 3, 1) and not codec.planar
        number = _LIKE_CHUNKS.get(codec.kind) if plain else None
        return None if number is None else struct.pack("<4sBBBxi", b"yxc", number, 0, 0, 3)
    filters = list(codec.filters)
    order = "cyx" if codec.planar else "yxc"
    if filters and filters[0].get("id") == "transpose":
        order = filters.pop(0)["stored"]
    names = [str(one.get("id")) for one in filters]
    packed = [name for name in names if name != "crc32c"]
    if len(packed) > 1 or not set(packed) <= set(_COMPRESSORS) or len(names) > 8:
        return None
    inner = names.index(packed[0]) if packed else 0
    outer = len(names) - inner - len(packed)
    number = _COMPRESSORS[packed[0]] if packed else 0
    return struct.pack("<4sBBBxi", order.encode(), number, inner, outer, codec.samples)
