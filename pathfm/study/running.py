"""A study from its preparation to its page, by one process or several."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathfm.runtime import PathfmError, make_folder, save_config, scrubbed
from pathfm.study.cell import Stopped, interrupting
from pathfm.study.claims import WORDS, aside, in_turn
from pathfm.study.equal import check_plan
from pathfm.study.judging import judge
from pathfm.study.page import lead_of, write_page
from pathfm.study.plan import Study, made_of
from pathfm.study.preparing import look_up, missing, prepare
from pathfm.study.showing import rows_of, show_grid
from pathfm.study.working import (
    Grid,
    n_gpus,
    parent_run,
    processes,
    share_of,
    tell_parent,
    work,
)
from pathfm.tracking import ui_command

if TYPE_CHECKING:
    from pathfm.study import StudyConfig, StudyResult

_LOOKS_EVERY_S = 30.0


def run_study(study: Study, config: StudyConfig) -> StudyResult:
    """Works on the grid, or only looks at it; then the page of what is done."""
    from pathfm.study import StudyResult

    check_plan(study)
    if config.worker is not None and config.processes is not None:
        raise PathfmError(
            "--worker is one process of several, --processes starts several: give one"
        )
    share = share_of(config.worker)
    if gone := missing(study):
        raise PathfmError(f"study {study.name}: {'; '.join(gone)}")
    folder = config.out / study.name
    if config.status:
        prepared = look_up(study, config.out)
    else:
        save_config(study, make_folder(folder), f"{study.name}.yaml")
        with aside(folder / WORDS):
            prepared = prepare(study, config.out)
        print(f"{study.name}: made of {made_of(study.data, study.kind)}; how, in {folder / WORDS}")
    tracking = config.tracking.filled(folder, study.name)
    grid = Grid(study, folder, prepared, tracking)
    alone = config.worker is not None or share.n > 1
    n = 1 if alone else config.processes or max(1, n_gpus())
    show_grid(grid)
    if not config.status:
        try:
            if n > 1:
                parent_run(grid)  # before the processes would each want to make it
                _share_out(grid, config, n)
            else:
                work(grid, share, lambda: None if alone else show_grid(grid))
        except Stopped as stopped:
            if stopped.exit_code == 128 + signal.SIGINT:
                raise
            print(f"study {study.name}: stopped as it was told to; the same command goes on")
            return StudyResult("not finished", None, stopped.exit_code)
        if n > 1 or alone:  # else it was shown after the last cell
            show_grid(grid)
    rows = rows_of(grid)
    page = make_page(grid, config) if any(row.state == "done" for row in rows) else None
    failed = [row for row in rows if row.state == "failed"]
    if failed and not config.status:
        told = (
            f"study {study.name}: {len(failed)} cell(s) failed, first {failed[0].name}: {failed[0].told} "
            "(the same command tries again)"
        )
        if config.worker is not None or share.n == 1:
            raise PathfmError(told)
        print(told, file=sys.stderr)  # torchrun ends all ranks with the first that fails
    return StudyResult("" if page is None else page[0], None if page is None else page[1])


def _share_out(grid: Grid, config: StudyConfig, n: int) -> None:
    """Starts n processes and shows the grid until they have ended."""
    words = command_words(grid.study, config)
    with interrupting(), processes(n, words, grid.folder) as started:
        _wait(started)
        while any(process.poll() is None for process in started):
            show_grid(grid, workers=n)
            _wait(started)
    codes = [process.returncode for process in started]
    failed = any(row.state == "failed" for row in rows_of(grid))  # told of by who called us
    if any(codes) and not (failed and set(codes) <= {0, 2}):
        raise PathfmError(
            f"study {grid.study.name}: a process ended with {next(filter(None, codes))}; its words are in "
            f"{grid.folder}/worker_*.log. The same command goes on"
        )


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Until the next look, or until all have ended."""
    until_s = time.monotonic() + _LOOKS_EVERY_S
    while time.monotonic() < until_s and any(process.poll() is None for process in started):
        time.sleep(0.2)


def make_page(grid: Grid, config: StudyConfig) -> tuple[str, Path]:
    """The page of all cells that are done, and its verdict for MLflow; (verdict, the HTML file)."""
    study = grid.study
    with in_turn(grid.folder):
        results: dict[str, Any] = {}
        for name, (_, place) in grid.places.items():
            found = place.result()
            if found is not None:
                results[name] = {**found, "offline": grid.prepared.costs}
        judged = judge(study, results)
        commands, of_data = commands_of(study, config), grid.prepared.caveats
        files = write_page(study, judged, results, commands, grid.folder, of_data)
    print(f"{study.name}: {lead_of(study, judged)}")
    print(f"the page: {files[0].resolve().as_uri()}")
    if judged.verdict != "not finished" and not config.status:
        summary = {
            f"{each.arm}-{each.against}.{what}": value
            for each in judged.differences
            for what, value in (("mean", each.mean), ("low", each.low), ("high", each.high))
            if value == value
        }
        tell_parent(grid, summary, files)
        print(f"MLflow: {ui_command(grid.tracking.store(grid.folder))}")
    return judged.verdict, files[0]


def command_words(study: Study, config: StudyConfig) -> list[str]:
    """The words after `pathfm study` that do the same again."""
    words = [study.name, "--out", str(config.out)]
    if config.studies is not None:
        words += ["--studies", str(config.studies)]
    for name in ("mpp_overrides", "exclude", "patches", "weights", "seeds"):
        if getattr(config, name) is not None:
            words += [f"--{name}", str(getattr(config, name))]
    for name in ("slides", "pictures", "set"):
        if getattr(config, name):
            words += [f"--{name}", *map(str, getattr(config, name))]
    tracking = config.tracking
    words += ["--tracking.experiment", tracking.experiment]
    words += ["--tracking.uri", tracking.uri] if tracking.uri else []
    return words if tracking.enabled else [*words, "--tracking.no-enabled"]


def commands_of(study: Study, config: StudyConfig) -> list[str]:
    """What to type to do it again, to look, and to work on it with several processes."""
    base = shlex.join(["pathfm", "study", *scrubbed(command_words(study, config))])
    return [base, f"{base} --status", f"{base} --processes 2"]
