"""Random patches out of Zarr: the whole PatchLoader beside zarr-python and tensorstore, local and over HTTP.

    python benchmarks/zarr_peers.py SLIDE [--mpp MPP] [--blocks N] [--only NAME] [--out benchmarks/results/FILE.txt]

A square of the slide's tissue, mirrored until it is 16,384 px wide, is written in six ways (`STORES`), and everyone
reads 224 px patches at the array's own µm/px at the same tissue positions into batches of (128, 224, 224, 3):

- the PatchLoader, with two decode threads: drawing, planning and delivering included;
- tensorstore: all reads of a batch at once as futures, in a ts.Batch where that is faster (decided in this
  run; it reads a shard's table once a batch then), its pools limited to two threads, no cache;
- zarr-python: all reads of a batch at once on its event loop, two codec threads.

Nobody keeps decoded chunks, but who reads a batch at once decodes a chunk once that two of its patches touch;
the picture is large so that these are few, as they are in training (their share is printed). Shard tables: we
hold them (they are the index), the others have no cache to hold them in that would not hold chunks too. nginx
serves the same folder and adds 0 or 30 ms to each answer.

`bare` is decoding alone, in one thread: the chunks that each patch touches, whole, from memory, by the fastest
function at hand, without pasting. Readers take turns in blocks, nobody always first; ratios are taken block by
block. CPU is this process's for a patch decoded. Client and server share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imagecodecs
import numcodecs  # type: ignore[import-untyped]
import numpy as np
import simplejpeg
import tensorstore as ts
import zarr
from common import about_this_run, paired, tissue, write_out
from http_nginx import nginx

from online_patching import (
    ForegroundMask,
    PatchLoader,
    PatchSampler,
    open_slide,
    read_slide_index,
)
from online_patching.fetch import pieces_of
from online_patching.geometry import Box, PatchRef
from online_patching.plan import plan_patch
from online_patching.slide_index import SlideIndex
from online_patching.stores import Stores
from online_patching.testing import Storage, write_zarr_array

SIZE_PX, BATCH, THREADS, MPP = 224, 128, 2, 0.5
STORES = {
    "v2 blosc-lz4": Storage(2, 256, compressor="blosc-lz4-1-0", axes="yxc"),
    "v2 blosc-lz4 channels apart": Storage(2, 512, 1, "blosc-lz4-1-0", "tczyx"),
    "v3 zstd": Storage(3, 256, compressor="zstd", axes="cyx"),
    "v3 zstd sharded": Storage(3, 256, compressor="zstd", axes="cyx", shard_px=2048),
    "v2 gzip": Storage(2, 256, compressor="gzip", axes="yxc"),
    "v2 jpeg": Storage(2, 256, compressor="jpeg", axes="yxc"),
}
PLACES = ("local", "0 ms", "30 ms")


@dataclass
class Reader:
    """Reads whole batches; keeps each block's rate and CPU a patch."""

    read: Callable[[list[PatchRef]], np.ndarray]
    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)

    def run(self, block: int, refs: list[PatchRef]) -> None:
        """One batch, counted unless it is block 0."""
        clock, cpu = time.perf_counter(), time.process_time()
        self.read(refs)
        self.keep(
            block, len(refs), time.perf_counter() - clock, time.process_time() - cpu, len(refs)
        )

    def keep(self, block: int, n: int, seconds: float, cpu_s: float, decoded: float) -> None:
        """Note a block's figures."""
        if block:
            self.rates.append(n / seconds)
            self.cpu_us.append(cpu_s / decoded * 1e6)


