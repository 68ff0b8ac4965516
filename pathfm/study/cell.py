"""One cell of a study: trained, looked at, measured, and its figures in a flat table.

run/        steps, patches, slides          watch/  what training's own probe saw
probe/V/P   balanced accuracy of probe P on view V      few-shot/V/M/k  the same from k a class
robust/     errors, mCE, noise              cost/   seconds      foreground/  Dice of thumbnails
"""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from pathfm import embed, foreground_train, pretrain, probe, robustness
from pathfm.probe import ProbeResult
from pathfm.runtime import PathfmError, as_dict, stage
from pathfm.study.claims import digest_of
from pathfm.study.equal import config_of, planned
from pathfm.study.plan import (
    START,
    Cell,
    Study,
    View,
    backbone_of,
    settings_of,
    start_of,
    validated,
)
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


_PLACES = ("out", "corpus", "pictures", "data", "embeddings", "models", "weights", "name",
           "watch.probe_folder", "sites")  # fmt: skip
_COMPUTING = ("device", "parallel", "compile", "micro_batch_size", "keep_checkpoints", "threads")


def facts_of(study: Study, cell: Cell, prepared: Prepared) -> dict[str, Any]:
    """All that a cell's figures depend on, plain: every setting, defaults too, and the data by digest.

    Not where things lie, nor what is recorded where, nor on what is computed.
    """
    made, arm = prepared.facts, cell.arm
    own = ("weights ", "offline ")  # of one start or one arm
    data = {name: value for name, value in made.items() if not name.startswith(own)}
    facts: dict[str, Any] = {"format": FORMAT, "seed": cell.seed, "data": data}
    if arm is not None:
        facts |= {"train": _settings(config_of(study, arm, cell.seed))}
        facts |= {"reads": arm.reads, "noise": arm.label_noise}
        facts["grid"] = made.get(f"offline {arm.name}")
        facts["weights"] = made.get(f"weights {start_of(study, arm, cell.seed).start}")
    else:
        facts |= {"weights": made.get(f"weights {cell.start}"), "backbone": cell.backbone}
    if study.kind == "pretrain":
        facts["split"] = study.split_labelled
        facts["views"] = [[view.name, _settings(_embedded(study, view))] for view in study.views]
        facts["probe"] = _settings(_probed(study))
        if study.robustness is not None:
            facts["robustness"] = _settings(_damaged(study))
            facts["reference"] = made.get(f"weights {START}", study.data.weights)
    return facts


def _settings(config: BaseModel) -> dict[str, Any]:
    """A config as flat settings, without places and what changes no figure."""
    return {
        key: value
        for key, value in as_dict(config).items()
        if key not in (*_PLACES, *_COMPUTING)
        and not key.startswith(("tracking.", "loader.", "labels.patches", "estimate."))
    }


def _embedded(study: Study, view: View, **own: Any) -> embed.EmbedConfig:
    given = {"data": "patches", "weights": "random", **view.embed, **own}
    where = f"study {study.name}, view {view.name}"
    config: embed.EmbedConfig = validated(embed.EmbedConfig, given, where)
    return config


def _probed(study: Study, **own: Any) -> probe.ProbeConfig:
    given = {"embeddings": ["cell"], **study.probe, **own}
    config: probe.ProbeConfig = validated(probe.ProbeConfig, given, f"study {study.name}, probe")
    return config


