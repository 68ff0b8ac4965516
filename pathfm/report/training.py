"""The page's part on pretraining: curves, pictures and the summary of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from pathfm.pictures import Series, jpeg_data_uri, line_plot_svg
from pathfm.report.stage_files import read_text
from pathfm.tracking import read_metrics

_PICTURE_PX = 1600


@dataclass(frozen=True)
class RunPart:
    """What a pretraining run left behind."""

    name: str
    plots: list[tuple[str, str]]  # (title, svg)
    pictures: list[tuple[str, str]]  # (title, data URI)
    summary: list[tuple[str, str]]
    n_steps: int


def run_part(folder: Path) -> RunPart:
    """What the run in `folder` has left behind so far."""
    rows = read_metrics(folder)
    summary = json.loads(read_text(folder / "summary.json") or "{}")
    return RunPart(
        name=folder.name,
        plots=_curves(rows, summary.get("log_k")),
        pictures=_pictures(folder / "pictures"),
        # shares by slide and resolution have a table of their own
        summary=[(k, _shown(v)) for k, v in summary.items() if not isinstance(v, dict)],
        n_steps=int(rows[-1]["step"]) + 1 if rows else 0,
    )


def _curves(rows: Sequence[dict[str, float]], log_k: object) -> list[tuple[str, str]]:
    """(title, svg) of every curve the run has values for."""
    names = {name for row in rows for name in row}
    uniform = f" (uniform: log K = {log_k:.2f} nats)" if isinstance(log_k, float) else ""
    wanted = (
        ("Loss", "loss", "loss"),
        (f"Teacher entropy{uniform}", "nats", "entropy"),
        ("Learning rate", "learning rate", "lr"),
        ("Speed", "patches/s", "patches_per_s"),
    )
    plots = []
    for title, unit, name in wanted:
        chosen = sorted(n for n in names if n == name or (name == "entropy" and name in n))
        if chosen:
            plots.append((title, _curve_svg(rows, chosen, unit)))
    return plots


def _curve_svg(rows: Sequence[dict[str, float]], names: Sequence[str], unit: str) -> str:
    series = []
    for name in names:
        points = [(row["step"], row[name]) for row in rows if name in row]
        series.append(Series(name.replace("_", " "), *map(list, zip(*points, strict=True))))
    smooth = 9 if unit in ("loss", "patches/s") and len(rows) >= 60 else 0
    return line_plot_svg(series, "optimizer step", unit, 520, 250, smooth)


def _pictures(folder: Path) -> list[tuple[str, str]]:
    """(title, data URI) of every picture, the ones with a title first."""
    titles = {"mosaic": "Patches of the stream's first draws", "views": "The views of one patch"}
    pictures = []
    for path in sorted(folder.glob("*.jpg"), key=lambda p: (p.stem not in titles, p.stem)):
        with Image.open(path) as image:
            title = titles.get(path.stem, path.stem)
            pictures.append((title, jpeg_data_uri(image.convert("RGB"), 82, _PICTURE_PX)))
    return pictures


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
