"""Verb `compare`: runs side by side, and what was measured in them as one page of tables and pictures.

Runs come out of an MLflow store, which is read directly: no server is needed, and none is started.
Results (`probe.json`, `robustness.json`, ...) are those kept with the runs, and those in folders.

    settings.py    options             runs.py       the tree of runs, stages side by side
    gathering.py   runs, folders -> result files -> what was found
    parsing.py, reading_probe.py, reading_robustness.py, reading_judged.py   one form of file each
    records.py     scores, differences, curves, in one form
    published.py   the public eva leaderboard's figures
    tables.py      tables of text      page.py       HTML, Markdown, CSV
    ablation.py, curves.py, maps.py    what is drawn
    pictures.py, drawing.py, matrices.py   and how
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pathfm.compare.runs import (
    Comparison,
    as_tree,
    by_stage,
    differing_params,
    find_store,
    listed,
    show_runs,
)
from pathfm.compare.settings import CompareConfig
from pathfm.runtime import (
    PathfmError,
    console,
    counted,
    make_folder,
    save_config,
    titled,
    without_secrets,
)
from pathfm.tracking import RunRecord, read_runs, replay, ui_command

if TYPE_CHECKING:
    from pathfm.compare.gathering import Gathered
    from pathfm.compare.tables import Table

__all__ = [
    "CompareConfig",
    "CompareResult",
    "Comparison",
    "as_tree",
    "by_stage",
    "differing_params",
    "find_store",
    "run",
]


@dataclass(frozen=True)
class CompareResult:
    """All runs with their depth, each parent followed by its children; the stages; the results' tables."""

    tree: list[tuple[int, RunRecord]]
    stages: list[Comparison]
    uri: str  # "" where results came from files alone
    tables: list[Table]
    written: list[Path]


def run(config: CompareConfig) -> CompareResult:
    """Prints runs and results; with `out`, writes the page, and says where it is."""
    from pathfm.compare.gathering import from_files, from_runs, gather
    from pathfm.compare.tables import every_table, stage_table

    if config.replay is not None:
        given = config.experiment if "experiment" in config.model_fields_set else None
        store = find_store(config.uri) if config.uri else None
        print(f"{replay(config.replay, store, given):,} rows of {config.replay} shipped")
    sources, uri = from_files(config.results), ""
    notes: list[str] = []
    tree: list[tuple[int, RunRecord]] = []
    stages: list[Comparison] = []
    if not config.results or {"uri", "experiment", "runs"} & config.model_fields_set:
        uri = find_store(config.uri)
        records = _records(uri, config)
        shown = listed(records)
        tree, stages = list(as_tree(shown)), list(by_stage(shown, config))
        kept, notes = from_runs(uri, records)
        sources = [*kept, *sources]
        show_runs(tree, stages)
        if len(shown) < len(records):
            print(f"and {counted(len(records) - len(shown), 'run')} of one repeat of a probe each")
    gathered = gather(sources, notes)
    tables = every_table(gathered.found, config.published)
    _show(tables, gathered.found.notes)
    written = []
    if config.out is not None:
        runs = [stage_table(part) for part in stages]
        written = _written(config, gathered, tables, runs, uri)
    if uri:
        # not wrapped: it is there to be copied
        print(f"\nto look at them in a browser: {ui_command(uri)}")
    return CompareResult(tree, stages, uri, tables, written)


def _records(uri: str, config: CompareConfig) -> list[RunRecord]:
    from pathfm.compare.gathering import chosen

    records = read_runs(uri, config.experiment)
    if not records:
        raise PathfmError(
            f"experiment {config.experiment!r} in {without_secrets(uri)} has no runs yet"
        )
    return chosen(records, config.runs)


def _written(
    config: CompareConfig, gathered: Gathered, tables: list[Table], runs: list[Table], uri: str
) -> list[Path]:
    """The page's files; `PathfmError` where there is nothing to put on one."""
    from pathfm.compare.page import Page, lead_of, write_page
    from pathfm.compare.pictures import draw_all

    if not tables and not runs and not config.maps:
        raise PathfmError(
            "nothing was measured in these runs, and no probe.json or robustness.json is kept with them: "
            "run `pathfm probe`, or give --results or --maps"
        )
    assert config.out is not None
    pictures = draw_all(gathered, config)  # all of them before anything is written
    where = [f"experiment {config.experiment} in {without_secrets(uri)}"] if uri else []
    where += [path.as_posix() for path in config.results]
    page = Page(
        title=config.experiment if uri else "Results",
        where="; ".join(where),
        lead=lead_of(gathered.found),
        tables=tables,
        pictures=pictures,
        runs=runs,
        notes=gathered.found.notes,
    )
    written = write_page(page, gathered.found, make_folder(config.out))
    save_config(config, config.out, "compare.yaml")
    named = ", ".join(str(path) for path in written if path.suffix != ".png")
    print(f"written: {named} and {len(pictures)} pictures")
    return written


def _show(tables: list[Table], notes: tuple[str, ...]) -> None:
    from rich.markup import escape

    out = console()
    for table in tables:
        printed = titled(escape(table.title))
        for n, head in enumerate(table.columns):
            printed.add_column(escape(head), justify="right" if n else "left", overflow="fold")
        for n, row in enumerate(table.rows):
            printed.add_row(*map(escape, row), style="dim" if n in table.marked else None)
        out.print(printed)
        for note in table.notes:
            out.print(note, markup=False, highlight=False)
    for note in notes:
        out.print(f"note: {note}", markup=False, highlight=False)
