"""Runs side by side: children under their parents, only what differs, stage by stage."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pathfm.compare.settings import CompareConfig
from pathfm.runtime import PathfmError, console, titled
from pathfm.tracking import RunRecord

_REPEATS = frozenset({"probe, one run"})
"""Stages whose runs are repeats of what their parent tells as a mean: counted, not listed."""


@dataclass(frozen=True)
class Comparison:
    """Runs of one stage, oldest first, with the names of what to print of them."""

    stage: str
    runs: list[RunRecord]
    params: list[str]
    metrics: list[str]


def find_store(given: str | None, start: Path | None = None) -> str:
    """The store's URI; `PathfmError` when none is given and none is found."""
    uri = given or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri if "://" in uri else f"sqlite:///{Path(uri).resolve()}"
    here = start or Path.cwd()
    depths = ("mlflow.db", "*/mlflow.db", "*/*/mlflow.db", "*/*/*/mlflow.db")
    found = [path for depth in depths for path in here.glob(depth)]
    if not found:
        raise PathfmError(
            f"no mlflow.db in {here} or up to three folders below: run `pathfm demo` first, or give --uri"
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


def listed(records: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs but for single repeats of a probe, of which a study has hundreds."""
    return [record for record in records if record.tags.get("stage") not in _REPEATS]


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


def told_apart(runs: Sequence[RunRecord], known: Sequence[RunRecord]) -> list[str]:
    """A name for each run: its own, after its parent's where several have one name, as cells of a study have."""
    parents = {record.run_id: record.name for record in known}
    alike = Counter(run.name for run in runs)
    return [
        f"{parents[run.parent_id]}/{run.name}"
        if alike[run.name] > 1 and run.parent_id in parents
        else run.name
        for run in runs
    ]


def show_runs(tree: Sequence[tuple[int, RunRecord]], stages: Sequence[Comparison]) -> None:
    """Prints the tree of runs, and each stage's runs side by side."""
    from rich.markup import escape
    from rich.table import Table

    out = console()
    table = Table("run", "status", "started (UTC)", "commit")
    for depth, record in tree:
        name = "  " * (depth - 1) + ("└ " if depth else "") + record.name
        started = datetime.fromtimestamp(record.start_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        commit = record.tags.get("mlflow.source.git.commit", "")[:8]
        table.add_row(escape(name), record.status.lower(), started, commit)
    out.print(table)
    for part in stages:
        title = escape(f"{part.stage or 'runs'}: metrics, and params that differ")
        table = titled(title, "")
        for name in told_apart(part.runs, [record for _, record in tree]):
            table.add_column(escape(name), justify="right", overflow="fold")
        for name in part.params:
            values = [record.params.get(name, "") for record in part.runs]
            table.add_row(escape(name), *map(escape, values), style="dim")
        for name in part.metrics:
            numbers = [record.metrics.get(name) for record in part.runs]
            table.add_row(escape(name), *("" if n is None else f"{n:.5g}" for n in numbers))
        out.print(table)
