"""A backbone's probing as MLflow runs below the verb's: one for the backbone, one for each of its repeats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pathfm.embeddings import Embeddings
from pathfm.probing.matrices import draw_matrices
from pathfm.probing.measuring import Measured
from pathfm.tracking import Run, TrackingConfig, open_run

_POINTS = 200  # of a curve: a run of 6,000 validations is not shipped whole
MOST_RUNS = 64
"""Repeats that get a run of their own; the series of the backbone's run hold all of them."""
_PENDING = "pending-"


@dataclass(frozen=True)
class Place:
    """Where the runs of one backbone go: the store, the folder of the probing, the file of the features."""

    tracking: TrackingConfig
    out: Path
    embeddings: Path


def record_backbone(
    parent: Run, place: Place, params: Mapping[str, Any], data: Embeddings, measured: Measured
) -> None:
    """Records one backbone: scores with intervals, each run's metrics, eva's curves, pictures and files.

    The features are referred to by key and path, not copied. Series: `<probe>.by_run` over repeats,
    `eva.<metric>` over runs, `eva.run<i>.val` over optimizer steps at the chosen learning rate.
    """
    name, out = data.info.name, place.out
    tags = features_of(data, place) | {"stage": "probe of a backbone"}
    about = dict(params) | {"backbone": name, "weights_note": data.info.weights_note}
    if data.info.mpp:
        about["input_mpp"] = f"{data.info.mpp:g}"
    below = _below(place.tracking, parent, f"probe {name}")
    with open_run(below, out / "tracking" / name, about, tags) as run:
        run.cohort(data.info.data, data.info.data_digest, "evaluation")
        _scores(run, measured)
        _series(run, measured)
        path = out / "confusions" / f"{name}.png"
        run.picture(draw_matrices(name, measured.result.probes, data.classes, path))
        run.artifact(out / "predictions" / f"{name}.safetensors")
        if measured.heads is not None:
            run.artifact(out / "eva" / name / "results.json")
        _record_repeats(run, place, data, measured)


def features_of(data: Embeddings, place: Place) -> dict[str, str]:
    """Tags that say which features were probed, of which weights."""
    return {
        "embeddings.key": data.info.key,
        "embeddings.path": str(place.embeddings.resolve()),
        "backbone.digest": data.info.backbone_digest,
    }


def _below(tracking: TrackingConfig, parent: Run, name: str) -> TrackingConfig:
    """The tracking of a child. Below a run that no store has answered for, nobody is waited for."""
    answered = not parent.run_id.startswith(_PENDING)
    told = {"run_name": name, "parent_run_id": parent.run_id}
    return tracking.model_copy(update=told | {"enabled": tracking.enabled and answered})


def _scores(run: Run, measured: Measured) -> None:
    """Means with their intervals, calibration, few-shot; scores by µm/px where rows differ in it."""
    for probe, scores in measured.result.probes.items():
        run.summary(**{f"{probe}.mean": scores.mean, f"{probe}.ece": scores.mean_ece})
        if len(scores.values) > 1:
            run.summary(**{f"{probe}.sd": scores.sd})
        if scores.interval:
            low, high = scores.interval
            run.summary(**{f"{probe}.low": low, f"{probe}.high": high})
    for at in measured.result.by_mpp:
        run.summary(**{f"{p}.mean_at_{at.mpp:g}_mpp": s.mean for p, s in at.probes.items()})
    for method, few in measured.result.few_shot.items():
        for k, mean in zip(few.shots, few.mean, strict=True):
            run.log(k, **{f"few-shot.{method}": mean})


def _series(run: Run, measured: Measured) -> None:
    """What is a series over repeats, runs or steps."""
    rows: dict[int, dict[str, float]] = {}
    for probe, scores in measured.result.probes.items():
        for repeat, value in enumerate(scores.values):
            rows.setdefault(repeat, {})[f"{probe}.by_run"] = value
    for repeat, metrics in enumerate(measured.eva):
        rows.setdefault(repeat, {}).update({f"eva.{name}": v for name, v in metrics.items()})
    for repeat, values in rows.items():
        run.log(repeat, **values)
    heads = measured.heads
    if heads is None:
        return
    for i in _spread(len(heads.val_steps)):
        scores_at = heads.val_scores[i, :, heads.rate]
        run.log(
            int(heads.val_steps[i]),
            **{f"eva.run{k}.val": float(v) for k, v in enumerate(scores_at)},
        )


def _record_repeats(parent: Run, place: Place, data: Embeddings, measured: Measured) -> None:
    """A run for each repeat: what was chosen, its scores, and of eva's heads the curves."""
    probes, name = measured.result.probes, data.info.name
    repeats = max(len(scores.values) for scores in probes.values())
    for repeat in range(min(repeats, MOST_RUNS)):
        there = {p: s for p, s in probes.items() if repeat < len(s.values)}
        chosen: dict[str, Any] = {"backbone": name, "repeat": repeat}
        chosen |= {f"{p}.c": s.c[repeat] for p, s in there.items() if s.c}
        chosen |= {
            f"{p}.learning_rate": s.learning_rate for p, s in there.items() if s.learning_rate
        }
        below = _below(place.tracking, parent, f"probe {name}, run {repeat}")
        folder = place.out / "tracking" / name / f"run-{repeat}"
        tags = features_of(data, place) | {"stage": "probe, one run"}
        with open_run(below, folder, chosen, tags) as run:
            for probe, scores in there.items():
                run.summary(**{f"{probe}.balanced_accuracy": scores.values[repeat]})
                run.summary(**{f"{probe}.ece": scores.ece[repeat]})
            if repeat < len(measured.eva):
                run.summary(**{f"eva.{k}": v for k, v in measured.eva[repeat].items()})
                _curves(run, measured, repeat)


def _curves(run: Run, measured: Measured, repeat: int) -> None:
    """eva's loss and validation score over optimizer steps, at the chosen learning rate."""
    heads = measured.heads
    if heads is None:
        return
    stopped = int(heads.stopped_step[repeat, heads.rate])
    for i in _spread(stopped):
        run.log(i + 1, **{"eva.loss": float(heads.losses[i, repeat, heads.rate])})
    for i in _spread(len(heads.val_steps)):
        if heads.val_steps[i] <= stopped:
            score = float(heads.val_scores[i, repeat, heads.rate])
            run.log(int(heads.val_steps[i]), **{"eva.val": score})


def _spread(n: int) -> range:
    """Some of n points, evenly, from the first."""
    return range(0, n, max(1, -(-n // _POINTS)))
