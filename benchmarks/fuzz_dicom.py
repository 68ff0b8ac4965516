"""Hostile DICOM series by the million: whatever a file says, indexing ends soon, small, and by name.

    python benchmarks/fuzz_dicom.py [--inputs 1000000] [--workers 1] [--state FILE] [--out FILE]
    python benchmarks/fuzz_dicom.py --only 123456                    # one input again, with its traceback

Each input is a folder of one hostile file (online_patching.testing.hostile_dicom) and its sound siblings, read by
formats.dicom.read_index. Of what is accepted every tile must lie inside one object, and the first stored tile
is decoded. Findings and limits are those of fuzz_tiff.py, whose machinery this is; the limit of memory is
what the largest slide that is accepted needs (2,097,152 frames).
"""

from __future__ import annotations

import fuzz_tiff
import numpy as np

from online_patching.decode import BadTileError, decode_tile
from online_patching.formats import dicom
from online_patching.slide_index import SlideIndex
from online_patching.testing.hostile import HostileFile, Seed
from online_patching.testing.hostile_dicom import (
    FOLDER,
    HostileSeries,
    dicom_bombs,
    dicom_seeds,
    siblings,
)

_DECODED_PX = 2**20
_MOST_REQUESTS = 256
_FRAMES = 2**21


def try_dicom(file: HostileFile) -> str:
    """Index the series; check where its tiles lie; decode the first that is stored."""
    stores = HostileSeries(file, siblings(file.kind.partition(": ")[2]))
    try:
        index = dicom.read_index(FOLDER, "hostile", None, stores)
    finally:
        assert stores.requests <= _MOST_REQUESTS, f"{stores.requests} requests"
    if index is None:
        return "not DICOM"
    check_ranges(index)
    level = index.levels[0]
    assert level.rows is not None
    stored = np.flatnonzero(level.rows)
    if not len(stored) or level.tile_width_px * level.tile_height_px > _DECODED_PX:
        return "indexed"
    key, start, stop, _ = index.locate(*level.byte_range(int(stored[0])))
    try:
        pixels = decode_tile(
            level.codec, stores.read(key, start, stop), level.tile_width_px, level.tile_height_px
        )
    except BadTileError as error:
        if "MemoryError" in str(error):  # the decoder's own catch-all must not hide it
            raise MemoryError("a tile's frame took all memory") from None
        return "indexed, its first tile refused"
    assert pixels.shape == (level.tile_height_px, level.tile_width_px, 3)
    return "indexed, its first tile decoded"


def check_ranges(index: SlideIndex) -> None:
    """Every stored tile lies inside one of the objects."""
    bounds = index.object_starts
    for level in index.levels:
        assert level.rows is not None and len(level.rows) == level.n_tiles
        length = (level.rows & np.uint64(0xFFFFFF)).astype(np.int64)
        starts = (level.rows >> np.uint64(24)).astype(np.int64)
        large = length == 0xFFFFFF
        for number in starts[large]:
            assert index.locate(*_end(level.overflow[int(number)]))
        starts, length = starts[~large & (length > 0)], length[~large & (length > 0)]
        owner = np.searchsorted(bounds, starts, side="right") - 1
        assert np.all((owner >= 0) & (owner < len(index.objects)))
        assert np.all(starts + length <= bounds[owner + 1])


def _end(stored: tuple[int, int]) -> tuple[int, int]:
    return stored[0], stored[0] + stored[1]


def seeds() -> list[Seed]:
    """Valid files of every kind, and a few bombs."""
    return [*dicom_seeds()] * 60 + dicom_bombs()


fuzz_tiff.TARGETS = {"dicom": (seeds, try_dicom)}
fuzz_tiff.LIMITS_BYTES = {"dicom": 256 * 2**20}
fuzz_tiff.CHUNK = 60_000

if __name__ == "__main__":
    fuzz_tiff.main()
