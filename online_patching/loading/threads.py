"""The loader's engine in one process: plans batches in order, network on an event loop, decoding in threads.

A requested batch is drawn and planned by one planning thread (in the order of asking, so that bytes are
reserved in that order too). Its patches are then read in pieces: a few canvases of local JPEG slides a
piece, one canvas of a remote one, or a single patch of any other container. A piece that fails hands its
rows back; they move to their next attempt, f(seed, draw, attempt), and are planned again.

Nothing here waits for a decode thread inside a decode thread, or for the loop on the loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching import native
from online_patching.batch_plan import can_plan, plan_batch
from online_patching.canvases import Failed, read_bodies, read_local
from online_patching.errors import (
    LoaderError,
    ObjectChangedError,
    ObjectNotFoundError,
    PatchingError,
    SamplerError,
    SlideError,
    StoreError,
)
from online_patching.fetch import (
    ByteBudget,
    Range,
    count_fetched,
    cut,
    fetch_local,
    fetch_ranges,
    fetch_remote,
    pieces_of,
    plan_request,
)
from online_patching.loading.batch import (
    FILTERED,
    DrawSource,
    Failure,
    LoaderOptions,
    PatchBatch,
    batch_shape,
)
from online_patching.loading.turn import BatchInMaking, Turn
from online_patching.plan import merge_ranges, plan_patch
from online_patching.sampling.sampler import MAX_ATTEMPTS, Draws
from online_patching.slide import check_unchanged, finish, finish_fallback
from online_patching.slide_index import SlideIndex
from online_patching.stats import Stats
from online_patching.stores import Stores, is_remote
from online_patching.stores.feed import Feed, Group

_REPLACED = (SlideError, ObjectNotFoundError, ObjectChangedError)
"""Failures of one slide, for which a draw moves to its next attempt. Other store errors stop."""

_PIECE = 64
"""The most canvases a decode thread takes at once: each call has its own cost in Python."""


class ThreadEngine:
    """Starts every patch of a requested batch at once; `take` waits for the oldest batch."""

    def __init__(self, sampler: DrawSource, options: LoaderOptions, stats: Stats) -> None:
        self.sampler, self.options, self.stats = sampler, options, stats
        self.stores = Stores(options.retry)
        self.budget = ByteBudget(options.bytes_in_flight)
        self._views = 1 + len(getattr(sampler, "context", ()))
        self._per_read = int(getattr(sampler, "patches_per_read", 1))
        self._filters = tuple(getattr(sampler, "filters", ()))
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="patch-plan")
        self._pool = ThreadPoolExecutor(options.threads, thread_name_prefix="patch-decode")
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="patch-check")
        self._pending: deque[BatchInMaking] = deque()
        self._checked: set[str] = set()
        self._retries_seen = 0
        # The table is the process's, not this engine's: it only ever grows.
        if options.remember_bytes > native.remembered()["limit"]:
            native.remember(options.remember_bytes)
        self._from_states_seen = native.remembered()["hits"]
        self._feed: Feed | None = None
        self._lock = threading.Lock()

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
        if self._feed is not None:
            self.stores.loop.call(self._feed.close)
        self.stores.cancel_all()
        self._planner.shutdown(wait=True, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._checker.shutdown(wait=True, cancel_futures=True)
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
        self._read(batch, np.arange(len(draws)), self._per_read)

    def _read(self, batch: BatchInMaking, rows: NDArray[np.int64], per_read: int = 1) -> None:
        """Plan these rows of a batch and start reading them."""
        corpus = self.sampler.corpus
        columns = batch.drawn().take(rows)
        remote = np.asarray([is_remote(corpus.uri(int(row))) for row in columns.slide], bool)
        planned = can_plan(corpus, columns.slide)
        for away in (False, True):
            chosen = np.flatnonzero(planned & (remote == away))
            if len(chosen):
                self._read_planned(batch, rows[chosen], columns.take(chosen), away, per_read)
        for k in np.flatnonzero(~planned):
            self._read_single(batch, int(rows[k]), bool(remote[k]))

    def _read_planned(
        self,
        batch: BatchInMaking,
        rows: NDArray[np.int64],
        columns: Draws,
        remote: bool,
        per_read: int,
    ) -> None:
        """Rows of JPEG slides: many canvases a piece where they are local, one where they are not."""
        views = self._expand(columns)
        places = (rows[:, None] * self._views + np.arange(self._views)).reshape(-1)
        plan = plan_batch(self.sampler.corpus, views, self.sampler.size_px, places, per_read)
        turn = Turn(batch, plan, places, self._views)
        if remote:
            self._read_remote(turn)
            return
        # Even pieces, two a thread where there are that many, so that no thread waits long for the last.
        pieces = max(-(-len(plan) // _PIECE), min(2 * self.options.threads, len(plan)))
        edges = np.linspace(0, len(plan), pieces + 1).astype(int).tolist()
        for first, stop in pairwise(edges):
            self._in_pool(batch, self._local_canvases, turn, first, stop)

    def _local_canvases(self, turn: Turn, first: int, stop: int) -> None:
        failed = read_local(
            self.sampler.corpus,
            turn.plan,
            first,
            stop,
            turn.batch.pixels,
            self.stores.local,
            self.stats,
        )
        self._arrived(turn, range(first, stop), failed)

    def _read_remote(self, turn: Turn) -> None:
        """Canvases over HTTP go through the feed, without a task for any; others are awaited."""
        corpus, plan = self.sampler.corpus, turn.plan
        groups = []
        starts, stops = plan.tiles["start"], plan.tiles["start"] + plan.tiles["length"]
        every = list(zip(starts.tolist(), stops.tolist(), strict=True))
        for canvas, slide in enumerate(plan.slide.tolist()):
            uri, token = corpus.uri(slide), corpus.token(slide)
            pieces = every[plan.tiles_of(canvas)]
            ranges = merge_ranges(pieces, self.options.gap_bytes)
            if uri.startswith("http"):
                groups.append(Group(uri, token, ranges, (turn, canvas, pieces)))
            else:
                self._on_loop(turn.batch, self._remote_canvas(turn, canvas, pieces, ranges))
        if groups:
            self._fed().ask(groups)

    def _fed(self) -> Feed:
        """The feed of decode threads over HTTP, made when first needed."""
        with self._lock:
            if self._feed is None:
                self._feed = Feed(
                    self.stores.http(),
                    self.stores.loop.loop,
                    self._pool.submit,
                    self._take_groups,
                    threads=self.options.threads,
                    limit_bytes=self.options.bytes_in_flight,
                )
            return self._feed

    def _take_groups(self, groups: list[Group]) -> None:
        """Decode what the feed hands over, one native call for all of a turn; errors belong to batches."""
        by_turn: dict[Turn, list[Group]] = {}
        for group in groups:
            by_turn.setdefault(group.tag[0], []).append(group)
        for turn, some in by_turn.items():
            try:
                self._take_some(turn, some)
            except BaseException as error:
                turn.batch.fail(error)

    def _take_some(self, turn: Turn, groups: list[Group]) -> None:
        failed: Failed = {}
        canvases: list[int] = []
        bodies: list[bytes] = []
        for group in groups:
            _, canvas, pieces = group.tag
            if isinstance(group.error, _REPLACED):
                failed[canvas] = group.error
            elif group.error is not None:
                raise group.error
            else:
                canvases.append(canvas)
                bodies += cut(pieces, group.ranges, group.bodies)
                count_fetched(pieces, group.ranges, self.stats)
        if canvases:
            batch = turn.batch.pixels
            failed |= read_bodies(self.sampler.corpus, turn.plan, canvases, bodies, batch)
        self._arrived(turn, [group.tag[1] for group in groups], failed)

    async def _remote_canvas(
        self, turn: Turn, canvas: int, pieces: list[Range], ranges: list[Range]
    ) -> None:
        corpus = self.sampler.corpus
        slide = int(turn.plan.slide[canvas])
        uri, token = corpus.uri(slide), corpus.token(slide)
        try:
            if uri not in self._checked:
                # Off the loop, and not in the decode pool: this thread waits for the loop.
                await self._checked_apart(corpus.index(slide))
            async with self.budget.reserve(sum(stop - start for start, stop in ranges)):
                bodies = await fetch_ranges(uri, token, pieces, ranges, self.stores, self.stats)
                await self._pooled(self._remote_bodies, turn, canvas, bodies)
        except _REPLACED as error:
            await self._pooled(self._arrived, turn, [canvas], {canvas: error})

    def _remote_bodies(self, turn: Turn, canvas: int, bodies: list[bytes]) -> None:
        failed = read_bodies(self.sampler.corpus, turn.plan, [canvas], bodies, turn.batch.pixels)
        self._arrived(turn, [canvas], failed)

    def _arrived(self, turn: Turn, canvases: Sequence[int], failed: Failed) -> None:
        """These canvases are there or failed: go on with the rows of which nothing is missing."""
        good, bad, alone = turn.arrived(canvases, failed)
        if alone:  # a shared canvas failed: only those that touch the damage are to be replaced
            self._read(turn.batch, np.asarray(alone))
        self._settle(turn.batch, good, bad)

    # --- containers that are read patch by patch ---

    def _read_single(self, batch: BatchInMaking, row: int, remote: bool) -> None:
        # Fallback readers fetch in their own processes: for a thread here they are local.
        if remote and not self._index_of(batch, row).fallback:
            self._on_loop(batch, self._remote_single(batch, row))
        else:
            self._in_pool(batch, self._local_single, batch, row)

    def _index_of(self, batch: BatchInMaking, row: int) -> SlideIndex:
        return self.sampler.corpus.index(int(batch.drawn().slide[row]))

    def _local_single(self, batch: BatchInMaking, row: int) -> None:
        views = self.sampler.refs(self._expand(batch.drawn().take(np.asarray([row]))))
        index = self.sampler.corpus.index(views[0].slide)
        try:
            self._check(index)
            for ref, out in zip(views, self._targets(batch, row), strict=True):
                plan = plan_patch(index, ref)
                if index.fallback:
                    out[:] = finish_fallback(index, plan)
                else:
                    pieces = pieces_of(index, plan)
                    data = fetch_local(index, pieces, self.stores, self.stats)
                    out[:] = finish(index, plan, pieces, data)
        except _REPLACED as error:
            self._settle(batch, [], {row: error})
        else:
            self._settle(batch, [row], {})

    async def _remote_single(self, batch: BatchInMaking, row: int) -> None:
        views = self.sampler.refs(self._expand(batch.drawn().take(np.asarray([row]))))
        index = self.sampler.corpus.index(views[0].slide)
        try:
            if index.uri not in self._checked and not index.uri.startswith("http"):
                await self._checked_apart(index)
            for ref, out in zip(views, self._targets(batch, row), strict=True):
                plan = plan_patch(index, ref)
                pieces = pieces_of(index, plan)
                request = plan_request(index, plan, pieces, self.options.gap_bytes)
                async with self.budget.reserve(request.size_bytes):
                    data = await fetch_remote(index, pieces, request, self.stores, self.stats)
                    out[:] = await self._pooled(finish, index, plan, pieces, data)
        except _REPLACED as error:
            await self._pooled(self._settle, batch, [], {row: error})
        else:
            await self._pooled(self._settle, batch, [row], {})

    def _targets(self, batch: BatchInMaking, row: int) -> list[NDArray[np.uint8]]:
        return [batch.pixels[row]] if self._views == 1 else list(batch.pixels[row])

    async def _checked_apart(self, index: SlideIndex) -> None:
        """Check a slide in a thread for that alone: it waits for the loop, whose own threads stores need."""
        await asyncio.get_running_loop().run_in_executor(self._checker, self._check, index)

    def _check(self, index: SlideIndex) -> None:
        """At the first touch of a slide that nothing else checks: is it the one that was indexed?"""
        if index.uri not in self._checked:
            check_unchanged(index, self.stores)
            self._checked.add(index.uri)

    # --- the end of a row, or its next attempt ---

    def _settle(
        self, batch: BatchInMaking, good: list[int], bad: Mapping[int, PatchingError]
    ) -> None:
        """Count rows that are there; replace those that failed or that a pixel filter refuses."""
        reasons = {row: _reason(error) for row, error in bad.items()}
        if self._filters and good:
            first_view = batch.pixels[good] if self._views == 1 else batch.pixels[good, 0]
            for one in self._filters:
                for row, keep in zip(good, one.keep(first_view), strict=True):
                    if not keep:
                        reasons.setdefault(row, f"{FILTERED}{one.name}")
            good = [row for row in good if row not in reasons]
        if reasons:
            rows = np.asarray(sorted(reasons))
            self._replace(batch, rows, [reasons[int(row)] for row in rows])
            self._read(batch, rows)
        with batch.lock:
            batch.left -= len(good)
            if good and not batch.left and not batch.done.done():
                batch.done.set_result(None)

    def _replace(self, batch: BatchInMaking, rows: NDArray[np.int64], reasons: list[str]) -> None:
        """Give rows the next attempt of their draws; f(seed, draw, attempt) alone."""
        columns = batch.drawn().take(rows)
        names = [self.sampler.corpus.slide_id(int(row)) for row in columns.slide]
        found = zip(columns.draw.tolist(), columns.attempt.tolist(), names, reasons, strict=True)
        failures = [Failure(*one) for one in found]
        last = failures[int(columns.attempt.argmax())]
        if last.attempt + 1 >= MAX_ATTEMPTS:
            raise LoaderError(
                f"draw {last.draw} failed {MAX_ATTEMPTS} times, last on {last.slide_id}: {last.reason}"
            )
        try:
            again = self.sampler.draw_batch(columns.draw, columns.attempt + 1, batch.barred)
        except SamplerError as cause:
            raise LoaderError(
                f"draw {last.draw} cannot be replaced after {last.slide_id}: {last.reason} ({cause})"
            ) from None
        with batch.lock:
            batch.failures += failures
            for name, column in vars(batch.drawn()).items():
                column[rows] = getattr(again, name)

    def _expand(self, columns: Draws) -> Draws:
        """Each draw followed by its context views."""
        if self._views == 1:
            return columns
        expanded: Draws = self.sampler.expand(columns)  # type: ignore[attr-defined]
        return expanded

    # --- running things so that no error is lost ---

    def _in_pool(self, batch: BatchInMaking, work: Callable[..., None], *args: Any) -> None:
        self._submit(self._pool, batch, work, *args)

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

    def _on_loop(self, batch: BatchInMaking, work: Coroutine[Any, Any, None]) -> None:
        def ended(future: Future[None]) -> None:
            if future.cancelled():
                batch.fail(LoaderError("the loader was closed while this batch was being made."))
            elif (error := future.exception()) is not None:
                batch.fail(error)

        self.stores.loop.submit(work).add_done_callback(ended)

    async def _pooled(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)


def _reason(error: PatchingError) -> str:
    told = error.reason if isinstance(error, SlideError | StoreError) else str(error)
    return f"{type(error).__name__}: {told}"
