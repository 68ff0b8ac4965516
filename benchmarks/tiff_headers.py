"""Reading a TIFF's headers: our bounded reader beside tifffile, on slides and on bombs.

    python benchmarks/tiff_headers.py SLIDE ... [--out benchmarks/results/FILE.txt]

Slides: ours makes the whole SlideIndex (tags, tile tables, pyramid), tifffile reads every tag of every
directory; in turns, medians of RUNS, both through the same open file in the page cache. Bombs: what
online_patching.testing.hostile_seeds makes, each reader in a process of its own, ended after LIMIT_S.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tifffile
from common import about_this_run

from online_patching.errors import PatchingError
from online_patching.formats import tiff
from online_patching.formats.vendors import Mpp
from online_patching.stores import Stores
from online_patching.testing.hostile_seeds import tiff_bombs

RUNS, LIMIT_S = 41, 60
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def ours(path: str) -> None:
    stores = Stores()
    try:
        size, token = stores.version(path)
        tiff.read_index(path, "slide", Mpp.override(0.5), stores, size, token)
    except PatchingError:
        pass
    finally:
        stores.close()


def tifffiles(path: str) -> None:
    with tifffile.TiffFile(path) as file:
        for page in file.pages:
            [(tag.code, tag.value) for tag in page.aspage().tags]


READERS: dict[str, Callable[[str], None]] = {"ours": ours, "tifffile": tifffiles}


def slide_row(path: str) -> str:
    took: dict[str, list[float]] = {name: [] for name in READERS}
    for _ in range(RUNS):
        for name, read in READERS.items():
            began = time.perf_counter()
            read(path)
            took[name].append((time.perf_counter() - began) * 1e6)
    mine, theirs = (statistics.median(took[name]) for name in READERS)
    ratio = statistics.median(b / a for a, b in zip(*took.values(), strict=True))
    return f"{Path(path).name[:44]:46s}{mine:10,.0f}{theirs:10,.0f}{ratio:8.1f}"


def bomb_cell(name: str, path: str) -> str:
    """Seconds and peak memory of one reader on one bomb."""
    command = [sys.executable, __file__, "--one", name, path]
    try:
        done = subprocess.run(command, capture_output=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"> {LIMIT_S} s"
    if done.returncode:
        return f"ended with {done.returncode}"
    took, kib = json.loads(done.stdout)
    return f"{took:.3f} s {kib / 1024:,.0f} MiB"


def one(name: str, path: str) -> None:
    Path("/proc/self/clear_refs").write_text("5")
    before, began = peak_kib(), time.process_time()
    try:
        READERS[name](path)
    except Exception as error:
        print(error, file=sys.stderr)
    print(json.dumps([time.process_time() - began, peak_kib() - before]))


def peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slides", nargs="*")
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30,) * 2)
        one(*args.one)
        return
    lines = [
        about_this_run("tifffile"),
        "",
        f"{'µs a slide':46s}{'ours':>10}{'tifffile':>10}{'ratio':>8}",
    ]
    lines += [slide_row(path) for path in args.slides]
    lines += ["", f"{'bomb':34s}{'KB':>7}{'ours':>18}{'tifffile':>18}"]
    with tempfile.TemporaryDirectory() as folder:
        for seed in tiff_bombs():
            path = Path(folder) / "bomb.tif"
            path.write_bytes(seed.data)
            cells = [bomb_cell(name, str(path)) for name in READERS]
            lines.append(f"{seed.name:34s}{len(seed.data) // 1000:7,}{cells[0]:>18}{cells[1]:>18}")
    text = "\n".join(lines)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
