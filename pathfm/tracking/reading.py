"""Reading back: what the store knows of every run of an experiment."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from pathfm.runtime import PathfmError, without_secrets
from pathfm.tracking.settings import PARENT, sqlite_file

if TYPE_CHECKING:
    from pathfm.tracking import MlflowStore


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
    from pathfm.tracking import MlflowStore  # late: the package itself imports this file

    try:
        store = MlflowStore(uri)
        found = store.client.get_experiment_by_name(experiment)
        names = sorted(e.name for e in store.client.search_experiments() if e.name != "Default")
    except Exception as error:
        reason = without_secrets(" ".join(str(error).split()))[:200]
        where = without_secrets(uri)
        raise PathfmError(f"MLflow store {where} cannot be read: {reason}") from error
    if found is None:
        raise PathfmError(
            f"no experiment {experiment!r} in {without_secrets(uri)}; it has: "
            f"{', '.join(names) or 'none'}"
        )
    return sorted(_records(store, found.experiment_id), key=lambda run: (run.start_ms, run.run_id))


def read_artifacts(
    uri: str, run_id: str, names: Sequence[str], most_bytes: int = 64 << 20
) -> dict[str, bytes]:
    """Those files of a run that are called so, by name, at the root of its artifacts.

    One that is larger than `most_bytes` is refused with a `PathfmError`, and so is a store whose artifacts
    cannot be read (a folder that was moved, a server that does not answer).
    """
    found: dict[str, bytes] = {}
    try:
        client = _store(uri).client
        listed = {item.path: item.file_size or 0 for item in client.list_artifacts(run_id)}
        with tempfile.TemporaryDirectory() as folder:
            for name in sorted(set(names) & listed.keys()):
                if listed[name] > most_bytes:
                    raise PathfmError(
                        f"{name} of run {run_id}: {listed[name]:,} bytes, more than {most_bytes:,}"
                    )
                found[name] = Path(client.download_artifacts(run_id, name, folder)).read_bytes()
    except PathfmError:
        raise
    except Exception as error:
        reason = without_secrets(" ".join(str(error).split()))[:200]
        raise PathfmError(f"artifacts of run {run_id} cannot be read: {reason}") from error
    return found


@lru_cache(maxsize=4)
def _store(uri: str) -> MlflowStore:
    """One store for many runs: opening it costs more than reading a run's files."""
    from pathfm.tracking import MlflowStore  # late: the package itself imports this file

    return MlflowStore(uri)


def _records(store: MlflowStore, experiment_id: str) -> Iterator[RunRecord]:
    token: str | None = None
    while True:
        page = store.client.search_runs([experiment_id], max_results=1000, page_token=token)
        for run in page:
            info, tags = run.info, dict(run.data.tags)
            yield RunRecord(
                run_id=info.run_id,
                name=info.run_name or info.run_id[:8],
                parent_id=tags.get(PARENT),
                status=info.status,
                start_ms=info.start_time or 0,
                params=dict(run.data.params),
                metrics=dict(run.data.metrics),
                tags=tags,
            )
        token = page.token
        if not token:
            return
