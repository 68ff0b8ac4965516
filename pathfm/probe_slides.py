"""Verb `probe-slides`: bags of frozen patch features + slide labels -> ABMIL and mean pooling, n runs.

Reads the HDF5 that `pathfm embed` (or CLAM, or TRIDENT) writes. Writes `<out>/slide_probe.json`,
`<out>/<model>.<pooling>.results.json` with kaiko-eva's keys, and the predictions of every run.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from online_patching.stores.local import atomic_write_bytes, atomic_write_text
from pathfm.runtime import (
    PathfmError,
    as_dict,
    console,
    make_folder,
    pick_device,
    progress,
    provenance,
    save_config,
)
from pathfm.tracking import TrackingConfig, open_run

if TYPE_CHECKING:  # torch and h5py are imported when there is work, not for --help
    from pathfm.slide_probe import Bags
    from pathfm.slide_probe.runs import SlideScores

RESULT = "slide_probe.json"
METRIC = "balanced_accuracy"
_FORMAT = "pathfm.slide_probe.1"


class ProbeSlidesConfig(BaseModel, frozen=True, extra="forbid"):
    """Which bags to probe, and how; the defaults are kaiko-eva's."""

    bags: list[Path] = Field(
        min_length=1,
        description="folders of bags (<slide>.h5), one a model; a folder's name is the model's",
    )
    labels: str = Field(
        description="CSV with slide, label and, if known, patient and split; or a slide data set with "
        "its folder, such as panda_small=FOLDER"
    )
    out: Path = Field(Path("slide_probe"), description="folder for the results")
    poolings: tuple[Literal["abmil", "mean"], ...] = Field(
        ("abmil", "mean"), min_length=1, description="heads: abmil (gated attention), mean (linear)"
    )
    n_runs: int = Field(20, ge=1, le=1000, description="runs, each with its own head and batches")
    n_folds: int | None = Field(
        None, ge=3, le=100, description="folds by patient; unset: the table's own splits"
    )
    seed: int = Field(0, ge=0, description="key of all folds, heads and batches")
    lr: float = Field(1e-3, gt=0, le=10, description="AdamW's rate; a third of it for five epochs")
    batch_slides: int = Field(32, ge=1, le=4096, description="slides a step")
    max_epochs: int = Field(100, ge=1, le=10_000, description="epochs at most")
    patience_epochs: int = Field(20, ge=1, description="epochs without a better validation score")
    most_patches: int | None = Field(
        None, ge=1, description="patches of a slide used at most, evenly spaced; unset: all"
    )
    memory_gib: float = Field(8.0, ge=0, description="bags kept in memory, GiB; the rest is reread")
    leaks: Literal["refuse", "mark"] = Field(
        "refuse",
        description="slides that a backbone has seen in pretraining: refuse them, or mark the table",
    )
    device: str = Field("auto", description="auto, cpu or cuda:N")
    tracking: TrackingConfig = Field(TrackingConfig(), description="where the run is recorded")


@dataclass(frozen=True)
class SlideModel:
    """One model under one pooling. Balanced accuracies 0..1; interval: 95 %, over patients."""

    name: str
    protocol: str
    dim: int
    values: list[float]
    val: list[float]
    mean: float
    sd: float
    interval: list[float]
    interval_of: str
    n_patients: int
    epochs: float
    backbone_digest: str = ""


@dataclass(frozen=True)
class SlideProbeResult:
    """What `slide_probe.json` holds."""

    key: str  # digest of the features and the options: a rerun with the same key is skipped
    data: str
    data_digest: str
    n: int  # slides reported
    n_slides: int
    classes: list[str]
    told: str  # which slides are reported, and what chose
    metric: str
    models: list[SlideModel]
    caveats: list[str]


