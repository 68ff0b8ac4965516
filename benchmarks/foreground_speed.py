"""What a foreground mask costs: reading the thumbnail, the network, all the rest; many slides.

    python benchmarks/foreground_speed.py                    # one slide, piece by piece, on one core
    python benchmarks/foreground_speed.py --slides 1000      # and a corpus of so many, then a rerun

A synthetic slide of 20 x 15 mm whose finest level is 4 µm/px (what a scan of 0.25 µm/px with levels of
4x offers for a thumbnail at 16 µm/px, 1,250 x 938 px), JPEG tiles of 240 px; real slides beside it
where ../shared/data is at hand. Weights are as `build_model` draws them: time does not depend on them.
Everything in turn in each round, least of the rounds; one thread.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from common import about_this_run, last_core, pin
from numpy.typing import NDArray

from online_patching import (
    ForegroundMask,
    SlideIndex,
    bitmaps,
    errors,
    find_slides,
    open_slide,
    read_slide_index,
)
from online_patching.testing import SyntheticSlide, write_tiff
from pathfm.geojson import contours
from pathfm.segmentation.models import build_model, multiply_adds_per_pixel
from pathfm.segmentation.predict import ready, tissue_probability
from pathfm.segmentation.thresholds import otsu_mask
from pathfm.segmentation.tidy import tidy

Floats = NDArray[np.float64]
MODELS = ("unet", "unet_stem4", "segformer_b0")
MPP = 16.0
REAL = Path(__file__).parents[2] / "shared" / "data" / "wsi"


def least_s(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The least seconds of each, all in turn in each round, after one that does not count."""
    least = dict.fromkeys(works, float("inf"))
    for number in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            passed = time.perf_counter() - began
            least[name] = min(least[name], passed) if number else least[name]
    return least


def one_slide(folder: Path, rounds: int) -> None:
    """Reading against predicting, and the rest of a slide's work."""
    drawn = SyntheticSlide(seed=5, width_px0=5000, height_px0=3750, mpp=4.0)
    index = read_slide_index(
        str(
            write_tiff(folder / "slide.tif", drawn, flavour="generic"),
        ),
        mpp=4.0,
    )
    thumbnail = open_slide(index).thumbnail(MPP)
    models = {name: build_model(name).eval() for name in MODELS}
    works: dict[str, Callable[[], object]] = {"reading": lambda: open_slide(index).thumbnail(MPP)}
    for name, model in models.items():
        fast = {p: ready(model, precision=p) for p in ("fp32", "bf16")}
        works[f"{name} as loaded"] = partial(tissue_probability, model, thumbnail)
        works[f"{name} fp32"] = partial(tissue_probability, fast["fp32"], thumbnail)
        works[f"{name} bf16"] = partial(tissue_probability, fast["bf16"], thumbnail)
    works["otsu_mask"] = lambda: otsu_mask(thumbnail)
    mask = tidy(otsu_mask(thumbnail), 80.0)
    works["tidy"] = lambda: tidy(mask, 80.0)
    works["contours"] = lambda: contours(mask, 4.0)
    took = least_s(works, rounds)
    print(f"thumbnail of {thumbnail.shape[1]} x {thumbnail.shape[0]} px at {MPP:g} µm/px, one core")
    for name, seconds in took.items():
        ratio = f"{seconds / took['reading']:6.2f} x reading" if name != "reading" else ""
        cost = ""
        if name.split()[0] in models:
            cost = f"{multiply_adds_per_pixel(models[name.split()[0]]):8,.0f} multiply-adds a pixel"
        print(f"  {name:24s} {ratio:16s} {seconds * 1e3:8.1f} ms {1 / seconds:7.1f} /s  {cost}")
    box_cost(ForegroundMask.from_array(mask, index.dimensions, (4.0, 4.0)))


def box_cost(mask: ForegroundMask) -> None:
    """Microseconds for the tissue fraction of a box: one at a time, and 256 at once as samplers ask."""
    rng, n = np.random.default_rng(0), 256
    values = (0, 0, mask.width, mask.height, *mask.size_px0)
    where = bitmaps.Bitmaps(*(np.full(n, value, np.int64) for value in values))
    rows = np.concatenate([mask.packed.ravel(), np.zeros(bitmaps.PADDING_BYTES, np.uint8)])
    for side_um in (128.0, 512.0, 2048.0):
        side = side_um / mask.mpp_px0[0]
        x, y = (rng.random((n, 2)) * (np.array(mask.size_px0) - side)).T
        sides = np.full(n, side)
        works: dict[str, Callable[[], object]] = {
            "one": partial(_one_by_one, mask, x, y, side),
            "all": partial(bitmaps.tissue_fractions, rows, where, x, y, sides, sides),
        }
        took = {name: seconds / n * 1e6 for name, seconds in least_s(works, 5).items()}
        print(
            f"  tissue fraction of a box of {side_um:5.0f} µm: {took['one']:6.1f} µs alone, "
            f"{took['all']:5.2f} µs each of {n}"
        )


