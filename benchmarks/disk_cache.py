"""CPU and time that the cache of tiles on disk costs a tile, beside a plain file and a GET over HTTP.

    python benchmarks/disk_cache.py [--kb 30] [--blocks 7] [--out benchmarks/results/FILE.txt]

Blocks of 1,000 tiles take turns: kept in the cache for the first time, found there, kept while others must go, written
to and read from plain files, and asked of nginx on this machine by our own client. Medians over blocks.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from common import about_this_run, write_out
from http_nginx import nginx

from online_patching.stores import HttpStore, LoopThread
from online_patching.stores.disk_cache import DiskCache

TILES = 1000
Work = Callable[[int], None]


def main() -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kb", type=int, default=30, help="bytes a tile / 1024")
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()
    size = args.kb * 1024
    body = np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()
    with (
        tempfile.TemporaryDirectory() as cached,
        tempfile.TemporaryDirectory() as served,
        tempfile.TemporaryDirectory() as own,
    ):
        (Path(served) / "slide.bin").write_bytes(os.urandom(2**24))
        with nginx(Path(served), Path(own)) as server:
            loop = LoopThread()
            store = HttpStore()
            ways = ways_of(Path(cached), body, args.blocks)
            url = server.url("slide.bin")

            def over_http(block: int) -> None:
                loop.run(gets(store, url, size, block))

            ways["a GET from nginx, 32 at once"] = over_http
            lines = [f"{about_this_run()}; tiles of {args.kb} KiB", *measured(ways, args.blocks)]
            loop.run(store.close())
            loop.close()
    write_out(lines, args.out)


def ways_of(folder: Path, body: bytes, blocks: int) -> dict[str, Work]:
    """What is measured, by name: each handles TILES tiles of one block."""
    size = len(body)
    roomy = DiskCache(folder / "roomy", 4 * (blocks + 1) * TILES * size)
    tight = DiskCache(folder / "tight", TILES * size // 2)
    plain = folder / "plain"
    plain.mkdir()

    def put(cache: DiskCache) -> Work:
        def work(block: int) -> None:
            for i in range(block * TILES, (block + 1) * TILES):
                cache.put("s3://b/slide", "v", i * size, (i + 1) * size, body)

        return work

    def get(block: int) -> None:
        for i in range(block * TILES, (block + 1) * TILES):
            assert roomy.get("s3://b/slide", "v", i * size, (i + 1) * size) == body

    def write(block: int) -> None:
        for i in range(block * TILES, (block + 1) * TILES):
            (plain / str(i)).write_bytes(body)

    def read(block: int) -> None:
        for i in range(block * TILES, (block + 1) * TILES):
            assert (plain / str(i)).read_bytes() == body

    return {
        "put": put(roomy),
        "get": get,
        "put while as much must go": put(tight),
        "write a plain file": write,
        "read a plain file": read,
    }


async def gets(store: HttpStore, url: str, size: int, block: int) -> None:
    """TILES ranges of one object, 32 under way."""
    starts = iter(np.random.default_rng(block).integers(0, 2**24 - size, TILES).tolist())

    async def lane() -> None:
        for start in starts:
            await store.read(url, start, start + size)

    await asyncio.gather(*(lane() for _ in range(32)))


def measured(ways: dict[str, Work], blocks: int) -> list[str]:
    """One row each: µs of CPU and of time a tile."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for block in range(blocks + 1):
        for name, work in ways.items():
            began, cpu = time.perf_counter(), time.process_time()
            work(block)
            cost = (time.process_time() - cpu, time.perf_counter() - began)
            if block:
                found[name].append((cost[0] / TILES * 1e6, cost[1] / TILES * 1e6))
    return [
        f"  {name:30s} {statistics.median(c for c, _ in costs):6.1f} µs CPU   "
        f"{statistics.median(t for _, t in costs):6.1f} µs"
        for name, costs in found.items()
    ]


if __name__ == "__main__":
    main()