def run(config: ProbeSlidesConfig) -> SlideProbeResult:
    """Probes every folder of bags under every pooling; a rerun with nothing new prints what is there."""
    from pathfm.slide_probe.bags import same_slides

    names = [_name(folder) for folder in config.bags]
    if len({*names}) < len(names):
        raise PathfmError(f"two folders of bags have one name ({', '.join(names)}): rename one")
    found = [_open(folder, config.labels) for folder in config.bags]
    same_slides(found, names)
    if config.n_folds is None and not found[0].splits:
        raise PathfmError(f"{config.labels} has no splits: add a column split, or give --n_folds 5")
    notes = _leaks(config, names, found)
    path, key = config.out / RESULT, _key(config, found)
    earlier = _load(path)
    told = earlier is not None and set(notes) <= set(earlier.caveats)
    if earlier is not None and earlier.key == key and told:
        print(f"probe-slides: {path} is up to date")
        show(earlier)
        return earlier
    save_config(config, make_folder(config.out), "probe_slides.yaml")
    tracking = config.tracking.filled(config.out, "probe-slides")
    tags = provenance() | {"stage": "probe-slides"}
    with open_run(tracking, config.out, as_dict(config), tags) as tracked:
        tracked.cohort(config.labels, _digest(found[0]), "evaluation")
        result = _probe(config, key, names, found)
        result = replace(result, caveats=[*result.caveats, *notes])
        atomic_write_text(path, json.dumps(asdict(result), indent=1) + "\n")
        for model in result.models:
            at = f"{model.name}/{model.protocol}"
            tracked.summary(**{f"{at}.mean": model.mean, f"{at}.sd": model.sd})
            for number, value in enumerate(model.values):
                tracked.log(number, **{f"{at}.by_run": value})
        tracked.artifact(path)
    show(result)
    print(f"written: {path}")
    return result


def _leaks(config: ProbeSlidesConfig, names: Sequence[str], found: Sequence[Bags]) -> list[str]:
    """What must be said of slides that a backbone had seen; refuses them where that is asked for."""
    from pathfm.leakage import mark_of_bags

    triples = zip(names, config.bags, found, strict=True)
    lines = [mark_of_bags(n, folder, bags.slides, config.leaks) for n, folder, bags in triples]
    return [line for line in lines if line]


def _probe(
    config: ProbeSlidesConfig, key: str, names: Sequence[str], found: Sequence[Bags]
) -> SlideProbeResult:
    from pathfm.slide_probe.fit import SlideProtocol
    from pathfm.slide_probe.runs import probe_bags

    device = str(pick_device(config.device))
    fits = len(names) * len(config.poolings) * config.n_runs * (config.n_folds or 1)
    models, caveats, scores = [], [], None
    with progress(fits, "fits", "probe-slides") as bar:
        for name, bags in zip(names, found, strict=True):
            loaded = bags.loaded(int(config.memory_gib * 2**30), config.most_patches)
            for pooling in config.poolings:
                protocol = SlideProtocol(
                    pooling=pooling,
                    lr=config.lr,
                    batch_slides=config.batch_slides,
                    max_epochs=config.max_epochs,
                    patience_epochs=config.patience_epochs,
                )
                scores = probe_bags(
                    loaded,
                    protocol,
                    config.n_runs,
                    config.n_folds,
                    config.seed,
                    device,
                    bar.advance,
                )
                models.append(_model(name, pooling, bags, scores))
                caveats += [f"{name}, {pooling}: {c}" for c in scores.interval.caveats]
                _write_files(config, f"{name}.{pooling}", bags, scores)
    assert scores is not None
    if not any(found[0].patients):
        caveats.append("No patients are known: each slide counts as a patient of its own.")
    return SlideProbeResult(
        key=key,
        data=config.labels,
        data_digest=_digest(found[0]),
        n=scores.n,
        n_slides=len(found[0]),
        classes=list(found[0].classes),
        told=scores.told,
        metric=METRIC,
        models=models,
        caveats=caveats,
    )


def _model(name: str, pooling: str, bags: Bags, scores: SlideScores) -> SlideModel:
    return SlideModel(
        name=name,
        protocol=pooling,
        dim=bags.dim,
        values=list(scores.values),
        val=list(scores.val),
        mean=scores.mean,
        sd=scores.sd,
        interval=[scores.interval.low, scores.interval.high],
        interval_of="mean over runs, patients resampled",
        n_patients=scores.interval.n_groups,
        epochs=scores.epochs,
    )