class LoaderReader(Reader):
    """The whole loader: started anew each block, until it is steady, then counted."""

    def __init__(self, sampler: PatchSampler, batches: int) -> None:
        super().__init__(self.first)
        self.sampler, self.batches, self.tiles_a_patch = sampler, batches, 1.0

    def first(self, refs: list[PatchRef]) -> np.ndarray:
        """The first batch of the stream."""
        with PatchLoader(self.sampler, BATCH, threads=THREADS, prefetch=1) as loader:
            batch = loader.next_batch()
            assert not batch.failures, batch.failures[0]
            return batch.pixels[: len(refs)]

    def run(self, block: int, refs: list[PatchRef]) -> None:
        """Some batches of a new loader."""
        with PatchLoader(self.sampler, BATCH, threads=THREADS) as loader:
            for _ in range(loader.options.prefetch + 2):
                loader.next_batch()
            clock, cpu, tiles = time.perf_counter(), time.process_time(), loader.stats.tiles
            for _ in range(self.batches):
                loader.next_batch()
            seconds, cpu_s = time.perf_counter() - clock, time.process_time() - cpu
            decoded = (loader.stats.tiles - tiles) / self.tiles_a_patch
        self.keep(block, self.batches * BATCH, seconds, cpu_s, decoded)


def tensorstore_reader(uri: str, storage: Storage, together: bool) -> Reader:
    """Every read of a batch under way at once, limited to as many threads as we use."""
    kvstore: dict[str, Any] = (
        {"driver": "http", "base_url": f"{uri}/"}
        if uri.startswith("http")
        else {"driver": "file", "path": f"{uri}/"}
    )
    context = ts.Context(
        {
            "cache_pool": {"total_bytes_limit": 0},
            "data_copy_concurrency": {"limit": THREADS},
            "file_io_concurrency": {"limit": THREADS},
            "http_request_concurrency": {"limit": BATCH},
        }
    )
    driver = "zarr" if storage.version == 2 else "zarr3"
    array = ts.open({"driver": driver, "kvstore": kvstore}, context=context, read=True).result()
    if storage.axes == "tczyx":
        array = array[0, :, 0]
    if storage.axes != "yxc":
        array = array.transpose([1, 2, 0])

    def read(refs: list[PatchRef]) -> np.ndarray:
        out = np.empty((len(refs), SIZE_PX, SIZE_PX, 3), np.uint8)
        group = ts.Batch() if together else None
        futures = []
        for ref in refs:
            x, y = corner(ref)
            view = array[y : y + SIZE_PX, x : x + SIZE_PX]
            futures.append(view.read(batch=group) if group else view.read())
        if group:
            group.submit()
        for k, future in enumerate(futures):
            out[k] = future.result()
        return out

    return Reader(read)


def zarr_reader(uri: str, storage: Storage) -> Reader:
    """Every read of a batch under way at once on zarr-python's own loop."""
    from zarr.core.sync import sync

    array = zarr.open_array(uri, mode="r")._async_array

    async def one(ref: PatchRef, out: np.ndarray) -> None:
        x, y = corner(ref)
        at: tuple[Any, ...] = (slice(y, y + SIZE_PX), slice(x, x + SIZE_PX))
        if storage.axes == "yxc":
            out[:] = await array.getitem((*at, slice(None)))
        else:
            lead = (0, slice(None), 0) if storage.axes == "tczyx" else (slice(None),)
            out[:] = np.moveaxis(np.asarray(await array.getitem((*lead, *at))), 0, 2)

    async def every(refs: list[PatchRef], out: np.ndarray) -> None:
        await asyncio.gather(*(one(ref, place) for ref, place in zip(refs, out, strict=True)))

    def read(refs: list[PatchRef]) -> np.ndarray:
        out = np.empty((len(refs), SIZE_PX, SIZE_PX, 3), np.uint8)
        sync(every(refs, out))
        return out

    return Reader(read)


