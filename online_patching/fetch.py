"""Runs plans against stores: the stored pieces of a patch's tiles, as bytes.

For a slide in a person's hands: local pieces are read at once, remote ones awaited together. Loaders plan
batches (batch_plan) and read remote ones through a feed (loading/remote.py).
"""

from __future__ import annotations

import asyncio
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
