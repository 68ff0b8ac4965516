"""Canvases whose bytes are far away: asked of the feed as groups of reads, decoded when they are there.

A group is what one canvas needs, over as many objects as it lies in. Where a folder keeps tiles that were
read before, a decode thread looks there first, and what came over the network is kept there afterwards.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from online_patching.batch_plan import BatchPlan
from online_patching.batch_plan.pieces import CHUNKS
from online_patching.batch_plan.runs import Piece, merge, pieces_of, size_of
from online_patching.canvases import Failed, bad_tile, read_bodies
from online_patching.corpus import Corpus
from online_patching.errors import ObjectChangedError, ObjectNotFoundError, SlideError
from online_patching.loading.batch import LoaderOptions
from online_patching.loading.turn import Turn
from online_patching.slide import check_unchanged
from online_patching.stats import Stats
from online_patching.stores import Stores
from online_patching.stores.disk_cache import DiskCache
from online_patching.stores.feed import Feed, Group

REPLACED = (SlideError, ObjectNotFoundError, ObjectChangedError)
"""Failures of one slide, for which a draw moves to its next attempt. Other store errors stop."""

_CHECKERS = 8


class Wanted:
    """The bytes of one canvas: its `pieces` in the order of the plan, and the `runs` to read for them."""

    __slots__ = ("canvas", "found", "pieces", "runs", "turn")

    def __init__(self, turn: Turn, canvas: int, pieces: list[Piece], gap_bytes: int) -> None:
        self.turn, self.canvas, self.pieces = turn, canvas, pieces
        self.found: dict[int, bytes] = {}  # by piece: those that were kept
        self.runs = merge(pieces, gap_bytes)

    def empty(self, read: Sequence[bytes | None]) -> int | None:
        """The first piece whose whole object is there and has no bytes: unlike an absent one, it is damage."""
        files = {run[0] for run, body in zip(self.runs, read, strict=True) if body == b""}
        return next((i for i, piece in enumerate(self.pieces) if piece[0] in files), None)

    def bodies(self, read: Sequence[bytes]) -> list[bytes]:
        """The bytes of each piece out of those of the runs, b"" where nothing is stored."""
        return [self.found.get(i) or self._cut(piece, read) for i, piece in enumerate(self.pieces)]

    def _cut(self, piece: Piece, read: Sequence[bytes]) -> bytes:
        file, start, stop = piece
        if start == stop:
            return b""
        for (of, first, last), body in zip(self.runs, read, strict=True):
            if of == file and (
                last is None or (stop is not None and first <= start and stop <= last)
            ):
                return body if last is None else body[start - first : (stop or 0) - first]
        raise AssertionError("a piece lies in no run")


class RemoteReader:
    """Reads canvases of remote slides and hands them to `arrived` (turn, canvases, failed), in decode threads.

    `submit` starts a callable in one of them.
    """

    def __init__(
        self,
        corpus: Corpus,
        options: LoaderOptions,
        stats: Stats,
        stores: Stores,
        submit: Callable[[Callable[[], None]], object],
        arrived: Callable[[Turn, Sequence[int], Failed], None],
    ) -> None:
        self._corpus, self._options, self._stats, self._stores = corpus, options, stats, stores
        self._submit, self._arrived = submit, arrived
        self._cache: DiskCache | None = None
        if options.disk_cache is not None:
            self._cache = DiskCache(options.disk_cache, options.disk_cache_bytes)
        self._checks: dict[int, asyncio.Task[None]] = {}  # on the loop, by slide
        self._checked: set[int] = set()
        self._checkers = ThreadPoolExecutor(_CHECKERS, thread_name_prefix="patch-check")
        self._feed: Feed | None = None
        self._lock = threading.Lock()

    @property
    def peak(self) -> int:
        """The most bytes that were held at once."""
        return self._feed.peak if self._feed else 0

    def read(self, turn: Turn) -> None:
        """Begin to read a turn's canvases, in their order."""
        plan = turn.plan
        every = pieces_of(plan)
        groups = []
        for canvas, slide in enumerate(plan.slide.tolist()):
            wanted = Wanted(turn, canvas, every[plan.tiles_of(canvas)], self._options.gap_bytes)
            group = Group(_reads(plan, wanted.runs), wanted, size_of(plan, canvas, wanted.runs))
            if self._corpus.records["reader"][slide] == CHUNKS and slide not in self._checked:
                group.before = self._first_touch(slide)
            groups.append(group)
        self._fed().ask(groups)

    def close(self) -> None:
        """Forget what is on its way; cancel the stores' reads afterwards."""
        if self._feed is not None:
            self._stores.loop.call(self._feed.close)
        self._checkers.shutdown(wait=False, cancel_futures=True)

    def _fed(self) -> Feed:
        """The feed of decode threads, made when first needed."""
        with self._lock:
            if self._feed is None:
                self._feed = Feed(
                    self._stores.starter,
                    self._stores.loop.loop,
                    self._submit,
                    self._take,
                    threads=self._options.threads,
                    limit_bytes=self._options.bytes_in_flight,
                    look=self._look if self._cache is not None else None,
                )
            return self._feed

    # --- on the loop ---------------------------------------------------------------------------

    def _first_touch(self, slide: int) -> Callable[[], Awaitable[None]]:
        """Whether a slide whose reads check nothing is the one that was indexed; asked once for all."""

        async def check() -> None:
            if slide in self._checked:
                return
            task = self._checks.get(slide)
            if task is None:
                task = asyncio.get_running_loop().create_task(self._check(slide))
                self._checks[slide] = task
            try:
                await asyncio.shield(task)
                self._checked.add(slide)
            finally:
                if self._checks.get(slide) is task:
                    del self._checks[slide]

        return check

    async def _check(self, slide: int) -> None:
        # In threads for that alone: they wait for the loop, whose own threads stores need.
        loop, index = asyncio.get_running_loop(), self._corpus.index(slide)
        await loop.run_in_executor(self._checkers, check_unchanged, index, self._stores)

    # --- in decode threads ---------------------------------------------------------------------

    def _look(self, group: Group) -> None:
        """Take what the folder has, and leave the rest to be read."""
        assert self._cache is not None
        wanted: Wanted = group.tag
        plan = wanted.turn.plan
        known = 0
        for i, (file, start, stop) in enumerate(wanted.pieces):
            if stop is None or start == stop or not plan.tokens[file]:
                continue
            known += 1
            body = self._cache.get(plan.keys[file], plan.tokens[file], start, stop)
            if body is not None:
                wanted.found[i] = body
        hits = len(wanted.found)
        if hits:
            left = [piece for i, piece in enumerate(wanted.pieces) if i not in wanted.found]
            wanted.runs = merge(left, self._options.gap_bytes)
            group.reads = _reads(plan, wanted.runs)
        self._stats.add(cache_hits=hits, cache_misses=known - hits)

    def _keep(self, wanted: Wanted, bodies: list[bytes]) -> None:
        assert self._cache is not None
        plan = wanted.turn.plan
        for i, ((file, start, stop), body) in enumerate(zip(wanted.pieces, bodies, strict=True)):
            if stop is not None and body and i not in wanted.found:
                self._cache.put(plan.keys[file], plan.tokens[file], start, stop, body)

    def _take(self, groups: list[Group]) -> None:
        """Decode what the feed hands over, one native call for all of a turn; errors belong to batches."""
        by_turn: dict[Turn, list[Group]] = {}
        for group in groups:
            by_turn.setdefault(group.tag.turn, []).append(group)
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
            wanted: Wanted = group.tag
            if isinstance(group.error, REPLACED):
                failed[wanted.canvas] = group.error
            elif group.error is not None:
                raise group.error
            else:
                empty = wanted.empty(group.bodies)
                if empty is not None:
                    at = turn.plan.tiles_of(wanted.canvas).start + empty
                    why = "its object is empty"
                    failed[wanted.canvas] = bad_tile(
                        self._corpus, turn.plan, wanted.canvas, at, why
                    )
                    continue
                read = [body or b"" for body in group.bodies]
                its = wanted.bodies(read)
                canvases.append(wanted.canvas)
                bodies += its
                self._count(wanted, read, its)
                if self._cache is not None:
                    self._keep(wanted, its)
        if canvases:
            failed |= read_bodies(self._corpus, turn.plan, canvases, bodies, turn.batch.pixels)
        self._arrived(turn, [group.tag.canvas for group in groups], failed)

    def _count(self, wanted: Wanted, read: Sequence[bytes], bodies: list[bytes]) -> None:
        whole = sum(
            len(body) for piece, body in zip(wanted.pieces, bodies, strict=True) if piece[2] is None
        )
        ranges = sum(stop - start for _, start, stop in merge(wanted.pieces, 0) if stop is not None)
        self._stats.add(
            tiles=len(bodies),
            requests=len(read),
            bytes_wanted=whole + ranges,
            bytes_read=sum(map(len, read)),
        )


def _reads(plan: BatchPlan, runs: list[Piece]) -> list[tuple[str, int, int | None, str]]:
    return [(plan.keys[file], start, stop, plan.tokens[file]) for file, start, stop in runs]
