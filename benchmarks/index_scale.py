"""What `pathfm index` costs at 1,000, 10,000 and 100,000 slides: the first run, a kill, going on, adding.

    python benchmarks/index_scale.py [--slides N ...] [--http N ...] [--tiled N] [--scratch FOLDER] [--out FILE]

Slides are hard links in folders of 1,000 to two files: a real small SVS of 60 tiles ("small"), and a
BigTIFF with the headers of a scan of 98,304 x 98,304 px, 196,613 tiles in six levels, whose tiles are a hole in
the file ("tiled": what is read at indexing is real). Remote ones are served by nginx with 20 ms added to every
answer. Every run is the command itself in a process of its own, fingerprints off (all links have one size).

first     a new corpus folder
killed    the same, SIGKILL when half of the slides are in the journal; then the same command again
again     everything known: nothing to do but to find that out
append    one more folder of 1,000 (or a tenth) added with --append

Peers read the same headers of local slides with as many threads: OpenSlide opens each slide and asks for level
sizes and µm/px; tifffile parses the pages of the pyramid and their tile tables.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openslide
import tifffile
from common import about_this_run, write_out
from http_nginx import nginx

from online_patching.testing import SyntheticSlide, write_tiff
from online_patching.testing.raw_tiff import RawImage, ascii_text, build_tiff

LATENCY_MS, THREADS, A_FOLDER = 20, 8, 1000
SIDE_PX, TILE_PX = 98_304, 256


@dataclass(frozen=True)
class Run:
    """One command: seconds by the clock and of CPU, and the most memory it held."""

    wall_s: float
    cpu_s: float
    peak_mb: float


def main() -> None:
    """Measure every size, print the table, write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--slides", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--http", type=int, nargs="*", default=[1_000, 10_000])
    parser.add_argument("--tiled", type=int, default=1_000, help="slides with a scan's headers")
    parser.add_argument("--scratch", type=Path, help="a folder on a disk with 4 GB free")
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        folder = Path(scratch)
        small = write_tiff(
            folder / "small.svs", SyntheticSlide(1, 2300, 1500, mpp=0.2531), downsamples=(3.9995,)
        )
        lines = [about_this_run("tifffile", "openslide-bin", "pyarrow"), "", HEAD]
        cases: list[tuple[str, Path, int, bool]] = [("small", small, n, False) for n in args.slides]
        if args.tiled:
            cases.append(("tiled", write_tiled(folder / "tiled.svs"), args.tiled, False))
        cases += [("small", small, n, True) for n in args.http]
        for kind, source, count, remote in cases:
            for line in measure(folder / f"{kind}{count}{remote}", kind, source, count, remote):
                print(line, file=sys.stderr, flush=True)  # hours of work are not lost at a fault
                lines.append(line)
        write_out(lines, args.out)


HEAD = (
    f"{'slides':>8} {'kind':<6} {'where':<12} {'run':<8} {'wall s':>8} {'slides/s':>9} {'CPU s':>8} "
    f"{'CPU ms/slide':>13} {'peak MB':>8}"
)


