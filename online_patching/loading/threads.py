"""The loader's engine in one process: plans batches in order, network on an event loop, decoding in threads.

A requested batch is drawn and planned by one planning thread (in the order of asking, so that bytes are
reserved in that order too). Its patches are then read in pieces: a few canvases of local slides a piece,
one canvas of a remote one (remote.py), or a single patch of a slide that another library reads. A piece
that fails hands its rows back; they move to their next attempt (replacing.py) and are planned again.

Nothing here waits for a decode thread inside a decode thread, or for the loop on the loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching import native
from online_patching.batch_plan import can_plan, plan_batch
from online_patching.batch_plan.pieces import CHUNKS
from online_patching.canvases import Failed, read_local
from online_patching.errors import LoaderError, PatchingError
from online_patching.loading.batch import DrawSource, LoaderOptions, PatchBatch, batch_shape
from online_patching.loading.remote import REPLACED, RemoteReader
from online_patching.loading.replacing import reasons_against, replace
from online_patching.loading.turn import BatchInMaking, Turn
from online_patching.plan import plan_patch
from online_patching.sampling.sampler import Draws
from online_patching.slide import check_unchanged, finish_fallback
from online_patching.stats import Stats
from online_patching.stores import Stores, is_remote

_PIECE = 64
"""The most canvases a decode thread takes at once: each call has its own cost in Python."""


class ThreadEngine:
    """Starts every patch of a requested batch at once; `take` waits for the oldest batch."""

    def __init__(self, sampler: DrawSource, options: LoaderOptions, stats: Stats) -> None:
        self.sampler, self.options, self.stats = sampler, options, stats
        self.stores = Stores(options.retry, options.connections)
        self._views = 1 + len(sampler.context)
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="patch-plan")
        self._pool = ThreadPoolExecutor(options.threads, thread_name_prefix="patch-decode")
        self.remote = RemoteReader(
            sampler.corpus, options, stats, self.stores, self._pool.submit, self._arrived
        )
        self._pending: deque[BatchInMaking] = deque()
        self._checked: set[int] = set()
        self._retries_seen = 0
        # The table is the process's, not this engine's: it only ever grows.
        if options.remember_bytes > native.remembered()["limit"]:
            native.remember(options.remember_bytes)
        self._from_states_seen = native.remembered()["hits"]

    def request(
        self,
        draws: NDArray[np.int64],
        barred: Mapping[int, int] | None = None,
        into: NDArray[np.uint8] | None = None,
    ) -> None:
        """Start a batch, writing its pixels into `into` (of `batch_shape`) where given."""
        shape = batch_shape(self.sampler, len(draws))
        pixels = np.empty(shape, np.uint8) if into is None else into
        batch = BatchInMaking(pixels, dict(barred or {}))
        self._pending.append(batch)
        self._submit(self._planner, batch, self._begin, batch, np.asarray(draws, np.int64))

    def take(self) -> PatchBatch:
        """The oldest requested batch; the first error of any of its patches is raised."""
        batch = self._pending[0]
        batch.done.result()
        self._pending.popleft()
        self.stats.add(retries=self.stores.retries - self._retries_seen)
        self._retries_seen = self.stores.retries
        from_states = native.remembered()["hits"]
        self.stats.add(from_states=max(0, from_states - self._from_states_seen))
        self._from_states_seen = from_states
        return PatchBatch(batch.pixels, batch.drawn(), self.sampler, sorted(batch.failures))

    def close(self) -> None:
        """Cancel what has not started, wait for what has, close clients."""
        self.remote.close()
        self.stores.cancel_all()
        self._planner.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.stores.close()
        for batch in self._pending:
            batch.fail(LoaderError("the loader was closed while this batch was being made."))
        self._pending.clear()

    # --- a batch's way: begin -> read rows -> arrived, or read again ---

    def _begin(self, batch: BatchInMaking, draws: NDArray[np.int64]) -> None:
        batch.columns = self.sampler.draw_batch(draws, 0, batch.barred)
        batch.left = len(draws)
        if not len(draws):
            batch.done.set_result(None)
        self._read(batch, np.arange(len(draws)), self.sampler.patches_per_read)

    def _read(self, batch: BatchInMaking, rows: NDArray[np.int64], per_read: int = 1) -> None:
        """Plan these rows of a batch and start reading them."""
        corpus = self.sampler.corpus
        columns = batch.drawn().take(rows)
        slides, at = np.unique(columns.slide, return_inverse=True)
        away = np.asarray([is_remote(corpus.uri(row)) for row in slides.tolist()], bool)[at]
        planned = can_plan(corpus, columns.slide)
        for remote in (False, True):
            chosen = np.flatnonzero(planned & (away == remote))
            if len(chosen):
                turn = self._planned(batch, rows[chosen], columns.take(chosen), per_read)
                (self.remote.read if remote else self._read_local)(turn)
        for row in rows[~planned].tolist():
            self._submit(self._pool, batch, self._read_single, batch, row)

    def _planned(
        self, batch: BatchInMaking, rows: NDArray[np.int64], columns: Draws, per_read: int
    ) -> Turn:
        views = self.sampler.expand(columns)
        places = (rows[:, None] * self._views + np.arange(self._views)).reshape(-1)
        plan = plan_batch(self.sampler.corpus, views, self.sampler.size_px, places, per_read)
        return Turn(batch, plan, places, self._views)

    def _read_local(self, turn: Turn) -> None:
        """Even pieces, two a thread where there are that many, so that no thread waits long for the last."""
        n = len(turn.plan)
        pieces = max(-(-n // _PIECE), min(2 * self.options.threads, n))
        edges = np.linspace(0, n, pieces + 1).astype(int).tolist()
        for first, stop in pairwise(edges):
            self._submit(self._pool, turn.batch, self._read_piece, turn, first, stop)

    def _read_piece(self, turn: Turn, first: int, stop: int) -> None:
        corpus, plan = self.sampler.corpus, turn.plan
        failed = self._first_touch(turn, first, stop)
        good = [i for i in range(first, stop) if i not in failed] if failed else []
        runs = [(first, stop)] if not failed else [(i, i + 1) for i in good]
        for a, b in runs:
            failed |= read_local(
                corpus, plan, a, b, turn.batch.pixels, self.stores.local, self.stats
            )
        self._arrived(turn, range(first, stop), failed)

    def _first_touch(self, turn: Turn, first: int, stop: int) -> Failed:
        """Canvases of Zarr slides that are not what was indexed: reading their chunks does not tell."""
        corpus, slides = self.sampler.corpus, turn.plan.slide[first:stop]
        failed: Failed = {}
        for slide in np.unique(slides[corpus.records["reader"][slides] == CHUNKS]).tolist():
            try:
                self._check(slide)
            except REPLACED as error:
                failed |= dict.fromkeys((np.flatnonzero(slides == slide) + first).tolist(), error)
        return failed

    def _arrived(self, turn: Turn, canvases: Sequence[int], failed: Failed) -> None:
        """These canvases are there or failed: go on with the rows of which nothing is missing."""
        good, bad, alone = turn.arrived(canvases, failed)
        if alone:  # a shared canvas failed: only those that touch the damage are to be replaced
            self._read(turn.batch, np.asarray(alone))
        self._settle(turn.batch, good, bad)

    def _read_single(self, batch: BatchInMaking, row: int) -> None:
        """A patch, and its context views, of a slide that another library reads."""
        views = self.sampler.refs(self.sampler.expand(batch.drawn().take(np.asarray([row]))))
        index = self.sampler.corpus.index(views[0].slide)
        out = batch.pixels[row].reshape(self._views, *batch.pixels.shape[-3:])
        try:
            self._check(views[0].slide)
            for ref, pixels in zip(views, out, strict=True):
                pixels[:] = finish_fallback(index, plan_patch(index, ref))
        except REPLACED as error:
            self._settle(batch, [], {row: error})
        else:
            self._settle(batch, [row], {})

    def _check(self, slide: int) -> None:
        """At the first touch of a slide that nothing else checks: is it the one that was indexed?"""
        if slide not in self._checked:
            check_unchanged(self.sampler.corpus.index(slide), self.stores)
            self._checked.add(slide)

    # --- the end of a row, or its next attempt ---

    def _settle(
        self, batch: BatchInMaking, good: list[int], bad: Mapping[int, PatchingError]
    ) -> None:
        """Count rows that are there; replace those that failed or that a pixel filter refuses."""
        reasons = reasons_against(self.sampler, batch, good, bad)
        if reasons:
            good = [row for row in good if row not in reasons]
            self._read(batch, replace(self.sampler, batch, reasons))
        with batch.lock:
            batch.left -= len(good)
            if good and not batch.left and not batch.done.done():
                batch.done.set_result(None)

    # --- running things so that no error is lost ---

    def _submit(
        self, pool: ThreadPoolExecutor, batch: BatchInMaking, work: Callable[..., None], *args: Any
    ) -> None:
        def guarded() -> None:
            try:
                work(*args)
            except BaseException as error:
                batch.fail(error)

        try:
            pool.submit(guarded)
        except RuntimeError as closing:  # the pool takes nothing any more
            batch.fail(closing)
