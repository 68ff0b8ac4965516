"""The thread that brings a journal's rows to the store, however long the store is away.

A store that cannot be reached costs a run nothing: the thread tries again, ever more slowly, and
what is left at the end stays in the folder for `replay`.
"""

from __future__ import annotations

import logging
import shlex
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pathfm.runtime import PathfmError, one_line, without_secrets
from pathfm.tracking.journal import METRICS, TASKS, Journal, read_state
from pathfm.tracking.lines import rows_of
from pathfm.tracking.settings import TrackingConfig, absolute

if TYPE_CHECKING:
    from pathfm.tracking import MlflowStore

_log = logging.getLogger(__name__)
_ROWS = 1000  # of the journal, read at a time


class Shipper:
    """The guarded thread between a journal and MLflow."""

    # A request to SQLite costs 12 ms of CPU before its first row, each row of ten metrics 0.7 ms
    # (MLflow 3.17): every second is too often for a run of four steps a second.
    interval_s = 10.0
    retry_s = 1.0
    longest_wait_s = 15.0

    def __init__(self, config: TrackingConfig, journal: Journal) -> None:
        self._journal = journal
        self._uri = config.store(journal.folder)
        # on disk before any server is asked: a replay must find the same place
        journal.update(
            uri=without_secrets(absolute(self._uri)),
            experiment=config.experiment,
            run_name=config.run_name or journal.folder.resolve().name,
            parent_run_id=config.parent_run_id or "",
        )
        self._store: MlflowStore | None = None
        self._wake, self._known = threading.Event(), threading.Event()
        self._stop_by_s: float | None = None
        self._complained = self._checked = False
        self._thread = threading.Thread(target=self._loop, name="pathfm-tracking", daemon=True)

    def start(self, connect_s: float) -> None:
        """Start shipping; returns once the run has an id, or after `connect_s`."""
        self._thread.start()
        self._known.wait(connect_s)

    def stop(self, flush_s: float) -> None:
        """Ship what is left for at most `flush_s`, then give up and say how to ship it later."""
        self._stop_by_s = time.monotonic() + flush_s
        self._wake.set()
        self._thread.join(flush_s)
        left = self._journal.pending_rows
        if left:
            _log.warning(
                "%d rows did not reach %s; they are kept in %s: pathfm compare --replay %s%s",
                left,
                without_secrets(self._uri),
                self._journal.folder,
                shlex.quote(str(self._journal.folder)),
                # what was cut out of the URI is not on disk
                "" if without_secrets(self._uri) == self._uri else " --uri THE_STORE",
            )

    def _loop(self) -> None:
        retry_s = self.retry_s
        while True:
            stop_by_s = self._stop_by_s  # read before shipping: what came earlier is on disk
            try:
                self.ship()
                wait_s, retry_s, self._complained = self.interval_s, self.retry_s, False
                if stop_by_s is not None:
                    return
            except Exception as error:
                # any kind: whatever a store, a proxy or a driver raises must not end training
                self._checked = False
                if self._store is not None:
                    self._store.forget()  # what was under way may have landed
                self._complain(error)
                wait_s = retry_s = min(2 * retry_s, self.longest_wait_s)
            if stop_by_s is not None:
                wait_s = min(wait_s, self.retry_s)
                if time.monotonic() > stop_by_s:
                    return
            self._wake.wait(wait_s)
            self._wake.clear()

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            reason = without_secrets(" ".join(str(error).split()))[:300]
            _log.warning(
                "MLflow store %s does not answer (%s). The run goes on; rows wait in %s",
                without_secrets(self._uri),
                reason or type(error).__name__,
                self._journal.folder,
            )
        self._complained = True

    def ship(self) -> None:
        """Send everything that waits; raises whatever the store raises."""
        store, journal = self._connect(), self._journal
        while (piece := journal.unshipped(METRICS, _ROWS)).rows:
            journal.advance(piece, store.send_metrics(journal.state.run_id, piece.rows))
        while (piece := journal.unshipped(TASKS, _ROWS)).rows:
            for i, task in enumerate(piece.rows):
                store.send_task(journal.state.run_id, task)
                journal.advance(piece, i + 1)

    def ship_afterwards(self) -> None:
        """As `ship`, for a run that is not alive: what waits does not make it RUNNING for good."""
        waiting = self._journal.pending_rows
        self._known.set()
        self.ship()
        if not waiting or self._store is None:
            return
        run_id, tasks = self._journal.state.run_id, rows_of(self._journal.folder / TASKS)
        if tasks and tasks[-1]["do"] == "end":
            self._store.send_task(run_id, tasks[-1])
        else:
            self._store.client.update_run(run_id, status="RUNNING")

    def _connect(self) -> MlflowStore:
        from pathfm.tracking import MlflowStore  # late: the package itself imports this file

        if self._store is None:
            self._store = MlflowStore(self._uri)
        if not self._checked:
            self._check(self._store)
            self._checked = True
        if not self._known.is_set():
            self._store.client.update_run(self._journal.state.run_id, status="RUNNING")
            self._known.set()
        return self._store

    def _check(self, store: MlflowStore) -> None:
        """A run to ship to, and the cursor set back where that holds less than was acknowledged."""
        from pathfm.tracking import RunGoneError

        journal = self._journal
        if journal.state.run_id:
            try:
                if store.marks(journal.state.run_id).lacks(journal.last_shipped()):
                    _log.warning("MLflow has lost rows of this run: they are sent again")
                    journal.ship_again()
                return
            except RunGoneError:
                _log.warning("MLflow does not know this run any more: it is recorded as a new one")
                journal.ship_again(new_run=True)
                self._known.clear()
        state = journal.state
        parent = state.parent_run_id or None
        run_id = store.find_or_create(state.experiment, state.key, state.run_name, parent)
        journal.update(run_id=run_id)


def replay(folder: Path, uri: str | None = None, experiment: str | None = None) -> int:
    """Ship what a run's folder still holds back; returns how many rows that were.

    It goes where the run wanted it, unless another store or experiment is given. The run is left
    with the status of its own end, RUNNING without one; with nothing held back, as it is. Raises
    `PathfmError` if the folder has no journal, or nobody knows the store, or it does not answer.
    """
    state = read_state(folder)
    if state is None:
        raise PathfmError(f"{folder} holds no tracking.json: it is not the folder of a run")
    uri = uri or state.uri
    if not uri:
        raise PathfmError(f"{folder} does not say which store its run belongs to: give --uri")
    base = TrackingConfig(
        uri=uri,
        experiment=experiment or state.experiment or "pathfm",
        run_name=state.run_name or None,
        parent_run_id=state.parent_run_id or None,
    )
    journal = Journal(folder, state.run_id or f"pending-{state.key}", goes_on=False)
    waiting = journal.pending_rows
    try:
        Shipper(base, journal).ship_afterwards()
    except Exception as error:
        where = without_secrets(base.store(folder))
        reason = without_secrets(one_line(error))[:200]
        raise PathfmError(f"MLflow store {where} does not answer: {reason}") from error
    return waiting