def bare_reader(index: SlideIndex) -> Reader:
    """Decoding the chunks that patches touch, from memory."""
    codec, level = index.levels[0].codec, index.levels[0]
    size = level.tile_width_px * level.tile_height_px * codec.samples
    out = np.empty(size, np.uint8)
    name = codec.filters[-1]["id"] if codec.kind == "chunk" else "jpeg"
    known: dict[str, Callable[[bytes], Any]] = {
        "blosc": lambda d: numcodecs.blosc.decompress(d, out),
        "zstd": lambda d: imagecodecs.zstd_decode(d, out=out.data),
        "gzip": lambda d: imagecodecs.gzip_decode(d, out=out.data),
        "jpeg": lambda d: simplejpeg.decode_jpeg(d, "RGB"),
    }
    decode = known[name]
    stores, held = Stores(), dict[tuple[str, int], bytes]()

    def bodies(ref: PatchRef) -> list[bytes]:
        found = []
        for piece in pieces_of(index, plan_patch(index, ref)):
            at = (piece.key, piece.start)
            if at not in held:
                held[at] = stores.read(piece.key, piece.start, piece.stop)
            found.append(held[at])
        return found

    def read(refs: list[PatchRef]) -> np.ndarray:
        for ref in refs:
            for body in bodies(ref):
                decode(body)
        return np.empty(0)

    class Bare(Reader):
        def run(self, block: int, refs: list[PatchRef]) -> None:
            every = [body for ref in refs for body in bodies(ref)]
            clock, cpu = time.perf_counter(), time.process_time()
            for body in every:
                decode(body)
            seconds, cpu_s = time.perf_counter() - clock, time.process_time() - cpu
            self.keep(block, len(refs), seconds, cpu_s, len(refs))

    return Bare(read)


def corner(ref: PatchRef) -> tuple[int, int]:
    """The whole pixel a patch begins at."""
    return int(np.floor(ref.x_px0 + 0.5 + 1e-6)), int(np.floor(ref.y_px0 + 0.5 + 1e-6))


def make(
    slide: Path,
    mpp: float | None,
    folder: Path,
    sides_px: tuple[int, int],
    stores: dict[str, Storage],
) -> ForegroundMask:
    """The stores, of the square with most tissue, and its tissue."""
    side_px, wide_px = sides_px
    with open_slide(str(slide), mpp=mpp) as opened:
        mask = tissue(opened)
        width, height = opened.dimensions
        corners = [
            (x, y) for x in range(0, width - side_px, 512) for y in range(0, height - side_px, 512)
        ] or [(0, 0)]
        x, y = max(corners, key=lambda c: mask.fraction(c[0], c[1], side_px, side_px))
        picture = opened.read_box(0, Box(x, y, min(x + side_px, width), min(y + side_px, height)))
    while picture.shape[1] < wide_px:
        picture = np.concatenate([picture, picture[:, ::-1]], axis=1)
    while picture.shape[0] < wide_px:
        picture = np.concatenate([picture, picture[::-1]], axis=0)
    for name, storage in stores.items():
        path = folder / f"{name.replace(' ', '_')}.zarr"
        if not path.exists():
            write_zarr_array(path, picture, storage)
    with open_slide(str(next(folder.iterdir())), mpp=MPP) as made:
        return tissue(made)


def compare(name: str, place: str, uri: str, mask: ForegroundMask, args: Any) -> list[str]:
    """One store, read from one place by everyone."""
    storage = STORES[name]
    index = read_slide_index(uri, mpp=MPP)
    sampler = PatchSampler([index], [mask], size_px=SIZE_PX, mpp=MPP, seed=1)
    refs = sampler.refs(sampler.draw_batch(np.arange(BATCH * (args.blocks + 1))))
    ours = LoaderReader(sampler, args.batches)
    readers: dict[str, Reader] = {"loader": ours}
    if name != "v2 jpeg":  # no JPEG in tensorstore's Zarr drivers
        kinds = {"tensorstore": False, "tensorstore in a Batch": True}
        readers |= {k: tensorstore_reader(uri, storage, v) for k, v in kinds.items()}
    readers["zarr-python"] = zarr_reader(uri, storage)
    if place == "local":
        readers["bare"] = bare_reader(index)
    first = ours.first(refs[:32])
    for who, reader in readers.items():
        if who not in ("loader", "bare"):
            assert (reader.read(refs[:32]) == first).all(), f"{who} reads other pixels"
    with PatchLoader(sampler, 1024, threads=THREADS, prefetch=1) as loader:
        loader.next_batch()
        ours.tiles_a_patch = loader.stats.tiles / 1024
    names = [*readers]
    for block in range(args.blocks + 1):
        turn = block % len(names)
        for who in names[turn:] + names[:turn]:
            readers[who].run(block, refs[block * BATCH : (block + 1) * BATCH])
    return table(name, place, readers, shared_by_batch(index, refs))


