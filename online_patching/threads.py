"""The loader's engine in one process: network on an event loop, decoding in threads."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from online_patching.batch import (
    DrawSource,
    Failure,
    LoaderOptions,
    PatchBatch,
    batch_shape,
    draw_with,
)
from online_patching.errors import (
    LoaderError,
    ObjectChangedError,
    ObjectNotFoundError,
    SamplerError,
    SlideError,
    StoreError,
)
from online_patching.fetch import ByteBudget, fetch_local, fetch_remote, pieces_of, plan_request
from online_patching.geometry import PatchRef
from online_patching.plan import plan_patch
from online_patching.sampler import MAX_ATTEMPTS, Draws
from online_patching.slide import check_unchanged, finish, finish_fallback
from online_patching.slide_index import SlideIndex
from online_patching.stats import Stats
from online_patching.stores import Stores, is_remote

_REPLACED = (SlideError, ObjectNotFoundError, ObjectChangedError)
"""Failures of one slide, for which a draw moves to its next attempt. Other store errors stop."""


@dataclass(eq=False)
class _Job:
    """One patch on its way: what to read now, where to, what failed before, and whether it is there."""

    row: Draws
    ref: PatchRef
    out: NDArray[np.uint8]
    barred: Mapping[int, int] | None
    failed: list[Failure] = field(default_factory=list)
    done: Future[None] = field(default_factory=Future)


@dataclass
class _Batch:
    pixels: NDArray[np.uint8]
    jobs: list[_Job]


class ThreadEngine:
    """Starts every patch of a requested batch at once; `take` gathers the oldest batch in order."""

    def __init__(self, sampler: DrawSource, options: LoaderOptions, stats: Stats) -> None:
        self.sampler, self.options, self.stats = sampler, options, stats
        self.stores = Stores(options.retry)
        self.budget = ByteBudget(options.bytes_in_flight)
        self._pool = ThreadPoolExecutor(options.threads, thread_name_prefix="patch-decode")
        self._pending: deque[_Batch] = deque()
        self._checked: set[str] = set()
        self._retries_seen = 0

    def request(
        self,
        draws: NDArray[np.int64],
        barred: Mapping[int, int] | None = None,
        into: NDArray[np.uint8] | None = None,
    ) -> None:
        """Start a batch, writing its pixels into `into` (of `batch_shape`) where given."""
        shape = batch_shape(self.sampler, len(draws))
        pixels = np.empty(shape, np.uint8) if into is None else into
        columns = draw_with(self.sampler, draws, 0, barred)
        refs = self.sampler.refs(columns)
        jobs = [
            _Job(_row(columns, i), ref, pixels[i], dict(barred or {})) for i, ref in enumerate(refs)
        ]
        self._pending.append(_Batch(pixels, jobs))
        for job in jobs:
            self._go(job)

    def take(self) -> PatchBatch:
        """The oldest requested batch; the first error of any of its patches is raised."""
        batch = self._pending.popleft()
        for job in batch.jobs:
            job.done.result()
        failures = [failure for job in batch.jobs for failure in job.failed]
        self.stats.add(retries=self.stores.retries - self._retries_seen)
        self._retries_seen = self.stores.retries
        columns = _join([job.row for job in batch.jobs])
        return PatchBatch(batch.pixels, columns, self.sampler, failures)

    def close(self) -> None:
        """Cancel what has not started, wait for what has, close clients."""
        self.stores.cancel_all()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.stores.close()
        self._pending.clear()

    def _go(self, job: _Job) -> None:
        """Read a job's patch where its slide is, without ever blocking the caller.

        A replacement may lie on another kind of store, so a round ends with "done" or "go again": a
        decode thread that waited for the loop, which waits for decode threads, would hang both.
        """
        if is_remote(self.sampler.corpus.index(job.ref.slide).uri):
            round_ = self.stores.loop.submit(self._remote(job))
        else:
            round_ = self._pool.submit(self._local, job)
        round_.add_done_callback(lambda ended: self._ended(job, ended))

    def _ended(self, job: _Job, ended: Future[bool]) -> None:
        if ended.cancelled():
            job.done.cancel()
        elif (error := ended.exception()) is not None:
            job.done.set_exception(error)
        elif ended.result():
            job.done.set_result(None)
        else:
            try:
                self._go(job)
            except RuntimeError as closing:  # the pool takes nothing any more
                job.done.set_exception(closing)

    def _local(self, job: _Job) -> bool:
        """One attempt at a local patch; False when it was replaced."""
        index = self.sampler.corpus.index(job.ref.slide)
        try:
            self._check(index)
            plan = plan_patch(index, job.ref)
            if index.fallback:
                job.out[:] = finish_fallback(index, plan)
            else:
                pieces = pieces_of(index, plan)
                data = fetch_local(index, pieces, self.stores, self.stats)
                job.out[:] = finish(index, plan, pieces, data)
        except _REPLACED as error:
            self._replace(job, error)
            return False
        return True

    async def _remote(self, job: _Job) -> bool:
        """One attempt at a remote patch; False when it was replaced."""
        loop = asyncio.get_running_loop()
        index = self.sampler.corpus.index(job.ref.slide)
        try:
            if index.uri not in self._checked and not index.uri.startswith("http"):
                await self._check_remote(index)
            plan = plan_patch(index, job.ref)
            pieces = pieces_of(index, plan)
            request = plan_request(index, plan, pieces, self.options.gap_bytes)
            async with self.budget.reserve(request.size_bytes):
                data = await fetch_remote(index, pieces, request, self.stores, self.stats)
                job.out[:] = await loop.run_in_executor(
                    self._pool, finish, index, plan, pieces, data
                )
        except _REPLACED as error:
            await loop.run_in_executor(self._pool, self._replace, job, error)
            return False
        return True

    def _check(self, index: SlideIndex) -> None:
        """At the first touch of a slide: is it the one that was indexed?"""
        if index.uri not in self._checked:
            check_unchanged(index, self.stores)
            self._checked.add(index.uri)

    async def _check_remote(self, index: SlideIndex) -> None:
        """The same off the loop: stores other than HTTP do not check at each request."""
        # Not in the decode pool: this thread waits for the loop.
        await asyncio.to_thread(self._check, index)

    def _replace(self, job: _Job, error: Exception) -> None:
        """Give a job the next attempt of its draw; f(seed, draw, attempt) alone."""
        ref = job.ref
        reason = error.reason if isinstance(error, SlideError | StoreError) else str(error)
        job.failed.append(
            Failure(ref.draw, ref.attempt, ref.slide_id, f"{type(error).__name__}: {reason}")
        )
        if ref.attempt + 1 >= MAX_ATTEMPTS:
            raise LoaderError(f"draw {ref.draw} failed {MAX_ATTEMPTS} times, last with {error}")
        try:
            job.row = draw_with(self.sampler, [ref.draw], ref.attempt + 1, job.barred)
        except SamplerError as cause:
            raise LoaderError(
                f"draw {ref.draw} cannot be replaced after {error}: {cause}"
            ) from None
        job.ref = self.sampler.refs(job.row)[0]


def _row(columns: Draws, i: int) -> Draws:
    """One row of drawn columns."""
    return Draws(**{name: column[i : i + 1] for name, column in vars(columns).items()})


def _join(rows: list[Draws]) -> Draws:
    """Rows as columns again."""
    names = vars(rows[0])
    return Draws(**{name: np.concatenate([getattr(row, name) for row in rows]) for name in names})
