"""Hostile Zarr stores by the million: whatever they say, indexing ends soon, small, and by name.

    python benchmarks/fuzz_zarr.py [--inputs 1000000] [--workers 1] [--state FILE] [--out FILE]
    python benchmarks/fuzz_zarr.py --only 123456                     # one input again, with its traceback

Each input is a store of hostile metadata documents, shard tables, chunks or sizes
(online_patching.testing.hostile_zarr), read by formats.zarr.read_index: no part of it is skipped, and zarr-python
is not in the way. Of what is accepted every tile must lie inside one object, and a chunk is decoded, all of it and
a box of it, natively too where that decoder is built: both must give the same pixels. Findings and limits are
those of fuzz_tiff.py, whose machinery this is; the limit of memory is what the largest slide that is accepted
needs (2,097,152 chunks in shards).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import fuzz_tiff
import numpy as np

from online_patching.decode import BadTileError, decode_tile
from online_patching.errors import ObjectNotFoundError
from online_patching.formats import zarr
from online_patching.formats.vendors import Mpp
from online_patching.geometry import Box
from online_patching.slide_index import Level, SlideIndex
from online_patching.testing.hostile_zarr import (
    URI,
    HostileZarr,
    ZarrSeed,
    ZarrStores,
    hostile_zarrs,
    zarr_seeds,
)

_DECODED_BYTES = 2**22
_MOST_REQUESTS = 200
_MPP = Mpp.override(0.5)


def try_zarr(store: HostileZarr) -> str:
    """Index the store; check where its tiles lie; decode a chunk."""
    stores = ZarrStores(store)
    counted = 0
    try:
        index = zarr.read_index(URI, "hostile", _MPP, stores)
    finally:
        # Shards are asked for one by one; their number is bounded, and refused before.
        counted = stores.requests
        assert counted <= 3 * 2**16 + _MOST_REQUESTS, f"{counted} requests"
    check(index, stores)
    level = index.levels[0]
    size = level.tile_width_px * level.tile_height_px * level.codec.samples
    if size > _DECODED_BYTES:
        return "indexed"
    return decode_one(index, level, stores)


def check(index: SlideIndex, stores: ZarrStores) -> None:
    """Every tile lies in one object; names stay inside the store; the index can be saved and loaded."""
    for level in index.levels:
        if level.keys is not None:
            assert ".." not in level.keys.prefix and not level.keys.prefix.startswith("/")
            continue
        assert level.rows is not None and len(level.rows) == level.n_tiles * level.parts
        for piece in {0, len(level.rows) // 2, len(level.rows) - 1}:
            start, stop = level.byte_range(piece)
            if start < stop:
                index.locate(start, stop)
    if index.n_tiles < 10_000 and stores.requests % 4 == 0:  # as good as always, and quicker
        assert SlideIndex.from_bytes(*index.to_bytes()) == index


def decode_one(index: SlideIndex, level: Level, stores: ZarrStores) -> str:
    """The first chunk, whole and a box of it."""
    try:
        if level.keys is not None:
            key = f"{URI}/{level.keys.key(0, 0, 0)}"
            if stores.version(key)[0] > 2 * _DECODED_BYTES:
                return "indexed"
            body = stores.read(key, 0, None)
        else:
            start, stop = level.byte_range(0)
            if start == stop:
                return "indexed"
            key, start, stop, token = index.locate(start, stop)
            body = stores.read(key, start, stop, token)
    except ObjectNotFoundError:
        return "indexed"
    width, height = level.tile_width_px, level.tile_height_px
    box = Box(width // 3, height // 4, max(width // 3 + 1, width // 2), height // 4 + 1)
    whole = attempt(level, body, None)
    part = attempt(level, body, box)
    if whole is None:
        return "indexed, its first chunk refused"
    assert whole.shape[:2] == (height, width)
    assert part is not None, "a part of a sound chunk is refused"
    assert (whole[box.top : box.bottom, box.left : box.right] == part).all(), "parts differ"
    return "indexed, its first chunk decoded"


def attempt(level: Level, body: bytes, box: Box | None) -> np.ndarray | None:
    """Decoded pixels, or None where they are refused."""
    try:
        return decode_tile(level.codec, body, level.tile_width_px, level.tile_height_px, box=box)
    except BadTileError as error:
        if "MemoryError" in str(error):  # the decoder's own catch-all must not hide it
            raise MemoryError("a chunk took all memory") from None
        return None


def _stores(
    seeds: Sequence[ZarrSeed], numbers: Sequence[int], seed: int = 0
) -> Iterator[HostileZarr]:
    return hostile_zarrs(seeds, numbers, seed)


machinery: Any = fuzz_tiff
machinery.hostile = SimpleNamespace(hostile_files=_stores)
machinery.TARGETS = {"zarr": (zarr_seeds, try_zarr)}
machinery.CHUNK = 42_000  # starting a child costs seconds: its seeds are written by zarr-python
machinery.LIMITS_BYTES = {"zarr": 192 * 2**20}

if __name__ == "__main__":
    fuzz_tiff.main()
