"""What resampling costs inside the native call, beside Pillow's resize of the same window.

    python benchmarks/resampling.py [--out benchmarks/results/FILE.txt]

A tile of noise is read natively as it is and resampled to 224 px, in turns; the difference of the two is
resampling (and the copy it spares). Pillow gets the decoded pixels for nothing. CPU time of one thread,
medians; pixels of the two ways are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import simplejpeg
from common import about_this_run, write_out

from online_patching import native
from online_patching.batch_plan import CANVAS, FILE, OUTPUT, TILE
from online_patching.resample import resize

SIZE_PX, REPEATS = 224, 60
TIMES = (0.6, 1.03, 1.3, 1.6, 2.0)


def main() -> None:
    """Measure every reduction, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    lines = [
        about_this_run("pillow"),
        "",
        f"{'times':>6s}{'native, µs':>12s}{'Pillow, µs':>12s}  pixels",
    ]
    write_out([*lines, *(measured(times) for times in TIMES)], args.out)


def measured(times: float) -> str:
    """One reduction's line."""
    side = -(-int(SIZE_PX * max(times, 1.0) + 8) // 16) * 16
    tile = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    body = simplejpeg.encode_jpeg(tile, quality=80, colorsubsampling="420")
    whole = simplejpeg.decode_jpeg(body, "RGB")
    window = (2.3, 2.6, 2.3 + SIZE_PX * times, 2.6 + SIZE_PX * times)
    plain, resampled = reading(body, side, None), reading(body, side, window)
    costs: list[list[float]] = [[], [], []]

    def pillow() -> object:
        return resize(whole, window, (SIZE_PX, SIZE_PX))

    for _ in range(REPEATS):
        for cost, work in zip(
            costs,
            (plain, resampled, pillow),
            strict=True,
        ):
            cost.append(seconds(work))
    ours = statistics.median(b - a for a, b in zip(costs[0], costs[1], strict=True))
    equal = np.array_equal(resampled(), resize(whole, window, (SIZE_PX, SIZE_PX)))
    return f"{times:6g}{ours * 1e6:12.0f}{statistics.median(costs[2]) * 1e6:12.0f}  {'equal' if equal else 'DIFFER'}"


def reading(
    body: bytes, side: int, window: tuple[float, float, float, float] | None
) -> Callable[[], np.ndarray]:
    """A call that reads the whole tile, or a window of it resampled."""
    canvas, tile, output = np.zeros(1, CANVAS), np.zeros(1, TILE), np.zeros(1, OUTPUT)
    for name, value in {
        "n_tiles": 1, "n_outputs": 1, "width": side, "height": side, "tile_width": side,
        "tile_height": side, "scale": 1, "colour": 1, "tables": -1,
    }.items():  # fmt: skip
        canvas[name] = value
    tile[0] = (0, len(body), -1, 0, 0, 0, side, side, 0, 0, 0, 0)
    size = side if window is None else SIZE_PX
    output[0] = (
        *(window or (0, 0, side, side)),
        0,
        size,
        size,
        0,
        0,
        side,
        side,
        window is None,
        0,
    )
    out = np.empty((size, size, 3), np.uint8)

    def read() -> np.ndarray:
        native.read(canvas, tile, output, np.zeros(0, FILE), (), (body,), out, 0, 1)
        return out

    return read


def seconds(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


if __name__ == "__main__":
    main()
