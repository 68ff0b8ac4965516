"""The loader's engine in one process: network on an event loop, decoding in threads."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from online_patching.batch import LoaderOptions, PatchBatch
from online_patching.errors import (
    LoaderError,
    ObjectChangedError,
    ObjectNotFoundError,
    SamplerError,
    SlideError,
    StoreError,
)
from online_patching.fetch import ByteBudget, fetch_local, fetch_remote, pieces_of
from online_patching.geometry import PatchRef
from online_patching.plan import plan_patch
from online_patching.sampler import MAX_ATTEMPTS, PatchSampler
from online_patching.slide import finish, finish_fallback
from online_patching.slide_index import SlideIndex
from online_patching.stats import Stats
from online_patching.stores import Stores, is_remote

_REPLACED = (SlideError, ObjectNotFoundError, ObjectChangedError)
"""Failures of one slide, for which a draw moves to its next attempt. Other store errors stop."""

Failure = tuple[int, int, str]


@dataclass
class _Batch:
    pixels: NDArray[np.uint8]
    patches: list[Future[tuple[PatchRef, list[Failure]]]]


class ThreadEngine:
    """Starts every patch of a requested batch at once; `take` gathers the oldest batch in order."""

    def __init__(self, sampler: PatchSampler, options: LoaderOptions, stats: Stats) -> None:
        self.sampler, self.options, self.stats = sampler, options, stats
        self.stores = Stores(options.retry)
        self.budget = ByteBudget(options.bytes_in_flight)
        self._pool = ThreadPoolExecutor(options.threads, thread_name_prefix="patch-decode")
        self._pending: deque[_Batch] = deque()
        self._checked: set[str] = set()
        self._retries_seen = 0

    def request(self, draws: NDArray[np.int64], into: NDArray[np.uint8] | None = None) -> None:
        """Start a batch, writing its pixels into `into` (batch, size, size, 3) where given."""
        size = self.sampler.size_px
        pixels = np.empty((len(draws), size, size, 3), np.uint8) if into is None else into
        refs = self.sampler.refs(self.sampler.draw_batch(draws))
        self._pending.append(
            _Batch(pixels, [self._start(r, pixels[i]) for i, r in enumerate(refs)])
        )

    def take(self) -> PatchBatch:
        """The oldest requested batch; the first error of any of its patches is raised."""
        batch = self._pending.popleft()
        done = [future.result() for future in batch.patches]
        failures = [failure for _, failed in done for failure in failed]
        self.stats.add(retries=self.stores.retries - self._retries_seen)
        self._retries_seen = self.stores.retries
        return PatchBatch(batch.pixels, [ref for ref, _ in done], failures)

    def close(self) -> None:
        """Cancel what has not started, wait for what has, close clients."""
        for batch in self._pending:
            for future in batch.patches:
                future.cancel()
        for batch in self._pending:
            for future in batch.patches:
                with contextlib.suppress(BaseException):  # their errors belong to nobody now
                    future.result(timeout=30)
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.stores.close()

    def _start(
        self, ref: PatchRef, out: NDArray[np.uint8]
    ) -> Future[tuple[PatchRef, list[Failure]]]:
        if is_remote(self.sampler.corpus.index(ref.slide).uri):
            return self.stores.loop.submit(self._remote(ref, out))
        return self._pool.submit(self._local, ref, out)

    def _local(self, ref: PatchRef, out: NDArray[np.uint8]) -> tuple[PatchRef, list[Failure]]:
        failed: list[Failure] = []
        while True:
            index = self.sampler.corpus.index(ref.slide)
            if is_remote(index.uri):  # a replacement may lie on another store
                return self.stores.loop.run(self._remote(ref, out, failed))  # type: ignore[no-any-return]
            try:
                out[:] = self._read_local(index, ref)
                return ref, failed
            except _REPLACED as error:
                ref = self._replacement(ref, error, failed)

    def _read_local(self, index: SlideIndex, ref: PatchRef) -> NDArray[np.uint8]:
        plan = plan_patch(index, ref)
        if index.fallback:
            return finish_fallback(index, plan)
        if index.uri not in self._checked and index.token:
            self.stores.local.check_version(index.uri, index.token)
            self._checked.add(index.uri)
        pieces = pieces_of(index, plan)
        return finish(index, plan, pieces, fetch_local(index, pieces, self.stores, self.stats))

    async def _remote(
        self, ref: PatchRef, out: NDArray[np.uint8], failed: list[Failure] | None = None
    ) -> tuple[PatchRef, list[Failure]]:
        failed = [] if failed is None else failed
        loop = asyncio.get_running_loop()
        while True:
            index = self.sampler.corpus.index(ref.slide)
            try:
                if is_remote(index.uri):
                    await self._read_remote(index, ref, out)
                else:
                    out[:] = await loop.run_in_executor(self._pool, self._read_local, index, ref)
                return ref, failed
            except _REPLACED as error:
                ref = await loop.run_in_executor(self._pool, self._replacement, ref, error, failed)

    async def _read_remote(self, index: SlideIndex, ref: PatchRef, out: NDArray[np.uint8]) -> None:
        plan = plan_patch(index, ref)
        pieces = pieces_of(index, plan)
        data = await fetch_remote(
            index, pieces, self.stores, self.stats, self.budget, self.options.gap_bytes
        )
        loop = asyncio.get_running_loop()
        out[:] = await loop.run_in_executor(self._pool, finish, index, plan, pieces, data)

    def _replacement(self, ref: PatchRef, error: Exception, failed: list[Failure]) -> PatchRef:
        """The next attempt of a failed draw; f(seed, draw, attempt) alone."""
        reason = error.reason if isinstance(error, SlideError | StoreError) else str(error)
        failed.append((ref.draw, ref.attempt, f"{ref.slide_id}: {type(error).__name__}: {reason}"))
        if ref.attempt + 1 >= MAX_ATTEMPTS:
            raise LoaderError(f"draw {ref.draw} failed {MAX_ATTEMPTS} times, last with {error}")
        try:
            again = self.sampler.draw_batch([ref.draw], attempt=ref.attempt + 1)
        except SamplerError as cause:
            raise LoaderError(
                f"draw {ref.draw} cannot be replaced after {error}: {cause}"
            ) from None
        return self.sampler.refs(again)[0]