def _one_by_one(mask: ForegroundMask, x: Floats, y: Floats, side_px0: float) -> None:
    for at in zip(x.tolist(), y.tolist(), strict=True):
        mask.fraction(*at, side_px0, side_px0)


def _read(index: SlideIndex) -> object:
    return open_slide(index).thumbnail(MPP)


def real_slides(rounds: int) -> None:
    """The U-Net beside reading, on real slides."""
    if not REAL.is_dir():
        print("real slides: not at hand (../shared/data)")
        return
    rows = csv.DictReader((REAL / "mpp.csv").read_text().splitlines())
    mpp = {row["file"]: float(row["mpp"]) for row in rows}
    fast = {name: ready(build_model(name)) for name in ("unet", "unet_stem4")}
    print(f"real slides at {MPP:g} µm/px, one core: network (fp32) against reading")
    for uri in find_slides(str(REAL / "converted")):
        try:
            index = read_slide_index(uri, mpp=mpp.get(Path(uri).name))
        except errors.SlideError:
            continue
        thumbnail = open_slide(index).thumbnail(MPP)
        works: dict[str, Callable[[], object]] = {"reading": partial(_read, index)}
        for name, model in fast.items():
            works[name] = partial(tissue_probability, model, thumbnail)
        took = least_s(works, rounds)
        ratios = ", ".join(
            f"{n} {took[n] / took['reading']:5.2f} x ({took[n] * 1e3:.1f} ms)" for n in fast
        )
        size = f"{thumbnail.shape[1]} x {thumbnail.shape[0]}"
        print(
            f"  {index.slide_id:42.42s} {size:12s} {ratios}, reading {took['reading'] * 1e3:.1f} ms"
        )


def many_slides(folder: Path, slides: int, side_mm: float) -> None:
    """`pathfm foreground` on a corpus of `slides` slides, then again."""
    width, height = round(side_mm * 250), round(side_mm * 187.5)
    files = []
    for seed in range(8):
        drawn = SyntheticSlide(seed=seed, width_px0=width, height_px0=height, mpp=4.0)
        files.append(write_tiff(folder / f"{seed}.tif", drawn, flavour="generic"))
    corpus = folder / "corpus"
    for number in range(slides):
        index: SlideIndex = read_slide_index(str(files[number % 8]), mpp=4.0)
        index = replace(index, slide_id=f"slide_{number:05d}")
        index.save(corpus / "slides" / f"{index.slide_id}.index")
    print(
        f"{slides:,} slides of {side_mm:g} x {0.75 * side_mm:g} mm at {MPP:g} µm/px, `pathfm foreground`"
    )
    for what in ("all", "again"):
        seconds, memory = _timed_run(corpus)
        quarter = max(1, len(memory) // 4)
        print(
            f"  {what:6s} {seconds:7.1f} s, {slides / seconds:7.1f} slides/s; memory "
            f"{max(memory[quarter : 2 * quarter] or memory):.0f} MB at most in the second quarter, "
            f"{max(memory[3 * quarter :]):.0f} MB in the last"
        )
    written = sum(p.stat().st_size for n in ("masks", "contours", "thumbnails", "overlays")
                  for p in (corpus / n).iterdir())  # fmt: skip
    print(f"  written {written / slides / 1e3:.1f} KB a slide")


def _timed_run(corpus: Path) -> tuple[float, list[float]]:
    """Seconds of a run, and its resident MB, four times a second."""
    began = time.perf_counter()
    words = [sys.executable, "-m", "pathfm", "foreground", str(corpus), "--mpp", str(MPP)]
    run = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    memory = []
    while run.poll() is None:
        try:
            pages = int(Path(f"/proc/{run.pid}/statm").read_text().split()[1])
            memory.append(pages * 4096 / 1e6)
        except (OSError, IndexError):
            pass
        time.sleep(0.25)
    if run.returncode:
        raise SystemExit(f"pathfm foreground ended with {run.returncode}")
    return time.perf_counter() - began, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slides", type=int, default=0)
    parser.add_argument("--side-mm", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(about_this_run("torch"))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.slides:
            many_slides(Path(folder), args.slides, args.side_mm)
        pin(last_core())
        one_slide(Path(folder), args.rounds)
        real_slides(args.rounds)


if __name__ == "__main__":
    main()
