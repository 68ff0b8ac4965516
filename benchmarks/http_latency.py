"""Patches per second over HTTP as the server gets slower: the whole loader beside its peers.

    python benchmarks/larger_slides.py SLIDE FOLDER      (a cache of 5 MB must not hold half the slide)
    python benchmarks/http_latency.py [SLIDE] [--mpp MPP] [--blocks N] [--out benchmarks/results/FILE.txt]

nginx serves the slide and adds 0, 30 or 100 ms to each answer. Everyone reads 224 px patches of
level 0 at the same tissue positions. The loader runs with its defaults (two decode threads) from the local
file and over HTTP at each latency; the peers get their positions for nothing:

- tiffslide over fsspec's HTTP filesystem, one read after another, and 32 readers in 32 threads, each
  with the better of fsspec's default cache and none (decided in this run);
- async-tiff (pip install async-tiff, left out where it is not installed), 256 patches in flight.

Readers take turns in blocks, nobody always first, and ratios are taken block by block, because
machines drift. A block of the loader starts a new one, lets it run until it is steady, and counts whole
batches; nothing runs on between blocks. Client and server share this machine's cores.
CPU is this process's, user and system, for a patch decoded (the loader decodes ahead of what it hands
over, and more so at the end of a block than at its beginning); the server's is told apart.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import tiffslide
from common import about_this_run, paired, tissue, write_out
from http_nginx import Served, cpu_seconds, nginx

from online_patching import PatchLoader, PatchRef, PatchSampler, Slide, read_slide_index
from online_patching.slide_index import SlideIndex
from online_patching.testing import SyntheticSlide, write_tiff

SIZE_PX = 224
LATENCIES_MS = (0, 30, 100)


def main() -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slide", type=Path, nargs="?", help="a JPEG TIFF or SVS; unset: synthetic")
    parser.add_argument("--mpp", type=float, help="µm/px of level 0, where the file carries none")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=12, help="counted in a block of the loader")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefetch", type=int, help="batches read ahead; unset: the default")
    parser.add_argument("--no-peers", action="store_true", help="the loader alone")
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as own:
        if args.slide is None:
            args.slide = write_tiff(Path(scratch) / "synthetic.svs", SyntheticSlide(1, 9000, 7000))
        with nginx(args.slide.parent.absolute(), Path(own)) as served:
            write_out(compare(args, served), args.out)


def compare(args: argparse.Namespace, served: Served) -> list[str]:
    """All readers at all latencies on one slide."""
    local = read_slide_index(str(args.slide), mpp=args.mpp)
    with Slide(local) as slide:
        mask = tissue(slide)
    urls = {ms: served.url(args.slide.name, ms) for ms in LATENCIES_MS}
    sources = {"local": local}
    sources |= {f"{ms} ms": read_slide_index(url, mpp=local.mpp) for ms, url in urls.items()}
    options = {"size_px": SIZE_PX, "mpp": local.mpp, "seed": 1}
    samplers = {
        name: PatchSampler([index], [mask], **options)  # type: ignore[arg-type]
        for name, index in sources.items()
    }
    readers: dict[str, Reader] = {
        f"loader {name}": LoaderReader(sampler, args, served.pid)
        for name, sampler in samplers.items()
    }
    if not args.no_peers:
        refs = samplers["local"].refs(samplers["local"].draw_batch(np.arange(2000)))
        readers |= peers(urls, refs, local, served.pid)
    head = [
        (
            f"{args.slide.name}: {local.dimensions[0]} x {local.dimensions[1]} px, {local.codec}, tiles "
            f"{local.levels[0].tile_width_px} px; {SIZE_PX} px patches on tissue, batches of {args.batch}, "
            f"{args.threads} decode threads, {len(os.sched_getaffinity(0))} cores for client and server"
        ),
        about_this_run("tiffslide", "fsspec", "aiohttp", "async-tiff"),
        "",
    ]
    agree(readers)
    in_turns(readers, args.blocks)
    return head + table(readers)


@dataclass
class Reader:
    """Reads patches in blocks; keeps each block's rate, CPU and server CPU a patch."""

    server: int
    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    server_us: list[float] = field(default_factory=list)
    told: str = ""

    def run(self, block: int) -> None:
        """One block, counted unless it is block 0."""
        raise NotImplementedError

    def first(self, n: int) -> list[np.ndarray]:
        """The first patches, to compare."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of connections."""

    @contextmanager
    def counting(self, block: int, patches: int) -> Iterator[None]:
        """Measure what runs inside as so many patches."""
        server, cpu, clock = cpu_seconds(self.server), time.process_time(), time.perf_counter()
        done = self.decoded()
        yield
        if block:
            self.rates.append(patches / (time.perf_counter() - clock))
            done = self.decoded() - done or patches
            self.cpu_us.append((time.process_time() - cpu) / done * 1e6)
            self.server_us.append((cpu_seconds(self.server) - server) / done * 1e6)

    def decoded(self) -> float:
        """Patches decoded so far, where that is more than those handed over; else 0."""
        return 0.0


