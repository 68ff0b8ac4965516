"""The native decoder: JPEG tiles -> patches, many in one call without the GIL.

`read(plan arrays)` preads tiles (or takes their bytes), decodes only the rows and columns needed, pastes
and resamples them into the batch. Its pixels are those of the portable decoder (decode.py, resample.py),
bit for bit; the tests compare them.

The extension is optional. It is compiled without libjpeg-turbo and finds one when it is imported: the one
inside our own wheel, else the one that Pillow ships, else the system's. `AVAILABLE` and `ABOUT` say what is active.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching.batch_plan import CANVAS, FILE, OUTPUT, TILE

OK, BAD_TILE, SHORT_READ, IO_ERROR, CHANGED, NO_MEMORY = range(6)
SWITCH = "ONLINE_PATCHING_DECODER"
"""Set to `portable` to leave the native decoder out."""


STEP_PX = 64
"""Between remembered states: `docs/decisions/0012-restart-states.md` has what others cost and bring."""

_COUNTS = ("limit", "bytes", "tiles", "refused", "hits", "misses", "failed")


def read(
    canvases: NDArray[np.void],
    tiles: NDArray[np.void],
    outputs: NDArray[np.void],
    files: NDArray[np.void],
    tables: Sequence[bytes],
    bodies: Sequence[bytes | NDArray[np.uint8]],
    batch: NDArray[np.uint8],
    first: int,
    stop: int,
) -> None:
    """Make the patches of canvases first..stop; `status` of each says how it went.

    Tiles of `file` -1 are handed over: their bytes in `bodies` or, where a canvas's packing is "pixels", the
    pixels (height, width, channels) of the part that is seen, in any strides. Targets of canvases of one
    call, or of calls at the same time, must not overlap. ValueError when the arrays contradict each other.
    """
    if _jpeg is None:
        raise RuntimeError(ABOUT)
    _jpeg.read(canvases, tiles, outputs, files, tuple(tables), tuple(bodies), batch, first, stop)


def remember(limit_bytes: int, step_px: int = STEP_PX) -> None:
    """Remember entropy-decoder states of tiles touched from now on, in `limit_bytes` of this process.

    Later touches decode only the MCUs they need; pixels and errors stay the same. What is remembered
    stays until the limit is set to 0, which forgets it all; where it is full, further tiles are read as
    ever. `step_px`: a state every so many columns of each MCU row (at least one an MCU), of tiles to
    come. Without the native decoder nothing is remembered. ValueError for a negative limit.
    """
    if _jpeg is not None:
        _jpeg.remember(limit_bytes, step_px)


def remembered() -> dict[str, int]:
    """What this process remembers, and how often it was of use since the limit was last 0.

    limit and bytes (of the table); tiles with states, tiles refused (a kind of stream that is not
    covered); of the parts of tiles decoded: hits (from states), misses (tiles not known, or no longer
    as they were), failed (a stream could not be made or decoded, so the tile was read as ever).
    """
    return dict(_jpeg.remembered()) if _jpeg is not None else dict.fromkeys(_COUNTS, 0)


def _candidates() -> list[tuple[str, str]]:
    """(path, whose it is) of libjpeg-turbo builds, the one to try first in front."""
    found = [
        (str(p), "this package's own") for p in sorted(Path(__file__).parent.glob("lib/libjpeg*"))
    ]
    try:
        pillow = distribution("pillow")
        files = [f for f in pillow.files or () if f.name.startswith("libjpeg")]
        found += [(str(pillow.locate_file(f)), f"Pillow {pillow.version}'s") for f in files]
    except PackageNotFoundError:  # pragma: no cover - Pillow is a dependency
        pass
    return [*found, ("libjpeg.so.62", "the system's"), ("libjpeg.62.dylib", "the system's")]


def _load() -> tuple[ModuleType | Any, str]:
    """The extension with its library, or None and why."""
    if os.environ.get(SWITCH) == "portable":
        return None, f"portable decoder ({SWITCH}=portable)"
    try:
        module = importlib.import_module("online_patching.native._jpeg")
    except ImportError as error:
        return None, f"the native decoder is not built ({error})"
    names = ("CANVAS_BYTES", "TILE_BYTES", "OUTPUT_BYTES", "FILE_BYTES")
    sizes = tuple(getattr(module, name, 0) for name in names)
    if sizes != tuple(record.itemsize for record in (CANVAS, TILE, OUTPUT, FILE)):
        return None, f"the native decoder belongs to another version (records of {sizes} bytes)"
    why = ""
    for path, whose in _candidates():
        try:
            module.load(path)
        except OSError as error:
            why = why or str(error)
            continue
        return module, f"native decoder on {whose} libjpeg-turbo ({Path(path).name})"
    return None, f"no libjpeg-turbo to load ({why})"


def _load_chunks() -> bool:
    """Whether the libraries of Zarr's compressors, which come with imagecodecs, were found."""
    if _jpeg is None:
        return False
    paths = []
    try:
        files = distribution("imagecodecs").files or []
        for name in ("libzstd-", "libblosc-", "libdeflate-", "liblz4-", "libsnappy-"):
            found = next((f for f in files if f.name.startswith(name)), None)
            paths.append(None if found is None else str(found.locate()))
        for path in (
            paths[0],
            paths[3],
            paths[4],
        ):  # C-Blosc needs them, and does not know where they are
            ctypes.CDLL(str(path))
    except (PackageNotFoundError, OSError):
        pass  # systems have them where the linker looks
    names = ("libzstd.so.1", "libblosc.so.1", "libdeflate.so.0")
    given = (path or name for path, name in zip_longest(paths[:3], names))
    return bool(_jpeg.load_chunks(*given))


_jpeg, ABOUT = _load()
AVAILABLE = _jpeg is not None
CHUNKS = _load_chunks()
"""Whether Zarr chunks are decoded natively too."""
