"""A run while it lives: everything it is told goes into its folder's journal, and on from there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from pathfm.runtime import PathfmError, git_commit, scrubbed
from pathfm.tracking.journal import Journal
from pathfm.tracking.settings import TrackingConfig
from pathfm.tracking.shipper import Shipper

_NAME = re.compile(r"^[\w./ :-]{1,250}$")


def open_run(
    config: TrackingConfig,
    folder: Path,
    params: Mapping[str, Any],
    tags: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    connect_s: float = 20.0,
    last_step: int | None = None,
) -> Run:
    """A `Run` that records into `folder`; use it as a context manager.

    `run_id` goes on with that run (its params must not be repeated equal: one that changed is kept
    as the tag `param_changed.<name>`, since MLflow refuses to overwrite). Waits at most `connect_s`
    for the store to hand out an id and goes on without one if it does not. `last_step` forgets the
    rows after it (`Run.truncate`) before anything is sent.
    """
    journal = Journal(folder, run_id)
    if last_step is not None:
        journal.truncate(last_step)
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
        self.stopped = False
        """Set for a run that ends before its last step: KILLED to MLflow, until it goes on."""

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

    def sync(self) -> None:
        """All told so far outlives a power cut when this returns; a checkpoint waits for it."""
        self._journal.sync()

    @property
    def last_step(self) -> int:
        """The step of the last row in metrics.jsonl; -1 where there is none."""
        return self._journal.last_step()

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
        self.close(self.ending(kind))

    def ending(self, kind: type[BaseException] | None) -> str:
        """MLflow's word for how the run ends, left with an exception of this kind or none."""
        if kind is not None and issubclass(kind, Exception):
            return "FAILED"
        return "KILLED" if kind or self.stopped else "FINISHED"

    def _start(self, connect_s: float) -> None:
        if self._shipper is not None:
            self._shipper.start(connect_s)

    def _task(self, do: str, **facts: Any) -> None:
        self._journal.append_task(do, **scrubbed(facts))


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _checked(name: str) -> str:
    if not _NAME.match(name):
        raise PathfmError(f"metric name {name!r}: letters, digits, _ - . / : and spaces only")
    return name