def _write_files(config: ProbeSlidesConfig, stem: str, bags: Bags, scores: SlideScores) -> None:
    """eva's results.json of one model, and (runs, n) predictions with truth, slides and patients."""
    import numpy as np

    metric = "BinaryBalancedAccuracy" if len(bags.classes) == 2 else "MulticlassAccuracy"

    def told(part: str, values: Sequence[float]) -> list[dict[str, Any]]:
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0
        stated = {"mean": float(np.mean(values)), "stdev": sd, "values": list(values)}
        return [{f"{part}/{metric}": stated}]

    test = [] if scores.told.startswith("val") else told("test", scores.values)
    metrics = {"metrics": {"val": told("val", scores.val), "test": test}}
    text = json.dumps(metrics, indent=2, sort_keys=True) + "\n"
    atomic_write_text(config.out / f"{stem}.results.json", text)
    held = io.BytesIO()
    np.savez_compressed(
        held,
        truth=bags.labels,
        predicted=scores.predicted,
        slides=np.array(bags.slides),
        patients=np.array(bags.groups),
    )
    atomic_write_bytes(config.out / f"{stem}.predictions.npz", held.getvalue())


def _open(folder: Path, labels: str) -> Bags:
    from pathfm.slide_probe.table import bags_of_samples, read_bags

    if labels.endswith(".csv"):
        return read_bags(folder, Path(labels))
    from pathfm.datasets import open_dataset

    data = open_dataset(labels)
    if data.facts.task != "slide":
        raise PathfmError(f"{labels}: a {data.facts.task} data set; slides are wanted, or a CSV")
    slides = [data.slide(i).rsplit("/", 1)[-1].split(".")[0] for i in range(len(data))]
    return bags_of_samples(
        folder, labels, slides, data.labels, data.classes, data.groups, data.splits
    )


def _name(folder: Path) -> str:
    path = folder.resolve()
    return path.parent.name if path.name == "h5_files" else path.name


def _digest(bags: Bags) -> str:
    """Of the slides, labels, patients and splits."""
    rows = [bags.slides, bags.labels.tolist(), bags.classes, bags.patients, bags.splits]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _key(config: ProbeSlidesConfig, found: Sequence[Bags]) -> str:
    """A digest of everything the result depends on; files by name, size and time of change."""
    from pathfm.embeddings.bags import find_bags

    options = config.model_dump(
        mode="json", exclude={"bags", "out", "tracking", "device", "memory_gib"}
    )
    files = [
        [
            _name(folder),
            [[s, f.stat().st_size, f.stat().st_mtime_ns] for s, f in find_bags(folder).items()],
        ]
        for folder in config.bags
    ]
    return hashlib.sha256(
        json.dumps([_FORMAT, options, files, _digest(found[0])]).encode()
    ).hexdigest()


def _load(path: Path) -> SlideProbeResult | None:
    try:
        return TypeAdapter(SlideProbeResult).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def show(result: SlideProbeResult) -> None:
    """Prints the table and the caveats."""
    from rich.markup import escape
    from rich.table import Table

    out = console()
    about = (
        f"{result.data}: {result.n_slides:,} slides, {len(result.classes)} classes, {result.n:,} reported: "
        f"{result.told}. Balanced accuracy, %, with its 95 % interval over patients:"
    )
    out.print(about, markup=False, highlight=False)
    table = Table("model", "pooling")
    for column in ("mean [interval]", "sd over runs", "runs", "epochs"):
        table.add_column(column, justify="right", no_wrap=True)
    for m in result.models:
        low, high = (100 * v for v in m.interval)
        table.add_row(
            escape(m.name),
            m.protocol,
            f"{100 * m.mean:.1f} [{low:.1f}, {high:.1f}]",
            f"{100 * m.sd:.1f}",
            f"{len(m.values)}",
            f"{m.epochs:.0f}",
        )
    out.print(table)
    for caveat in result.caveats:
        out.print(f"note: {caveat}", markup=False, highlight=False)
