"""One cell of a study: trained, looked at, measured, and its figures in a flat table.

run/        steps, patches, slides          watch/  what training's own probe saw
probe/V/P   balanced accuracy of probe P on view V      few-shot/V/M/k  the same from k a class
robust/     errors, mCE, noise              cost/   seconds      foreground/  Dice of thumbnails
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pathfm import embed, foreground_train, pretrain, probe, robustness
from pathfm.probe import ProbeResult
from pathfm.runtime import PathfmError, as_dict, stage
from pathfm.study.claims import digest_of
from pathfm.study.equal import config_of, planned
from pathfm.study.plan import START, Cell, Study, View, settings_of, validated
from pathfm.study.preparing import Prepared, linked_tree
from pathfm.tracking import Run, TrackingConfig

FORMAT = 2
"""Raised when the same settings give other figures: finished cells are then done again."""
TRAINED = "pretrain"

Metrics = dict[str, float]


class Stopped(KeyboardInterrupt):
    """Training was told to stop: the whole study stops, with the same exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


def facts_of(study: Study, cell: Cell, prepared: Prepared) -> dict[str, Any]:
    """All that a cell's figures depend on, plain: settings, views, and the data by digest or count."""
    facts: dict[str, Any] = {
        "format": FORMAT,
        "kind": study.kind,
        "seed": cell.seed,
        "data": prepared.facts,
    }
    if cell.arm is not None:
        arm = cell.arm
        facts |= {"train": settings_of(study, arm), "reads": arm.reads, "noise": arm.label_noise}
    else:
        facts["backbone"] = _backbone(study)
    if study.kind == "pretrain":
        facts["views"] = [view.model_dump(mode="json") for view in study.views]
        facts |= {"probe": study.probe, "robustness": study.robustness}
        facts["split"] = study.split_labelled
    return facts


def digest_of_cell(study: Study, cell: Cell, prepared: Prepared) -> str:
    """SHA-256 of `facts_of`."""
    return digest_of(facts_of(study, cell, prepared))


def run_cell(
    study: Study,
    cell: Cell,
    prepared: Prepared,
    folder: Path,
    tracked: Run,
    tracking: TrackingConfig,
) -> dict[str, Any]:
    """Does what is not done yet in the cell's folder; its figures and what they rest on.

    Raises PathfmError, a PatchingError, or Stopped.
    """
    seconds: dict[str, float] = {}
    if study.kind == "foreground":
        curves: dict[str, list[list[float]]] = {}
        told: dict[str, Any] = {}
        metrics = _train_foreground(study, cell, folder, tracking, seconds)
    else:
        metrics, curves, told = _pretrain_and_probe(
            study, cell, prepared, folder, tracking, seconds
        )
    metrics |= {f"cost/{name}_s": s for name, s in seconds.items()}
    tracked.summary(**metrics)
    return {"cell": cell.name, "metrics": metrics, "curves": curves, **told}


def _train_foreground(
    study: Study, cell: Cell, folder: Path, tracking: TrackingConfig, seconds: dict[str, float]
) -> Metrics:
    assert cell.arm is not None
    own = {
        "out": folder / TRAINED,
        "pictures": list(study.data.pictures),
        "tracking": tracking.model_copy(update={"run_name": TRAINED}),
    }
    config = config_of(study, cell.arm, cell.seed, own)
    assert isinstance(config, foreground_train.ForegroundTrainConfig)
    with stage("train", seconds):
        result = foreground_train.run(config)
    found = {f"foreground/{name}": float(v) for name, v in result.facts["validation"].items()}
    return {f"run/{name}": float(n) for name, n in planned(config).items()} | found


def _pretrain_and_probe(
    study: Study,
    cell: Cell,
    prepared: Prepared,
    folder: Path,
    tracking: TrackingConfig,
    seconds: dict[str, float],
) -> tuple[Metrics, dict[str, list[list[float]]], dict[str, Any]]:
    metrics: Metrics = {}
    curves: dict[str, list[list[float]]] = {}
    told: dict[str, Any] = {}
    weights, backbone = study.data.weights, _backbone(study)
    if cell.arm is not None:
        with stage("train", seconds):
            metrics, curves, told = _pretrain(study, cell, prepared, folder, tracking)
        weights = str(folder / TRAINED)
    caveats: list[str] = []
    for view in study.views:
        with stage("probe", seconds):
            result = _probe(study, view, prepared, folder, weights, backbone)
        metrics |= scores_of(view.name, result)
        caveats += [line for line in result.caveats if line not in caveats]
        told["probed"] = {"data": result.data_digest, "n": result.n, "classes": result.classes}
    if study.robustness is not None and cell.arm is not None:
        with stage("robustness", seconds):
            metrics |= _robustness(study, prepared, folder, weights, backbone)
    return metrics, curves, told | {"caveats": caveats}


def _backbone(study: Study) -> str:
    return str(study.pretrain.get("backbone", "vit_small_patch16_224"))


def pretrain_config(
    study: Study, cell: Cell, prepared: Prepared, folder: Path, tracking: TrackingConfig
) -> pretrain.PretrainConfig:
    """What `pathfm pretrain` is called with for a cell."""
    arm = cell.arm
    assert arm is not None
    settings = settings_of(study, arm)
    weights = str(settings.get("weights", study.data.weights))
    over: dict[str, Any] = {
        "out": folder / TRAINED,
        "weights": f"random:{cell.seed}" if weights == "random" else weights,
        "tracking": tracking.model_copy(update={"run_name": TRAINED}),
    }
    if arm.reads == "slides":
        over["corpus"] = prepared.corpus
    else:
        own = prepared.offline.get(arm.name) or prepared.train[arm.label_noise]
        given = settings.get("labels", {})
        unlabelled = {"balanced": False} if arm.reads == "offline" else {}
        over["labels"] = {**given, **unlabelled, "patches": own}
    if "watch" in settings and prepared.patches is not None and not study.split_labelled:
        over["watch"] = {"probe_folder": prepared.patches, **settings["watch"]}
    config = config_of(study, arm, cell.seed, over)
    assert isinstance(config, pretrain.PretrainConfig)
    return config


