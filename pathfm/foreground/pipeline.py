"""All slides of a corpus, in order: thumbnails read ahead, masked in batches, written behind.

Reading waits on storage and decoding, the network on the processor or the GPU; threads let them
overlap. The number of thumbnails and masks that wait is bounded, whatever the number of slides.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pathfm.foreground import SlideForeground
from pathfm.foreground.masking import Seen, Worker

AHEAD = 4
"""Thumbnails read ahead of the one being masked, and masks not yet written; twice a GPU's batch on
one."""
GPU_BATCH = 8

Outcome = Seen | SlideForeground


def masked(worker: Worker, indexes: Sequence[Path]) -> Iterator[SlideForeground]:
    """Each slide's outcome, in the order of `indexes`, once its files are written."""
    batch = _batch_of(worker.device)
    with ThreadPoolExecutor(worker.config.threads, "foreground") as pool:
        try:
            yield from _in_order(worker, pool, indexes, batch)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _batch_of(device: str) -> int:
    """A processor is busy with one thumbnail; a GPU wants several."""
    return 1 if device == "cpu" else GPU_BATCH


def _in_order(
    worker: Worker, pool: ThreadPoolExecutor, indexes: Sequence[Path], batch: int
) -> Iterator[SlideForeground]:
    ahead = max(AHEAD, 2 * batch)
    waiting = iter(indexes)
    reading: deque[Future[Outcome]] = deque()
    writing: deque[Future[SlideForeground]] = deque()
    while True:
        while len(reading) < ahead and (path := next(waiting, None)) is not None:
            reading.append(pool.submit(worker.see, path))
        if not reading:
            break
        outcomes = [reading.popleft().result() for _ in range(min(batch, len(reading)))]
        seen = [outcome for outcome in outcomes if isinstance(outcome, Seen)]
        probabilities = iter(worker.probabilities(seen))
        for outcome in outcomes:
            if isinstance(outcome, Seen):
                writing.append(pool.submit(worker.write, outcome, next(probabilities)))
            else:
                writing.append(_done(outcome))
        while len(writing) > ahead:
            yield writing.popleft().result()
    for future in writing:
        yield future.result()


def _done(row: SlideForeground) -> Future[SlideForeground]:
    future: Future[SlideForeground] = Future()
    future.set_result(row)
    return future
