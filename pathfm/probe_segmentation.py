"""Verb `probe-segmentation`: a frozen model's patch tokens + class masks -> heads, mean Dice, n runs.

Reads a segmentation data set, writes `<out>/segmentation_probe.json` and `<out>/<model>.<head>.results.json`
with kaiko-eva's keys. Pictures and masks are cut and resized as eva does; tokens are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field

from pathfm.heads.recording import file_name, key_of, once, stem_of
from pathfm.heads.result import HeadPaired, HeadResult, HeadScores, write_eva_results
from pathfm.heads.telling import show as tell
from pathfm.models.naming import WEIGHTS_HELP
from pathfm.runtime import PathfmError, pick_device, progress
from pathfm.tracking import TrackingConfig

if TYPE_CHECKING:  # torch is imported when there is work, not for --help
    import numpy as np
    from numpy.typing import NDArray

    from pathfm.datasets import Benchmark
    from pathfm.models import Embedder
    from pathfm.segmentation_probe.fit import MaskedMaps, SegmentationProtocol
    from pathfm.segmentation_probe.pictures import Pictures
    from pathfm.segmentation_probe.runs import DiceScores

RESULT = "segmentation_probe.json"
METRIC = "mean_dice_without_background"
EVA_METRIC = "MonaiDiceScore"
EVA_RESULTS = ".results.json"
EVA_PATIENCE = {"consep": 200, "monusac": 100}
Head = Literal["conv", "mlp", "linear"]

_DEFAULT_FOLDS = 5
_FORMAT = "pathfm.segmentation_probe.2"


class ProbeSegmentationConfig(BaseModel, frozen=True, extra="forbid"):
    """Which models to probe on which masks; the defaults are kaiko-eva's."""

    data: str = Field(
        description="consep=FOLDER, monusac=FOLDER, or a folder of images/ and masks/ (PNG, a class number "
        "a pixel), perhaps under train, val, test, with classes.csv and groups.csv"
    )
    weights: list[str] = Field(
        min_length=1, description=f"models that give patch tokens, one or several: {WEIGHTS_HELP}"
    )
    backbone: str = Field(
        "vit_tiny_patch16_224", description="timm name, for weights that do not know theirs"
    )
    names: list[str] = Field(
        [], description="what tables call each of the weights; unset: as the weights are written"
    )
    out: Path = Field(Path("segmentation_probe"), description="folder for the results")
    heads: tuple[Head, ...] = Field(
        ("conv", "mlp", "linear"),
        min_length=1,
        description="conv (eva's), mlp (SegFormer's decoder), linear (one layer a token)",
    )
    input_px: int = Field(224, ge=16, le=2048, description="side of the input, px")
    tile_px: int | None = Field(
        None,
        ge=0,
        description="side pictures are cut into first, px; 0: whole; unset: the data's own",
    )
    last_blocks: int = Field(
        1, ge=1, le=64, description="blocks whose tokens are used, from the last"
    )
    norm: bool = Field(False, description="the backbone's last norm after its tokens; eva has none")
    mean: tuple[float, ...] | None = Field(
        None, description="of each channel on 0..1, for every model; unset: the model's own"
    )
    std: tuple[float, ...] | None = Field(
        None, description="of each channel on 0..1, for every model; unset: the model's own"
    )
    n_runs: int = Field(5, ge=1, le=1000, description="runs, each with its own head and batches")
    n_folds: int | None = Field(
        None,
        ge=3,
        le=100,
        description="folds by patient; unset: the data's own splits, or 5 folds where it has none",
    )
    seed: int = Field(0, ge=0, lt=1 << 64, description="key of all folds, heads and batches")
    lr: float = Field(2e-3, gt=0, le=10, description="AdamW's rate; a third of it for five epochs")
    batch: int = Field(64, ge=1, le=4096, description="pictures a step")
    steps: int = Field(2000, ge=1, le=10_000_000, description="steps at most")
    patience_epochs: int | None = Field(
        None,
        ge=1,
        description="epochs without a better validation score; unset: eva's for the data",
    )
    eva_ignore: bool = Field(
        True,
        description="what is predicted on ignored pixels counts as wrong, as in eva; false: not at all",
    )
    partial: bool = Field(False, description="take a copy whose counts are not the published ones")
    leaks: Literal["refuse", "mark"] = Field(
        "refuse",
        description="reported pictures that a model has seen in pretraining: refuse, or mark the table",
    )
    embed_batch: int = Field(32, ge=1, le=4096, description="pictures in one forward pass")
    device: str = Field("auto", description="auto, cpu or cuda:N")
    tracking: TrackingConfig = Field(TrackingConfig(), description="where the run is recorded")


