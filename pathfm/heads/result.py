"""What heads on frozen features scored: the file of a probe, and kaiko-eva's results.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from online_patching.stores.local import atomic_write_text
from pathfm.uncertainty import Interval


@dataclass(frozen=True)
class HeadScores:
    """One head on one model's features. Scores 0..1, of each run on the reported rows.

    protocol: which head. val: each run's best on validation (mean over folds). interval: 95 %, of the
    mean over runs, resampling what `interval_of` says; [] where there is none. n_patients: how many of
    these there are. epochs: mean length of a fit.
    per_class: each class's own score (recall, Dice), mean over runs; None where it does not occur.
    What does not apply is left at its default, and out of the file.
    """

    name: str
    protocol: str
    values: list[float]
    val: list[float]
    mean: float
    sd: float
    interval: list[float]
    interval_of: str
    epochs: float
    backbone_digest: str = ""
    weights_note: str = ""
    dim: int = 0
    n_patients: int = 0
    parameters: int = 0
    per_class: dict[str, float | None] = field(default_factory=dict)

    @staticmethod
    def of(
        name: str,
        protocol: str,
        values: Sequence[float],
        val: Sequence[float],
        interval: Interval | None,
        groups: str,
        epochs: Sequence[float],
        **about: Any,
    ) -> HeadScores:
        """From the scores of each run. groups: what was resampled; `about` are the fields with defaults."""
        return HeadScores(
            name=name,
            protocol=protocol,
            values=list(values),
            val=list(val),
            mean=float(np.mean(values)),
            sd=spread(values),
            interval=[interval.low, interval.high] if interval else [],
            interval_of=f"mean over runs, {groups} resampled" if interval else "",
            epochs=float(np.mean(epochs)),
            n_patients=interval.n_groups if interval else 0,
            **about,
        )


@dataclass(frozen=True)
class HeadPaired:
    """One head on another model's features minus the same head on the first one's, in scores (0..1).

    interval: 95 %, paired: the same patients for both; [] where there is none. p: of no difference, by
    swapping the two in random groups; None where it is not tested.
    """

    baseline: str
    other: str
    protocol: str
    mean: float
    interval: list[float]
    p: float | None = None

    @property
    def told(self) -> str:
        """As a line: "random minus imagenet, conv: -7.9 [-17.3, -3.1] points"."""
        low_high = ", ".join(f"{100 * value:.1f}" for value in self.interval)
        between = f" [{low_high}]" if self.interval else ""
        tested = f", p {self.p:.2g}" if self.p is not None else ""
        return (
            f"{self.other} minus {self.baseline}, {self.protocol}: {100 * self.mean:+.1f}{between} "
            f"points{tested}"
        )


@dataclass(frozen=True)
class HeadResult:
    """What `slide_probe.json` and `segmentation_probe.json` hold."""

    key: str  # digest of all the result depends on: a rerun with the same key is skipped
    data: str
    data_digest: str
    n: int  # slides or pictures reported (tiles, where pictures are cut)
    classes: list[str]
    told: str  # which are reported, and what chose
    metric: str
    models: list[HeadScores]
    caveats: list[str]
    paired: list[HeadPaired] = field(default_factory=list)  # other models minus the first
    n_slides: int = 0  # reported or not
    input_px: int = 0


def spread(values: Sequence[float]) -> float:
    """Standard deviation over runs, n - 1 below the line; 0 for one run."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def write_result(path: Path, result: HeadResult) -> None:
    """Writes the file, whole or not at all."""
    facts = TypeAdapter(HeadResult).dump_python(result, exclude_defaults=True)
    atomic_write_text(path, json.dumps(facts, indent=1, allow_nan=False) + "\n")


def load_result(path: Path) -> HeadResult | None:
    """The result in a file, or None where there is none that can be read."""
    try:
        return TypeAdapter(HeadResult).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def write_eva_results(path: Path, metric: str, val: Sequence[float], test: Sequence[float]) -> None:
    """`results.json` with eva's keys; test is empty where validation reports, as in eva's file."""

    def told(part: str, values: Sequence[float]) -> list[dict[str, Any]]:
        stated = {"mean": float(np.mean(values)), "stdev": spread(values), "values": list(values)}
        return [{f"{part}/{metric}": stated}]

    metrics = {"metrics": {"val": told("val", val), "test": told("test", test) if test else []}}
    atomic_write_text(path, json.dumps(metrics, indent=2, sort_keys=True) + "\n")
