"""``pathfm foreground-evaluate``: mask models and thresholds against drawn and synthetic truth.

Every method masks the same pictures and gets the same clean-up. Written: ``results.json`` (all of it),
``results.csv`` (a line for each method and picture), ``evaluation.html`` (pictures, worst first), and a
run in MLflow with a child run a method.

    measuring.py   pictures in, a score for each method and picture out
    summing.py     means, intervals, differences, the drawer's agreement, the targets
    telling.py     the table that is printed       page.py   evaluation.html
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, model_validator

from online_patching.stores.local import atomic_write_text
from pathfm.runtime import as_dict, make_folder, progress, provenance, save_config
from pathfm.tracking import Run, TrackingConfig, open_run

if TYPE_CHECKING:
    from pathfm.foreground_evaluate.measuring import Row
    from pathfm.foreground_evaluate.summing import Summary

Method = Literal[
    "otsu", "saturation", "saturation_otsu", "hsv", "entropy", "saturated_or_dark"
]  # the names in pathfm.segmentation.thresholds, which a test compares
METHODS: tuple[Method, ...] = (
    "otsu",
    "saturation",
    "saturation_otsu",
    "hsv",
    "entropy",
    "saturated_or_dark",
)
RESULT, TABLE, PAGE = "results.json", "results.csv", "evaluation.html"


class ForegroundEvaluateConfig(BaseModel, frozen=True, extra="forbid"):
    """What to judge, on which pictures."""

    pictures: list[Path] = Field(
        [], description="folders of the drawn pictures; none: synthetic thumbnails only"
    )
    drawn: Path | None = Field(
        None, description="folder of pictures.csv and the drawings; none: those in the package"
    )
    split: Literal["evaluation", "validation", "training"] = Field(
        "evaluation", description="which of the drawn pictures"
    )
    weights: list[Path] = Field(
        [],
        description="mask models (.safetensors), compared; the page is in the order of the first; "
        "none: the shipped one",
    )
    methods: list[Method] = Field(list(METHODS), description="thresholds to compare with")
    synthetic: int = Field(
        0, ge=0, le=10_000, description="also score so many held-out synthetic thumbnails"
    )
    synthetic_px: int = Field(512, ge=64, le=2048, description="their side in px")
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the synthetic thumbnails and the bootstrap"
    )
    threshold: float = Field(
        0.5, gt=0, lt=1, description="tissue where a model's probability is above this"
    )
    smallest_px: float = Field(
        64, ge=0, le=1e6, description="pieces and holes below so many pixels go, for every method"
    )
    smallest_share: float = Field(
        0.001, ge=0, lt=0.5, description="pieces below this share of the tissue go as well"
    )
    bootstrap: int = Field(10_000, ge=100, le=1_000_000, description="resamplings of the sources")
    device: str = Field("auto", description="torch device of the models: auto, cpu, cuda, cuda:1")
    threads: int = Field(1, ge=1, le=256, description="CPU threads of the models")
    out: Path = Field(Path("foreground-evaluation"), description="folder of the results")
    tracking: TrackingConfig = Field(TrackingConfig(), description="where the run is recorded")

    @model_validator(mode="after")
    def _something_to_judge(self) -> ForegroundEvaluateConfig:
        if not self.pictures and not self.synthetic:
            raise ValueError("nothing to judge on: give --pictures FOLDER or --synthetic N")
        if self.drawn is not None and not self.pictures:
            raise ValueError(
                f"drawn {self.drawn} says how pictures were drawn, but there are none: give "
                "--pictures FOLDER too"
            )
        return self


@dataclass(frozen=True)
class ForegroundEvaluateResult:
    """What was measured, and where it lies."""

    rows: tuple[Row, ...]
    drawn: Summary | None
    synthetic: Summary | None
    page: Path


def run(config: ForegroundEvaluateConfig) -> ForegroundEvaluateResult:
    """Scores every method on every picture, writes the results, prints the table.

    Raises ``PathfmError`` when a folder or picture is missing or changed, when no drawn picture is in
    the split, and when weights are missing or damaged.
    """
    from pathfm.foreground_evaluate.measuring import load_methods, measure, subjects
    from pathfm.foreground_evaluate.page import page_of
    from pathfm.foreground_evaluate.summing import agreement, summarise
    from pathfm.foreground_evaluate.telling import show

    methods = load_methods(config)  # before any picture: a damaged file is told at once
    asked = subjects(config)
    out = make_folder(config.out)
    save_config(config, out, "foreground_evaluate.yaml")
    tracking = config.tracking.filled(out, "foreground-evaluate")
    tags = provenance() | {"stage": "foreground-evaluate"}
    with open_run(tracking, out, as_dict(config), tags) as tracked:
        if config.pictures:
            digest = asked.digest
            tracked.cohort(f"drawn thumbnails, {config.split}", digest, "evaluation")
        rows: list[Row] = []
        masks = {}
        with progress(len(methods) * len(asked.all), "masks", "evaluating") as bar:
            for subject in asked.all:
                for method in methods:
                    row, mask = measure(method, subject)
                    rows.append(row)
                    if subject.drawn:
                        masks[method.name, subject.name] = mask
                    bar.advance(picture=subject.name, dice=row.scores.dice)
        models = [m.name for m in methods if m.is_model]
        agreed = agreement(asked.drawn)
        drawn = summarise(_of(rows, True), models, agreed, config.seed, config.bootstrap)
        synthetic = summarise(_of(rows, False), models, {}, config.seed, config.bootstrap)
        result = ForegroundEvaluateResult(tuple(rows), drawn, synthetic, out / PAGE)
        _write(config, result)
        result.page.unlink(missing_ok=True)  # an earlier evaluation's
        if drawn is not None:
            atomic_write_text(result.page, page_of(asked.drawn, masks, _of(rows, True), drawn))
        _record(tracked, tracking, out, rows, drawn, synthetic)
    show(result, config)
    return result


def _of(rows: Sequence[Row], drawn: bool) -> list[Row]:
    return [row for row in rows if row.drawn == drawn]


def _write(config: ForegroundEvaluateConfig, result: ForegroundEvaluateResult) -> None:
    """results.json and results.csv; what cannot be formed is null, or an empty field."""
    from pathfm.cohorts import write_csv
    from pathfm.segmentation.scores import HIGHER_IS_BETTER
    from pathfm.segmentation.truth import INSIDE, OUTSIDE

    everything = {
        "made_with": provenance(),
        "settings": as_dict(config),
        "drawn": result.drawn and asdict(result.drawn),
        "synthetic": result.synthetic and asdict(result.synthetic),
        "rows": [asdict(row) for row in result.rows],
    }
    text = json.dumps(_without_nan(everything), indent=1, allow_nan=False)
    atomic_write_text(config.out / RESULT, text + "\n")
    kinds = (*INSIDE, *OUTSIDE)
    columns = (
        "method",
        "picture",
        "group",
        "source",
        *HIGHER_IS_BETTER,
        *(f"{k}_inside" for k in kinds),
    )
    lines = []
    for row in result.rows:
        numbers = [getattr(row.scores, name) for name in HIGHER_IS_BETTER]
        numbers += [row.inside(kind) for kind in kinds]
        told = ["" if math.isnan(value) else f"{value:.6f}" for value in numbers]
        lines.append((row.method, row.picture, row.group, row.source, *told))
    write_csv(config.out / TABLE, columns, lines)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _record(
    tracked: Run, tracking: TrackingConfig, out: Path, rows: Sequence[Row], *parts: Summary | None
) -> None:
    """The parent run gets the files and the targets, a child run a method its numbers."""
    for name in (RESULT, TABLE, PAGE):
        if (out / name).exists():
            tracked.artifact(out / name)
    names = list(dict.fromkeys(row.method for row in rows))
    for name in names:
        child = tracking.model_copy(update={"run_name": name, "parent_run_id": tracked.run_id})
        tags = provenance() | {"stage": "foreground-evaluate", "method": name}
        folder = make_folder(out / "methods" / name)
        with open_run(child, folder, {"method": name}, tags) as run_of_method:
            for part in parts:
                if part is not None:
                    _tell(run_of_method, part, name)
    for part in parts:
        if part is not None:
            tracked.summary(
                **{f"{part.data}/agreement": part.agreement_mean} if part.agreement else {}
            )
            for target in part.targets:
                if target.met is not None:
                    tracked.summary(**{f"{part.data}/{target.method}/{target.name}": target.met})


def _tell(tracked: Run, part: Summary, method: str) -> None:
    """One method's numbers on one kind of pictures; the pictures as steps, in order of name."""
    told = part.methods[method]
    values: dict[str, float] = {}
    for name, score in told.scores.items():
        values |= {f"{part.data}/{name}.mean": score.mean, f"{part.data}/{name}.worst": score.worst}
        for group, mean in told.groups.get(name, {}).items():
            values[f"{part.data}/{name}.{group.replace('&', '')}"] = mean
    values |= {f"{part.data}/inside.{kind}": share for kind, share in told.inside.items()}
    tracked.summary(**{key: value for key, value in values.items() if math.isfinite(value)})
    for step, dice in enumerate(told.dice.values()):
        tracked.log(step, **{f"{part.data}/dice.by_picture": dice})
