"""The loader's engine in N spawned processes, handing batches over through shared memory.

Each worker owns `prefetch` + 1 slots of one batch. The parent asks a worker for a batch in a slot
that is free; the worker answers when its pixels are there. Nothing but refs crosses the pipe.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching.batch import DrawSource, LoaderOptions, PatchBatch, batch_shape
from online_patching.errors import LoaderError, WorkerDiedError
from online_patching.stats import Stats
from online_patching.threads import ThreadEngine


@dataclass(eq=False)
class Slot:
    """One batch's worth of shared memory, free or held by whoever uses its batch."""

    memory: SharedMemory
    shape: tuple[int, ...]
    free: bool = True

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The memory as an array (batch, size, size, 3)."""
        return np.ndarray(self.shape, np.uint8, self.memory.buf)

    def release(self) -> None:
        """Let the next batch be written here."""
        self.free = True


class ProcessEngine:
    """Batch k goes to worker k mod N and is taken from it in the same order."""

    def __init__(
        self,
        sampler: DrawSource,
        batch_size: int,
        workers: int,
        options: LoaderOptions,
        stats: Stats,
        copy: bool,
    ) -> None:
        self.sampler, self.stats, self.copy = sampler, stats, copy
        shape = batch_shape(sampler, batch_size)
        context = multiprocessing.get_context("spawn")
        self._workers: list[tuple[Any, Connection, list[Slot]]] = []
        self._pending: deque[tuple[int, int]] = deque()
        self._next = 0
        for number in range(workers):
            slots = [
                Slot(SharedMemory(create=True, size=int(np.prod(shape))), shape)
                for _ in range(options.prefetch + 1)
            ]
            here, there = context.Pipe()
            names = [slot.memory.name for slot in slots]
            process = context.Process(
                target=_work,
                args=(there, sampler, options, names, shape),
                name=f"patches-{number}",
                daemon=True,
            )
            process.start()
            there.close()
            self._workers.append((process, here, slots))

    def request(self, draws: NDArray[np.int64], barred: Mapping[int, int] | None = None) -> None:
        """Ask the next worker for a batch, in one of its free slots."""
        number = self._next % len(self._workers)
        self._next += 1
        _, pipe, slots = self._workers[number]
        free = [i for i, slot in enumerate(slots) if slot.free]
        if not free:
            raise LoaderError("every buffer is held: call release() on batches, or use copy=True.")
        slots[free[0]].free = False
        self._pending.append((number, free[0]))
        with contextlib.suppress(OSError):  # a dead worker is reported by take
            pipe.send((free[0], draws, barred))

    def take(self) -> PatchBatch:
        """The oldest requested batch; errors of its worker are raised here."""
        number, at = self._pending.popleft()
        process, pipe, slots = self._workers[number]
        try:
            answer = pipe.recv()
        except (EOFError, OSError):
            process.join(timeout=5)
            raise WorkerDiedError(
                f"loader process {number} ended with exit code {process.exitcode}. Killed for memory: "
                "resume with fewer workers or a smaller batch. At the start of a script: put its code under "
                "`if __name__ == '__main__':`, as every script that starts processes must, or use workers=0."
            ) from None
        if isinstance(answer, BaseException):
            raise answer
        columns, failures, counters = answer
        self.stats.merge(counters)
        slot = slots[at]
        if not self.copy:
            return PatchBatch(slot.pixels, columns, self.sampler, failures, slot)
        pixels = slot.pixels.copy()
        slot.release()
        return PatchBatch(pixels, columns, self.sampler, failures)

    def close(self) -> None:
        """End the workers and free the shared memory."""
        for _, pipe, _ in self._workers:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process, pipe, slots in self._workers:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
            pipe.close()
            for slot in slots:
                with contextlib.suppress(BufferError):  # a batch somebody still looks at
                    slot.memory.close()
                slot.memory.unlink()
        self._workers.clear()
        self._pending.clear()


def _work(
    pipe: Connection,
    sampler: DrawSource,
    options: LoaderOptions,
    names: list[str],
    shape: tuple[int, ...],
) -> None:
    """A worker's life: start requested batches as they come, answer them in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    memories = [SharedMemory(name=name) for name in names]
    buffers = [np.ndarray(shape, np.uint8, memory.buf) for memory in memories]
    stats = Stats()
    engine = ThreadEngine(sampler, options, stats)
    asked = 0
    reported = stats.as_dict()
    try:
        while True:
            # Take in every request that waits, so that reading runs ahead of the parent.
            while asked == 0 or pipe.poll():
                request = _receive(pipe)
                if request is None:
                    return
                slot, draws, barred = request
                engine.request(draws, barred, buffers[slot])
                asked += 1
            batch = engine.take()
            asked -= 1
            now = stats.as_dict()
            delta = {k: now[k] - reported[k] for k in now if k != "failures"}
            reported = now
            _send(pipe, (batch.columns, batch.failures, delta))
    except Exception as error:
        _send(pipe, error)
    finally:
        engine.close()
        del buffers
        for memory in memories:
            with contextlib.suppress(BufferError):
                memory.close()


def _receive(pipe: Connection) -> Any:
    """The parent's next request; None when it is gone."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


def _send(pipe: Connection, answer: object) -> None:
    """Answer the parent, if it is still there."""
    with contextlib.suppress(OSError):
        pipe.send(answer)
