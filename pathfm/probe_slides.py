"""Verb `probe-slides`: bags of frozen patch features + slide labels -> ABMIL and mean pooling, n runs.

Reads the HDF5 that `pathfm embed` (or CLAM, or TRIDENT) writes. Writes `<out>/slide_probe.json`,
`<out>/<model>.<pooling>.results.json` with kaiko-eva's keys, and the predictions of every run.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from online_patching.stores.local import atomic_write_bytes
from pathfm.heads.recording import file_name, key_of, once, stem_of
from pathfm.heads.result import HeadPaired, HeadResult, HeadScores, write_eva_results
from pathfm.heads.telling import show as tell
from pathfm.runtime import PathfmError, pick_device, progress
from pathfm.tracking import TrackingConfig

if TYPE_CHECKING:  # torch and h5py are imported when there is work, not for --help
    from pathfm.slide_probe import Bags
    from pathfm.slide_probe.fit import Pooling, SlideProtocol
    from pathfm.slide_probe.runs import SlideScores

RESULT = "slide_probe.json"
METRIC = "balanced_accuracy"
EVA_RESULTS, PREDICTIONS = ".results.json", ".predictions.npz"
_FORMAT = "pathfm.slide_probe.2"


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
    seed: int = Field(0, ge=0, lt=1 << 64, description="key of all folds, heads and batches")
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


def run(config: ProbeSlidesConfig) -> HeadResult:
    """Probes every folder of bags under every pooling; a rerun with nothing new prints what is there."""
    from pathfm.slide_probe.bags import same_slides

    names = [_name(folder) for folder in config.bags]
    if len({file_name(name) for name in names}) < len(names):
        raise PathfmError(f"two folders of bags have one name ({', '.join(names)}): rename one")
    found = [_open(folder, config.labels) for folder in config.bags]
    same_slides(found, names)
    if config.n_folds is None and not found[0].splits:
        raise PathfmError(f"{config.labels} has no splits: add a column split, or give --n_folds 5")
    notes = _leaks(config, names, found)
    key = _key(config, found, notes)
    data = config.labels, _digest(found[0])

    def measure() -> HeadResult:
        return _probe(config, key, names, found, notes)

    beside = (EVA_RESULTS, PREDICTIONS)
    return once("probe-slides", config, RESULT, key, data, measure, show, beside)


def _leaks(config: ProbeSlidesConfig, names: Sequence[str], found: Sequence[Bags]) -> list[str]:
    """What must be said of reported slides that a backbone had seen; refuses them where that is asked for."""
    from pathfm.leakage import mark_of_bags
    from pathfm.probing.parts import Parts

    slides = found[0].slides
    if config.n_folds is None:
        slides = tuple(slides[i] for i in Parts.of_names(found[0].splits).reported)
    pairs = zip(names, config.bags, strict=True)
    lines = [mark_of_bags(name, folder, slides, config.leaks) for name, folder in pairs]
    return [line for line in lines if line]


def _probe(
    config: ProbeSlidesConfig,
    key: str,
    names: Sequence[str],
    found: Sequence[Bags],
    notes: Sequence[str],
) -> HeadResult:
    from pathfm.slide_probe.runs import probe_bags

    device = str(pick_device(config.device))
    fits = len(names) * len(config.poolings) * config.n_runs * (config.n_folds or 1)
    models: list[HeadScores] = []
    caveats: dict[str, list[str]] = {}
    paired: list[HeadPaired] = []
    first: dict[str, SlideScores] = {}
    with progress(fits, "fits", "probe-slides") as bar:
        for name, bags in zip(names, found, strict=True):
            loaded = bags.loaded(int(config.memory_gib * 2**30), config.most_patches)
            for pooling in config.poolings:
                protocol = _protocol(config, pooling)
                scores = probe_bags(
                    loaded,
                    protocol,
                    config.n_runs,
                    config.n_folds,
                    config.seed,
                    device,
                    bar.advance,
                )
                models.append(_model(name, protocol, bags, scores))
                for caveat in scores.interval.caveats:
                    caveats.setdefault(caveat, []).append(f"{name}, {pooling}")
                _write_files(config, stem_of(name, pooling), bags, scores)
                if pooling in first:
                    paired.append(_paired((names[0], name), pooling, first[pooling], scores))
                first.setdefault(pooling, scores)
    scores = first[config.poolings[0]]
    every = len(models)
    said = [c if len(of) == every else f"{'; '.join(of)}: {c}" for c, of in caveats.items()]
    if not any(found[0].patients):
        said.append("No patients are known: each slide counts as a patient of its own.")
    return HeadResult(
        key=key,
        data=config.labels,
        data_digest=_digest(found[0]),
        n=scores.n,
        n_slides=len(found[0]),
        classes=list(found[0].classes),
        told=scores.told,
        metric=METRIC,
        models=models,
        paired=paired,
        caveats=[*said, *notes],
    )


def _paired(names: tuple[str, str], pooling: str, a: SlideScores, b: SlideScores) -> HeadPaired:
    from pathfm.uncertainty import compare

    found = compare(a.predictions, b.predictions)
    between = [found.interval.low, found.interval.high]
    return HeadPaired(*names, pooling, found.interval.estimate, between, found.p_swap)


def _protocol(config: ProbeSlidesConfig, pooling: Pooling) -> SlideProtocol:
    from pathfm.slide_probe.fit import SlideProtocol

    return SlideProtocol(
        pooling=pooling,
        lr=config.lr,
        batch=config.batch_slides,
        max_epochs=config.max_epochs,
        patience_epochs=config.patience_epochs,
    )


def _model(name: str, protocol: SlideProtocol, bags: Bags, scores: SlideScores) -> HeadScores:
    from pathfm.slide_probe.fit import make_head

    head = make_head(protocol, bags.dim, len(bags.classes), 0, 0)
    return HeadScores.of(
        name,
        protocol.pooling,
        scores.values,
        scores.val,
        scores.interval,
        "patients" if any(bags.patients) else "slides",
        scores.epochs,
        backbone_digest=bags.encoder_digest,
        dim=bags.dim,
        parameters=sum(p.numel() for p in head.parameters()),
        per_class=dict(zip(bags.classes, scores.recall, strict=True)),
    )


def _write_files(config: ProbeSlidesConfig, stem: str, bags: Bags, scores: SlideScores) -> None:
    """eva's results.json of one model, and (runs, n) predictions with truth, slides and patients."""
    import numpy as np

    metric = "BinaryBalancedAccuracy" if len(bags.classes) == 2 else "MulticlassAccuracy"
    test = () if scores.told.startswith("val") else scores.values
    write_eva_results(config.out / f"{stem}{EVA_RESULTS}", metric, scores.val, test)
    held = io.BytesIO()
    np.savez_compressed(
        held,
        truth=bags.labels,
        predicted=scores.predicted,
        slides=np.array(bags.slides),
        patients=np.array(bags.groups),
    )
    atomic_write_bytes(config.out / f"{stem}{PREDICTIONS}", held.getvalue())


