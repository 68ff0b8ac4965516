"""CPU that one GET of a byte range costs the client, for several HTTP clients, side by side.

    python benchmarks/http_clients.py [--kb 30] [--blocks 9] [--out benchmarks/results/FILE.txt]

nginx, in a process of its own, serves a file; each client reads the same random ranges of it, 32 at
a time on one event loop, plain and with TLS (verified against a certificate of its own). Clients
take turns in short blocks; figures are medians over blocks of this process's CPU time (user and
system) for a GET, and the ratios are taken block by block. What is not installed is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import ssl
import statistics
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
from http_nginx import Served, nginx

NAME = "object.bin"
SIZE = 64 * 2**20
BLOCK = 1200
AT_ONCE = 32
OURS = "range client"
Read = Callable[[int, int], Awaitable[Any]]


def main() -> None:
    """Measure, print, and write the table where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kb", type=int, default=30, help="bytes a range / 1024")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--uvloop", action="store_true", help="all of it on uvloop's event loop")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as own:
        (Path(scratch) / NAME).write_bytes(os.urandom(SIZE))
        with nginx(Path(scratch), Path(own)) as served:
            os.environ["SSL_CERT_FILE"] = served.certificate  # before aiohttp is imported
            from common import write_out

            lines = [about(args)]
            for tls in (False, True):
                lines += ["", "https" if tls else "http"]
                lines += run(args, measure(served, tls, args.kb * 1024, args.blocks))
    write_out(lines, args.out)


def run(args: argparse.Namespace, work: Coroutine[Any, Any, list[str]]) -> list[str]:
    """On asyncio's own loop, or uvloop's."""
    factory = importlib.import_module("uvloop").new_event_loop if args.uvloop else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(work)


async def measure(served: Served, tls: bool, size: int, blocks: int) -> list[str]:
    """One table: µs of CPU a GET and the ratio to ours."""
    async with AsyncExitStack() as stack:
        url = served.url(NAME, tls=tls)
        clients: dict[str, Read] = {}
        for name, make in MAKERS.items():
            if make.__name__.startswith("ours") or importlib.util.find_spec(make.__name__):
                clients[name] = await make(url, stack, served.certificate)
        found: dict[str, list[float]] = {name: [] for name in clients}
        for k in range(blocks + 1):  # block 0 opens connections
            order = [*clients][k % len(clients) :] + [*clients][: k % len(clients)]
            for name in order:
                cost = await block(clients[name], size, k)
                if k:
                    found[name].append(cost * 1e6)
    rows = []
    for name, costs in found.items():
        ratios = [a / b for a, b in zip(costs, found[OURS], strict=True)]
        rows.append(
            f"  {name:28s} {statistics.median(costs):6.1f} µs   {statistics.median(ratios):5.2f} x ours "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )
    return rows


async def block(read: Read, size: int, seed: int) -> float:
    """CPU seconds a GET, over BLOCK ranges, AT_ONCE of them in flight."""
    starts = iter(np.random.default_rng(seed).integers(0, SIZE - size, BLOCK).tolist())

    async def lane() -> None:
        for start in starts:
            body = await read(start, start + size)
            assert len(body) == size

    began = time.process_time()
    await asyncio.gather(*(lane() for _ in range(AT_ONCE)))
    return (time.process_time() - began) / BLOCK


async def ours(url: str, stack: AsyncExitStack, certificate: str) -> Read:
    from online_patching.stores import HttpStore

    store = HttpStore()
    stack.push_async_callback(store.close)
    token = (await store.version(url))[1]
    return lambda start, stop: store.read(url, start, stop, token)


async def ours_by_aiohttp(url: str, stack: AsyncExitStack, certificate: str) -> Read:
    """What every read cost before there was a range client, and what unusual hosts still cost."""
    from online_patching.stores import HttpStore
    from online_patching.stores.address import plain_address

    store = HttpStore()
    stack.push_async_callback(store.close)
    token = (await store.version(url))[1]
    return lambda start, stop: store.full.read(url, start, stop, token, plain_address(url))


async def aiohttp(url: str, stack: AsyncExitStack, certificate: str) -> Read:
    import aiohttp

    session = await stack.enter_async_context(aiohttp.ClientSession(auto_decompress=False))

    async def read(start: int, stop: int) -> bytes:
        async with session.get(url, headers={"Range": f"bytes={start}-{stop - 1}"}) as answer:
            return await answer.read()

    return read


async def httpx(url: str, stack: AsyncExitStack, certificate: str) -> Read:
    httpx = importlib.import_module("httpx")
    context = ssl.create_default_context(cafile=certificate)
    limits = httpx.Limits(max_connections=AT_ONCE, max_keepalive_connections=AT_ONCE)
    client = await stack.enter_async_context(httpx.AsyncClient(verify=context, limits=limits))

    async def read(start: int, stop: int) -> Any:
        answer = await client.get(url, headers={"Range": f"bytes={start}-{stop - 1}"})
        return answer.content

    return read


async def obstore(url: str, stack: AsyncExitStack, certificate: str) -> Read:
    base, _, name = url.rpartition("/")
    options = {"allow_http": True, "allow_invalid_certificates": True}  # it ignores SSL_CERT_FILE
    http_store = importlib.import_module("obstore.store").HTTPStore
    store = http_store.from_url(base, client_options=options)

    async def read(start: int, stop: int) -> Any:
        return await store.get_range_async(name, start=start, end=stop)

    return read


MAKERS = {
    OURS: ours,
    "our checks around aiohttp": ours_by_aiohttp,
    "aiohttp": aiohttp,
    "httpx": httpx,
    "obstore (Rust)": obstore,
}


def about(args: argparse.Namespace) -> str:
    """Date, commit, machine and versions."""
    from common import about_this_run

    told = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=False).stderr
    return (
        f"{about_this_run('aiohttp', 'httpx', 'obstore', 'uvloop')}, {told.strip().split(': ')[-1]}; ranges of "
        f"{args.kb} KiB, {AT_ONCE} in flight, {'uvloop' if args.uvloop else 'asyncio'}"
    )


if __name__ == "__main__":
    main()
