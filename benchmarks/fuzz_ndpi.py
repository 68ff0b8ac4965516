"""Hostile NDPI files by the million: whatever a file says, indexing ends soon, small, and by name.

    python benchmarks/fuzz_ndpi.py [--inputs 1000000] [--workers 1] [--state FILE] [--out FILE]
    python benchmarks/fuzz_ndpi.py --only 123456                     # one input again, with its traceback

Files are those of online_patching.testing.hostile_ndpi, changed by number; they enter where every TIFF does
(formats.tiff.read_index). Of what is accepted every tile must lie inside the file, and the first, the middle and
the last tile of every level are decoded. Findings and limits are those of fuzz_tiff.py, whose machinery this is;
the limit of memory is what the largest slide that is accepted needs (8,388,608 intervals).
"""

from __future__ import annotations

import fuzz_tiff
import numpy as np

from online_patching.decode import BadTileError, decode_tile
from online_patching.formats import tiff
from online_patching.slide_index import Level, SlideIndex
from online_patching.testing.hostile import HostileFile, HostileStores, Seed
from online_patching.testing.hostile_ndpi import ndpi_bombs, ndpi_seeds

_DECODED_PX = 2**20
_MOST_REQUESTS = 1024
"""16 levels of 35 requests each, directories and tables; streams that are read for their markers besides."""


def try_ndpi(file: HostileFile) -> str:
    """Index it; check where its tiles lie; decode three of every level."""
    stores = HostileStores(file)
    try:
        index = tiff.read_index("hostile.ndpi", "hostile", None, stores, file.size_bytes, "")
    finally:
        assert stores.requests <= _MOST_REQUESTS, f"{stores.requests} requests"
    if index is None:
        return "for a fallback reader"
    check_ranges(index, file.size_bytes)
    decoded = 0
    for level in index.levels:
        for tile in {0, level.n_tiles // 2, level.n_tiles - 1}:
            decoded += _decodes(level, file, tile)
    return f"{index.container}: indexed, {'some' if decoded else 'none'} of the tiles tried decoded"


def check_ranges(index: SlideIndex, size_bytes: int) -> None:
    """Every tile lies inside the file, behind the one before."""
    for level in index.levels:
        assert level.rows is not None and len(level.rows) == level.n_tiles
        lengths = (level.rows & np.uint64(0xFFFFFF)).astype(np.int64)
        starts = (level.rows >> np.uint64(24)).astype(np.int64)
        assert all(a >= 0 and a + n <= size_bytes for a, n in level.overflow)
        small = lengths != 0xFFFFFF
        assert np.all(starts[small] + lengths[small] <= size_bytes)
        assert np.all(starts[~small] < len(level.overflow))
        if level.codec.headless and small.all():
            assert np.all(np.diff(starts) > 0) and np.all(lengths >= 0)


def _decodes(level: Level, file: HostileFile, tile: int) -> bool:
    start, stop = level.byte_range(tile)
    if start == stop or level.tile_width_px * level.tile_height_px > _DECODED_PX:
        return False
    data = file.read(start, stop)
    try:
        pixels = decode_tile(level.codec, data, level.tile_width_px, level.tile_height_px)
    except BadTileError as error:
        if "MemoryError" in str(error):  # the decoder's own catch-all must not hide it
            raise MemoryError("a tile's frame took all memory") from None
        return False
    assert pixels.shape == (level.tile_height_px, level.tile_width_px, 3)
    return True


def seeds() -> list[Seed]:
    """Valid files of every kind, and a few bombs."""
    return [*ndpi_seeds()] * 600 + ndpi_bombs()


fuzz_tiff.TARGETS = {"ndpi": (seeds, try_ndpi)}
fuzz_tiff.LIMITS_BYTES = {"ndpi": 256 * 2**20}

if __name__ == "__main__":
    fuzz_tiff.main()
