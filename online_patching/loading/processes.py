"""The loader's engine in N processes, handing batches over through a ring of shared memory.

The parent sends draw numbers and a free slot of the ring; a worker writes pixels there and answers with
the drawn columns, a few kilobytes. Batch k is made by worker k mod N and taken in that order.

Workers end when told to, when their pipe closes, and when their parent is gone (killed, say); the
parent never waits for one that does not end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import reduction, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import LoaderError, WorkerDiedError
from online_patching.loading.batch import DrawSource, LoaderOptions, PatchBatch, batch_shape
from online_patching.loading.ring import Ring, Slot
from online_patching.loading.threads import ThreadEngine
from online_patching.stats import Stats

START_METHODS = ("spawn", "fork", "forkserver")
_THE_PARENTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PATIENCE_S = 1.0
"""How long workers may take to end before they are killed: a read may hang, and they hold nothing."""


@dataclass(frozen=True)
class _Worker:
    process: Any  # the start methods' process classes have no common type
    pipe: Connection


@dataclass(eq=False)
class _Asked:
    """A batch that was asked for; its slot once there is a free one."""

    worker: _Worker
    draws: NDArray[np.int64]
    barred: dict[int, int]
    slot: Slot | None = None


class ProcessEngine:
    """Workers that each run a ThreadEngine. Raises LoaderError where processes cannot be started."""

    def __init__(
        self,
        source: DrawSource,
        batch_size: int,
        workers: int,
        options: LoaderOptions,
        stats: Stats,
        *,
        copy: bool = True,
        start_method: str = "spawn",
    ) -> None:
        if multiprocessing.current_process().daemon:
            raise LoaderError(
                f"workers={workers} inside another loader's process, which may not start any. Use either "
                "workers=N here, or the DataLoader's num_workers=N, and 0 for the other."
            )
        self.source, self.stats, self.copy = source, stats, copy
        self._pending: deque[_Asked] = deque()
        self._next = 0
        n_slots = workers * options.prefetch + 1
        self._ring = Ring.create(n_slots, batch_shape(source, batch_size))
        self._slots = [Slot(number) for number in range(n_slots)]
        self._workers: list[_Worker] = []
        # Not __del__: this also runs when the interpreter ends, and never twice.
        self._end = weakref.finalize(self, _end_workers, self._workers, os.getpid())
        try:
            self._start(workers, start_method, pickle.dumps((source, options)))
        except BaseException:
            self.close()
            raise
        finally:
            self._ring.close_descriptor()

    def request(self, draws: NDArray[np.int64], barred: Mapping[int, int] | None = None) -> None:
        """Ask the next worker for a batch, as soon as a slot is free."""
        worker = self._workers[self._next % len(self._workers)]
        self._next += 1
        self._pending.append(_Asked(worker, draws, dict(barred or {})))
        self._send_waiting()

    def take(self) -> PatchBatch:
        """The oldest requested batch; errors of its worker are raised here."""
        self._send_waiting()
        asked = self._pending.popleft()
        if asked.slot is None:
            raise LoaderError(
                f"all {len(self._slots)} buffers are held: call release() on batches, or use copy=True."
            )
        try:
            answer = asked.worker.pipe.recv()
        except (EOFError, OSError):
            raise self._died(asked.worker) from None
        if isinstance(answer, BaseException):
            raise answer
        columns, failures, counters = answer
        self.stats.merge(counters)
        pixels = self._ring.pixels(asked.slot.number, len(asked.draws))
        if not self.copy:
            return PatchBatch(pixels, columns, self.source, failures, asked.slot)
        pixels = pixels.copy()
        asked.slot.release()
        return PatchBatch(pixels, columns, self.source, failures)

    def close(self) -> None:
        """End the workers, by force where they do not. Views of the ring stay good."""
        self._end()
        self._pending.clear()

    def _start(self, workers: int, method: str, payload: bytes) -> None:
        context: Any = multiprocessing.get_context(method)
        if method != "fork":
            resource_tracker.ensure_running()  # it would undo _no_interrupts
        for number in range(workers):
            here, there = context.Pipe()
            # A forked child has copies of the parent's ends, and would keep its brothers' pipes open.
            inherited = [*(w.pipe for w in self._workers), here] if method == "fork" else []
            process = context.Process(
                target=_work,
                args=(there, inherited, payload, self._ring.n_slots, self._ring.shape),
                name=f"patches-{number}",
                daemon=True,
            )
            with _no_interrupts():
                process.start()
            there.close()
            self._workers.append(_Worker(process, here))
            with contextlib.suppress(OSError):  # a worker that died at once is reported by take
                reduction.send_handle(here, self._ring.descriptor, process.pid)

    def _send_waiting(self) -> None:
        """Send requests for which there is a slot now, in their order."""
        free = (slot for slot in self._slots if slot.free)
        for asked in self._pending:
            if asked.slot is not None:
                continue
            if (slot := next(free, None)) is None:
                return
            slot.free, asked.slot = False, slot
            with contextlib.suppress(OSError):  # a dead worker is reported by take
                asked.worker.pipe.send((slot.number, asked.draws, asked.barred))

    def _died(self, worker: _Worker) -> WorkerDiedError:
        worker.process.join(timeout=5.0)
        number = self._workers.index(worker)
        return WorkerDiedError(
            f"loader process {number} ended with exit code {worker.process.exitcode}. Killed for memory: "
            "resume with fewer workers or a smaller batch. At the start of a script: put its code under "
            "`if __name__ == '__main__':`, as every script that starts processes must, or use workers=0."
        )


def _end_workers(workers: list[_Worker], owner: int) -> None:
    """Tell workers to end, kill those that do not, and free what they held here."""
    if os.getpid() != owner:  # a forked copy of the engine: the workers are not its own
        return
    for worker in workers:
        with contextlib.suppress(OSError):
            worker.pipe.send(None)
    deadline = time.monotonic() + _PATIENCE_S
    for worker in workers:
        worker.process.join(timeout=max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        worker.process.close()
        worker.pipe.close()
    workers.clear()


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Processes started here never see Ctrl-C, nor what schedulers send to a whole job before they take
    its machine, not even while they start: it is the parent's to handle, and they end with it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _THE_PARENTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(
    pipe: Connection,
    inherited: list[Connection],
    payload: bytes,
    n_slots: int,
    shape: tuple[int, ...],
) -> None:
    """A worker's life: start requested batches as they come, answer them in order."""
    for number in _THE_PARENTS:
        signal.signal(number, signal.SIG_IGN)
    for connection in inherited:
        connection.close()
    threading.Thread(target=_end_with_parent, name="patches-parent", daemon=True).start()
    try:
        ring = Ring(reduction.recv_handle(pipe), n_slots, shape)
        ring.close_descriptor()
        # Unpickled here also when forked: no lock that some thread of the parent holds comes along.
        source, options = pickle.loads(payload)  # noqa: S301  # our own parent's
        _serve(pipe, ring, source, options)
    except Exception as error:
        _send(pipe, _told(error))


