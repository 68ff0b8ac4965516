"""Inflating what claims to be small."""

from __future__ import annotations

import zlib

from online_patching.decode.bad_tile import BadTileError


def inflate(data: bytes, wanted: int, gzip: bool = False, more: bool = False) -> bytes:
    """The bytes of a zlib (or gzip) stream, at most `wanted` of them; of one that holds `more`, its first."""
    engine = zlib.decompressobj(31 if gzip else 15)
    if more:
        return engine.decompress(data, wanted)
    out = engine.decompress(data, wanted + 1)
    if len(out) > wanted:
        raise BadTileError(f"it inflates to more than {wanted:,} bytes")
    return out
