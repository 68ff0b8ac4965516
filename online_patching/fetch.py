"""Runs plans against stores: the stored pieces of a patch's tiles, as bytes.

Local pieces are read at once by the calling (decode) thread. Remote ones are awaited; whoever asks
reserves their bytes in a ByteBudget first and holds them until they are decoded. The budget is granted
in the order of asking, so that a late patch never starves an early one.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from online_patching.errors import ObjectNotFoundError
from online_patching.plan import ReadPlan, Tile, merge_ranges
from online_patching.slide_index import SlideIndex
from online_patching.stats import Stats
from online_patching.stores import Stores

DEFAULT_GAP_BYTES = 16 * 2**10
"""Remote tiles this close together are fetched in one request: less than what a request costs."""


@dataclass(frozen=True, slots=True)
class Piece:
    """One stored piece of a tile: the object it lies in, its range there (stop None: all of it), and the
    object's token."""

    tile: Tile
    part: int
    key: str
    start: int
    stop: int | None
    token: str = ""


def pieces_of(index: SlideIndex, plan: ReadPlan) -> list[Piece]:
    """What a plan needs from storage, in tile order. Tiles that are not stored have empty ranges."""
    level = index.levels[plan.level]
    out = []
    for tile in plan.tiles:
        for part in range(level.parts):
            if level.keys is not None:
                key = f"{index.uri.rstrip('/')}/{level.keys.key(tile.row, tile.column, part)}"
                out.append(Piece(tile, part, key, 0, None))
            else:
                start, stop = level.byte_range(tile.number * level.parts + part)
                if start == stop:  # not stored: it lies nowhere
                    out.append(Piece(tile, part, index.uri, 0, 0))
                else:
                    out.append(Piece(tile, part, *index.locate(start, stop)))
    return out


Range = tuple[int, int]
"""First byte, and the one past the last."""

Body = bytes | None
"""A piece's bytes; None where the container says that nothing is stored (it is all fill value)."""


def fetch_local(index: SlideIndex, pieces: list[Piece], stores: Stores, stats: Stats) -> list[Body]:
    """The bytes of each piece of a local slide."""
    out: list[Body] = []
    for piece in pieces:
        if piece.stop == piece.start:
            out.append(None)
            continue
        try:
            out.append(stores.local.read(piece.key, piece.start, piece.stop))
        except ObjectNotFoundError:
            if piece.stop is not None:
                raise
            out.append(None)  # an absent Zarr chunk holds the fill value
    stored = [len(body) for body in out if body is not None]
    size = sum(stored)
    stats.add(tiles=len(pieces), requests=len(stored), bytes_wanted=size, bytes_read=size)
    return out


@dataclass(frozen=True, slots=True)
class Request:
    """What to ask a remote store for one patch: merged ranges of each object, and the bytes to reserve."""

    ranges: dict[str, list[tuple[int, int]]]
    size_bytes: int


def plan_request(
    index: SlideIndex, plan: ReadPlan, pieces: list[Piece], gap_bytes: int = DEFAULT_GAP_BYTES
) -> Request:
    """Ranges of the objects that pieces lie in; for chunks, whose sizes are not known, what they decode to."""
    level = index.levels[plan.level]
    if level.keys is not None:
        decoded = level.tile_width_px * level.tile_height_px * level.codec.samples
        return Request({}, decoded * len(pieces))
    wanted: dict[str, list[Range]] = {}
    for piece in pieces:
        wanted.setdefault(piece.key, []).append((piece.start, piece.stop or 0))
    ranges = {key: merge_ranges(some, gap_bytes) for key, some in wanted.items()}
    return Request(ranges, sum(b - a for some in ranges.values() for a, b in some))


