"""Hostile headers by the million: whatever a file says, indexing ends soon, small, and by name.

    python benchmarks/fuzz_tiff.py [--inputs 1000000] [--target tiff] [--workers 1] [--state FILE] [--out FILE]
    python benchmarks/fuzz_tiff.py --target tiff --only 123456        # one input again, with its traceback

Targets: `tiff` (formats.tiff.read_index, and the first tile of what it accepts is decoded), `tile` (one
stored tile of every codec but JPEG, decoded whole, in part and at lower resolutions), `index`
(SlideIndex.load), `mask` (ForegroundMask.load), `slide` (read_slide_index of a file on disk, with
OpenSlide's and tiffslide's process behind it; that process is not under the limits), `tifffile` (the same
files through tifffile instead, for comparison).

Every input is made from (seed, number) by online_patching.testing.hostile. A finding is anything but a
result or an error of online_patching.errors: another exception, more than LIMIT_CPU_S of CPU, more than
LIMIT_BYTES of address space beyond what the process had before its first input (RLIMIT_AS, so an
allocation too many is a MemoryError and nothing may swallow it), a crash, headers that take more requests
than promised. Inputs run in children, CHUNK at a time; `--state` keeps a line a chunk, so that a run goes
on where it stopped. Exits 1 when there is a finding.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import json
import logging
import mmap
import os
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from online_patching import ForegroundMask, SlideIndex, read_slide_index
from online_patching.decode import BadTileError, decode_tile, jpeg2000
from online_patching.errors import PatchingError
from online_patching.formats import tiff
from online_patching.formats.tiff_tags import MAX_REQUESTS
from online_patching.geometry import Box
from online_patching.slide_index import Codec
from online_patching.testing import hostile
from online_patching.testing.hostile import HostileFile, HostileStores, Seed
from online_patching.testing.hostile_codecs import TILE_PX, coded_seeds, tile_seeds
from online_patching.testing.hostile_seeds import tiff_bombs, tiff_seeds

CHUNK = 20_000
LIMIT_CPU_S, LIMIT_BYTES = 1.0, 64 * 2**20
LIMIT_SLIDE_S = 10.0
WARM_UP = 200
LIMIT_CHUNK_S = 1800
_DECODED_PX = 2**20
_REAL = Path(__file__).parents[2] / "shared" / "data" / "wsi"


class TooSlowError(BaseException):
    """The second is over; not an Exception, so that nothing on the way swallows it."""


# --- what is tried --------------------------------------------------------------------------------


def try_tiff(file: HostileFile) -> str:
    """Index it; decode the first tile of what is accepted; check what an index promises."""
    stores = HostileStores(file)
    try:
        index = tiff.read_index("hostile.svs", "hostile", None, stores, file.size_bytes, "")
    finally:
        assert stores.requests <= MAX_REQUESTS, f"{stores.requests} requests"
    if index is None:
        return "for a fallback reader"
    for level in index.levels:
        assert level.rows is not None and len(level.rows) == level.n_tiles * level.parts
        for tile in (0, level.n_tiles // 2, level.n_tiles - 1):
            start, stop = level.byte_range(tile)
            assert 0 <= start <= stop <= file.size_bytes
    level = index.levels[0]
    start, stop = level.byte_range(0)
    if start == stop or level.tile_width_px * level.tile_height_px > _DECODED_PX:
        return "indexed"
    try:
        pixels = decode_tile(
            level.codec, file.read(start, stop), level.tile_width_px, level.tile_height_px
        )
    except BadTileError as error:
        if "MemoryError" in str(error):  # the decoder's own catch-all must not hide it
            raise MemoryError("a tile's frame took all memory") from None
        return "indexed, its first tile refused"
    channels = 3 if level.parts == 1 else 1
    assert pixels.shape == (level.tile_height_px, level.tile_width_px, channels)
    return "indexed, its first tile decoded"


def try_tile(file: HostileFile) -> str:
    """Decode it whole, in part, and at half its size where its kind has one."""
    jpeg2000.WORTH_BLOCKS = 0  # in part although the tile is small
    codec = _tiles()[file.kind.partition(": ")[2]]
    data, sizes = file.whole() if file.size_bytes < 2**20 else file.base, TILE_PX
    done = 0
    for scale, box in ((1, None), (1, Box(3, 2, 17, 9)), (2, None), (4, Box(1, 1, 5, 3))):
        if scale > 1 and codec.kind != "jpeg2000":
            continue
        try:
            pixels = decode_tile(codec, data, *sizes, scale, box)
        except BadTileError as error:
            if "MemoryError" in str(error):
                raise MemoryError("a tile took all memory") from None
            continue
        done += 1
        width, height = (
            (sizes[0] // scale, sizes[1] // scale) if box is None else (box.width, box.height)
        )
        assert (
            pixels.shape == (height, width, 1 if codec.planar else 3) and pixels.dtype == np.uint8
        )
    return f"{codec.kind} {'decoded' if done else 'refused'}"


@functools.cache
def _tiles() -> dict[str, Codec]:
    return {seed.name: codec for seed, codec in tile_seeds()}


def try_index(file: HostileFile) -> str:
    """Load it as a saved index and use what comes out."""
    index = SlideIndex.load(_on_disk(file))
    assert index.dimensions[0] > 0 and index.n_tiles >= 0 and index.mpp > 0
    for level in index.levels:
        if level.rows is not None:
            level.byte_range(len(level.rows) - 1)
    return "loaded"


def try_mask(file: HostileFile) -> str:
    """Load it as a saved mask and use what comes out."""
    mask = ForegroundMask.load(_on_disk(file))
    mask.fraction(0, 0, *mask.size_px0)
    if mask.tissue_cells:
        mask.tissue_point(mask.tissue_cells - 1, 0.5, 0.5)
    assert 0 <= mask.tissue_fraction <= 1 and mask.size_px0[0] > 0
    return "loaded"


def try_slide(file: HostileFile) -> str:
    """Index it as a person would, from disk, whatever reader opens it."""
    return f"indexed through {read_slide_index(_on_disk(file)).container}"


def try_tifffile(file: HostileFile) -> str:
    """What our reader took the place of: every directory through tifffile, any error of its own is fine."""
    try:
        with tifffile.TiffFile(io.BufferedReader(_Opened(file))) as found:
            pages: list[Any] = list(found.pages)
            return "read" if [page.tags for page in pages] else "no images"
    except MemoryError:
        raise
    except Exception:
        return "an error of tifffile's"


class _Opened(io.RawIOBase):
    """A HostileFile as libraries want files: read and sought, never copied whole."""

    def __init__(self, file: HostileFile) -> None:
        self._file, self._at, self.name = file, 0, "hostile.svs"

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._file.size_bytes)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(self._at, self._at + len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _on_disk(file: HostileFile) -> str:
    for old in _scratch().iterdir():
        old.unlink()
    path = _scratch() / f"{next(_NAMES)}.svs"  # the fallback's process keeps slides open by name
    path.write_bytes(file.whole() if file.size_bytes < 2**26 else file.base)
    return str(path)


def _scratch() -> Path:
    memory = Path("/dev/shm")  # noqa: S108  # a folder of our own is made there
    global _FOLDER
    if _FOLDER is None:
        _FOLDER = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
    return Path(_FOLDER.name)


_FOLDER: tempfile.TemporaryDirectory[str] | None = None
_NAMES = itertools.count()


# --- what it is tried on --------------------------------------------------------------------------


def seeds_tiff() -> list[Seed]:
    """Small files of every kind, real headers where they are at hand, and a few bombs."""
    small, real = tiff_seeds(), []
    for path in sorted(p for p in _REAL.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if tiff.is_tiff(data):
            real.append(hostile.tiff_seed(path.name, data))
    return small * 30 + coded_seeds() * 30 + real * 8 + tiff_bombs()


def seeds_tile() -> list[Seed]:
    """Tiles; those of JPEG 2000, whose decoder is the largest, three times as often."""
    seeds = [seed for seed, _ in tile_seeds()]
    return seeds + 2 * [seed for seed in seeds if seed.fields]


def seeds_index() -> list[Seed]:
    """Saved indexes of the small files."""
    out = []
    for seed in tiff_seeds():
        stores = HostileStores(HostileFile(seed.name, seed.data, (), len(seed.data)))
        try:
            index = tiff.read_index("a.svs", "a", None, stores, len(seed.data), "1-2")
        except PatchingError:
            continue
        assert index is not None
        index.save(_scratch() / "index")
        data = (_scratch() / "index").read_bytes()
        out.append(Seed(seed.name, data, fields=(hostile.Field(8, 8, "count"),)))
    return out


def seeds_mask() -> list[Seed]:
    """Saved masks: their chunk lengths, size and CRCs are the numbers."""
    out = []
    for shape in ((7, 13), (100, 90), (1, 3000)):
        bits = np.random.default_rng(0).random(shape) < 0.5
        ForegroundMask.from_array(bits, (9000, 5000), (0.25, 0.26)).save(_scratch() / "mask.png")
        data = (_scratch() / "mask.png").read_bytes()
        spots = tuple(hostile.Field(at, 4, "count") for at in (8, 16, 20, 33, 49))
        out.append(Seed(f"{shape}", data, ">", spots))
    return out


LIMITS_BYTES = {"mask": 6 * LIMIT_BYTES}
"""A mask may have 64 Mi cells, a byte each while it is read: its limit is what the largest needs."""

logging.getLogger("tifffile").setLevel(logging.CRITICAL)

TARGETS: dict[str, tuple[Callable[[], list[Seed]], Callable[[HostileFile], str]]] = {
    "tiff": (seeds_tiff, try_tiff),
    "tile": (seeds_tile, try_tile),
    "index": (seeds_index, try_index),
    "mask": (seeds_mask, try_mask),
    "slide": (seeds_tiff, try_slide),
    "tifffile": (seeds_tiff, try_tifffile),
}


# --- a child --------------------------------------------------------------------------------------


def run_chunk(target: str, seed: int, start: int, count: int, progress: str) -> dict[str, Any]:
    """Try inputs start..start+count-1 under the limits; every finding with its number."""
    make, attempt = TARGETS[target]
    signal.signal(signal.SIGPROF, _over)
    seeds = make()
    for file in hostile.hostile_files(
        seeds, range(WARM_UP), seed + 1
    ):  # what is made once is made now
        _outcome(attempt, file, LIMIT_SLIDE_S)
    marker = mmap.mmap(os.open(progress, os.O_RDWR), 8)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts here
    before = _peak_kib()
    if target != "slide":
        limit = _address_space() + LIMITS_BYTES.get(target, LIMIT_BYTES)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    outcomes, findings, slowest, began = Counter[str](), [], (0.0, 0), time.process_time()
    for number in _numbers(start, count):
        files = hostile.hostile_files(seeds, number, seed)
        for one, file in zip(number, files, strict=True):
            struct.pack_into("<q", marker, 0, one)
            since = time.process_time()
            name, found = _outcome(attempt, file, LIMIT_CPU_S)
            slowest = max(slowest, (time.process_time() - since, one))
            outcomes[name] += 1
            if found:
                findings.append({"number": one, "file": file.kind, "what": found})
    return {
        "start": start, "count": count, "outcomes": outcomes, "findings": findings, "slowest": slowest,
        "cpu_s": time.process_time() - began, "grown_kib": _peak_kib() - before,
    }  # fmt: skip


def _numbers(start: int, count: int) -> Iterator[range]:
    for first in range(start, start + count, 256):
        yield range(first, min(start + count, first + 256))


def _outcome(
    attempt: Callable[[HostileFile], str], file: HostileFile, limit_s: float
) -> tuple[str, str]:
    """(outcome, "" or what is wrong with it)."""
    try:
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        try:
            return attempt(file), ""
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except PatchingError as error:
        several = "\n" in str(error)
        return type(error).__name__, f"a message of several lines: {error}" if several else ""
    except TooSlowError:
        return "finding", f"more than {limit_s:g} s of CPU"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return (
            "finding",
            f"{type(error).__name__}: {str(error)[:200]} ({where.name}:{where.lineno})",
        )


def _over(*_: object) -> None:
    raise TooSlowError


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


# --- the parent -----------------------------------------------------------------------------------


def start_chunk(target: str, seed: int, start: int, count: int) -> dict[str, Any]:
    """One child; its death or hang is a finding that names the input it was at."""
    with tempfile.NamedTemporaryFile() as progress:
        progress.write(bytes(8))
        progress.flush()
        words = [target, str(seed), str(start), str(count), progress.name]
        command = [
            sys.executable,
            sys.argv[0],
            "--chunk",
            *words,
        ]  # this script, or one with other targets
        try:
            done = subprocess.run(command, capture_output=True, timeout=LIMIT_CHUNK_S, check=False)
            if done.returncode == 0:
                result: dict[str, Any] = json.loads(done.stdout)
                return result
            what = f"the process ended with {done.returncode}: {done.stderr.decode()[-300:]}"
        except subprocess.TimeoutExpired:
            what = f"the process hung for {LIMIT_CHUNK_S} s"
        (number,) = struct.unpack("<q", Path(progress.name).read_bytes()[:8])
    finding = {"number": number, "file": "", "what": what}
    return {
        "start": start, "count": count, "outcomes": {"finding": 1}, "findings": [finding],
        "slowest": (0.0, 0), "cpu_s": 0.0, "grown_kib": 0,
    }  # fmt: skip


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every chunk's result, from the state file where it is known already."""
    known: dict[int, dict[str, Any]] = {}
    if args.state and args.state.exists():
        for line in args.state.read_text().splitlines():
            entry = json.loads(line)
            if (entry["target"], entry["seed"]) == (args.target, args.seed):
                known[entry["start"]] = entry
    chunk = min(CHUNK, max(1, args.inputs))
    starts = [s for s in range(0, args.inputs, chunk) if s not in known]

    def one(start: int) -> dict[str, Any]:
        result = start_chunk(args.target, args.seed, start, min(chunk, args.inputs - start))
        if args.state:
            with args.state.open("a") as file:
                file.write(json.dumps({**result, "target": args.target, "seed": args.seed}) + "\n")
        return result

    with ThreadPoolExecutor(args.workers) as pool:
        return [*known.values(), *pool.map(one, starts)]


