"""What a segmentation probe found: the file, the table, and kaiko-eva's results.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from online_patching.stores.local import atomic_write_text
from pathfm.runtime import console

RESULT = "segmentation_probe.json"
METRIC = "mean_dice_without_background"


@dataclass(frozen=True)
class SegmentationModel:
    """One head on one backbone. Mean Dice without background, 0..1, of each run.

    interval: 95 %, of the mean over runs, resampling patients (pictures where unknown); [] for a single one.
    per_class: Dice of each class, background included, mean over runs.
    """

    name: str
    protocol: str
    backbone_digest: str
    weights_note: str
    values: list[float]
    val: list[float]
    mean: float
    sd: float
    interval: list[float]
    interval_of: str
    per_class: dict[str, float | None]
    parameters: int
    epochs: float


@dataclass(frozen=True)
class SegmentationResult:
    """What `segmentation_probe.json` holds."""

    key: str  # digest of the weights, the data and the options: the same key is skipped
    data: str
    data_digest: str
    input_px: int
    n: int  # pictures reported (tiles, where the data is cut)
    classes: list[str]
    told: str  # which pictures are reported, and what chose
    metric: str
    models: list[SegmentationModel]
    caveats: list[str]


def write_eva_results(path: Path, val: Sequence[float], test: Sequence[float]) -> None:
    """`results.json` with eva's keys; test is empty where validation reports, as in eva's file."""

    def told(part: str, values: Sequence[float]) -> list[dict[str, Any]]:
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0
        stated = {"mean": float(np.mean(values)), "stdev": sd, "values": list(values)}
        return [{f"{part}/MonaiDiceScore": stated}] if values else []

    metrics = {"metrics": {"val": told("val", val), "test": told("test", test) if test else []}}
    atomic_write_text(path, json.dumps(metrics, indent=2, sort_keys=True) + "\n")


def load_result(path: Path) -> SegmentationResult | None:
    """The result in a file, or None where there is none that can be read."""
    try:
        return TypeAdapter(SegmentationResult).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def show(result: SegmentationResult) -> None:
    """Prints the table, the Dice of each class and the caveats."""
    from rich.markup import escape
    from rich.table import Table

    out = console()
    about = (
        f"{result.data}: {result.n:,} pictures of {result.input_px} px reported: {result.told}. Mean Dice "
        "without background, %, with its 95 % interval over patients:"
    )
    out.print(about, markup=False, highlight=False)
    table = Table("model", "head")
    for column in ("mean [interval]", "sd over runs", "runs", *result.classes):
        table.add_column(escape(column), justify="right")
    for m in result.models:
        between = ", ".join(f"{100 * v:.1f}" for v in m.interval)
        each = (m.per_class[c] for c in result.classes)
        table.add_row(
            escape(m.name),
            m.protocol,
            f"{100 * m.mean:.1f} [{between}]" if m.interval else f"{100 * m.mean:.1f}",
            f"{100 * m.sd:.1f}",
            f"{len(m.values)}",
            *("-" if v is None else f"{100 * v:.0f}" for v in each),
        )
    out.print(table)
    for caveat in result.caveats:
        out.print(f"note: {caveat}", markup=False, highlight=False)
