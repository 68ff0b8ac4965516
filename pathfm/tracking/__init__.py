"""Runs in MLflow, fed from files, so that no server can stop, slow or thin out a training run.

Everything is written to the run's folder first (`journal`). A daemon thread ships it in batches
and remembers how far it got; while the store cannot be reached it tries again, and what is left at
the end is shipped when the folder is opened again or by `replay`. The only file that imports
mlflow, and late: the import takes seconds.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, Field, field_validator

from pathfm.runtime import PathfmError, git_commit
from pathfm.tracking.journal import (
    METRICS,
    TASKS,
    Journal,
    Slice,
    metric_values,
    read_metrics,
    read_state,
)

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

__all__ = ["Run", "RunRecord", "TrackingConfig", "open_run", "read_metrics", "read_runs", "replay"]

_log = logging.getLogger(__name__)
_MAX_METRICS = 1000  # of one log_batch call
_MAX_PARAMS = 100
_MAX_VALUE = 6000  # characters of a param
_PARENT, _KEY = "mlflow.parentRunId", "pathfm.run_key"
_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks")
_NAME = re.compile(r"^[\w./ :-]{1,250}$")
_SECRET_NAME = re.compile(
    r"(^|[._-])(password|passwd|secret|token|api_?key|access_?key)s?$", re.IGNORECASE
)
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)(?:[^\s/?#]*@)?([^\s?#]*)(?:[?#]\S*)?")
_client_lock = threading.Lock()


class TrackingConfig(BaseModel, frozen=True, extra="forbid"):
    """Where a run is recorded."""

    enabled: bool = Field(True, description="ship to MLflow; metrics.jsonl is written regardless")
    uri: str | None = Field(
        None,
        description="MLflow store: sqlite:///FILE or http(s)://...; unset: $MLFLOW_TRACKING_URI, "
        "else mlflow.db in the run's folder",
    )
    experiment: str = Field("pathfm", min_length=1, description="name of the MLflow experiment")
    run_name: str | None = Field(None, description="name of the run; unset: its folder's name")
    parent_run_id: str | None = Field(None, description="id of the run this one is a child of")

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str | None) -> str | None:
        if uri and uri.split(":")[0].split("+")[0] not in _SCHEMES:
            raise ValueError(
                f"{without_secrets(uri)!r} is no store MLflow 3 can write to: "
                f"use sqlite:///FILE.db or http(s)://HOST:PORT"
            )
        return uri

    def store(self, folder: Path) -> str:
        """The store's URI for a run in `folder`."""
        default = f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        return self.uri or os.environ.get("MLFLOW_TRACKING_URI") or default


def open_run(
    config: TrackingConfig,
    folder: Path,
    params: Mapping[str, Any],
    tags: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    connect_s: float = 20.0,
) -> Run:
    """A `Run` that records into `folder`; use it as a context manager.

    `run_id` goes on with that run (its params must not be repeated equal: one that changed is kept
    as the tag `param_changed.<name>`, since MLflow refuses to overwrite). Waits at most `connect_s`
    for the store to hand out an id and goes on without one if it does not.
    """
    journal = Journal(folder, run_id)
    run = Run(config, journal)
    name = config.run_name or folder.resolve().name
    commit = git_commit()
    run._task(
        "tags",
        tags={
            "mlflow.runName": name,
            "mlflow.source.name": "pathfm",
            "mlflow.source.git.commit": commit,
            **(tags or {}),
        },
    )
    if params:
        run._task("params", params=_flat(params))
    run._start(connect_s)
    return run