def _damaged(study: Study, **own: Any) -> robustness.RobustnessConfig:
    given = {"data": "patches", "models": ["start=random"], **(study.robustness or {}), **own}
    where = f"study {study.name}, robustness"
    config: robustness.RobustnessConfig = validated(robustness.RobustnessConfig, given, where)
    return config


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

    Raises Stopped, and whatever else keeps a cell from its end.
    """
    seconds: dict[str, float] = {}
    again = (folder / TRAINED).exists()
    if study.kind == "foreground":
        curves: dict[str, list[list[float]]] = {}
        told: dict[str, Any] = {}
        metrics = _train_foreground(study, cell, folder, tracking, seconds)
    else:
        metrics, curves, told = _pretrain_and_probe(
            study, cell, prepared, folder, tracking, seconds
        )
    if not again:  # of a cell that goes on no time is known
        metrics |= {f"cost/{name}_s": s for name, s in seconds.items()}
        told["seconds"] = sum(seconds.values())
    metrics = {name: value for name, value in metrics.items() if math.isfinite(value)}
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
    weights, backbone = cell.weights, cell.backbone
    if cell.arm is not None:
        with stage("train", seconds):
            metrics, curves, told = _pretrain(study, cell, prepared, folder, tracking)
        weights, backbone = str(folder / TRAINED), backbone_of(study, cell.arm)
    caveats: list[str] = []
    off = TrackingConfig(enabled=False)
    model = {"data": prepared.patches, "weights": weights, "backbone": backbone, "name": "cell"}
    with stage("probe", seconds):
        for view in study.views:
            out = folder / "embeddings" / view.name
            embed.run(_embedded(study, view, **model, out=out, tracking=off))
            files, out = [out / "cell.safetensors"], folder / "probe" / view.name
            result = probe.run(_probed(study, embeddings=files, out=out, tracking=off))
            metrics |= scores_of(view.name, result)
            caveats += [line for line in result.caveats if line not in caveats]
            told["probed"] = {"data": result.data_digest, "n": result.n, "classes": result.classes}
    if study.robustness is not None:
        with stage("robustness", seconds):
            found, said = _robustness(study, prepared, folder, weights, backbone)
        metrics |= found
        caveats += [line for line in said if line not in caveats]
    return metrics, curves, told | {"caveats": caveats}


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
    assert cell.arm is not None
    config = pretrain_config(study, cell, prepared, folder, tracking)
    result = pretrain.run(config)
    if result.exit_code:
        raise Stopped(result.exit_code)
    if not result.finished:
        raise PathfmError(f"{config.out} stopped after {result.steps:,} of {config.steps:,} steps")
    summary = json.loads((config.out / "summary.json").read_text(encoding="utf-8"))
    _refuse_other_data(cell, prepared, summary)
    metrics = {
        f"run/{name}": float(summary[name])
        for name in ("patches_seen", "distinct_patches", "slides_seen", "patches_per_s")
        if summary.get(name) is not None
    }
    # a grid on disk has a folder for each µm/px
    shares = summary.get("slide_share" if cell.arm.reads == "offline" else "mpp_share") or {}
    metrics |= {f"run/share_at_{float(mpp):g}": float(share) for mpp, share in shares.items()}
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


def _refuse_other_data(cell: Cell, prepared: Prepared, summary: Mapping[str, Any]) -> None:
    """PathfmError when the slides are no longer those that the grid was begun with."""
    assert cell.arm is not None
    begun = prepared.facts.get("corpus")
    if cell.arm.reads == "slides" and begun not in (None, summary.get("corpus_digest")):
        raise PathfmError(
            f"{cell.name}: the corpus {prepared.corpus} has changed since this grid was begun: the same command "
            "begins one on the slides there are now"
        )


def curve_of(run: Path, name: str) -> list[list[float]]:
    """(optimizer steps done, value) of a number in metrics.jsonl, in the order of steps."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line]
    return sorted([row["step"] + 1, row[name]] for row in rows if row.get(name) is not None)


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
) -> tuple[Metrics, list[str]]:
    """A model's figures beside those of the study's own start, which is the reference; and what must be known."""
    out = folder / "robustness"
    key = digest_of([prepared.facts, _settings(_damaged(study))])[:8]
    shared, own = folder.parent.parent / f"start_features-{key}", out / "features" / START
    linked_tree(shared, own)  # every cell is measured against it
    reference = study.data.weights
    models = [f"{START}={'random:0' if reference == 'random' else reference}", f"cell={weights}"]
    settings = {"data": str(prepared.patches), "models": models, "backbone": backbone, "out": out}
    robustness.run(_damaged(study, **settings, tracking=TrackingConfig(enabled=False)))
    linked_tree(own, shared)
    result = json.loads((out / robustness.RESULT).read_text(encoding="utf-8"))
    model = next(m for m in result["models"] if m["name"] == "cell")
    return robust_metrics(model), list(result["caveats"])


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
