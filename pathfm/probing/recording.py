"""A backbone's probing as an MLflow run below the verb's: params, curves, tables, files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pathfm.embeddings import Embeddings
from pathfm.probing.measuring import Measured
from pathfm.tracking import Run, TrackingConfig, open_run

_POINTS = 200  # of a curve: a run of 6,000 validations is not shipped whole


def record_backbone(
    parent: Run,
    tracking: TrackingConfig,
    out: Path,
    params: Mapping[str, Any],
    data: Embeddings,
    measured: Measured,
) -> None:
    """Records one backbone: scores with intervals, each run's metrics, eva's curves, and its files.

    The features are referred to by key, not copied. Series: `<probe>.by_run` over repeats, `eva.<metric>`
    over runs, `eva.run<i>.val` over optimizer steps at the chosen learning rate.
    """
    name = data.info.name
    below = tracking.model_copy(
        update={"run_name": f"probe {name}", "parent_run_id": parent.run_id}
    )
    tags = {
        "stage": "probe of a backbone",
        "embeddings.key": data.info.key,
        "backbone.digest": data.info.backbone_digest,
    }
    about = dict(params) | {"backbone": name, "weights_note": data.info.weights_note}
    with open_run(below, out / "tracking" / name, about, tags) as run:
        run.cohort(data.info.data, data.info.data_digest, "evaluation")
        for probe, scores in measured.result.probes.items():
            run.summary(**{f"{probe}.mean": scores.mean, f"{probe}.sd": scores.sd})
            if scores.interval:
                low, high = scores.interval
                run.summary(**{f"{probe}.low": low, f"{probe}.high": high})
        for method, few in measured.result.few_shot.items():
            for k, mean in zip(few.shots, few.mean, strict=True):
                run.log(k, **{f"few-shot.{method}": mean})
        _series(run, measured)
        run.artifact(out / "predictions" / f"{name}.safetensors")
        if measured.heads is not None:
            run.artifact(out / "eva" / name / "results.json")


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
    every = -(-len(heads.val_steps) // _POINTS)
    for i in range(0, len(heads.val_steps), every):
        scores_at = heads.val_scores[i, :, heads.rate]
        run.log(
            int(heads.val_steps[i]),
            **{f"eva.run{k}.val": float(v) for k, v in enumerate(scores_at)},
        )