def run(config: ProbeSegmentationConfig) -> HeadResult:
    """Fits every head on every model; a rerun with nothing new prints what is there."""
    from pathfm.datasets import open_dataset
    from pathfm.segmentation_probe.pictures import read_pictures

    names = list(config.names) or list(config.weights)
    files = {file_name(name) for name in names}
    if len(names) != len(config.weights) or len(files) < len(names):
        raise PathfmError(
            f"{len(config.weights)} weights and names {names}: give each one of its own"
        )
    data = open_dataset(config.data, partial=config.partial)
    if data.facts.task != "segmentation":
        raise PathfmError(f"{config.data}: a {data.facts.task} data set, it has no masks")
    models = [_model(config, weights) for weights in config.weights]
    n_folds = config.n_folds or (None if any(data.splits) else _DEFAULT_FOLDS)
    tile_px = data.facts.tile_px if config.tile_px is None else config.tile_px
    pictures = read_pictures(data, config.input_px, tile_px)
    notes = _leaks(config, names, data, pictures, n_folds)
    key = _key(config, data, models, notes)

    def measure() -> HeadResult:
        return _probe(config, key, data, pictures, names, models, n_folds, notes)

    return once("probe-segmentation", config, RESULT, key, (data.name, data.digest), measure, show)


def _model(config: ProbeSegmentationConfig, weights: str) -> Embedder:
    from pathfm.models import load_model
    from pathfm.models.maps import check_maps

    model = load_model(weights, config.backbone, config.input_px, config.mean, config.std)
    check_maps(model, config.last_blocks)
    return model


def _leaks(
    config: ProbeSegmentationConfig,
    names: Sequence[str],
    data: Benchmark,
    pictures: Pictures,
    n_folds: int | None,
) -> list[str]:
    """What must be said of pictures that a model had seen; refuses those that are reported."""
    from pathfm.leakage import refuse_or_mark, salt_at_hand, seen_by
    from pathfm.probing.parts import Parts
    from pathfm.segmentation_probe.leaks import leaks_of

    reported = None if n_folds else Parts.of_names(pictures.splits).reported
    ids, found = salt_at_hand(config.out), []
    for name, weights in zip(names, config.weights, strict=True):
        leaks = leaks_of(seen_by(weights), data, pictures, ids)
        line = refuse_or_mark(leaks, config.leaks, reported)
        if line:
            found.append(f"{name}: {line}")
    return found


def _probe(
    config: ProbeSegmentationConfig,
    key: str,
    data: Benchmark,
    pictures: Pictures,
    names: Sequence[str],
    models: Sequence[Embedder],
    n_folds: int | None,
    notes: Sequence[str],
) -> HeadResult:
    from pathfm.models.maps import embed_maps
    from pathfm.segmentation_probe.fit import MaskedMaps
    from pathfm.segmentation_probe.runs import probe_maps

    device = pick_device(config.device)
    classes = tuple(c for k, c in enumerate(data.classes) if k not in data.facts.ignored)
    ignore = data.facts.ignored[0] if data.facts.ignored else None
    found: list[HeadScores] = []
    paired: list[HeadPaired] = []
    first: dict[str, DiceScores] = {}
    fits = len(names) * len(config.heads) * config.n_runs * (n_folds or 1)
    with progress(fits, "fits", "probe-segmentation") as bar:
        for name, model in zip(names, models, strict=True):
            batches = _batches(pictures.pixels, config.embed_batch)
            maps = embed_maps(model, batches, device, config.last_blocks, config.norm)
            held = MaskedMaps(maps, pictures.masks, classes, ignore)
            for head in config.heads:
                scores = probe_maps(
                    held,
                    pictures.splits,
                    pictures.groups,
                    _protocol(config, data, head),
                    config.n_runs,
                    n_folds,
                    config.seed,
                    str(device),
                    config.eva_ignore,
                    bar.advance,
                )
                found.append(_scores(config, name, model, head, data, held, scores))
                if head in first:
                    paired.append(_paired((names[0], name), head, first[head], scores, pictures))
                first.setdefault(head, scores)
    scores = first[config.heads[0]]
    return HeadResult(
        key=key,
        data=data.name,
        data_digest=data.digest,
        input_px=config.input_px,
        n=len(scores.rows),
        classes=list(classes),
        told=scores.told,
        metric=METRIC,
        models=found,
        paired=paired,
        caveats=[*_caveats(config, data, names, models, scores), *notes],
    )


