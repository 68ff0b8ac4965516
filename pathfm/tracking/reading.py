"""Reading back: what the store knows of every run of an experiment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
