"""Does it pay to remember the entropy decoder's state inside tiles? Patches a second, and index bytes.

    python benchmarks/restart_state/measure.py SLIDE[=MPP] ... [--side 224] [--blocks 15] [--core N] [--out FILE]

The same patches through bare_loop.c, which decodes each tile's codes from its beginning, and through
restart_state.c, which starts at stored states: every MCU row, or every 8, 4, 2 or 1 MCUs of each. In
turns on one core; pixels must be equal. Making the states is timed too: it happens once a tile.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent))

from bare_loop import _VENDORED, BareLoop, Jobs, libjpeg
from common import about_this_run, in_turns, last_core, paired, pin, tissue, write_out

from online_patching import PatchSampler, Slide, read_slide_index

BLOCK = 128
STEPS = (64, 8, 4, 2, 1)
"""MCUs between states; 64 is more than a row has."""


def main() -> None:
    """Measure every slide, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slides", nargs="+", help="SLIDE, or SLIDE=MPP where the file carries none")
    parser.add_argument("--side", type=int, default=224, help="of a patch, in level-0 px")
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--core", type=int, default=last_core())
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    pin(args.core)
    lines = [f"{about_this_run('pillow')}; core {args.core}; {args.side} px patches"]
    library = compiled()
    for given in args.slides:
        lines += ["", *measured(given, library, args.side, args.blocks)]
    write_out(lines, args.out)


def compiled() -> ctypes.CDLL:
    """restart_state.c on the library that the bare loop uses."""
    source, library = Path(__file__).with_name("restart_state.c"), libjpeg()
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / "restart_state.so"
        include = [f"-I{_VENDORED}"] if (_VENDORED / "jpeglib.h").exists() else []
        subprocess.run(
            ["cc", "-O3", "-march=native", "-Wall", "-shared", "-fPIC", *include, str(source), "-o", str(built),
             str(library), f"-Wl,-rpath,{library.parent}"],
            check=True,
        )  # fmt: skip
        loaded = ctypes.CDLL(str(built))
    loaded.restart_loop.restype, loaded.scan_tile.restype = ctypes.c_double, ctypes.c_int64
    return loaded


def measured(given: str, library: ctypes.CDLL, side: int, blocks: int) -> list[str]:
    """One slide's lines."""
    path, _, mpp = given.partition("=")
    index = read_slide_index(path, mpp=float(mpp) if mpp else None)
    with Slide(index) as slide:
        sampler = PatchSampler([index], [tissue(slide)], size_px=side, mpp=index.mpp, seed=1)
    loop = BareLoop(index)
    draws = sampler.draw_batch(np.arange((blocks + 1) * BLOCK))
    corners = [(int(x), int(y)) for x, y in zip(draws.x_px0, draws.y_px0, strict=True)]
    jobs = [loop.jobs(corners[k * BLOCK :][:BLOCK], side) for k in range(blocks + 1)]
    works: dict[str, Callable[[int], NDArray[np.uint8]]] = {"whole": lambda k: loop.run(jobs[k])}
    notes, sizes = {}, loop.ranges[:, 1] - loop.ranges[:, 0]
    for step in STEPS:
        began = time.perf_counter()
        states = scanned(loop, library, step)
        us = (time.perf_counter() - began) / len(states) * 1e6
        run = partial(restarted, loop, library, states, step, jobs)
        same = np.array_equal(run(0).copy(), loop.run(jobs[0]))
        name = f"every {step} MCUs" if step < 64 else "every MCU row"
        room = (states.shape[1] - 1) * 8
        notes[name] = (
            f"{room:5d} bytes a tile ({room / sizes.mean():.1%}); equal {same}; scan {us:.0f} µs"
        )
        works[name] = run
    series = in_turns(works, blocks)
    whole = series["whole"]
    lines = [
        f"{Path(path).name}: tiles of {loop.level.tile_width_px} px, {sizes.mean():,.0f} bytes"
    ]
    for name, one in series.items():
        ratio = "" if one is whole else f" {paired(one.rates, whole.rates)}  {notes[name]}"
        lines.append(f"  {name:16s}{statistics.median(one.rates):7,.0f} patches/s{ratio}")
    return lines


def scanned(loop: BareLoop, library: ctypes.CDLL, step: int) -> NDArray[np.uint64]:
    """States of every tile (tile, state)."""
    room = np.zeros(2**16, np.uint64)
    out = []
    for start, stop in loop.ranges:
        data = os.pread(loop.file, int(stop - start), int(start))
        n = library.scan_tile(
            data, ctypes.c_int64(len(data)), loop.tables, ctypes.c_int64(len(loop.tables)), step,
            ctypes.c_void_p(room.ctypes.data),
        )  # fmt: skip
        if n == 0:
            raise SystemExit("a tile is not baseline JPEG of three interleaved components")
        out.append(room[:n].copy())
    return np.stack(out)


def restarted(
    loop: BareLoop,
    library: ctypes.CDLL,
    states: NDArray[np.uint64],
    step: int,
    jobs: list[Jobs],
    block: int,
) -> NDArray[np.uint8]:
    """A block of patches by way of stored states."""
    some = jobs[block]
    n, rows = len(some.first) - 1, some.rows
    tiles = np.searchsorted(loop.ranges[:, 0], rows[:, 0])
    out = np.full((n, some.side, some.side, 3), 255, np.uint8)
    seconds = library.restart_loop(
        loop.file, loop.tables, ctypes.c_int64(len(loop.tables)), loop.codec.colour == "ycbcr",
        ctypes.c_void_p(rows.ctypes.data), ctypes.c_void_p(tiles.ctypes.data),
        ctypes.c_void_p(states.ctypes.data), ctypes.c_int64(states.shape[1]), step,
        ctypes.c_void_p(some.first.ctypes.data), ctypes.c_int64(n), ctypes.c_int64(some.side),
        ctypes.c_int64(int(rows[:, 1].max())), ctypes.c_int64(loop.level.tile_width_px),
        ctypes.c_void_p(out.ctypes.data),
    )  # fmt: skip
    if seconds < 0:
        raise SystemExit("a tile cannot be restarted: a code that is needed is not in its tables")
    return out


if __name__ == "__main__":
    main()