def _pretrain(
    study: Study, cell: Cell, prepared: Prepared, folder: Path, tracking: TrackingConfig
) -> tuple[Metrics, dict[str, list[list[float]]], dict[str, Any]]:
    config = pretrain_config(study, cell, prepared, folder, tracking)
    result = pretrain.run(config)
    if result.exit_code:
        raise Stopped(result.exit_code)
    if not result.finished:
        raise PathfmError(f"{config.out} stopped after {result.steps:,} of {config.steps:,} steps")
    summary = json.loads((config.out / "summary.json").read_text(encoding="utf-8"))
    metrics = {
        f"run/{name}": float(summary[name])
        for name in ("patches_seen", "distinct_patches", "slides_seen", "patches_per_s")
        if summary.get(name) is not None
    }
    metrics["run/optimizer_steps"] = float(summary["steps"])
    each = planned(config)["views_seen"] / planned(config)["patches_seen"]
    metrics["run/views_seen"] = summary["patches_seen"] * each
    curves: dict[str, list[list[float]]] = {}
    if study.curves:
        start = summary.get(f"{study.curves}_start")
        before = [] if start is None else [[0.0, float(start)]]
        curves[study.curves] = before + curve_of(config.out, study.curves)
    for name, points in curves.items():
        values = [y for x, y in points if x > 0]
        if values:
            metrics[f"watch/{name}_mean"] = float(np.mean(values))
    for name in ("rankme_start", "rankme_end"):
        if summary.get(name) is not None:
            metrics[f"watch/{name}"] = float(summary[name])
    told = {"init": summary.get("init", ""), "corpus": summary.get("corpus_digest", "")}
    return metrics, curves, told


def curve_of(run: Path, name: str) -> list[list[float]]:
    """(optimizer steps done, value) of a number in metrics.jsonl, in the order of steps."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line]
    return sorted([row["step"] + 1, row[name]] for row in rows if row.get(name) is not None)


def _probe(
    study: Study, view: View, prepared: Prepared, folder: Path, weights: str, backbone: str
) -> ProbeResult:
    where = f"study {study.name}, view {view.name}"
    off = TrackingConfig(enabled=False)
    own = {
        "data": prepared.patches,
        "weights": weights,
        "backbone": backbone,
        "name": "cell",
        "out": folder / "embeddings" / view.name,
        "tracking": off,
    }
    embed.run(validated(embed.EmbedConfig, {**view.embed, **own}, where))
    files = [folder / "embeddings" / view.name / "cell.safetensors"]
    given = {**study.probe, "embeddings": files, "out": folder / "probe" / view.name}
    return probe.run(validated(probe.ProbeConfig, {**given, "tracking": off}, where))


def scores_of(view: str, result: ProbeResult) -> Metrics:
    """The probes' balanced accuracies (0..1), and few-shot's for each number of shots."""
    (backbone,) = result.backbones
    found = {f"probe/{view}/{name}": scores.mean for name, scores in backbone.probes.items()}
    for method, scores in backbone.few_shot.items():
        for shots, mean in zip(scores.shots, scores.mean, strict=True):
            found[f"few-shot/{view}/{method}/{shots}"] = mean
    return found | {f"probe/{view}/rankme": backbone.rankme}


def _robustness(
    study: Study, prepared: Prepared, folder: Path, weights: str, backbone: str
) -> Metrics:
    out = folder / "robustness"
    shared, own = folder.parent.parent / "start_features", out / "features" / START
    linked_tree(shared, own)  # of the start, which every cell is measured against
    given = {
        **(study.robustness or {}),
        "data": str(prepared.patches),
        "models": [f"{START}={study.data.weights}", f"cell={weights}"],
        "backbone": backbone,
        "out": out,
        "tracking": TrackingConfig(enabled=False),
    }
    robustness.run(validated(robustness.RobustnessConfig, given, f"study {study.name}, robustness"))
    linked_tree(own, shared)
    result = json.loads((out / robustness.RESULT).read_text(encoding="utf-8"))
    return robust_metrics(next(m for m in result["models"] if m["name"] == "cell"))


def robust_metrics(model: Mapping[str, Any]) -> Metrics:
    """Errors on 0..1, CE in per cent of the start's; what was left out is not there."""
    found = {
        name: model[name]["value"]
        for name in ("clean_error", "mean_corrupted_error", "mce", "relative_mce")
        if model[name] is not None
    }
    for each in model["corruptions"]:
        if each["ce"] is not None:
            found[f"ce/{each['name']}"] = each["ce"]
        found[f"error/{each['name']}"] = float(np.mean(each["errors"]))
    found |= {f"noise/{each['share']:g}": each["error"] for each in model["noisy_labels"]}
    return {f"robust/{name}": float(value) for name, value in found.items()}


@contextmanager
def interrupting() -> Iterator[None]:
    """SIGTERM and SIGUSR1 between trainings end the study as they end a training."""

    def stop(number: int, frame: object) -> None:
        raise Stopped(128 + number)

    old = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def told_params(study: Study, cell: Cell) -> dict[str, Any]:
    """What MLflow shows of a cell: its arm, its seed, and what the arm sets."""
    params: dict[str, Any] = {"study": study.name, "cell": cell.name, "seed": cell.seed}
    if cell.arm is not None:
        params |= {"arm": cell.arm.name, "reads": cell.arm.reads}
        params |= as_dict(cell.arm)
    return params