def _protocol(config: ProbeSegmentationConfig, data: Benchmark, head: Head) -> SegmentationProtocol:
    from pathfm.segmentation_probe.fit import SegmentationProtocol

    return SegmentationProtocol(
        head=head,
        lr=config.lr,
        batch=config.batch,
        steps=config.steps,
        patience_epochs=config.patience_epochs or EVA_PATIENCE.get(data.name, 200),
    )


def _scores(
    config: ProbeSegmentationConfig,
    name: str,
    model: Embedder,
    head: Head,
    data: Benchmark,
    held: MaskedMaps,
    scores: DiceScores,
) -> HeadScores:
    from pathfm.segmentation_probe.decoders import TokenHead, parameters_of

    test = () if scores.told.startswith("val") else scores.values
    path = config.out / f"{stem_of(name, head)}{EVA_RESULTS}"
    write_eva_results(path, EVA_METRIC, scores.val, test)
    return HeadScores.of(
        name,
        head,
        scores.values,
        scores.val,
        scores.interval,
        _unit(data),
        scores.epochs,
        backbone_digest=model.digest,
        weights_note=model.weights_note,
        dim=sum(held.widths),
        parameters=parameters_of(TokenHead(head, held.widths, len(held.classes))),
        per_class=scores.per_class,
    )


def _paired(
    names: tuple[str, str], head: str, a: DiceScores, b: DiceScores, pictures: Pictures
) -> HeadPaired:
    import numpy as np

    from pathfm.segmentation_probe.runs import interval_over

    difference = b.by_picture - a.by_picture
    found = interval_over(difference, [pictures.groups[i] for i in a.rows])
    between = [found.low, found.high] if found else []
    return HeadPaired(*names, head, float(np.nanmean(difference)), between)


def _caveats(
    config: ProbeSegmentationConfig,
    data: Benchmark,
    names: Sequence[str],
    models: Sequence[Embedder],
    scores: DiceScores,
) -> list[str]:
    from pathfm.models.maps import keeps_norm

    found = []
    if not any(data.groups):
        found.append(f"{data.name} does not say whose its pictures are: each counts for itself.")
    if scores.interval is None:
        found.append("No interval: the reported pictures are of one group.")
    else:
        found += scores.interval.caveats
    if data.facts.ignored and config.eva_ignore:
        found.append(
            f"Predictions on {data.classes[data.facts.ignored[0]]!r} pixels count as wrong, as in eva "
            "0.4.5; --eva_ignore false leaves them out."
        )
    normed = [name for name, model in zip(names, models, strict=True) if keeps_norm(model)]
    if normed and not config.norm:
        found.append(f"Tokens of {', '.join(normed)} are as it ends: its last norm is in them.")
    return found


def _unit(data: Benchmark) -> str:
    """What pictures belong to that must not be torn: what the intervals are over."""
    from pathfm.datasets import DATASETS

    if not any(data.groups):
        return "pictures"
    return "patients" if data.name in DATASETS else "groups"


def _batches(pixels: NDArray[np.uint8], size: int) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(pixels), size):
        yield pixels[start : start + size]


def _key(
    config: ProbeSegmentationConfig,
    data: Benchmark,
    models: Sequence[Embedder],
    notes: Sequence[str],
) -> str:
    left_out = {"out", "tracking", "device", "weights", "data"}
    options = config.model_dump(mode="json", exclude=left_out)
    facts = [[model.digest, list(model.mean), list(model.std)] for model in models]
    return key_of(_FORMAT, options, data.digest, facts, list(notes))


def show(result: HeadResult) -> None:
    """Prints the table, the Dice of each class and the caveats."""
    judged = f"{result.n:,} pictures of {result.input_px} px reported"
    tell(result, judged, "Mean Dice without background, and Dice of each class")
