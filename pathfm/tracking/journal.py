"""What a run has to tell, on disk before anything else: the source of every row MLflow ever shows.

    metrics.jsonl          one JSON line a step: {"step": 3, "time_ms": ..., "loss": 6.9, ...}
    metrics_replaced.jsonl rows of steps that a resumed run does again, as they were the first time
    tracking_tasks.jsonl   params, tags, pictures, the end of the run: {"do": "tags", ...}
    tracking.json          who the run is and how far it has been shipped

Rows survive `kill -9` (each is one write of a whole line; a torn last line is dropped on opening).
They are not fsynced one by one but by `sync`, which a checkpoint waits for: a power cut can lose rows
since then, a crash cannot. A line that is no row is passed over with a warning.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from online_patching.stores.local import atomic_write_bytes, atomic_write_text
from pathfm.runtime import PathfmError, make_folder, scrubbed
from pathfm.tracking.lines import drop_torn_line, lines_and_rows, row_of, rows_of, safe_cursor

METRICS = "metrics.jsonl"
REPLACED = "metrics_replaced.jsonl"
TASKS = "tracking_tasks.jsonl"
STATE = "tracking.json"
_NOT_METRICS = ("step", "time_ms")
_TAIL_BYTES = 65_536

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShippingState:
    """Who a run is and how much of its journal MLflow has acknowledged."""

    key: str  # ours, drawn before any server is asked; finds a run whose creation went unanswered
    uri: str = ""  # without secrets: a store that wants them is named again to replay
    experiment: str = ""
    run_name: str = ""
    parent_run_id: str = ""
    run_id: str = ""
    metrics_bytes: int = 0
    tasks_bytes: int = 0
    folder: str = ""  # where it lay when it was last open
    copied_from: Sequence[str] = ()  # names of the runs whose folder this one is a copy of

    @property
    def names(self) -> set[str]:
        """What a checkpoint may call this run."""
        return {self.run_id, f"pending-{self.key}", *self.copied_from}


_STATES = TypeAdapter(ShippingState)


@dataclass(frozen=True)
class Slice:
    """Rows that wait to be shipped, and the cursor after each of them."""

    name: str
    rows: list[dict[str, Any]]
    ends: list[int]
    rewinds: int


class Journal:
    """The journal in one folder; append from any thread, ship from one.

    `run_id` names the run to go on with (its MLflow id, or the "pending-..." id it had before the
    server answered). Without one, or with another run's, the folder's old journal is moved to
    `previous_runs/` and a new one begins; rows are never deleted. A copy of a folder that is still
    where it was, as seen from here, is a run of its own: with the rows so far, without the pictures.
    `goes_on` is False for who only ships what is there, copy or not.
    """

    def __init__(self, folder: Path, run_id: str | None = None, *, goes_on: bool = True) -> None:
        self.folder = make_folder(folder)
        self._lock = threading.Lock()
        self._rewinds = 0
        self._differed = False
        self.state = self._find_state(run_id, goes_on)
        for name in (METRICS, TASKS, REPLACED):
            drop_torn_line(folder / name)
        self._replaced = {row["step"]: row for row in rows_of(folder / REPLACED)}
        self.save(
            replace(
                self.state,
                metrics_bytes=safe_cursor(folder / METRICS, self.state.metrics_bytes),
                tasks_bytes=safe_cursor(folder / TASKS, self.state.tasks_bytes),
                folder=str(folder.resolve()) if goes_on else self.state.folder,
            )
        )

    @property
    def run_id(self) -> str:
        """MLflow's id, or `pending-<key>` until the server has given one."""
        return self.state.run_id or f"pending-{self.state.key}"

    def _find_state(self, run_id: str | None, goes_on: bool) -> ShippingState:
        known = read_state(self.folder)
        fresh = ShippingState(key=uuid.uuid4().hex)
        if run_id and known and run_id in known.names:
            if not goes_on or not _is_copy(self.folder, known):
                return known
            _log.warning("%s is a copy of %s: a run of its own", self.folder, known.folder)
            (self.folder / REPLACED).unlink(missing_ok=True)  # of what MLflow holds of the other
            tasks = self.folder / TASKS
            told = tasks.stat().st_size if tasks.exists() else 0  # their paths are the other's
            return replace(fresh, copied_from=sorted(known.names - {""}), tasks_bytes=told)
        if run_id and not run_id.startswith("pending-"):
            return replace(fresh, run_id=run_id)  # read whole again: what MLflow holds is not sent
        self._set_aside(known.key if known else fresh.key)
        return fresh

    def _set_aside(self, key: str) -> None:
        names = (METRICS, REPLACED, TASKS, STATE)
        old = [p for p in (self.folder / n for n in names) if p.exists()]
        if not any(path.stat().st_size for path in old if path.name != STATE):
            return
        target = make_folder(self.folder / "previous_runs" / key[:8])
        for path in old:
            path.replace(target / path.name)

    def save(self, state: ShippingState) -> None:
        """Make `state` the one a restart finds."""
        self.state = state
        atomic_write_text(self.folder / STATE, json.dumps(asdict(state), indent=1) + "\n")

    def update(self, **changes: str) -> None:
        """Record who the run is, and where it belongs: fields of its state."""
        with self._lock:
            self.save(replace(self.state, **changes))  # type: ignore[arg-type]

    def append_metrics(self, step: int, values: dict[str, float]) -> None:
        """Add one row. One made again after `truncate` keeps its first time, and is compared."""
        first = self._replaced.get(step)
        time_ms = first["time_ms"] if first else int(time.time() * 1000)
        self._append(METRICS, {"step": step, "time_ms": time_ms, **values})
        if first is not None and not self._differed:
            self._differed = _tell_difference(step, first, values)

    def append_task(self, do: str, **facts: Any) -> None:
        """Add one thing to tell MLflow besides metrics."""
        self._append(TASKS, {"do": do, "time_ms": int(time.time() * 1000), **facts})

    def _append(self, name: str, row: dict[str, Any]) -> None:
        line = json.dumps(row).encode() + b"\n"
        try:
            with self._lock, (self.folder / name).open("ab", buffering=0) as file:
                began = file.tell()
                written = file.write(line)
                if written != len(line):  # a nearly full disk takes a part and raises nothing
                    file.truncate(began)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise _refused(self.folder / name, error) from error

    def sync(self) -> None:
        """Every row so far outlives a power cut when this returns."""
        for path in (self.folder / METRICS, self.folder / TASKS, self.folder):
            if not path.exists():
                continue
            try:
                handle = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)
            except OSError as error:
                raise _refused(path, error) from error

    def last_step(self) -> int:
        """The step of the last row; -1 where there is none."""
        path = self.folder / METRICS
        if not path.exists():
            return -1
        with self._lock, path.open("rb") as file:
            start = max(0, path.stat().st_size - _TAIL_BYTES)
            file.seek(start)
            lines = file.read().splitlines()[1 if start else 0 :]
        return max((row["step"] for row in map(row_of, lines) if row), default=-1)

    def truncate(self, last_step: int) -> None:
        """Drop the metric rows after `last_step`: a resumed run makes them again.

        They are kept in metrics_replaced.jsonl: MLflow may hold them, and goes on holding them.
        """
        path = self.folder / METRICS
        with self._lock:
            pairs = lines_and_rows(path)
            later = {row["step"]: row for _, row in pairs if row["step"] > last_step}
            if not later:
                return
            if self.state.run_id or not self.state.copied_from:  # a copy's are nobody's yet
                self._keep_first(later, last_step)
            data = b"".join(line for line, row in pairs if row["step"] <= last_step)
            atomic_write_bytes(path, data)
            self._rewinds += 1
            at = min(self.state.metrics_bytes, len(data))
            self.save(replace(self.state, metrics_bytes=at))

    def _keep_first(self, later: Mapping[int, dict[str, Any]], last_step: int) -> None:
        """Of a step done three times the first row counts; rows before `last_step` stay as they are."""
        known = {step: row for step, row in self._replaced.items() if step > last_step}
        self._replaced = {**later, **known}
        kept_first = [json.dumps(row) + "\n" for _, row in sorted(self._replaced.items())]
        atomic_write_text(self.folder / REPLACED, "".join(kept_first))

    def ship_again(self, *, new_run: bool = False) -> None:
        """Begin at the first row: the store lost some, or (`new_run`) the whole run."""
        with self._lock:
            self._rewinds += 1
            run_id = "" if new_run else self.state.run_id
            self.save(replace(self.state, run_id=run_id, metrics_bytes=0, tasks_bytes=0))

    def last_shipped(self) -> dict[str, int]:
        """The last step of each key among the rows just before the cursor."""
        start = max(0, self.state.metrics_bytes - _TAIL_BYTES)
        path = self.folder / METRICS
        with self._lock:
            if not path.exists():
                return {}
            with path.open("rb") as file:
                file.seek(start)
                lines = file.read(self.state.metrics_bytes - start).splitlines()
        rows = map(row_of, lines[1 if start else 0 :])
        return {key: row["step"] for row in rows if row for key in metric_values(row)}

    def unshipped(self, name: str, limit: int) -> Slice:
        """Up to `limit` whole rows past the cursor of METRICS or TASKS."""
        path = self.folder / name
        with self._lock:
            start = self.state.metrics_bytes if name == METRICS else self.state.tasks_bytes
            if not path.exists():
                return Slice(name, [], [], self._rewinds)
            with path.open("rb") as file:
                file.seek(start)
                lines = list(islice(file, limit))
        lines = [line for line in lines if line.endswith(b"\n")]
        ends = [start + size for size in accumulate(map(len, lines))]
        told = [(row, end) for row, end in zip(map(row_of, lines), ends, strict=True) if row]
        return Slice(name, [row for row, _ in told], [end for _, end in told], self._rewinds)

    def advance(self, done: Slice, rows: int) -> None:
        """Record that the first `rows` of a slice have arrived."""
        with self._lock:
            if done.rewinds != self._rewinds:
                return  # the file was truncated meanwhile: these offsets mean nothing now
            at = done.ends[rows - 1]
            if done.name == METRICS:
                self.save(replace(self.state, metrics_bytes=at))
            else:
                self.save(replace(self.state, tasks_bytes=at))

    @property
    def pending_rows(self) -> int:
        """How many rows MLflow has not acknowledged yet."""
        return sum(len(self.unshipped(name, 1_000_000).rows) for name in (METRICS, TASKS))