class LoaderReader(Reader):
    """The whole PatchLoader."""

    def __init__(self, sampler: PatchSampler, args: argparse.Namespace, server: int) -> None:
        super().__init__(server)
        self.sampler, self.batches = sampler, args.batches
        self.tiles_a_patch: float = 1.0
        self.options: dict[str, Any] = {"batch_size": args.batch, "threads": args.threads}
        if args.prefetch:
            self.options["prefetch"] = args.prefetch

    def run(self, block: int) -> None:
        """A new loader, its first batches to get going, then the counted ones."""
        with PatchLoader(self.sampler, **self.options) as self.loader:
            for _ in range(2 * self.loader.options.prefetch + 2):
                self.loader.next_batch()
            with self.counting(block, self.batches * self.loader.batch_size):
                for _ in range(self.batches):
                    self.loader.next_batch()

    def decoded(self) -> float:
        """By the tiles that were read."""
        return self.loader.stats.tiles / self.tiles_a_patch

    def first(self, n: int) -> list[np.ndarray]:
        """The first patches of the stream; also what a patch costs in requests and bytes."""
        with PatchLoader(self.sampler, 1024, prefetch=1) as loader:
            pixels = list(loader.next_batch().pixels[:n])
            now = loader.stats.as_dict()
        self.tiles_a_patch = now["tiles"] / 1024
        self.told = (
            f"a patch: {now['tiles'] / 1024:.2f} tiles, {now['requests'] / 1024:.2f} requests, "
            f"{now['bytes_read'] / 2**20:.1f} KiB (+{now['bytes_read'] / now['bytes_wanted'] - 1:.1%} "
            f"beyond its tiles)"
        )
        return pixels


class TiffslideReader(Reader):
    """tiffslide on an fsspec HTTP file; a reader a thread, because its file has one position."""

    def __init__(
        self, url: str, refs: list[PatchRef], server: int, threads: int, patches: int
    ) -> None:
        super().__init__(server)
        self.url, self.refs, self.threads, self.patches = url, refs, threads, patches
        self.pool = ThreadPoolExecutor(threads)
        self.own = threading.local()
        self.cache: str | None = None  # fsspec's own choice

    def read(self, ref: PatchRef) -> np.ndarray:
        """One patch."""
        if getattr(self.own, "cache", "") != self.cache:
            more = {} if self.cache is None else {"cache_type": self.cache}
            self.own.slide = tiffslide.TiffSlide(fsspec.open(self.url, **more))
            self.own.cache = self.cache
        return np.asarray(
            self.own.slide.read_region((ref.x_px0, ref.y_px0), 0, (SIZE_PX, SIZE_PX))
        )[..., :3]

    def run(self, block: int) -> None:
        """A few of the same patches."""
        if block == 0:
            self.choose_cache()
        at = block * self.patches % (len(self.refs) - self.patches)
        with self.counting(block, self.patches):
            list(self.pool.map(self.read, self.refs[at : at + self.patches]))

    def choose_cache(self) -> None:
        """Whichever reads this slide faster."""
        took = {}
        for self.cache in (None, "none"):
            self.open_all()
            began = time.perf_counter()
            list(self.pool.map(self.read, self.refs[-8 * self.threads :]))
            took[self.cache] = time.perf_counter() - began
        self.cache = min(took, key=took.__getitem__)
        self.open_all()
        self.told = f"fsspec cache: {self.cache or 'its default'}"

    def open_all(self) -> None:
        """A reader in each thread, with its first patch behind it."""
        meet = threading.Barrier(self.threads)

        def one(ref: PatchRef) -> None:
            meet.wait()
            self.read(ref)

        list(self.pool.map(one, self.refs[: self.threads]))

    def first(self, n: int) -> list[np.ndarray]:
        """The first patches of the stream."""
        return [self.read(ref) for ref in self.refs[:n]]