def measure(folder: Path, kind: str, source: Path, count: int, remote: bool) -> Iterator[str]:
    """The lines of one case, as they are measured."""
    slides, extra = folder / "slides", folder / "more"
    link(source, slides, count)
    added = min(A_FOLDER, max(1, count // 10))
    link(source, extra, added, "more")
    where = f"http {LATENCY_MS} ms" if remote else "local"

    def told(name: str, n: int, run: Run) -> str:
        return (
            f"{count:>8,} {kind:<6} {where:<12} {name:<8} {run.wall_s:>8.1f} {n / run.wall_s:>9,.0f} "
            f"{run.cpu_s:>8.1f} {1000 * run.cpu_s / n:>13.2f} {run.peak_mb:>8,.0f}"
        )

    with nginx(folder, make(folder / "nginx")) as served:

        def asked(which: Path) -> str:
            if not remote:
                return str(which)
            table = folder / f"{which.name}.csv"
            paths = (path.relative_to(folder) for path in sorted(which.rglob("*.svs")))
            urls = "\n".join(served.url(str(path), LATENCY_MS) for path in paths)
            table.write_text(f"uri\n{urls}\n")
            return str(table)

        first = folder / "first"
        yield told("first", count, indexed(asked(slides), first))
        yield told("again", count, indexed(asked(slides), first))
        yield told("append", added, indexed(asked(extra), first, "--append"))
        shutil.rmtree(first)
        killed = folder / "killed"
        done = kill_half_way(asked(slides), killed, count)
        resumed = indexed(asked(slides), killed)
        yield told("goes on", count - done, resumed) + f"   ({done:,} were done)"
    if not remote and count <= A_FOLDER:
        paths = [str(path) for path in sorted(slides.rglob("*.svs"))]
        for name, read in PEERS.items():
            yield told(name, count, peer(read, paths))
    shutil.rmtree(folder)


def indexed(slides: str, out: Path, *more: str) -> Run:
    """`pathfm index`, to its end."""
    process, began_s = start(slides, out, *more)
    peak_mb = 0.0
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        peak_mb = max(peak_mb, high_water_mb(process.pid))
        time.sleep(0.02)
    wall_s = time.perf_counter() - began_s
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return Run(wall_s, usage.ru_utime + usage.ru_stime, peak_mb)


def high_water_mb(pid: int) -> float:
    """The most memory a process has held so far, shared libraries included. (What wait4 tells begins
    with what this process held when it forked.)"""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    return 0.0


def kill_half_way(slides: str, out: Path, count: int) -> int:
    """`pathfm index` until half of the slides are in the journal; how many are."""
    process, _ = start(slides, out)
    journal = out / "index.journal"
    while not journal.exists() or lines_in(journal) < count // 2:
        time.sleep(0.02)
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return lines_in(journal) - 1


def lines_in(path: Path) -> int:
    """Whole lines of a file."""
    return path.read_bytes().count(b"\n")


def start(slides: str, out: Path, *more: str) -> tuple[subprocess.Popen[bytes], float]:
    """The command, started, and when."""
    words = [sys.executable, "-m", "pathfm", "index", slides, "--out", str(out), "--show", "3"]
    words += ["--cohort.fingerprints", "false", *more]
    began_s = time.perf_counter()
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL), began_s


def peer(read: Callable[[str], object], paths: list[str]) -> Run:
    """A peer over all slides, in this process; its memory is not told."""
    began, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, paths))
    return Run(time.perf_counter() - began, time.process_time() - cpu, float("nan"))


def by_openslide(path: str) -> object:
    with openslide.OpenSlide(path) as slide:
        return slide.level_dimensions, slide.properties.get("openslide.mpp-x")


def by_tifffile(path: str) -> object:
    with tifffile.TiffFile(path) as file:
        pages: Any = [page for level in file.series[0].levels for page in level.pages]
        return [(page.shape, page.dataoffsets, page.databytecounts) for page in pages]


PEERS = {"OpenSlide": by_openslide, "tifffile": by_tifffile}


def link(source: Path, folder: Path, count: int, name: str = "s") -> None:
    """Hard links to copies of a file, a thousand a folder (a file may have 65,000 links)."""
    for number in range(count):
        inner = folder / f"{number // A_FOLDER:03d}"
        path = inner / f"{name}{number:06d}.svs"
        if number % A_FOLDER == 0:
            inner.mkdir(parents=True)
            first = path
            subprocess.run(["cp", "--sparse=always", source, path], check=True)
        else:
            os.link(first, path)


def make(folder: Path) -> Path:
    """A new folder."""
    folder.mkdir(parents=True)
    return folder


def write_tiled(path: Path) -> Path:
    """A BigTIFF with a large scan's headers: every tile has a place of its own, in a hole of the file."""
    about = "Aperio Image Library v12\r\n|AppMag = 40|MPP = 0.2531"
    images, place = [], 16 * 2**20
    for level in range(6):
        side = SIDE_PX >> level
        tiles = (-(-side // TILE_PX)) ** 2
        sizes = [9_000 + (k * 7919) % 4_000 for k in range(tiles)]
        places = []
        for size in sizes:
            places.append(place)
            place += size
        tags = {324: (16, tuple(places)), 325: (4, tuple(sizes)), 270: ascii_text(about)}
        images.append(RawImage((side, side), [b""], (TILE_PX, TILE_PX), 6, 7, tags=tags))
    path.write_bytes(build_tiff(images, big=True))
    os.truncate(path, place)
    return path


if __name__ == "__main__":
    main()
