"""The grid as a table: what is done, what runs how fast, what is left, and until when."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.markup import escape

from pathfm.datasets import scan_folder
from pathfm.runtime import console, titled, told_time
from pathfm.study.cell import TRAINED
from pathfm.study.claims import State
from pathfm.study.equal import check_plan, config_of, planned
from pathfm.study.plan import START, Cell, Study, cells_of, made_of
from pathfm.study.preparing import missing
from pathfm.study.working import Grid

_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Row:
    """A cell as it stands. seconds: of a finished one; left_s: of one that trains, nan where not known."""

    name: str
    state: State
    told: str
    seconds: float = float("nan")
    left_s: float = float("nan")


def rows_of(grid: Grid) -> list[Row]:
    """Every cell's row. This process must hold none of them."""
    return [
        _row(grid.study, cell, place.folder, place.state(), place.result(), place.failed())
        for cell, place in grid.places.values()
    ]


def _row(
    study: Study, cell: Cell, folder: Path, state: State, result: dict[str, object] | None, why: str
) -> Row:
    if state == "done" and result is not None:
        metrics = result.get("metrics")
        value = metrics.get(study.criterion.metric) if isinstance(metrics, dict) else None
        told = "" if value is None else f"{study.criterion.metric} {value:.4g}"
        return Row(cell.name, state, told, float(str(result.get("seconds", "nan"))))
    if state == "failed":
        return Row(cell.name, state, why)
    if state in ("running", "stopped") and cell.arm is not None:
        return _training(study, cell, folder, state)
    return Row(cell.name, state, "")


def _training(study: Study, cell: Cell, folder: Path, state: State) -> Row:
    assert cell.arm is not None
    plan = planned(config_of(study, cell.arm, cell.seed))
    steps = plan["optimizer_steps"]
    done, rate = last_step(folder / TRAINED / "metrics.jsonl")
    if done >= steps:
        return Row(cell.name, state, "trained; being measured" if state == "running" else "trained")
    patches = plan["patches_seen"] / steps
    told = f"step {done:,} of {steps:,}" + (f", {rate:.1f} patches/s" if rate else "")
    left_s = (steps - done) * patches / rate if rate else float("nan")
    return Row(cell.name, state, told, left_s=left_s)


def last_step(path: Path) -> tuple[int, float]:
    """Steps done and patches/s of the last whole row of a metrics.jsonl; 0, 0 where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
        row = json.loads(lines[-1])
        return int(row["step"]) + 1, float(row.get("patches_per_s", 0.0))
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return 0, 0.0


def left_s(rows: list[Row], workers: int) -> float:
    """Seconds until the grid is done, by the mean of finished cells that train; nan before the first."""
    done = [row for row in rows if row.state == "done" and not row.name.startswith(START)]
    known = [row.seconds for row in done if row.seconds == row.seconds]
    if not known:
        return float("nan")
    left = sum(row.state != "done" for row in rows)
    return float(np.mean(known)) * left / max(1, workers)


def show_grid(grid: Grid, workers: int = 1) -> None:
    """Prints the table of cells."""
    rows = rows_of(grid)
    done = sum(row.state == "done" for row in rows)
    eta_s = left_s(rows, max(workers, sum(row.state == "running" for row in rows)))
    until = f", about {told_time(eta_s)} left" if eta_s == eta_s and done < len(rows) else ""
    table = titled(f"{grid.study.name}: {done} of {len(rows)} cells done{until}")
    for head in ("cell", "state", "", "time", "left"):
        table.add_column(head, justify="right" if head in ("time", "left") else "left")
    for row in rows:
        cells = (
            row.name,
            row.state,
            escape(row.told[:90]),
            told_time(row.seconds),
            told_time(row.left_s),
        )
        table.add_row(*cells)
    console().print(table)


def show_plan(study: Study) -> None:
    """Prints the grid of a dry run: what each arm sees, and how long it may take."""
    plans = check_plan(study)
    pictures = pictures_of(study)
    table = titled(f"{study.name}: {study.question}")
    for head in (
        "arm",
        "what it is",
        "patches seen",
        "optimizer steps",
        "views seen",
        "seeds",
        "hours",
    ):
        table.add_column(head, justify="left" if head in ("arm", "what it is") else "right")
    total_s = 0.0
    for arm in study.arms:
        plan = plans[arm.name]
        seconds = study.seeds * (trained_s(study, plan) + measured_s(study, pictures))
        total_s += seconds
        numbers = [f"{plan[k]:,}" for k in ("patches_seen", "optimizer_steps", "views_seen")]
        table.add_row(
            arm.name, escape(arm.tells), *numbers, str(study.seeds), f"{seconds / 3600:.2f}"
        )
    cells = cells_of(study)
    total_s += sum(cell.arm is None for cell in cells) * measured_s(study, pictures)
    out = console()
    out.print(table)
    rates = study.rates
    told = (
        f"held equal: {', '.join(study.equal)}; judged by {study.criterion.metric}\n"
        f"made of: {made_of(study.data, study.kind)}\n"
        f"{len(cells)} cells, about {told_time(total_s)} one after the other, at {rates.patches_per_s:g} "
        f"patches/s in training and {rates.pictures_per_s:g} pictures/s in measuring ({rates.measured})"
    )
    if study.curves is not None:
        told += "; what is measured while training comes on top"
    if study.seeds == 1:
        told += "\nnote: one seed has no interval, and its answer is that it cannot tell: give --seeds 3"
    out.print(told, markup=False, highlight=False, soft_wrap=True)
    lacking = missing(study)
    for line in lacking:
        out.print(f"before it can run: {line}", markup=False, highlight=False, soft_wrap=True)
    if not lacking:
        print("next: the same command without --dry-run")


def pictures_of(study: Study) -> int:
    """Labelled pictures that are probed: those of the folder, or as many as the study was measured with."""
    if study.data.patches is None or not study.data.patches.is_dir():
        return study.rates.pictures
    return len(scan_folder(study.data.patches))


def trained_s(study: Study, plan: dict[str, int]) -> float:
    """Seconds that a training may take, by the study's rate."""
    return plan["patches_seen"] / study.rates.patches_per_s


def measured_s(study: Study, pictures: int) -> float:
    """Seconds until weights are measured: every view of the labelled pictures, and damaged ones."""
    if study.kind != "pretrain":
        return 0.0
    damaged = study.rates.robust_pictures if study.robustness is not None else 0
    return (pictures * len(study.views) + damaged) / study.rates.pictures_per_s