def told(args: argparse.Namespace, results: list[dict[str, Any]]) -> str:
    """The summary: how many, how fast, which outcomes, the worst, and every finding."""
    outcomes = sum((Counter(r["outcomes"]) for r in results), Counter[str]())
    findings = [finding for r in results for finding in r["findings"]]
    total, cpu_s = sum(outcomes.values()), sum(r["cpu_s"] for r in results)
    rate = total / max(cpu_s, 1e-9)
    grown_mib = max(r["grown_kib"] for r in results) / 1024
    limit = f"limit {LIMITS_BYTES.get(args.target, LIMIT_BYTES) >> 20}"
    if args.target == "slide":
        limit = "no limit: OpenSlide's process is another"
    slowest = max(tuple(r["slowest"]) for r in results)
    lines = [
        f"target {args.target}, seed {args.seed}: {total:,} inputs, {cpu_s:,.0f} s of CPU, {rate:,.0f} a second",
        f"slowest input: {slowest[0]:.3f} s of CPU (number {slowest[1]}; limit {LIMIT_CPU_S:g})",
        f"largest growth of a process over its inputs: {grown_mib:.1f} MiB ({limit})",
        "",
        *(f"{count:>10,}  {name}" for name, count in outcomes.most_common()),
        "",
        f"{len(findings)} findings",
        *(f"  input {f['number']} ({f['file']}): {f['what']}" for f in findings[:50]),
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what is asked, print the summary, write it where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, default=next(iter(TARGETS)))
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--state", type=Path, help="a line a chunk; a run goes on where it stopped")
    parser.add_argument("--out", type=Path, help="write the summary here, after what is there")
    parser.add_argument("--only", type=int, help="try this input alone")
    parser.add_argument("--chunk", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.chunk:
        target, seed, start, count, progress = args.chunk
        print(json.dumps(run_chunk(target, int(seed), int(start), int(count), progress)))
        return
    if args.only is not None:
        make, attempt = TARGETS[args.target]
        file = next(hostile.hostile_files(make(), [args.only], args.seed))
        print(file)
        print(attempt(file))
        return
    results = run(args)
    text = told(args, results)
    print(text)
    if args.out:
        from common import about_this_run

        before = args.out.read_text() if args.out.exists() else about_this_run() + "\n"
        args.out.write_text(f"{before}\n{text}\n")
    sys.exit(1 if any(r["findings"] for r in results) else 0)


if __name__ == "__main__":
    main()