def shared_by_batch(index: SlideIndex, refs: list[PatchRef]) -> float:
    """The share of a batch's chunk reads that another of its patches does too."""
    shares = []
    for first in range(0, len(refs), BATCH):
        plans = [plan_patch(index, ref) for ref in refs[first : first + BATCH]]
        touched = [tile.number for plan in plans for tile in plan.tiles]
        shares.append(1 - len(set(touched)) / len(touched))
    return statistics.mean(shares)


def table(name: str, place: str, readers: dict[str, Reader], shared: float) -> list[str]:
    """Ratios to the best peer first, then everyone."""
    ours = readers["loader"]
    peers = {who: r for who, r in readers.items() if who not in ("loader", "bare")}
    quick = max(peers, key=lambda who: statistics.median(peers[who].rates))
    lean = min(peers, key=lambda who: statistics.median(peers[who].cpu_us))
    lines = [
        f"{name}, {place} ({shared:.0%} of a batch's chunks are touched twice)",
        f"  rate, loader / {quick:24s} {paired(ours.rates, peers[quick].rates)}",
        f"  CPU, {lean:24s} / loader {paired(peers[lean].cpu_us, ours.cpu_us)}",
    ]
    if "bare" in readers:
        lines.append(
            f"  CPU, loader / bare decoding          {paired(ours.cpu_us, readers['bare'].cpu_us)}"
        )
    for who, reader in readers.items():
        rate, cpu = statistics.median(reader.rates), statistics.median(reader.cpu_us)
        lines.append(f"    {who:24s} {rate:9.1f} patches/s  {cpu:8.0f} µs CPU")
    return [*lines, ""]


def main() -> None:
    """Write the stores, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slide", type=Path)
    parser.add_argument("--mpp", type=float, help="µm/px of level 0, where the file carries none")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--batches", type=int, default=4, help="counted in a block of the loader")
    parser.add_argument("--side", type=int, default=4096, help="pixels of the square")
    parser.add_argument(
        "--wide", type=int, default=16384, help="pixels of the stores, by mirroring"
    )
    parser.add_argument("--only", help="stores whose names hold this")
    parser.add_argument("--places", nargs="+", default=PLACES, choices=PLACES)
    parser.add_argument("--folder", type=Path, help="keep the stores here, for further runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    imagecodecs_jpeg()
    numcodecs.blosc.use_threads = False
    zarr.config.set({"threading.max_workers": THREADS, "async.concurrency": BATCH})
    lines = []
    with tempfile.TemporaryDirectory() as made, tempfile.TemporaryDirectory() as own:
        folder = args.folder or Path(made)
        folder.mkdir(exist_ok=True)
        stores = {k: v for k, v in STORES.items() if not args.only or args.only in k}
        mask = make(args.slide, args.mpp, folder, (args.side, args.wide), stores)
        lines += [
            (
                f"{args.slide.name}: {args.side} px of its tissue mirrored to {args.wide} px; {SIZE_PX} px patches, "
                f"batches of {BATCH}, {THREADS} threads, {len(os.sched_getaffinity(0))} cores for client and server"
            ),
            about_this_run("zarr", "tensorstore", "numcodecs", "imagecodecs"),
            "",
        ]
        with nginx(folder, Path(own)) as served:
            for name in stores:
                file = f"{name.replace(' ', '_')}.zarr"
                for place in args.places:
                    uri = (
                        str(folder / file)
                        if place == "local"
                        else served.url(file, int(place[:-3]))
                    )
                    found = compare(name, place, uri, mask, args)
                    print("\n".join(found), flush=True)
                    lines += found
    write_out(lines, args.out)


def imagecodecs_jpeg() -> None:
    """Let zarr-python know the JPEG codec."""
    import imagecodecs.numcodecs

    imagecodecs.numcodecs.register_codecs("imagecodecs_jpeg", verbose=False)


if __name__ == "__main__":
    main()