class Run:
    """One run: append to it from anywhere; nothing here waits for a server or raises for one."""

    def __init__(self, config: TrackingConfig, journal: Journal) -> None:
        self.folder = journal.folder
        self._journal = journal
        self._shipper = Shipper(config, journal) if config.enabled else None

    @property
    def run_id(self) -> str:
        """MLflow's id, or `pending-...` while no server has answered; both resume the run."""
        return self._journal.run_id

    def log(self, step: int, **metrics: float) -> None:
        """Record metrics of one step (an optimizer step counted from 0)."""
        values = {_checked(key): float(value) for key, value in metrics.items()}
        self._journal.append_metrics(step, values)

    def summary(self, **metrics: float) -> None:
        """Record results that belong to the whole run, shown beside its params."""
        values = {_checked(key): float(value) for key, value in metrics.items()}
        self._task("summary", metrics=values)

    def truncate(self, step: int) -> None:
        """Forget the rows after `step`; a resumed run calls this before it goes on."""
        self._journal.truncate(step)

    def tag(self, key: str, value: object) -> None:
        """Set a tag."""
        self._task("tags", tags={key: str(value)})

    def picture(self, path: Path) -> None:
        """Keep a picture with the run, under `pictures/`."""
        self._task("artifact", path=str(path.resolve()), into="pictures")

    def artifact(self, path: Path, into: str = "") -> None:
        """Keep a file or a folder with the run. It must stay where it is until it is shipped."""
        self._task("artifact", path=str(path.resolve()), into=into)

    def checkpoint(self, path: Path, digest: str) -> None:
        """Refer to a checkpoint by path and digest; weights are not copied into the store."""
        self._task("tags", tags={"checkpoint.path": str(path), "checkpoint.digest": digest})

    def cohort(self, name: str, digest: str, context: str = "training") -> None:
        """Record which data the run used: an MLflow dataset input, and the full digest as a tag."""
        self._task("cohort", name=name, digest=digest, context=context)
        self._task("tags", tags={f"cohort.{context}": name, f"cohort.{context}.digest": digest})

    def close(self, status: str = "FINISHED", flush_s: float = 30.0) -> None:
        """Record the end and ship what is left, for at most `flush_s` seconds."""
        self._task("end", status=status)
        if self._shipper is not None:
            self._shipper.stop(flush_s)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        self.close("KILLED" if stopped else "FAILED" if kind else "FINISHED")

    def _start(self, connect_s: float) -> None:
        if self._shipper is not None:
            self._shipper.start(connect_s)

    def _task(self, do: str, **facts: Any) -> None:
        self._journal.append_task(do, **_scrubbed(facts))