def _serve(pipe: Connection, ring: Ring, source: DrawSource, options: LoaderOptions) -> None:
    stats = Stats()
    engine = ThreadEngine(source, options, stats)
    asked = 0
    reported = _counters(stats)
    try:
        while True:
            # Take in every request that waits, so that reading runs ahead of the parent.
            while asked == 0 or pipe.poll():
                request = _receive(pipe)
                if request is None:
                    return
                slot, draws, barred = request
                engine.request(draws, barred, ring.pixels(slot, len(draws)))
                asked += 1
            batch = engine.take()
            asked -= 1
            now = _counters(stats)
            delta = {name: now[name] - reported[name] for name in now}
            reported = now
            if not _send(pipe, (batch.columns, batch.failures, delta)):
                return
    finally:
        engine.close()


def _end_with_parent() -> None:
    """End this process when its parent has: killed ones cannot say so, and reads may hang for long."""
    parent, above = multiprocessing.parent_process(), os.getppid()
    sentinels = [parent.sentinel] if parent is not None else []
    # Under fork a brother may hold the sentinel's other end a while: look at the parent's number too.
    while not wait(sentinels, timeout=1.0) and os.getppid() == above:
        pass
    os._exit(1)


def _counters(stats: Stats) -> dict[str, float]:
    """The plain counters: failures are counted by who takes the batch."""
    return {k: v for k, v in stats.as_dict().items() if not isinstance(v, dict)}


def _told(error: Exception) -> Exception:
    """An error that survives the way to the parent, with its traceback as a note."""
    error.add_note(f"In loader process {os.getpid()}:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301
    except Exception:
        return LoaderError(f"{type(error).__name__} in a loader process: {error}")
    return error


def _receive(pipe: Connection) -> Any:
    """The parent's next request; None when it is gone."""
    try:
        return pipe.recv()
    except (EOFError, OSError):
        return None


def _send(pipe: Connection, answer: object) -> bool:
    """Answer the parent; False when it is gone."""
    try:
        pipe.send(answer)
    except OSError:
        return False
    return True
