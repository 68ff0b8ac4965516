"""The stages wired together: draws -> batches of pixels, in order, in parallel, resumable at any batch.

Bare use decodes in threads of this process. `workers=N` moves everything into N processes that write
into shared memory. The stream is one for all: global step s holds world_size x batch_size consecutive
draws, rank r gets its r-th part; so order and pixels are the same for any number of workers, threads
and ranks, and a stream may be continued on other numbers of each, and with another batch size.

A patch whose tiles are damaged is replaced by the next attempt of the same draw, counted and listed. A
slide that keeps failing is quarantined from a draw on that follows from the stream (ledger.py); past
`max_failed_fraction` of the draws the loader stops (`forgive_lost`: draws of slides that are gone or another
do not count). A store that stays unreachable after its retries
raises: `state_dict()` still names the next undelivered batch.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import LoaderError
from online_patching.loading.batch import (
    DrawSource,
    Engine,
    Failure,
    LoaderOptions,
    PatchBatch,
    n_draws,
    no_patches,
)
from online_patching.loading.ledger import LOST, Ledger, Rule
from online_patching.loading.processes import START_METHODS, ProcessEngine
from online_patching.loading.state import load_ledgers, merge_states, save_state
from online_patching.loading.threads import ThreadEngine
from online_patching.stats import Stats
from online_patching.stores import RetryPolicy, is_remote
from online_patching.stores.range_client import DEFAULT_CONNECTIONS

Gather = Callable[[Any], list[Any]]
_AGREEMENTS_A_WINDOW = 8
_REMOTE_PATCHES = 1024


class PatchLoader:
    """An ordered, resumable stream of PatchBatch: endless, or as long as its sampler.

    `rank` and `world_size` split each global step between the processes of a distributed run. `gather`
    lets the ranks agree on quarantines and on stopping: it hands over an object and returns those of all
    ranks in the order of ranks (`torch.distributed.all_gather_object`, wrapped). It is called by
    `next_batch` at the same steps on every rank, and by `state_dict()`, which every rank must then call.
    Without it, several ranks quarantine nothing and each stops by its own failures. Nothing is quarantined
    either of a sampler that ends, which is there to be read to its end.

    A new stream begins at `first_draw`. `workers` are loader processes (0: threads here), each with
    `threads` decode threads, made by `start_method` (spawn, fork, forkserver). `prefetch` batches a worker
    are read ahead, and no more are ever in flight: 2 by default, and behind a network enough for 1,024
    patches on their way. `remember_bytes` lets each process remember states inside JPEG tiles, which pays
    where tiles are touched several times (docs/decisions/0012-restart-states.md). `disk_cache` is a folder
    that keeps at most `disk_cache_bytes` of remote tiles, for all processes that name it. `copy=False` hands
    out shared memory, to be given back by `batch.release()`.

    Use it as a context manager, or close it; what ends without is cleaned up too. One thread at a time.
    """

    def __init__(
        self,
        sampler: DrawSource,
        batch_size: int,
        *,
        workers: int = 0,
        threads: int = 2,
        prefetch: int | None = None,
        bytes_in_flight: int = 64 * 2**20,
        gap_bytes: int = 16 * 2**10,
        remember_bytes: int = 0,
        disk_cache: str | Path | None = None,
        disk_cache_bytes: int = 16 * 2**30,
        retry: RetryPolicy | None = None,
        connections: int = DEFAULT_CONNECTIONS,
        max_failed_fraction: float = 0.05,
        forgive_lost: bool = False,
        quarantine_after: int | None = 8,
        window_draws: int = 2**16,
        rank: int = 0,
        world_size: int = 1,
        gather: Gather | None = None,
        first_draw: int = 0,
        start_method: str = "spawn",
        copy: bool = True,
    ) -> None:
        if prefetch is None:
            prefetch = _prefetch(sampler, batch_size * max(1, workers))
        _refuse_senseless(batch_size, workers, threads, prefetch, rank, world_size, start_method)
        _refuse_split_reads(batch_size, first_draw, sampler.patches_per_read)
        self.sampler, self.batch_size, self.workers = sampler, batch_size, workers
        self.rank, self.world_size, self.gather = rank, world_size, gather
        self.start_method, self.copy = start_method, copy
        self.options = LoaderOptions(
            threads, prefetch, bytes_in_flight, gap_bytes, retry or RetryPolicy(), remember_bytes,
            connections, disk_cache, disk_cache_bytes,
        )  # fmt: skip
        self.max_failed_fraction = max_failed_fraction
        self._forgiven = LOST if forgive_lost else ()
        self.stats = Stats()
        self._agreeing = world_size == 1 or gather is not None
        self._n_draws = n_draws(sampler)
        # Of a sampler that ends every place counts: slides with damage are read to the end.
        quarantines = self._agreeing and self._n_draws is None
        rule = Rule(quarantine_after if quarantines else None, window_draws)
        rule.refuse_step(batch_size * world_size)
        self._ledger = Ledger(rule)  # what all ranks know
        self._own = Ledger(rule)  # what this rank alone knows, where ranks never agree
        self._pending: list[Failure] = []  # what it knows until they agree next
        self._next_draw = self._began_at = first_draw
        self._requested = self._delivered = 0
        self._engine: Engine | None = None
        self._end: Callable[[], object] = _nothing

    def __iter__(self) -> Iterator[PatchBatch]:
        while not self.finished:
            yield self.next_batch()

    def __next__(self) -> PatchBatch:
        if self.finished:
            raise StopIteration
        return self.next_batch()

    def __len__(self) -> int:
        """Batches of this rank in the whole stream, the same for every rank; TypeError if endless."""
        if self._n_draws is None:
            raise TypeError("this loader's sampler never ends, so it has no length")
        step = self.batch_size * self.world_size
        return (self._n_draws + step - 1) // step

    def __bool__(self) -> bool:
        return True  # also where there is no length

    @property
    def next_draw(self) -> int:
        """The global draw at which the next step begins."""
        return self._draw_at(self._delivered)

    @property
    def finished(self) -> bool:
        """Whether every draw of a sampler that ends was delivered."""
        return self._n_draws is not None and self.next_draw >= self._n_draws

    @property
    def quarantined(self) -> dict[str, int]:
        """Slide id -> first draw that does not use it."""
        return {q.slide_id: q.from_draw for q in self._ledger.quarantined}

    def next_batch(self) -> PatchBatch:
        """The next batch of this rank, waiting for it if need be. LoaderError past the end.

        The last step of a sampler that ends may be short: its first ranks get whole batches, then one
        gets a short one, and the rest none (a batch of 0), so that all take the same number.
        """
        if self.finished:
            raise LoaderError(f"all {self._n_draws:,} draws were delivered.")
        try:
            batch = self._take()
            self._account(batch.failures)
        except BaseException:
            self.close()  # what was in flight is lost; the stream goes on at the undelivered batch
            raise
        self._delivered += 1
        self.stats.add(patches=len(batch.draws))
        for failure in batch.failures:
            (self.stats.refuse if failure.filtered else self.stats.fail)(failure.kind)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as small JSON: the next undelivered draw, what failed, quarantines.

        With `gather` it is the same on every rank, and every rank must call it at the same step.
        Without, it holds this rank's own failures; `merge_states` makes one state of all ranks'.
        """
        if self.gather is not None and self.world_size > 1:
            self._ledger = self._ledger.after(_joined(self.gather(self._pending)))
            self._pending = []
        part = None if self._agreeing else (self.rank, self.world_size)
        return save_state(self.sampler, self.next_draw, self._ledger, self._own, part)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a stream, on any number of ranks, workers and threads, with any batch size.

        StateMismatchError when the state belongs to another corpus or sampler, or its quarantines
        follow another rule (`quarantine_after=None` goes on with those there are, and adds none).
        """
        ledger, next_draw = load_ledgers(state, self.sampler, self._ledger.rule)
        self.close()
        self._ledger, self._own, self._pending = ledger, Ledger(ledger.rule), []
        self._next_draw = self._began_at = next_draw

    merge_states = staticmethod(merge_states)

    def close(self) -> None:
        """Stop threads and processes. The stream can be continued; it starts them again."""
        self._next_draw = self.next_draw
        self._requested = self._delivered = 0
        end, self._end, self._engine = self._end, _nothing, None
        end()

    def __enter__(self) -> PatchLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> Engine:
        if self.workers:
            engine: Engine = ProcessEngine(
                self.sampler, self.batch_size, self.workers, self.options, self.stats,
                copy=self.copy, start_method=self.start_method,
            )  # fmt: skip
        else:
            engine = ThreadEngine(self.sampler, self.options, self.stats)
        self._engine = engine
        # Not __del__: this also runs when the interpreter ends.
        self._end = weakref.finalize(self, _close_engine, engine, os.getpid())
        return engine

    def _draw_at(self, batch: int) -> int:
        """The first global draw of the `batch`-th step since the stream was (re)started."""
        draw = self._next_draw + batch * self.batch_size * self.world_size
        return draw if self._n_draws is None else min(draw, self._n_draws)

    def _draws(self, batch: int) -> NDArray[np.int64]:
        first = self._next_draw + (batch * self.world_size + self.rank) * self.batch_size
        stop = first + self.batch_size
        return np.arange(first, stop if self._n_draws is None else min(stop, self._n_draws))

    def _take(self) -> PatchBatch:
        engine = self._engine or self._start()
        ahead = self.options.prefetch * max(1, self.workers)
        barred = self._ledger.barred
        while self._requested < self._delivered + ahead and self._may_request(self._requested):
            draws = self._draws(self._requested)
            if len(draws):
                engine.request(draws, barred)
            self._requested += 1
        if not len(self._draws(self._delivered)):
            return no_patches(self.sampler)
        began = time.perf_counter()
        batch = engine.take()
        self.stats.add(wait_s=time.perf_counter() - began)
        return batch

    def _may_request(self, batch: int) -> bool:
        first, stop = self._draw_at(batch), self._draw_at(batch + 1)
        return first < stop and self._ledger.may_request(stop - 1, self.next_draw)

    def _account(self, failures: Sequence[Failure]) -> None:
        """Enter a batch's failures, agree with the other ranks when it is time, and stop if need be.

        Changes nothing when it raises: the batch counts as undelivered.
        """
        begin, end = self._draw_at(self._delivered), self._draw_at(self._delivered + 1)
        pending = [*self._pending, *failures]
        if not self._agreeing:
            own = self._own.after(failures)
            draws = (end - self._began_at) // self.world_size
            own.check_budget(draws, self.max_failed_fraction, self._forgiven)
            self._own = own.forgetting(end)
            return
        if self.world_size > 1:
            if not self._time_to_agree(begin, end):
                self._pending = pending
                return
            pending = _joined(self.gather(pending)) if self.gather is not None else pending
        ledger = self._ledger.after(pending)
        ledger.check_budget(end, self.max_failed_fraction, self._forgiven)
        self._ledger, self._pending = ledger.decided(end, self.sampler), []

    def _time_to_agree(self, begin: int, end: int) -> bool:
        """Whether a step crosses the end of a window, or of an eighth of one: alike on every rank."""
        window = self._ledger.rule.window_draws
        part = max(1, window // _AGREEMENTS_A_WINDOW)
        return begin // window != end // window or begin // part != end // part


def _nothing() -> None:
    """What ends a loader that has not begun."""


def _close_engine(engine: Engine, owner: int) -> None:
    if os.getpid() == owner:  # a forked copy of a loader has no threads and no workers to end
        engine.close()


def _joined(lists: list[list[Failure]]) -> list[Failure]:
    """The failures of all ranks."""
    return [Failure(*failure) for one in lists for failure in one]


def _prefetch(sampler: DrawSource, patches: int) -> int:
    """Batches to read ahead, of `patches` in all workers: by where the corpus's first slide is."""
    return max(2, -(-_REMOTE_PATCHES // patches)) if is_remote(sampler.corpus.uri(0)) else 2


def _refuse_senseless(
    batch_size: int,
    workers: int,
    threads: int,
    prefetch: int,
    rank: int,
    world_size: int,
    start_method: str,
) -> None:
    if min(batch_size, threads, prefetch) < 1 or workers < 0 or not 0 <= rank < world_size:
        raise LoaderError(
            f"batch_size {batch_size}, threads {threads}, prefetch {prefetch} must be at least 1, workers "
            f"{workers} at least 0, and rank {rank} below world_size {world_size}."
        )
    if start_method not in START_METHODS:
        raise LoaderError(f"start_method {start_method!r} is none of {', '.join(START_METHODS)}.")


def _refuse_split_reads(batch_size: int, first_draw: int, patches_per_read: int) -> None:
    if first_draw < 0 or first_draw % patches_per_read:
        raise LoaderError(
            f"first_draw {first_draw} must be at least 0 and a multiple of the sampler's patches_per_read "
            f"{patches_per_read}."
        )
    if batch_size % patches_per_read:
        fits = max(patches_per_read, batch_size // patches_per_read * patches_per_read)
        raise LoaderError(
            f"batch_size {batch_size} is no multiple of the sampler's patches_per_read {patches_per_read}: "
            f"patches of one read would lie in two batches. Use {fits} or {fits + patches_per_read}."
        )
