"""What a corpus of 1,000 to 1,000,000 slides costs a process that draws from it, cold.

    python benchmarks/corpus_scale.py [--slides N ...] [--scratch FOLDER] [--out FILE]

simulated_corpus.py says what the corpora are. Each is measured in fresh processes after its files
were dropped from the page cache (fsync, then posix_fadvise DONTNEED; the kernel's cachestat call
tells that nothing of them is left). A process opens the corpus, makes a PatchSampler, draws and
plans a batch of 256, and then as many as make 20,480 draws: all that a loader does but reading
pixels ("cold"); and these twice again, when all they need is in memory ("warm").

Memory is what no other process shares, while a second worker is there that has looked at every slide
as workers do in time: "dirty" is written to, "clean" are pages of the index mapped by this process
alone (page cache, which the system may drop), "tables" the page tables that mapping them takes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import about_this_run, write_out
from numpy.typing import NDArray
from simulated_corpus import MASKS, simulate, write_tiles

from online_patching import Corpus, PatchSampler
from online_patching.batch_plan import BatchPlan, plan_batch

SIZES = (1_000, 10_000, 100_000, 1_000_000)
BATCH, BATCHES, SIZE_PX = 256, 80, 224
_CACHESTAT = 451
_KIB = 1024


def main() -> None:
    """Measure every size, print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--slides", type=int, nargs="+", default=SIZES)
    parser.add_argument("--scratch", type=Path, help="a folder on a disk with 8 GB free")
    parser.add_argument("--repeats", type=int, default=3, help="processes a size")
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)  # in a process of its own
    args = parser.parse_args()
    if args.step:
        step, folder = args.step
        print(
            json.dumps(
                {"prepare": prepare, "measure": measure, "accompany": accompany}[step](Path(folder))
            )
        )
        return
    found = {}
    for slides in args.slides:
        with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
            found[slides] = one_size(Path(scratch), slides, args.repeats)
    write_out(report(found), args.out)