async def fetch_remote(
    index: SlideIndex, pieces: list[Piece], request: Request, stores: Stores, stats: Stats
) -> list[Body]:
    """The bytes of each piece of a remote slide. Reserve `request.size_bytes` around this and decoding."""
    if index.levels[0].keys is not None:
        return await _fetch_chunks(pieces, stores, stats)
    bodies: list[Body] = [None] * len(pieces)

    async def one(key: str) -> None:
        places = [i for i, piece in enumerate(pieces) if piece.key == key]
        wanted = [(pieces[i].start, pieces[i].stop or 0) for i in places]
        token, ranges = pieces[places[0]].token, request.ranges[key]
        got = await fetch_ranges(key, token, wanted, ranges, stores, stats)
        for i, body in zip(places, got, strict=True):
            bodies[i] = body or None

    await asyncio.gather(*(one(key) for key in request.ranges))
    return bodies


async def fetch_ranges(
    uri: str,
    token: str,
    pieces: list[Range],
    ranges: list[Range],
    stores: Stores,
    stats: Stats,
) -> list[bytes]:
    """The bytes of each piece (start, stop) of one object, b"" for an empty one, by requesting `ranges`.

    `ranges` are the pieces merged (plan.merge_ranges). They are requested at once; the first error
    is raised when all have ended.
    """
    store = stores.remote(uri)
    if len(ranges) == 1:
        bodies = [await store.read(uri, *ranges[0], token)]
    else:
        reads = (store.read(uri, start, stop, token) for start, stop in ranges)
        bodies = list(await asyncio.gather(*reads))
    count_fetched(pieces, ranges, stats)
    return cut(pieces, ranges, bodies)


def count_fetched(pieces: Sequence[Range], ranges: Sequence[Range], stats: Stats) -> None:
    """Count one request a range and the pieces' own bytes."""
    stats.add(
        tiles=len(pieces),
        requests=len(ranges),
        bytes_wanted=sum(stop - start for start, stop in merge_ranges(pieces, 0)),
        bytes_read=sum(stop - start for start, stop in ranges),
    )


def cut(pieces: Sequence[Range], ranges: Sequence[Range], bodies: Sequence[bytes]) -> list[bytes]:
    """The bytes of each piece out of those of the ranges, b"" for an empty piece."""
    out = []
    for start, stop in pieces:
        if start == stop:
            out.append(b"")
            continue
        k = next(i for i, (a, b) in enumerate(ranges) if a <= start and stop <= b)
        out.append(bodies[k][start - ranges[k][0] : stop - ranges[k][0]])
    return out


async def _fetch_chunks(pieces: list[Piece], stores: Stores, stats: Stats) -> list[Body]:
    async def one(piece: Piece) -> Body:
        try:
            return await stores.remote(piece.key).read(piece.key, 0, None)
        except ObjectNotFoundError:
            return None  # an absent Zarr chunk holds the fill value

    out = await asyncio.gather(*(one(piece) for piece in pieces))
    size = sum(len(body) for body in out if body is not None)
    stats.add(tiles=len(pieces), requests=len(pieces), bytes_wanted=size, bytes_read=size)
    return list(out)


class ByteBudget:
    """At most `limit` bytes in flight, granted strictly in the order of asking.

    A request larger than the limit is granted when nothing else is in flight.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.in_flight = 0
        self.peak = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def reserve(self, size: int) -> _Reservation:
        """An async context that holds `size` bytes of the budget."""
        return _Reservation(self, size)

    async def acquire(self, size: int) -> None:
        """Wait for `size` bytes of the budget."""
        if not self._waiting and self._fits(size):
            self._take(size)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release(size)
            raise

    def release(self, size: int) -> None:
        """Give `size` bytes back and wake whoever is next."""
        self.in_flight -= size
        while self._waiting and (
            self._waiting[0][1].cancelled() or self._fits(self._waiting[0][0])
        ):
            waiting, turn = self._waiting.popleft()
            if not turn.cancelled():
                self._take(waiting)
                turn.set_result(None)

    def _fits(self, size: int) -> bool:
        return self.in_flight == 0 or self.in_flight + size <= self.limit

    def _take(self, size: int) -> None:
        self.in_flight += size
        self.peak = max(self.peak, self.in_flight)


class _Reservation:
    def __init__(self, budget: ByteBudget, size: int) -> None:
        self.budget, self.size = budget, size

    async def __aenter__(self) -> None:
        await self.budget.acquire(self.size)

    async def __aexit__(self, *_: object) -> None:
        self.budget.release(self.size)