class Shipper:
    """The guarded thread between a journal and MLflow."""

    interval_s = 1.0
    longest_wait_s = 15.0

    def __init__(self, config: TrackingConfig, journal: Journal) -> None:
        self._config, self._journal = config, journal
        self._uri = config.store(journal.folder)
        self._client: MlflowClient | None = None
        self._wake, self._known = threading.Event(), threading.Event()
        self._stop_by_s: float | None = None
        self._complained = False
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
                "%d rows did not reach %s; they are kept in %s: pathfm compare --replay %s",
                left,
                without_secrets(self._uri),
                self._journal.folder,
                self._journal.folder,
            )

    def _loop(self) -> None:
        wait_s = self.interval_s
        while True:
            stop_by_s = self._stop_by_s  # read before shipping: what came earlier is on disk
            try:
                self.ship()
                wait_s, self._complained = self.interval_s, False
                if stop_by_s is not None:
                    return
            except Exception as error:
                # any kind: whatever a store, a proxy or a driver raises must not end training
                self._complain(error)
                wait_s = min(2 * wait_s, self.longest_wait_s)
            if stop_by_s is not None:
                wait_s = self.interval_s
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
        client = self._connect()
        for name, send in ((METRICS, self._send_metrics), (TASKS, self._send_tasks)):
            while (piece := self._journal.unshipped(name, _MAX_METRICS)).rows:
                send(client, piece)

    def _connect(self) -> MlflowClient:
        if self._client is None:
            self._client = make_client(self._uri)
        if not self._journal.state.run_id:
            run_id = self._create(self._client)
            experiment, uri = self._config.experiment, without_secrets(self._uri)
            self._journal.update(run_id=run_id, experiment=experiment, uri=uri)
        if not self._known.is_set():
            self._client.update_run(self._journal.state.run_id, status="RUNNING")
            self._known.set()
        return self._client

    def _create(self, client: MlflowClient) -> str:
        """The id of our run: an earlier request may have made it without our hearing of it."""
        key = self._journal.state.key
        experiment_id = _experiment_id(client, self._config.experiment, self._uri)
        found = client.search_runs([experiment_id], f"tags.`{_KEY}` = '{key}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        tags = {_KEY: key}
        parent = self._config.parent_run_id
        if parent:
            tags[_PARENT] = _resolved(client, experiment_id, parent)
        name = self._config.run_name or self._journal.folder.resolve().name
        run = client.create_run(experiment_id, tags=tags, run_name=name)
        return str(run.info.run_id)

    def _send_metrics(self, client: MlflowClient, piece: Slice) -> None:
        from mlflow.entities import Metric

        batch: list[Metric] = []
        rows = 0
        for row in piece.rows:
            values = metric_values(row)
            if batch and len(batch) + len(values) > _MAX_METRICS:
                break
            batch += [Metric(k, v, row["time_ms"], row["step"]) for k, v in values.items()]
            rows += 1
        for at in range(0, len(batch), _MAX_METRICS):
            part = batch[at : at + _MAX_METRICS]
            self._attempt(
                lambda part=part: client.log_batch(  # type: ignore[misc]
                    self._journal.state.run_id, metrics=part, synchronous=True
                )
            )
        self._journal.advance(piece, rows)

    def _send_tasks(self, client: MlflowClient, piece: Slice) -> None:
        for i, task in enumerate(piece.rows):
            self._attempt(lambda task=task: self._do(client, task))  # type: ignore[misc]
            self._journal.advance(piece, i + 1)

    def _attempt(self, call: Callable[[], object]) -> None:
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

    def _do(self, client: MlflowClient, task: dict[str, Any]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag

        run_id = self._journal.state.run_id
        match task["do"]:
            case "tags":
                tags = [RunTag(k, str(v)[:_MAX_VALUE]) for k, v in task["tags"].items()]
                client.log_batch(run_id, tags=tags, synchronous=True)
            case "params":
                _log_params(client, run_id, task["params"])
            case "summary":
                at_ms = task["time_ms"]
                metrics = [Metric(k, v, at_ms, 0) for k, v in task["metrics"].items()]
                client.log_batch(run_id, metrics=metrics, synchronous=True)
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


@dataclass(frozen=True)
class RunRecord:
    """What MLflow knows of one run: for tables."""

    run_id: str
    name: str
    parent_id: str | None
    status: str
    start_ms: int
    params: dict[str, str]
    metrics: dict[str, float]
    tags: dict[str, str]


def read_runs(uri: str, experiment: str) -> list[RunRecord]:
    """Every run of an experiment that is not deleted, oldest first.

    Raises `PathfmError` when the store or the experiment does not exist (and makes neither).
    """
    file = sqlite_file(uri)
    if file is not None and not file.exists():
        raise PathfmError(f"no MLflow store at {file}: run `pathfm demo` first, or give --uri")
    try:
        client = make_client(uri)
        found = client.get_experiment_by_name(experiment)
        names = sorted(e.name for e in client.search_experiments() if e.name != "Default")
    except Exception as error:
        reason = without_secrets(" ".join(str(error).split()))[:200]
        where = without_secrets(uri)
        raise PathfmError(f"MLflow store {where} cannot be read: {reason}") from error
    if found is None:
        raise PathfmError(
            f"no experiment {experiment!r} in {without_secrets(uri)}; it has: "
            f"{', '.join(names) or 'none'}"
        )
    return sorted(_records(client, found.experiment_id), key=lambda run: (run.start_ms, run.run_id))


def replay(folder: Path, config: TrackingConfig | None = None) -> int:
    """Ship what a run's folder still holds back; returns how many rows that were.

    Raises `PathfmError` if the folder has no journal, or the store does not answer.
    """
    state = read_state(folder)
    if state is None:
        raise PathfmError(f"{folder} holds no tracking.json: it is not the folder of a run")
    base = config or TrackingConfig(uri=state.uri or None)
    if state.experiment:
        base = base.model_copy(update={"experiment": state.experiment})
    journal = Journal(folder, state.run_id or f"pending-{state.key}")
    waiting = journal.pending_rows
    try:
        Shipper(base, journal).ship()
    except Exception as error:
        where = without_secrets(base.store(folder))
        raise PathfmError(f"MLflow store {where} does not answer: {str(error)[:200]}") from error
    return waiting


def ui_command(uri: str) -> str:
    """What to type to look at a store in a browser."""
    if uri.startswith(("http://", "https://")):
        return f"open {without_secrets(uri)}"
    return f"mlflow ui --backend-store-uri {without_secrets(uri)}"


def without_secrets(text: str) -> str:
    """The text with user:password and query strings cut out of every URI in it."""
    return _URI.sub(r"\1\2", text)


def sqlite_file(uri: str) -> Path | None:
    """The file behind a sqlite URI, else None."""
    return Path(urlsplit(uri).path[1:]) if uri.startswith("sqlite:///") else None


def make_client(uri: str) -> MlflowClient:
    """An MLflow client that does not phone home and does not hang for minutes."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with _client_lock:  # two threads making the tables of one new sqlite file collide
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):  # importing mlflow sets its level
            logging.getLogger(name).setLevel(logging.WARNING)
        file = sqlite_file(uri)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    return client


def _experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    file = sqlite_file(uri)
    # left to itself MLflow puts the artifacts of a sqlite store into the working directory
    where = (file.resolve().parent / "mlflow-artifacts").as_uri() if file else None
    try:
        return str(client.create_experiment(name, artifact_location=where))
    except Exception:
        found = client.get_experiment_by_name(name)  # somebody else was quicker
        if found is None:
            raise
        return str(found.experiment_id)


def _resolved(client: MlflowClient, experiment_id: str, run_id: str) -> str:
    """The id behind a `pending-...` one; raises (to be tried again) while there is none."""
    if not run_id.startswith("pending-"):
        return run_id
    key = run_id.removeprefix("pending-")
    found = client.search_runs([experiment_id], f"tags.`{_KEY}` = '{key}'", max_results=1)
    if not found:
        raise RuntimeError(f"the parent run {run_id} does not exist yet")
    return str(found[0].info.run_id)


def _log_params(client: MlflowClient, run_id: str, params: dict[str, str]) -> None:
    from mlflow.entities import Param, RunTag

    known = client.get_run(run_id).data.params
    cut = {key: value[:_MAX_VALUE] for key, value in params.items()}
    new = [Param(key, value) for key, value in cut.items() if key not in known]
    for at in range(0, len(new), _MAX_PARAMS):
        client.log_batch(run_id, params=new[at : at + _MAX_PARAMS], synchronous=True)
    changed = {k: v for k, v in cut.items() if k in known and known[k] != v}
    tags = [RunTag(f"param_changed.{key}", value) for key, value in changed.items()]
    if tags:
        client.log_batch(run_id, tags=tags[:_MAX_PARAMS], synchronous=True)


def _records(client: MlflowClient, experiment_id: str) -> Iterator[RunRecord]:
    token: str | None = None
    while True:
        page = client.search_runs([experiment_id], max_results=1000, page_token=token)
        for run in page:
            info, tags = run.info, dict(run.data.tags)
            yield RunRecord(
                run_id=info.run_id,
                name=info.run_name or info.run_id[:8],
                parent_id=tags.get(_PARENT),
                status=info.status,
                start_ms=info.start_time or 0,
                params=dict(run.data.params),
                metrics=dict(run.data.metrics),
                tags=tags,
            )
        token = page.token
        if not token:
            return


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _scrubbed(value: Any, name: str = "") -> Any:
    """The same structure, with secrets cut out of every string."""
    if isinstance(value, Mapping):
        return {str(key): _scrubbed(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, str):
        return "***" if _SECRET_NAME.search(name) and value else without_secrets(value)
    return value


def _checked(name: str) -> str:
    if not _NAME.match(name):
        raise PathfmError(f"metric name {name!r}: letters, digits, _ - . / : and spaces only")
    return name
