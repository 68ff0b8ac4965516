"""What a loader would ask of its stores for some draws: counted from plans, without a byte being read.

The same arithmetic as loading/threads.py, draw by draw: local tiles are one request each, remote ones are
merged across gaps, per patch (or per read neighbourhood). What byte ranges do not describe is marked:
Zarr chunks, whose sizes nobody knows before reading (counted as what they decode to), and slides that
another library reads, of which only patches are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from online_patching import Corpus, PatchSampler
from online_patching.batch_plan import BatchPlan, can_plan, plan_batch
from online_patching.fetch import Piece, pieces_of, plan_request
from online_patching.geometry import PatchRef
from online_patching.plan import merge_ranges, plan_patch
from online_patching.sampling.draws import Draws
from online_patching.slide_index import SlideIndex
from online_patching.stores import is_remote

_AT_ONCE = 4096

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Reads:
    """Columns, one row a read. `place` is the draw it is for (the first, where several share it).

    `bytes_wanted` are those of the tiles touched, `bytes_read` those asked for with the gaps between.
    `exact` is False where they are an upper bound, or not known (0).
    """

    place: Ints
    slide: Ints
    tiles: Ints
    requests: Ints
    bytes_wanted: Ints
    bytes_read: Ints
    exact: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.place)

    @classmethod
    def of(cls, rows: list[tuple[int, int, int, int, int, int, bool]]) -> Reads:
        """Columns of rows."""
        place, slide, tiles, requests, wanted, read, exact = np.asarray(rows, np.int64).T
        return cls(place, slide, tiles, requests, wanted, read, exact.astype(bool))


def forecast(sampler: PatchSampler, n_draws: int, gap_bytes: int) -> Iterator[tuple[Draws, Reads]]:
    """The first draws of a sampler and how each is read, some thousands at a time."""
    step = _AT_ONCE // sampler.patches_per_read * sampler.patches_per_read
    for first in range(0, n_draws, step):
        numbers = np.arange(first, min(n_draws, first + step))
        draws = sampler.draw_batch(numbers)
        yield draws, _reads(sampler, draws, gap_bytes)


def _reads(sampler: PatchSampler, draws: Draws, gap_bytes: int) -> Reads:
    corpus = sampler.corpus
    away = {row: is_remote(corpus.uri(row)) for row in np.unique(draws.slide).tolist()}
    remote = np.asarray([away[row] for row in draws.slide.tolist()], bool)
    planned = can_plan(corpus, draws.slide)
    parts = []
    for from_afar in (False, True):
        chosen = np.flatnonzero(planned & (remote == from_afar))
        if len(chosen):
            parts.append(_planned(sampler, draws.take(chosen), chosen, gap_bytes, from_afar))
    chosen = np.flatnonzero(~planned)
    if len(chosen):
        parts.append(_singles(sampler, draws.take(chosen), chosen, gap_bytes, remote[chosen]))
    columns = ([getattr(part, column.name) for part in parts] for column in fields(Reads))
    return Reads(*(np.concatenate(column) for column in columns))


def _planned(
    sampler: PatchSampler, draws: Draws, places: Ints, gap_bytes: int, remote: bool
) -> Reads:
    """Reads of slides that are planned as arrays: one a canvas."""
    views = 1 + len(sampler.context)
    expanded = sampler.expand(draws)
    targets = np.arange(len(expanded))
    plan = plan_batch(sampler.corpus, expanded, sampler.size_px, targets, sampler.patches_per_read)
    first_row = plan.row[plan.canvases["first_output"]]
    tiles = plan.canvases["n_tiles"].astype(np.int64)
    owner = np.repeat(np.arange(len(plan)), tiles)
    lengths = plan.tiles["length"]
    wanted = np.bincount(owner, lengths, len(plan)).astype(np.int64)
    requests = np.bincount(owner, lengths > 0, len(plan)).astype(np.int64)
    read = wanted
    if remote:
        wanted, read, requests = _merged(plan, gap_bytes)
    return Reads(
        *(places[first_row // views], plan.slide, tiles, requests, wanted, read),
        np.ones(len(plan), bool),
    )


def _merged(plan: BatchPlan, gap_bytes: int) -> tuple[Ints, Ints, Ints]:
    """Bytes wanted, bytes read and requests of each canvas of a remote plan."""
    out = np.empty((3, len(plan)), np.int64)
    starts, stops = plan.tiles["start"], plan.tiles["start"] + plan.tiles["length"]
    every = list(zip(starts.tolist(), stops.tolist(), strict=True))
    for canvas in range(len(plan)):
        pieces = every[plan.tiles_of(canvas)]
        ranges = merge_ranges(pieces, gap_bytes)
        out[:, canvas] = _size(merge_ranges(pieces, 0)), _size(ranges), len(ranges)
    return out[0], out[1], out[2]


def _size(ranges: list[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def _singles(
    sampler: PatchSampler, draws: Draws, places: Ints, gap_bytes: int, remote: NDArray[np.bool_]
) -> Reads:
    """Reads of slides that are planned patch by patch."""
    views = 1 + len(sampler.context)
    rows = []
    for number, ref in enumerate(sampler.refs(sampler.expand(draws))):
        at = number // views
        index = sampler.corpus.index(ref.slide)
        counts = _single(index, ref, gap_bytes, bool(remote[at]))
        rows.append((int(places[at]), ref.slide, *counts))
    return Reads.of(rows)


def _single(
    index: SlideIndex, ref: PatchRef, gap_bytes: int, remote: bool
) -> tuple[int, int, int, int, bool]:
    """Tiles, requests, bytes wanted and read of one patch, and whether they are exact."""
    plan = plan_patch(index, ref)
    if index.fallback:
        return 0, 0, 0, 0, False
    pieces = pieces_of(index, plan)
    request = plan_request(index, plan, pieces, gap_bytes)
    if index.levels[plan.level].keys is not None:
        return len(pieces), len(pieces), request.size_bytes, request.size_bytes, False
    if not remote:
        sizes = [(piece.stop or 0) - piece.start for piece in pieces]
        return len(pieces), sum(size > 0 for size in sizes), sum(sizes), sum(sizes), True
    count = sum(len(some) for some in request.ranges.values())
    return len(pieces), count, _wanted(pieces), request.size_bytes, True


def _wanted(pieces: list[Piece]) -> int:
    by_object: dict[str, list[tuple[int, int]]] = {}
    for piece in pieces:
        by_object.setdefault(piece.key, []).append((piece.start, piece.stop or 0))
    return sum(_size(merge_ranges(some, 0)) for some in by_object.values())


def store_of(uri: str) -> str:
    """Where a slide's requests go: a host or bucket, or "local files"."""
    return "/".join(uri.split("/", 3)[:3]) if is_remote(uri) else "local files"


def corpus_bytes(corpus: Corpus) -> int:
    """Bytes of all slides together, as far as they are known."""
    return sum(int(block["size_bytes"].sum()) for _, block in corpus.blocks())
