"""Verb `compare`: the runs of an MLflow experiment side by side, children under their parents.

Reads the store directly: no server is needed, and none is started.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, Field

from pathfm.runtime import PathfmError, console, without_secrets
from pathfm.tracking import RunRecord, read_runs, replay, ui_command


class CompareConfig(BaseModel, frozen=True, extra="forbid"):
    """Which runs to show."""

    uri: str | None = Field(
        None,
        description="MLflow store, or the .db file of one; unset: $MLFLOW_TRACKING_URI, else the "
        "newest mlflow.db found here or up to two folders below",
    )
    experiment: str = Field("pathfm", min_length=1, description="name of the experiment")
    params: list[str] = Field([], description="params to show; unset: those that differ")
    metrics: list[str] = Field([], description="metrics to show; unset: all")
    newest: int = Field(6, ge=1, le=100, description="runs shown side by side of each stage")
    replay: Path | None = Field(
        None, description="folder of a run whose rows did not reach the store: ship them first"
    )


@dataclass(frozen=True)
class Comparison:
    """Runs of one stage, oldest first, with the names of what to print of them."""

    stage: str
    runs: list[RunRecord]
    params: list[str]
    metrics: list[str]


@dataclass(frozen=True)
class CompareResult:
    """All runs with their depth, each parent followed by its children; and the stages compared."""

    tree: list[tuple[int, RunRecord]]
    stages: list[Comparison]
    uri: str


def run(config: CompareConfig) -> CompareResult:
    """Prints the table and the command that opens the MLflow UI on the same store."""
    if config.replay is not None:
        given = config.experiment if "experiment" in config.model_fields_set else None
        store = find_store(config.uri) if config.uri else None
        print(f"{replay(config.replay, store, given):,} rows of {config.replay} shipped")
    uri = find_store(config.uri)
    records = read_runs(uri, config.experiment)
    if not records:
        raise PathfmError(
            f"experiment {config.experiment!r} in {without_secrets(uri)} has no runs yet"
        )
    result = CompareResult(list(as_tree(records)), list(by_stage(records, config)), uri)
    show(result)
    return result


def find_store(given: str | None, start: Path | None = None) -> str:
    """The store's URI; `PathfmError` when none is given and none is found."""
    uri = given or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri if "://" in uri else f"sqlite:///{Path(uri).resolve()}"
    here = start or Path.cwd()
    depths = ("mlflow.db", "*/mlflow.db", "*/*/mlflow.db")
    found = [path for depth in depths for path in here.glob(depth)]
    if not found:
        raise PathfmError(
            f"no mlflow.db in {here} or two folders below: run `pathfm demo` first, or give --uri"
        )
    newest = max(found, key=lambda path: path.stat().st_mtime)
    return f"sqlite:///{newest.resolve()}"


def as_tree(records: Sequence[RunRecord]) -> Iterator[tuple[int, RunRecord]]:
    """(depth, run), each run followed by its children, all in order of their start.

    A child whose parent is not there (deleted, or in another experiment) stands at the top.
    """
    known = {record.run_id for record in records}
    children: dict[str | None, list[RunRecord]] = {}
    for record in records:
        parent = record.parent_id if record.parent_id in known else None
        children.setdefault(parent, []).append(record)

    def walk(parent: str | None, depth: int) -> Iterator[tuple[int, RunRecord]]:
        for record in children.get(parent, []):
            yield depth, record
            yield from walk(record.run_id, depth + 1)

    yield from walk(None, 0)


def by_stage(records: Sequence[RunRecord], config: CompareConfig) -> Iterator[Comparison]:
    """The newest runs of each stage (the tag `stage`); stages without metrics are left out."""
    stages: dict[str, list[RunRecord]] = {}
    for record in records:
        stages.setdefault(record.tags.get("stage", ""), []).append(record)
    for stage, every in stages.items():
        runs = every[-config.newest :]
        metrics = config.metrics or sorted({name for run in runs for name in run.metrics})
        if metrics:
            yield Comparison(stage, runs, config.params or differing_params(runs), metrics)


def differing_params(runs: Sequence[RunRecord]) -> list[str]:
    """Params that not all of these runs have with one value; where they are recorded aside."""
    names = sorted({name for run in runs for name in run.params})
    return [
        name
        for name in names
        if len({run.params.get(name) for run in runs}) > 1 and not name.startswith("tracking.")
    ]


def show(result: CompareResult) -> None:
    """Prints the tree of runs, each stage's runs side by side, and how to open the MLflow UI."""
    from rich.markup import escape
    from rich.table import Table

    out = console()
    tree = Table("run", "status", "started (UTC)", "commit")
    for depth, record in result.tree:
        name = "  " * (depth - 1) + ("└ " if depth else "") + record.name
        started = datetime.fromtimestamp(record.start_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        commit = record.tags.get("mlflow.source.git.commit", "")[:8]
        tree.add_row(escape(name), record.status.lower(), started, commit)
    out.print(tree)
    for part in result.stages:
        title = escape(f"{part.stage or 'runs'}: metrics, and params that differ")
        table = Table("", title=title, title_justify="left")
        for record in part.runs:
            table.add_column(escape(record.name), justify="right", overflow="fold")
        for name in part.params:
            values = [record.params.get(name, "") for record in part.runs]
            table.add_row(escape(name), *map(escape, values), style="dim")
        for name in part.metrics:
            numbers = [record.metrics.get(name) for record in part.runs]
            table.add_row(escape(name), *("" if n is None else f"{n:.5g}" for n in numbers))
        out.print(table)
    # not wrapped: it is there to be copied
    print(f"\nto look at them in a browser: {ui_command(result.uri)}")
