"""CPU that one GET of a byte range from S3 costs the client: ours, obstore's and s3fs's, side by side.

    python benchmarks/cloud_clients.py [--kb 30] [--blocks 9] [--out benchmarks/results/FILE.txt]

nginx, in a process of its own, stands for S3: it answers ranges whatever the signature, so what is measured is the
client (a Python emulator costs milliseconds a request; that the answers are right is what tests/test_stores_contract.py
shows). Two tables: ranges of one object, where a signature lasts for all of them, and an object a request, as
in an unsharded Zarr array, where each needs a signature. Clients take turns in short blocks, 32 requests in
flight; figures are medians over blocks of this process's CPU time (user and system), ratios are taken block by
block. Then the price of one signature.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from common import about_this_run, write_out
from http_nginx import Served, nginx

BUCKET = "0ms"  # nginx serves its folder below this path
SIZE = 16 * 2**20
BLOCK = 1000
AT_ONCE = 32
OBJECTS = 12_000
OURS = "ours, s3://"
Read = Callable[[str, int, int], Awaitable[Any]]
KEYS = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE", "AWS_SECRET_ACCESS_KEY": "k" * 40}


def main() -> None:
    """Measure, print, and write the tables where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kb", type=int, default=30, help="bytes a range / 1024")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the tables here")
    args = parser.parse_args()
    size = args.kb * 1024
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as own:
        (Path(scratch) / "slide.bin").write_bytes(os.urandom(SIZE))
        chunk = os.urandom(size)
        for number in range(OBJECTS):
            (Path(scratch) / f"{number}").write_bytes(chunk)
        with nginx(Path(scratch), Path(own)) as served:
            about = about_this_run("obstore", "s3fs", "aiobotocore", "botocore")
            lines = [f"{about}; ranges of {args.kb} KiB, {AT_ONCE} in flight, http, asyncio"]
            for title, many in (("ranges of one object", False), ("an object each", True)):
                lines += ["", title, *asyncio.run(measure(served, size, args.blocks, many))]
    lines += ["", "one signature", *signatures()]
    write_out(lines, args.out)


async def measure(served: Served, size: int, blocks: int, many: bool) -> list[str]:
    """One table: µs of CPU a GET and the ratio to ours."""
    endpoint = served.base
    os.environ.update(KEYS | {"AWS_ENDPOINT_URL_S3": endpoint, "AWS_REGION": "us-east-1"})
    async with AsyncExitStack() as stack:
        clients = {name: await make(endpoint, stack) for name, make in MAKERS.items()}
        found: dict[str, list[float]] = {name: [] for name in clients}
        for k in range(blocks + 1):  # block 0 opens connections
            order = [*clients][k % len(clients) :] + [*clients][: k % len(clients)]
            for name in order:
                cost = await block(clients[name], size, k, many)
                if k:
                    found[name].append(cost * 1e6)
    rows = []
    for name, costs in found.items():
        ratios = [a / b for a, b in zip(costs, found[OURS], strict=True)]
        rows.append(
            f"  {name:34s} {statistics.median(costs):6.1f} µs   {statistics.median(ratios):5.2f} x ours "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    return rows


async def block(read: Read, size: int, number: int, many: bool) -> float:
    """CPU seconds a GET, over BLOCK of them, AT_ONCE in flight; `many`: each of an object not asked before."""
    if many:
        names = (str((number * BLOCK + i) % OBJECTS) for i in range(BLOCK))
        wanted = iter([(name, 0) for name in names])
    else:
        starts = np.random.default_rng(number).integers(0, SIZE - size, BLOCK).tolist()
        wanted = iter([("slide.bin", start) for start in starts])

    async def lane() -> None:
        for name, start in wanted:
            body = await read(name, start, start + size)
            assert len(body) == size

    began = time.process_time()
    await asyncio.gather(*(lane() for _ in range(AT_ONCE)))
    return (time.process_time() - began) / BLOCK


async def ours_s3(endpoint: str, stack: AsyncExitStack) -> Read:
    from online_patching.stores import HttpStore

    store = HttpStore()
    stack.push_async_callback(store.close)
    return lambda name, start, stop: store.read(f"s3://{BUCKET}/{name}", start, stop)


async def ours_http(endpoint: str, stack: AsyncExitStack) -> Read:
    """The same client without a signature: what is public anyway."""
    from online_patching.stores import HttpStore

    store = HttpStore()
    stack.push_async_callback(store.close)
    return lambda name, start, stop: store.read(f"{endpoint}/{BUCKET}/{name}", start, stop)


async def obstore(endpoint: str, stack: AsyncExitStack) -> Read:
    store = importlib.import_module("obstore.store").S3Store(
        BUCKET, endpoint=endpoint, region="us-east-1", client_options={"allow_http": True}
    )

    async def read(name: str, start: int, stop: int) -> Any:
        return await store.get_range_async(name, start=start, end=stop)

    return read


async def s3fs(endpoint: str, stack: AsyncExitStack) -> Read:
    filesystem = importlib.import_module("s3fs").S3FileSystem(
        endpoint_url=endpoint, asynchronous=True, config_kwargs={"max_pool_connections": AT_ONCE}
    )
    session = await filesystem.set_session()
    stack.push_async_callback(session.close)
    return lambda name, start, stop: filesystem._cat_file(f"{BUCKET}/{name}", start=start, end=stop)


MAKERS = {
    OURS: ours_s3,
    "ours, http:// (nothing signed)": ours_http,
    "obstore get_range_async (Rust)": obstore,
    "s3fs _cat_file (aiobotocore)": s3fs,
}


def signatures() -> list[str]:
    """µs of CPU for a presigned URL of a new object, by ours, obstore and botocore."""
    from botocore.session import Session
    from obstore import sign
    from obstore.store import S3Store

    from online_patching.stores.sigv4 import Keys, presigned_query

    keys, at = Keys(*KEYS.values()), datetime.now(UTC)
    client = Session().create_client("s3", region_name="us-east-1")
    store = S3Store(BUCKET, region="us-east-1")
    hour = timedelta(hours=1)
    ways: dict[str, Callable[[int], object]] = {
        "ours (stores/sigv4.py)": lambda i: presigned_query(
            keys, "us-east-1", "b.s3.amazonaws.com", f"/c/{i}", at=at, seconds=3600
        ),
        "obstore.sign": lambda i: sign(store, "GET", f"c/{i}", hour),
        "botocore generate_presigned_url": lambda i: client.generate_presigned_url(
            "get_object", Params={"Bucket": BUCKET, "Key": f"c/{i}"}
        ),
    }
    costs: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(7):
        for name, way in ways.items():
            began = time.process_time()
            for i in range(300):
                way(i)
            costs[name].append((time.process_time() - began) / 300 * 1e6)
    return [f"  {name:34s} {statistics.median(c):6.1f} µs" for name, c in costs.items()]


if __name__ == "__main__":
    main()
