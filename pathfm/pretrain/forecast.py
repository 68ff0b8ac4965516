"""What a loader would ask of its stores for some draws: counted from plans, without a byte being read.

The same arithmetic as loading/remote.py, draw by draw: local tiles are one request each, remote ones are
merged across gaps, per patch (or per read neighbourhood). What byte ranges do not describe is marked:
Zarr chunks, whose sizes nobody knows before reading (counted as what they decode to), and slides that
another library reads, of which only patches are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from online_patching import Corpus
from online_patching.batch_plan import BatchPlan, can_plan, plan_batch
from online_patching.batch_plan.runs import Piece, merge, pieces_of, size_of
from online_patching.loading.batch import DrawSource
from online_patching.sampling.draws import Draws
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


def forecast(sampler: DrawSource, n_draws: int, gap_bytes: int) -> Iterator[tuple[Draws, Reads]]:
    """The first draws of a sampler and how each is read, some thousands at a time."""
    step = _AT_ONCE // sampler.patches_per_read * sampler.patches_per_read
    for first in range(0, n_draws, step):
        numbers = np.arange(first, min(n_draws, first + step))
        draws = sampler.draw_batch(numbers)
        yield draws, _reads(sampler, draws, gap_bytes)


def _reads(sampler: DrawSource, draws: Draws, gap_bytes: int) -> Reads:
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
        parts.append(_singles(sampler, draws.take(chosen), chosen))
    columns = ([getattr(part, column.name) for part in parts] for column in fields(Reads))
    return Reads(*(np.concatenate(column) for column in columns))


def _planned(
    sampler: DrawSource, draws: Draws, places: Ints, gap_bytes: int, remote: bool
) -> Reads:
    """Reads of slides that are planned as arrays: one a canvas."""
    views = 1 + len(sampler.context)
    expanded = sampler.expand(draws)
    targets = np.arange(len(expanded))
    plan = plan_batch(sampler.corpus, expanded, sampler.size_px, targets, sampler.patches_per_read)
    first_row = plan.row[plan.canvases["first_output"]]
    counts = np.asarray(
        [_counts(plan, canvas, its, gap_bytes, remote) for canvas, its in _by_canvas(plan)]
    )
    tiles, requests, wanted, read, exact = counts.reshape(-1, 5).T
    return Reads(
        *(places[first_row // views], plan.slide, tiles, requests, wanted, read), exact.astype(bool)
    )


def _by_canvas(plan: BatchPlan) -> Iterator[tuple[int, list[Piece]]]:
    every = pieces_of(plan)
    return ((canvas, every[plan.tiles_of(canvas)]) for canvas in range(len(plan)))


def _counts(
    plan: BatchPlan, canvas: int, pieces: list[Piece], gap_bytes: int, remote: bool
) -> tuple[int, int, int, int, bool]:
    """Tiles, requests, bytes wanted and read of one canvas, and whether they are exact."""
    exact = all(stop is not None for _, _, stop in pieces)
    if not remote:
        stored = [piece for piece in pieces if piece[1] != piece[2]]
        size = size_of(plan, canvas, stored)
        return len(pieces), len(stored), size, size, exact
    runs = merge(pieces, gap_bytes)
    wanted = size_of(plan, canvas, merge(pieces, 0))
    return len(pieces), len(runs), wanted, size_of(plan, canvas, runs), exact


def _singles(sampler: DrawSource, draws: Draws, places: Ints) -> Reads:
    """Reads of slides that another library reads: only its patches are known."""
    views = 1 + len(sampler.context)
    rows = []
    for number, ref in enumerate(sampler.refs(sampler.expand(draws))):
        rows.append((int(places[number // views]), ref.slide, 0, 0, 0, 0, False))
    return Reads.of(rows)


def store_of(uri: str) -> str:
    """Where a slide's requests go: a host or bucket, or "local files"."""
    return "/".join(uri.split("/", 3)[:3]) if is_remote(uri) else "local files"


def corpus_bytes(corpus: Corpus) -> int:
    """Bytes of all slides together, as far as they are known."""
    return sum(int(block["size_bytes"].sum()) for _, block in corpus.blocks())
