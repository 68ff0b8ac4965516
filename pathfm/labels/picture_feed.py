"""Patches of a folder as a stream: read ahead by threads, resumable at any batch, split between ranks."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching import PatchRef
from online_patching.errors import FailureBudgetError, StateMismatchError
from online_patching.loading.batch import Failure
from online_patching.stats import Stats
from pathfm.labels.pictures import MAX_ATTEMPTS, PictureSampler
from pathfm.labels.reading import Cut, Fit, UnreadablePictureError, read_patch

VERSION = 1
_PROBATION_DRAWS = 1000
_NAMED = 100
_CHUNK = 8
"""Pictures a thread takes at once: each task has a cost of its own."""


class PictureStats(Stats):
    """Counters of a stream of pictures, which has no tiles and makes no requests."""

    def told(self) -> str:
        """One line for people."""
        now = self.as_dict()
        return f"read {now['patches']:,} pictures, {sum(now['failures'].values()):,} replaced"


@dataclass(frozen=True, eq=False)
class PictureBatch:
    """`pixels` uint8 (b, S, S, 3); `draws`, `labels` int64 (b,), -1 for no class; `refs` whose `slide_id` is
    the picture's path, whose box is what was cut of it, and whose mpp is 0.0 where not known."""

    pixels: NDArray[np.uint8]
    draws: NDArray[np.int64]
    labels: NDArray[np.int64]
    refs: list[PatchRef]
    failures: list[Failure]


@dataclass(eq=False)
class _Making:
    """A batch under way: filled in place by its tasks."""

    batch: PictureBatch
    tasks: list[Future[None]]