def read_state(folder: Path) -> ShippingState | None:
    """The state in a folder, or None where there is none that can be read."""
    path = folder / STATE
    try:
        return _STATES.validate_json(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError):
        return None


def _is_copy(folder: Path, state: ShippingState) -> bool:
    """Whether the state's run lies where it was last open, and that is not `folder`."""
    there = read_state(Path(state.folder)) if state.folder else None
    if there is None or there.key != state.key:
        return False
    try:
        return not Path(state.folder).samefile(folder)
    except OSError:  # gone just now
        return False


def unfinished_run(folder: Path, params: Mapping[str, Any], free: Sequence[str] = ()) -> str | None:
    """The id of the run in `folder` that never ended well and was told these very params, or None.

    For a run that was killed before it had anything to go on from: begun again it is the same run
    to MLflow. params: flat, as `as_dict` gives them; those whose first word is in `free` may differ.
    """
    state = read_state(folder)
    if state is None:
        return None
    tasks = rows_of(folder / TASKS)
    told = [task["params"] for task in tasks if task["do"] == "params"]
    ends = [task["status"] for task in tasks if task["do"] == "end"]
    if not told or "FINISHED" in ends:
        return None
    now = scrubbed({key: str(value) for key, value in params.items()})
    if any(
        told[-1].get(key) != now.get(key)
        for key in told[-1].keys() | now.keys()
        if key.partition(".")[0] not in free
    ):
        return None
    return state.run_id or f"pending-{state.key}"


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Every row of a run's `metrics.jsonl`, in order; [] where there is none."""
    return rows_of(folder / METRICS)


def metric_values(row: dict[str, Any]) -> dict[str, float]:
    """A row without its step and time."""
    return {key: value for key, value in row.items() if key not in _NOT_METRICS}


def _refused(path: Path, error: OSError) -> PathfmError:
    return PathfmError(
        f"{path}: a row cannot be written: {error.strerror}. Free space; the run resumes from its "
        "last checkpoint"
    )


def _tell_difference(step: int, first: Mapping[str, Any], again: Mapping[str, float]) -> bool:
    """Warns where a step done again has another loss than the first time; whether it did."""
    before, now = first.get("loss"), again.get("loss")
    if before is None or now is None or before == now or (before != before and now != now):
        return False
    _log.warning(
        "step %s was done again and its loss is now %.6g, not %.6g: this hardware does not repeat "
        "itself to the bit. MLflow keeps the first value of a step, metrics.jsonl holds the last",
        f"{step:,}",
        now,
        before,
    )
    return True