def _open(folder: Path, labels: str) -> Bags:
    from pathfm.slide_probe.table import bags_of_samples, read_bags

    if labels.endswith(".csv"):
        return read_bags(folder, Path(labels))
    from pathfm.datasets import open_dataset

    data = open_dataset(labels)
    if data.facts.task != "slide":
        raise PathfmError(f"{labels}: a {data.facts.task} data set; slides are wanted, or a CSV")
    slides = [data.slide(i).rsplit("/", 1)[-1].split(".")[0] for i in range(len(data))]
    # groups that are all different are the slides themselves: whose they are is not known
    patients = data.groups if len({*data.groups}) < len(data) else [""] * len(data)
    return bags_of_samples(folder, labels, slides, data.labels, data.classes, patients, data.splits)


def _name(folder: Path) -> str:
    path = folder.resolve()
    return path.parent.name if path.name == "h5_files" else path.name


def _digest(bags: Bags) -> str:
    """Of the slides, labels, patients and splits."""
    rows = [bags.slides, bags.labels.tolist(), bags.classes, bags.patients, bags.splits]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _key(config: ProbeSlidesConfig, found: Sequence[Bags], notes: Sequence[str]) -> str:
    """A digest of everything the result depends on; files by name, size and time of change."""
    from pathfm.embeddings.bags import find_bags

    options = config.model_dump(
        mode="json", exclude={"bags", "out", "tracking", "device", "memory_gib"}
    )
    files = []
    for folder in config.bags:
        stats = [(slide, file.stat()) for slide, file in find_bags(folder).items()]
        files.append([_name(folder), [[s, of.st_size, of.st_mtime_ns] for s, of in stats]])
    return key_of(_FORMAT, options, files, _digest(found[0]), list(notes))


def show(result: HeadResult) -> None:
    """Prints the table and the caveats."""
    judged = f"{result.n_slides:,} slides, {len(result.classes)} classes, {result.n:,} reported"
    tell(result, judged, "Balanced accuracy and recall of each class")