class PictureFeed:
    """An endless stream of PictureBatch; rank r of each step gets the r-th part of world_size x batch_size
    consecutive draws.

    A picture that cannot be read is replaced by another of its class, counted and listed; past
    `max_failed_fraction` of the draws (of at least 1,000) the stream stops with FailureBudgetError. The
    state is the next draw and the count, so order and pixels are the same for any number of threads and
    ranks and after any resume, and a stream may go on with other numbers and another batch size. `gather`
    (as PatchLoader's) makes the ranks count together, when they save their states.
    """

    def __init__(
        self,
        sampler: PictureSampler,
        batch_size: int,
        *,
        size_px: int,
        fit: Fit = "resize",
        mpp: float | None = None,
        threads: int = 2,
        prefetch: int = 2,
        rank: int = 0,
        world_size: int = 1,
        gather: Callable[[Any], list[Any]] | None = None,
        max_failed_fraction: float = 0.05,
    ) -> None:
        self.sampler, self.batch_size, self.size_px = sampler, batch_size, size_px
        self.fit, self.mpp, self.stats = fit, mpp, PictureStats()
        self._rank, self._world_size, self._gather = rank, world_size, gather
        self._threads, self._ahead = threads, prefetch
        self._max_failed = max_failed_fraction
        self._failed: Counter[str] = Counter()  # of all ranks, up to the last agreement
        self._pending: Counter[str] = Counter()
        self._pool: ThreadPoolExecutor | None = None
        self._making: deque[_Making] = deque()
        self.next_draw = self._asked = 0

    @property
    def config(self) -> dict[str, Any]:
        """Everything that decides the stream besides the folder, as JSON types."""
        return {**self.sampler.config, "size_px": self.size_px, "fit": self.fit, "mpp": self.mpp}

    def next_batch(self) -> PictureBatch:
        """This rank's part of the next step, waiting for it if need be."""
        began = time.perf_counter()
        step = self.batch_size * self._world_size
        while len(self._making) < self._ahead:
            first = self._asked + self._rank * self.batch_size
            self._making.append(self._start(np.arange(first, first + self.batch_size)))
            self._asked += step
        try:
            made = self._making[0]
            for task in made.tasks:
                task.result()
            self._account(made.batch.failures)
        except BaseException:
            self.close()
            raise
        self._making.popleft()
        self.next_draw += step
        self.stats.add(patches=self.batch_size, wait_s=time.perf_counter() - began)
        return made.batch

    def first(self, n: int) -> PictureBatch:
        """The first n draws of the stream, which stays where it is."""
        made = self._start(np.arange(n))
        for task in made.tasks:
            task.result()
        return made.batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, as small JSON. With `gather` every rank must call it at one step."""
        if self._gather is not None and self._world_size > 1:
            self._failed = sum(
                (Counter(c) for c in self._gather(dict(self._pending))), self._failed
            )
        else:
            self._failed = self._failed + self._pending
        self._pending = Counter()
        return {
            "version": VERSION,
            "next_draw": self.next_draw,
            "corpus": self.sampler.folder.digest,
            "sampler": hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest(),
            "sampler_config": self.config,
            "failed": dict(self._failed),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a stream stood. StateMismatchError when it was of another folder or order."""
        if state.get("version") != VERSION or "failed" not in state:
            raise StateMismatchError(
                f"the saved stream is of version {state.get('version')} or of slides, this one is of version "
                f"{VERSION} and of a folder of patches. Resume with what it was begun with, or start a new run."
            )
        for name, saved, now in (
            ("folder", state["corpus"], self.sampler.folder.digest),
            ("order", state["sampler_config"], self.config),
        ):
            if saved != now:
                raise StateMismatchError(
                    f"the saved stream has another {name}: saved {saved}, now {now}. Resume with what it was "
                    "begun with, or start a new run."
                )
        self.close()
        self.next_draw = self._asked = int(state["next_draw"])
        self._failed, self._pending = Counter(state["failed"]), Counter()

    def close(self) -> None:
        """Stop the threads. The stream can be continued; it starts them again."""
        for made in self._making:
            for task in made.tasks:
                task.cancel()
        self._making.clear()
        self._asked = self.next_draw
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> PictureFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, draws: NDArray[np.int64]) -> _Making:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="pictures")
        n, picked = len(draws), self.sampler.pick(draws)
        pixels = np.empty((n, self.size_px, self.size_px, 3), np.uint8)
        refs: list[Any] = [None] * n
        batch = PictureBatch(pixels, draws, picked.label, refs, [])
        columns = (picked.picture, picked.u, picked.v)
        rows = list(zip(range(n), *(column.tolist() for column in columns), strict=True))
        tasks = [
            self._pool.submit(self._fill, batch, rows[at : at + _CHUNK])
            for at in range(0, n, _CHUNK)
        ]
        return _Making(batch, tasks)

    def _fill(self, batch: PictureBatch, rows: Sequence[tuple[int, int, float, float]]) -> None:
        """Reads some of a batch's pictures into their places."""
        for at, first_picture, first_u, first_v in rows:
            draw, first = int(batch.draws[at]), (first_picture, first_u, first_v)
            for attempt in range(MAX_ATTEMPTS):
                picture, u, v = self._other(draw, attempt) if attempt else first
                path = self.sampler.folder.paths[picture]
                try:
                    file = self.sampler.folder.root / path
                    batch.pixels[at], cut = read_patch(file, self.size_px, self.fit, u, v)
                    batch.refs[at] = self._ref(draw, attempt, picture, path, cut)
                    break
                except UnreadablePictureError as error:
                    reason = f"{type(error).__name__}: {error.reason}"
                    batch.failures.append(Failure(draw, attempt, path, reason))
            else:
                raise FailureBudgetError(
                    f"draw {draw} found no readable picture in {MAX_ATTEMPTS} attempts, at last {path}: "
                    f"{batch.failures[-1].reason}"
                )

    def _other(self, draw: int, attempt: int) -> tuple[int, float, float]:
        found = self.sampler.pick([draw], attempt)
        return int(found.picture[0]), float(found.u[0]), float(found.v[0])

    def _ref(self, draw: int, attempt: int, picture: int, path: str, cut: Cut) -> PatchRef:
        mpp = (self.mpp or 0.0) * cut.side_px / self.size_px
        side = float(cut.side_px)
        return PatchRef(
            draw, attempt, picture, path, cut.x_px, cut.y_px, side, side, mpp, self.size_px
        )

    def _account(self, failures: list[Failure]) -> None:
        """Counts a batch's failures; FailureBudgetError, with nothing changed, when they are too many."""
        failures.sort()
        pending = self._pending.copy()
        for failure in failures:
            known = failure.slide_id in pending or len(pending) < _NAMED
            pending[failure.slide_id if known else "(others)"] += 1
        # A rank judges by all until the last agreement and by its own since.
        failed = self._failed.total() + pending.total() * self._world_size
        draws = max(self.next_draw, _PROBATION_DRAWS)
        if failed > self._max_failed * draws:
            worst = (self._failed + pending).most_common(3)
            listed = ", ".join(f"{path} ({n} x)" for path, n in worst)
            raise FailureBudgetError(
                f"{failed:,} pictures of {draws:,} draws could not be read, more than {self._max_failed:.1%}: "
                f"{listed}. Remove what is damaged from {self.sampler.folder.root}"
            )
        self._pending = pending
        for failure in failures:
            self.stats.fail(failure.kind)