class AsyncTiffReader(Reader):
    """async-tiff with its own object store and decode threads; tiles pasted with numpy."""

    IN_FLIGHT = 256

    def __init__(
        self, url: str, refs: list[PatchRef], index: SlideIndex, server: int, patches: int
    ) -> None:
        super().__init__(server)
        self.url, self.refs, self.patches = url, refs, patches
        self.side = index.levels[0].tile_width_px, index.levels[0].tile_height_px
        self.loop = asyncio.new_event_loop()
        self.tiff: Any = None

    async def read(self, ref: PatchRef) -> np.ndarray:
        """One patch."""
        width, height = self.side
        columns = range(ref.x_px0 // width, (ref.x_px0 + SIZE_PX - 1) // width + 1)
        rows = range(ref.y_px0 // height, (ref.y_px0 + SIZE_PX - 1) // height + 1)
        names = [(x, y) for y in rows for x in columns]
        tiles = await self.tiff.fetch_tiles(names, 0)
        canvas = np.empty((len(rows) * height, len(columns) * width, 3), np.uint8)
        for (x, y), tile in zip(names, tiles, strict=True):
            pixels = np.asarray(await tile.decode())
            top, left = (y - rows[0]) * height, (x - columns[0]) * width
            canvas[top : top + height, left : left + width] = pixels
        top, left = ref.y_px0 - rows[0] * height, ref.x_px0 - columns[0] * width
        return canvas[top : top + SIZE_PX, left : left + SIZE_PX]

    async def read_all(self, refs: list[PatchRef]) -> list[np.ndarray]:
        """Many patches, IN_FLIGHT at a time."""
        if self.tiff is None:
            stores = importlib.import_module("async_tiff.store")
            base, _, name = self.url.rpartition("/")
            store = stores.HTTPStore.from_url(base, client_options={"allow_http": True})
            tiff = importlib.import_module("async_tiff").TIFF
            self.tiff = await tiff.open(name, store=store)
        slots = asyncio.Semaphore(self.IN_FLIGHT)

        async def one(ref: PatchRef) -> np.ndarray:
            async with slots:
                return await self.read(ref)

        return list(await asyncio.gather(*map(one, refs)))

    def run(self, block: int) -> None:
        """A warm-up, then the block."""
        at = block * self.patches % (len(self.refs) - self.patches)
        refs = self.refs[at : at + self.patches]
        self.loop.run_until_complete(self.read_all(refs[: self.IN_FLIGHT]))
        with self.counting(block, len(refs)):
            self.loop.run_until_complete(self.read_all(refs))

    def first(self, n: int) -> list[np.ndarray]:
        """The first patches of the stream."""
        return self.loop.run_until_complete(self.read_all(self.refs[:n]))


def peers(
    urls: dict[int, str], refs: list[PatchRef], index: SlideIndex, server: int
) -> dict[str, Reader]:
    """The others, at each latency; few patches where they take long."""
    out: dict[str, Reader] = {}
    for ms, url in urls.items():
        out[f"tiffslide {ms} ms"] = TiffslideReader(url, refs, server, 1, 24 if ms else 96)
    for ms, url in urls.items():
        out[f"tiffslide x 32 {ms} ms"] = TiffslideReader(url, refs, server, 32, 192)
    if importlib.util.find_spec("async_tiff"):
        for ms, url in urls.items():
            out[f"async-tiff {ms} ms"] = AsyncTiffReader(url, refs, index, server, 1000)
    return out


def agree(readers: dict[str, Reader]) -> None:
    """Everyone reads the same patches: ours bit for bit, others as their JPEG decoder has it."""
    want = readers["loader local"].first(8)
    for name, reader in readers.items():
        found = reader.first(8)
        apart = max(
            float(np.abs(a.astype(int) - b.astype(int)).mean())
            for a, b in zip(found, want, strict=True)
        )
        limit = 0.0 if name.startswith("loader") else 2.0
        if apart > limit:
            raise SystemExit(
                f"{name} reads other pixels: {apart:.2f} grey levels apart in the mean"
            )


def in_turns(readers: dict[str, Reader], blocks: int) -> None:
    """Each reader once a block, beginning with another one each time."""
    names = [*readers]
    for k in range(blocks + 1):
        turn = k % len(names)
        for name in names[turn:] + names[:turn]:
            readers[name].run(k)


def table(readers: dict[str, Reader]) -> list[str]:
    """Ratios first, then rates and CPU."""
    rows = ["paired by block, median (least to most):"]

    def ratio(name: str, of: Callable[[Reader], list[float]], a: str, b: str) -> None:
        if a in readers and b in readers:
            rows.append(f"  {name:52s} {paired(of(readers[a]), of(readers[b]))}")

    def rate(reader: Reader) -> list[float]:
        return reader.rates

    ratio("rate at 30 ms / at 0 ms", rate, "loader 30 ms", "loader 0 ms")
    ratio("rate at 100 ms / at 0 ms", rate, "loader 100 ms", "loader 0 ms")
    for ms in LATENCIES_MS:
        for peer in ("tiffslide", "tiffslide x 32", "async-tiff"):
            ratio(f"rate at {ms} ms / {peer}", rate, f"loader {ms} ms", f"{peer} {ms} ms")
    for ms in LATENCIES_MS:
        ratio(f"client CPU a patch at {ms} ms / local", _cpu, f"loader {ms} ms", "loader local")
    rows += ["", f"{'':24s} patches/s   client CPU µs   server CPU µs   (medians)"]
    for name, reader in readers.items():
        one, two, three = map(statistics.median, (reader.rates, reader.cpu_us, reader.server_us))
        rows.append(f"{name:24s} {one:9.1f}   {two:13.0f}   {three:13.0f}   {reader.told}")
    return rows


def _cpu(reader: Reader) -> list[float]:
    return reader.cpu_us


if __name__ == "__main__":
    main()
