"""Runs in MLflow, fed from files, so that no server can stop, slow or thin out a training run.

settings.py    where a run is recorded; no secrets in what is shown
run.py         open_run() and Run: what a stage tells
journal.py     the files in the run's folder, written first
lines.py       their rows, whatever a crash left of them
high_water.py  what a store holds already and is never sent again
shipper.py     the thread that brings them to the store, and replay()
reading.py     read_runs(), read_artifacts(): what the store knows
here           MLflow itself: the only file that imports it, and late, for that takes seconds
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from pathfm.locks import locked
from pathfm.runtime import PathfmError, without_secrets
from pathfm.tracking.high_water import HighWater, Point, points_of
from pathfm.tracking.journal import metric_values, read_metrics, unfinished_run
from pathfm.tracking.reading import RunRecord, read_artifacts, read_runs
from pathfm.tracking.run import Run, open_run
from pathfm.tracking.settings import (
    PARENT,
    TrackingConfig,
    sqlite_file,
    ui_command,
)
from pathfm.tracking.shipper import Shipper, replay

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = [
    "MlflowStore",
    "Run",
    "RunGoneError",
    "RunRecord",
    "Shipper",
    "TrackingConfig",
    "make_client",
    "open_run",
    "read_artifacts",
    "read_metrics",
    "read_runs",
    "replay",
    "sqlite_file",
    "ui_command",
    "unfinished_run",
]

_log = logging.getLogger(__name__)
_MAX_METRICS = 1000  # of one log_batch call
_MAX_PARAMS = 100
_MAX_VALUE = 6000  # characters of a param
_KEY = "pathfm.run_key"
_client_lock = threading.Lock()
_TABLES_S = 60.0  # making a store's tables takes seconds


class RunGoneError(Exception):
    """The store answers, but does not know the run (any more)."""


class MlflowStore:
    """A store that answers, spoken to in rows of the journal; raises whatever MLflow raises.

    Except for what the store understood and refused: it would refuse that for ever, so it is
    logged and left out.
    """

    def __init__(self, uri: str) -> None:
        self.client = make_client(uri)
        self._uri = uri
        self._marks: dict[str, HighWater] = {}

    def marks(self, run_id: str) -> HighWater:
        """What the store holds of a run: asked once, and again after anything that went wrong.

        Raises RunGoneError for a run that the store does not know.
        """
        from mlflow.exceptions import MlflowException

        if run_id not in self._marks:
            try:
                data = self.client.get_run(run_id).data
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    raise RunGoneError(run_id) from error
                raise
            # one request for all keys: the protocol's form of a run, unlike `data.metrics`, has steps
            latest = data.to_proto().metrics
            self._marks[run_id] = HighWater(
                Point(m.key, m.value, int(m.timestamp), int(m.step)) for m in latest
            )
        return self._marks[run_id]

    def forget(self) -> None:
        """What has been sent may have landed or not: the next to send asks again."""
        self._marks.clear()

    def find_or_create(self, experiment: str, key: str, name: str, parent: str | None) -> str:
        """The id of the run with our `key`: an earlier request may have made it unheard."""
        experiment_id = self._experiment_id(experiment)
        found = self._run_id_of(experiment_id, key)
        if found is not None:
            return found
        tags = {_KEY: key}
        if parent:
            tags[PARENT] = self._resolved(experiment_id, parent)
        run = self.client.create_run(experiment_id, tags=tags, run_name=name)
        return str(run.info.run_id)

    def send_metrics(self, run_id: str, rows: Sequence[dict[str, Any]]) -> int:
        """Send as many of the rows as fit one request, at least one; returns how many.

        Of them goes out what lies above the store's marks.
        """
        points: list[Point] = []
        n_rows = 0
        for row in rows:
            values = points_of(row, metric_values(row))
            if points and len(points) + len(values) > _MAX_METRICS:
                break
            points += values
            n_rows += 1
        marks = self.marks(run_id)
        self._send_points(run_id, marks.missing(points), marks)
        return n_rows

    def _send_points(self, run_id: str, points: Sequence[Point], marks: HighWater) -> None:
        """One request for up to 1,000 points; a part with a refused one is sent point by point."""
        for at in range(0, len(points), _MAX_METRICS):
            part = points[at : at + _MAX_METRICS]
            if not self._accepts(run_id, part):
                for point in part:
                    self._accepts(run_id, [point])
            marks.reached(part)

    def _accepts(self, run_id: str, points: Sequence[Point]) -> bool:
        """Sends them; False where the store refused, which it then does for ever."""
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        metrics = [Metric(p.key, p.value, p.time_ms, p.step) for p in points]
        try:
            self.client.log_batch(run_id, metrics=metrics, synchronous=True)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if self.client.get_run(run_id).info.lifecycle_stage != "active":
                raise RuntimeError(f"run {run_id} was deleted in MLflow: restore it") from error
            if len(points) == 1:
                _log.warning("MLflow refused a value: %s", without_secrets(str(error))[:300])
            return False
        return True

    def send_task(self, run_id: str, task: Mapping[str, Any]) -> None:
        """Do what one row of `tracking_tasks.jsonl` says."""
        _attempt(lambda: self._do(run_id, task))

    def _do(self, run_id: str, task: Mapping[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, RunTag

        client = self.client
        match task["do"]:
            case "tags":
                tags = [RunTag(k, str(v)[:_MAX_VALUE]) for k, v in task["tags"].items()]
                client.log_batch(run_id, tags=tags, synchronous=True)
            case "params":
                self._log_params(run_id, task["params"])
            case "summary":
                marks = self.marks(run_id)
                points = [Point(k, v, task["time_ms"], 0) for k, v in task["metrics"].items()]
                self._send_points(run_id, marks.missing_summary(points), marks)
            case "artifact":
                path, into = task["path"], task["into"] or None
                send = client.log_artifacts if os.path.isdir(path) else client.log_artifact
                if not os.path.exists(path):
                    raise FileNotFoundError(2, "gone", path)
                send(run_id, path, into)
            case "cohort":
                # MLflow keeps at most 36 characters of a digest; the tag holds all of it
                data = Dataset(task["name"], task["digest"][:36], "local", task["name"])
                context = InputTag("mlflow.data.context", task["context"])
                client.log_inputs(run_id, [DatasetInput(data, [context])])
            case "end":
                client.set_terminated(run_id, task["status"], task["time_ms"])

    def _log_params(self, run_id: str, params: dict[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        known = self.client.get_run(run_id).data.params
        cut = {key: value[:_MAX_VALUE] for key, value in params.items()}
        new = [Param(key, value) for key, value in cut.items() if key not in known]
        for at in range(0, len(new), _MAX_PARAMS):
            self.client.log_batch(run_id, params=new[at : at + _MAX_PARAMS], synchronous=True)
        changed = {k: v for k, v in cut.items() if k in known and known[k] != v}
        tags = [RunTag(f"param_changed.{key}", value) for key, value in changed.items()]
        if tags:
            self.client.log_batch(run_id, tags=tags[:_MAX_PARAMS], synchronous=True)

    def _experiment_id(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return str(found.experiment_id)
        file = sqlite_file(self._uri)
        # left to itself MLflow puts the artifacts of a sqlite store into the working directory
        where = (file.resolve().parent / "mlflow-artifacts").as_uri() if file else None
        try:
            return str(self.client.create_experiment(name, artifact_location=where))
        except Exception:
            found = self.client.get_experiment_by_name(name)  # somebody else was quicker
            if found is None:
                raise
            return str(found.experiment_id)

    def _resolved(self, experiment_id: str, run_id: str) -> str:
        """The id behind a `pending-...` one; raises (to be tried again) while there is none."""
        if not run_id.startswith("pending-"):
            return run_id
        found = self._run_id_of(experiment_id, run_id.removeprefix("pending-"))
        if found is None:
            raise RuntimeError(f"the parent run {run_id} does not exist yet")
        return found

    def _run_id_of(self, experiment_id: str, key: str) -> str | None:
        query = f"tags.`{_KEY}` = '{key}'"
        found = self.client.search_runs([experiment_id], query, max_results=1)
        return str(found[0].info.run_id) if found else None


def make_client(uri: str) -> MlflowClient:
    """An MLflow client that does not phone home and does not hang for minutes."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with _client_lock:  # two threads making the tables of one new sqlite file collide
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):  # importing mlflow sets its level
            logging.getLogger(name).setLevel(logging.WARNING)
        file = sqlite_file(uri)
        with ExitStack() as turn:
            if file is not None:  # MLflow makes its tables without asking who else does
                file.parent.mkdir(parents=True, exist_ok=True)
                with suppress(
                    PathfmError
                ):  # where none can be had, as in a read-only folder, without
                    turn.enter_context(locked(file.with_name(f".{file.name}.lock"), _TABLES_S))
            client = MlflowClient(tracking_uri=uri)
            client.search_experiments(max_results=1)
    return client


def _attempt(call: Callable[[], object]) -> None:
    """Do it; what the store understood and refused would be refused for ever, so go on."""
    from mlflow.exceptions import MlflowException

    try:
        call()
    except MlflowException as error:
        if error.error_code != "INVALID_PARAMETER_VALUE":
            raise
        _log.warning("MLflow refused an entry: %s", without_secrets(str(error))[:300])
    except FileNotFoundError as error:
        _log.warning("an artifact was gone before it was shipped: %s", error.filename)
