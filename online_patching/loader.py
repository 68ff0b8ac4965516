"""The stages wired together: draws -> batches of pixels, in order, in parallel, for ever.

Bare use decodes in threads of this process. `workers=N` moves everything into N spawned processes
that write into shared memory; batch k is made by worker k mod N, so order, refs and pixels are the
same for any number of workers and threads.

A patch whose tiles are damaged is replaced by the next attempt of the same draw, counted and
listed; past `max_failed_fraction` of the draws the loader stops. A store that stays unreachable
after its retries raises: `state_dict()` still names the next undelivered batch.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching.batch import DrawSource, Engine, Failure, LoaderOptions, PatchBatch
from online_patching.errors import FailureBudgetError, LoaderError, StateMismatchError
from online_patching.processes import ProcessEngine
from online_patching.stats import Stats
from online_patching.stores import RetryPolicy
from online_patching.threads import ThreadEngine

_PROBATION_DRAWS = 100
_VERSION = 1


class PatchLoader:
    """An endless, ordered, resumable stream of PatchBatch.

    `rank` and `world_size` split each global step of world_size x batch_size draws between
    processes of a distributed run. `workers` are loader processes (0: threads here), each with
    `threads` decode threads. Use it as a context manager, or close it.
    """

    def __init__(
        self,
        sampler: DrawSource,
        batch_size: int,
        *,
        workers: int = 0,
        threads: int = 2,
        prefetch: int = 2,
        bytes_in_flight: int = 64 * 2**20,
        gap_bytes: int = 16 * 2**10,
        retry: RetryPolicy | None = None,
        max_failed_fraction: float = 0.05,
        rank: int = 0,
        world_size: int = 1,
        copy: bool = True,
    ) -> None:
        if (
            batch_size < 1
            or threads < 1
            or workers < 0
            or prefetch < 1
            or not 0 <= rank < world_size
        ):
            raise LoaderError(
                f"batch_size {batch_size}, threads {threads}, prefetch {prefetch} must be at least 1, workers "
                f"{workers} at least 0, and rank {rank} below world_size {world_size}."
            )
        self.sampler, self.batch_size, self.workers = sampler, batch_size, workers
        self.rank, self.world_size, self.copy = rank, world_size, copy
        self.options = LoaderOptions(
            threads, prefetch, bytes_in_flight, gap_bytes, retry or RetryPolicy()
        )
        self.max_failed_fraction = max_failed_fraction
        self.stats = Stats()
        self._next_draw = 0
        self._requested = 0
        self._delivered = 0
        self._failed: Counter[str] = Counter()
        self._engine: Engine | None = None

    def __iter__(self) -> Iterator[PatchBatch]:
        while True:
            yield self.next_batch()

    def __next__(self) -> PatchBatch:
        return self.next_batch()

    def next_batch(self) -> PatchBatch:
        """The next batch of this rank, waiting for it if need be."""
        try:
            batch = self._take()
            failed = self._failed + Counter(_kind(f) for f in batch.failures)
            self._check_budget(failed)
        except BaseException:
            self.close()  # what was in flight is lost; the stream goes on at the undelivered batch
            raise
        self._failed = failed
        self._delivered += 1
        self.stats.add(patches=len(batch.draws))
        for failure in batch.failures:
            self.stats.fail(_kind(failure))
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands: the next undelivered global draw and whose stream it is."""
        return {
            "version": _VERSION,
            "next_draw": self._draw_at(self._delivered),
            "corpus": self.sampler.corpus.digest,
            "sampler": self.sampler.digest,
            "sampler_config": self.sampler.config,
            "failed": dict(self._failed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a stream, with any number of ranks, workers and threads.

        StateMismatchError when the state belongs to another corpus or sampler.
        """
        for name, here in (
            ("corpus", self.sampler.corpus.digest),
            ("sampler", self.sampler.digest),
        ):
            if state.get(name) != here:
                saved = state.get("sampler_config") if name == "sampler" else state.get(name)
                now = self.sampler.config if name == "sampler" else here
                raise StateMismatchError(
                    f"the saved stream has another {name}: saved {saved}, now {now}. Resume with what it was "
                    "begun with, or start a new run."
                )
        self.close()
        self._next_draw = int(state["next_draw"])
        self._failed = Counter(state.get("failed", {}))

    def close(self) -> None:
        """Stop threads and processes. The stream can be continued; it starts them again."""
        engine, self._engine = self._engine, None
        self._next_draw = self._draw_at(self._delivered)
        self._requested = self._delivered = 0
        if engine is not None:
            engine.close()

    def __enter__(self) -> PatchLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None:
            self.close()

    def _start(self) -> Engine:
        if self.workers:
            self._engine = ProcessEngine(
                self.sampler, self.batch_size, self.workers, self.options, self.stats, self.copy
            )
        else:
            self._engine = ThreadEngine(self.sampler, self.options, self.stats)
        return self._engine

    def _draw_at(self, batch: int) -> int:
        """The first global draw of the `batch`-th step since the stream was (re)started."""
        return self._next_draw + batch * self.batch_size * self.world_size

    def _draws(self, batch: int) -> NDArray[np.int64]:
        first = self._draw_at(batch) + self.rank * self.batch_size
        return np.arange(first, first + self.batch_size)

    def _take(self) -> PatchBatch:
        engine = self._engine or self._start()
        ahead = self.options.prefetch * max(1, self.workers)
        while self._requested < self._delivered + ahead:
            engine.request(self._draws(self._requested))
            self._requested += 1
        began = time.perf_counter()
        batch = engine.take()
        self.stats.add(wait_s=time.perf_counter() - began)
        return batch

    def _check_budget(self, failed: Counter[str]) -> None:
        seen = max(self._draw_at(self._delivered + 1) // self.world_size, _PROBATION_DRAWS)
        if failed.total() > self.max_failed_fraction * seen:
            listed = "; ".join(f"{n} x {kind}" for kind, n in failed.most_common(5))
            raise FailureBudgetError(
                f"{failed.total()} of {seen} draws failed, more than {self.max_failed_fraction:.1%}: {listed}. "
                "Leave these slides out, or raise max_failed_fraction."
            )


def _kind(failure: Failure) -> str:
    """Slide and error type: what failures are counted by, so that a state stays small."""
    return f"{failure.slide_id}: {failure.kind}"