def one_size(folder: Path, slides: int, repeats: int) -> dict[str, float]:
    """The medians of some cold processes."""
    simulate(folder, slides)
    facts = in_process("prepare", folder)
    facts["logical GB"] = sum(f.stat().st_size for f in folder.rglob("*.bin")) / 1e9
    facts["real GB"] = sum(f.stat().st_blocks * 512 for f in folder.rglob("*.bin")) / 1e9
    runs = []
    for _ in range(repeats):
        facts["pages cached before"] = drop(folder)
        runs.append(in_process("measure", folder))
    return facts | {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def in_process(step: str, folder: Path) -> dict[str, float]:
    """A step in a fresh process: nothing of this one maps the corpus, so that it can be dropped."""
    command = [sys.executable, __file__, "--step", step, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    facts: dict[str, float] = json.loads(done.stdout)
    return facts


def make(corpus: Corpus) -> PatchSampler:
    """The sampler measured."""
    return PatchSampler(corpus, size_px=SIZE_PX, mpp=[0.25, 0.5, 1.0, 2.0], seed=1)


def work(sampler: PatchSampler, batch: int) -> BatchPlan:
    """One batch: drawn and planned."""
    draws = sampler.draw_batch(np.arange(batch * BATCH, (batch + 1) * BATCH))
    return plan_batch(sampler.corpus, draws, SIZE_PX, np.arange(BATCH))


def prepare(folder: Path) -> dict[str, float]:
    """Write the tile rows that the draws will touch, and count what a draw looks at."""
    corpus = Corpus.open(folder)
    counts = _Counts(corpus)
    sampler, touched, slides = make(corpus), [], []
    for batch in range(BATCHES):
        plan = work(sampler, batch)
        canvas = np.repeat(np.arange(len(plan)), plan.canvases["n_tiles"])
        touched.append(corpus.levels["first_tile"][plan.level[canvas]] + plan.number)
        slides.append(plan.slide)
    positions, rows, n = np.concatenate(touched), np.concatenate(slides), BATCH * BATCHES
    pages = write_tiles(corpus, positions)
    records = corpus.records.itemsize + corpus.levels.itemsize * int(corpus.records["n_levels"][0])
    text = corpus.records["uri_bytes"][0] + corpus.records["token_bytes"][0]
    return {
        "slides drawn": len(np.unique(rows)),
        "records, bytes/draw": records + float(text),
        "mask, bytes/draw": counts.mask_bytes / n,
        "tile rows, bytes/draw": 8 * len(positions) / n,
        "tile pages": pages,
    }


class _Counts:
    """Counts the mask bytes that a corpus is asked to look at."""

    def __init__(self, corpus: Corpus) -> None:
        self.mask_bytes = 0
        self._corpus, points, fractions = corpus, corpus.tissue_points, corpus.tissue_fractions

        def counted_points(rows: NDArray[np.int64], *more: Any) -> Any:
            record = corpus.records[rows]
            search = np.ceil(np.log2(record["mask_height"])) + 1  # of row counts, 8 bytes each
            self.mask_bytes += int((8 * search + (record["mask_width"] + 7) // 8).sum())
            return points(rows, *more)

        def counted_fractions(rows: NDArray[np.int64], *box: Any) -> Any:
            record = corpus.records[rows]
            x, y, w, h = (np.asarray(value) for value in box)
            sx = record["mask_width"] / record["width_px0"]
            sy = record["mask_height"] / record["height_px0"]
            across = np.ceil((x + w) * sx / 8) - np.floor(x * sx / 8)
            down = np.ceil((y + h) * sy) - np.floor(y * sy)
            self.mask_bytes += int((np.ceil(across / 8) * 8 * down).sum())
            return fractions(rows, *box)

        corpus.tissue_points, corpus.tissue_fractions = counted_points, counted_fractions  # type: ignore[method-assign, assignment]


def measure(folder: Path) -> dict[str, float]:
    """In a fresh process: memory, times and reads."""
    start, read = memory(), storage_read()
    clock, cpu = time.perf_counter(), time.process_time()
    corpus = Corpus.open(folder)
    opened = time.perf_counter() - clock
    sampler = make(corpus)
    made = time.perf_counter() - clock
    constructed, read_made = memory(), storage_read()
    resumed = time.perf_counter()
    work(sampler, 0)
    first = made + time.perf_counter() - resumed
    out = {
        "open, ms": opened * 1e3,
        "sampler, ms": (made - opened) * 1e3,
        "first batch, ms": first * 1e3,
        "first batch, CPU ms": (time.process_time() - cpu) * 1e3,
        "read to construct, MiB": (read_made - read) / _KIB**2,
    }
    for name in ("cold", "again", "warm"):
        facts = one_pass(sampler)
        if name == "cold":
            with second_worker(folder):
                drawn = memory()
        if name != "again":  # still learns that asking for pages does not pay
            out |= {f"{name}: {key}": value for key, value in facts.items()}
    for when, now in (("constructed", constructed), ("after cold", drawn)):
        for name in now:
            out[f"{when}: {name} MiB"] = (now[name] - start[name]) / _KIB**2
    return out


@contextmanager
def second_worker(folder: Path) -> Iterator[None]:
    """While it lasts, another process has looked at every slide."""
    command = [sys.executable, __file__, "--step", "accompany", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        yield
        other.communicate()


def accompany(folder: Path) -> dict[str, float]:
    """Looks at every slide and level, says so, and waits to be let go."""
    corpus = Corpus.open(folder)
    for start in range(0, len(corpus), 2**16):
        corpus.check(np.arange(start, min(start + 2**16, len(corpus))))
    print("ready", flush=True)
    sys.stdin.read()
    return {}


def one_pass(sampler: PatchSampler) -> dict[str, float]:
    """Batches 1 to BATCHES - 1: costs a draw."""
    before = _clocks()
    for batch in range(1, BATCHES):
        work(sampler, batch)
    spent = (_clocks() - before) / (BATCH * (BATCHES - 1))
    names = ("user CPU, µs", "system CPU, µs", "time, µs", "waits for a page", "KiB from disk")
    return dict(zip(names, spent.tolist(), strict=True))


def _clocks() -> NDArray[np.float64]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return np.array(
        [
            used.ru_utime * 1e6,
            used.ru_stime * 1e6,
            time.perf_counter() * 1e6,
            used.ru_majflt,
            storage_read() / _KIB,
        ]
    )


def memory() -> dict[str, int]:
    """Bytes that only this process has: see above."""
    fields = {}
    for path in ("/proc/self/smaps_rollup", "/proc/self/status"):
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            fields[name] = value.split()
    names = {"dirty": "Private_Dirty", "clean": "Private_Clean", "tables": "VmPTE"}
    return {name: int(fields[key][0]) * _KIB for name, key in names.items()}


def storage_read() -> int:
    """Bytes that this process made the kernel fetch from disk."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes"):
            return int(line.split()[1])
    return 0


def drop(folder: Path) -> int:
    """Drop a corpus from the page cache; returns how many of its pages are still there."""
    left = 0
    for path in folder.rglob("*.bin"):
        handle = os.open(path, os.O_RDWR)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        left += _cached_pages(handle)
        os.close(handle)
    return left


def _cached_pages(handle: int) -> int:
    """Of a whole file, by Linux's cachestat (6.5); 0 where there is none."""
    span, out = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    failed = ctypes.CDLL(None, use_errno=True).syscall(_CACHESTAT, handle, span, out, 0)
    return 0 if failed else int(out[0])


def report(found: dict[int, dict[str, float]]) -> list[str]:
    """The table: a row a figure, a column a size."""
    names = list(next(iter(found.values())))
    lines = [
        (
            f"simulated slides of 150,746 tiles, at most {MASKS:,} masks; {BATCH} draws a batch, "
            f"{BATCH * BATCHES:,} draws; medians of fresh processes, page cache dropped (fadvise)"
        ),
        about_this_run("numpy"),
        "",
        f"{'slides':28}" + "".join(f"{slides:>14,}" for slides in found),
    ]
    rows = ("".join(f"{facts[name]:14,.1f}" for facts in found.values()) for name in names)
    return lines + [f"{name:28}{row}" for name, row in zip(names, rows, strict=True)]


if __name__ == "__main__":
    main()
