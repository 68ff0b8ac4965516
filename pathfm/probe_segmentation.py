"""Verb `probe-segmentation`: a frozen backbone's patch tokens + class masks -> heads, mean Dice, n runs.

Reads a segmentation data set, writes `<out>/segmentation_probe.json` and `<out>/<model>.<head>.results.json`
with kaiko-eva's keys. Pictures and masks are cut and resized as eva does; tokens are computed once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from online_patching.stores.local import atomic_write_text
from pathfm.runtime import (
    PathfmError,
    as_dict,
    make_folder,
    pick_device,
    progress,
    provenance,
    save_config,
)
from pathfm.segmentation.probe_result import (
    METRIC,
    RESULT,
    SegmentationModel,
    SegmentationResult,
    load_result,
    show,
    write_eva_results,
)
from pathfm.tracking import TrackingConfig, open_run

if TYPE_CHECKING:  # torch is imported when there is work, not for --help
    from pathfm.backbone import Backbone
    from pathfm.datasets import Benchmark
    from pathfm.segmentation.probe_fit import MaskedMaps, SegmentationRun

EVA_PATIENCE = {"consep": 200, "monusac": 100}
Head = Literal["conv", "mlp", "linear"]
Parts = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]

_FORMAT = "pathfm.segmentation_probe.1"


class ProbeSegmentationConfig(BaseModel, frozen=True, extra="forbid"):
    """Which backbone to probe on which masks; the defaults are kaiko-eva's."""

    data: str = Field(description="data set with its folder: consep=FOLDER or monusac=FOLDER")
    weights: list[str] = Field(
        min_length=1,
        description="random[:SEED] | imagenet | dinov2 | a .safetensors file | a pretrain run's folder; "
        "one or several",
    )
    backbone: str = Field("vit_tiny_patch16_224", description="timm name of the backbones")
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
    n_runs: int = Field(5, ge=1, le=1000, description="runs, each with its own head and batches")
    seed: int = Field(0, ge=0, description="key of all heads and batches")
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
    embed_batch: int = Field(32, ge=1, le=4096, description="pictures in one forward pass")
    device: str = Field("auto", description="auto, cpu or cuda:N")
    tracking: TrackingConfig = Field(TrackingConfig(), description="where the run is recorded")


@dataclass(frozen=True, eq=False)
class Pictures:
    """All tiles at the input size with masks, splits, and who must not be on two sides of a split."""

    pixels: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    splits: tuple[str, ...]
    groups: tuple[str, ...]


def run(config: ProbeSegmentationConfig) -> SegmentationResult:
    """Fits every head on every backbone; a rerun with nothing new prints what is there."""
    from pathfm.backbone import load_backbone
    from pathfm.datasets import open_dataset

    names = list(config.names) or list(config.weights)
    if len(names) != len(config.weights) or len({*names}) < len(names):
        raise PathfmError(
            f"{len(config.weights)} weights and names {names}: give each one of its own"
        )
    data = open_dataset(config.data, partial=config.partial)
    if data.facts.task != "segmentation":
        raise PathfmError(f"{config.data}: a {data.facts.task} data set, it has no masks")
    backbones = [load_backbone(config.backbone, weights) for weights in config.weights]
    backbones[0].check_input(config.input_px, "input_px")
    path = config.out / RESULT
    key = _key(config, data, [backbone.digest for backbone in backbones])
    earlier = load_result(path)
    if earlier is not None and earlier.key == key:
        print(f"probe-segmentation: {path} is up to date")
        show(earlier)
        return earlier
    save_config(config, make_folder(config.out), "probe_segmentation.yaml")
    tracking = config.tracking.filled(config.out, "probe-segmentation")
    tags = provenance() | {"stage": "probe-segmentation"}
    with open_run(tracking, config.out, as_dict(config), tags) as tracked:
        tracked.cohort(data.name, data.digest, "evaluation")
        result = _probe(config, key, data, names, backbones)
        atomic_write_text(path, json.dumps(asdict(result), indent=1) + "\n")
        for model in result.models:
            at = f"{_file_name(model.name)}/{model.protocol}"
            tracked.summary(**{f"{at}.mean": model.mean, f"{at}.sd": model.sd})
            for number, value in enumerate(model.values):
                tracked.log(number, **{f"{at}.by_run": value})
        tracked.artifact(path)
    show(result)
    print(f"written: {path}")
    return result


def read_pictures(data: Benchmark, input_px: int, tile_px: int) -> Pictures:
    """Every picture of a segmentation data set cut into tiles, resized with its mask."""
    from pathfm.datasets.preparing import fit
    from pathfm.segmentation.probe_pictures import fit_mask, tiles

    pixels, masks, splits, groups = [], [], [], []
    for i, name in enumerate(data.paths):
        try:
            for part, mask in tiles(data.read(i), data.mask(i), tile_px):
                pixels.append(fit(part, input_px, name))
                masks.append(fit_mask(mask, input_px))
                splits.append(data.splits[i])
                groups.append(data.groups[i] or name)
        except PathfmError as error:
            raise PathfmError(f"{data.name}, {name}: {error}") from None
    return Pictures(np.stack(pixels), np.stack(masks), tuple(splits), tuple(groups))


def _probe(
    config: ProbeSegmentationConfig,
    key: str,
    data: Benchmark,
    names: Sequence[str],
    backbones: Sequence[Backbone],
) -> SegmentationResult:
    from pathfm.segmentation.probe_fit import MaskedMaps
    from pathfm.segmentation.probe_tokens import embed_maps

    device = pick_device(config.device)
    tile_px = data.facts.tile_px if config.tile_px is None else config.tile_px
    pictures = read_pictures(data, config.input_px, tile_px)
    of = np.asarray(pictures.splits)
    parts = tuple(np.flatnonzero(of == name) for name in ("train", "val", "test"))
    assert len(parts) == 3
    _refuse_shared(pictures, parts)
    classes = tuple(c for k, c in enumerate(data.classes) if k not in data.facts.ignored)
    ignore = data.facts.ignored[0] if data.facts.ignored else None
    models = []
    fits = len(names) * len(config.heads) * config.n_runs
    with progress(fits, "fits", "probe-segmentation") as bar:
        for name, backbone in zip(names, backbones, strict=True):
            batches = _batches(pictures.pixels, config.embed_batch)
            maps = embed_maps(backbone, batches, device, config.last_blocks, config.norm)
            held = MaskedMaps(maps, pictures.masks, classes, ignore)
            for head in config.heads:
                runs = _fit(config, data, held, parts, head, bar.advance)
                models.append(_model(config, name, backbone, head, held, pictures, parts, runs))
    reported = parts[2] if len(parts[2]) else parts[1]
    caveats = []
    if not any(data.groups):
        caveats.append(
            f"{data.name} does not say whose its pictures are: each counts as a patient."
        )
    if not models[0].interval:
        caveats.append("No interval: the reported pictures are of one patient.")
    if ignore is not None and config.eva_ignore:
        caveats.append(
            f"Predictions on {data.classes[ignore]!r} pixels count as wrong, as in eva 0.4.5; "
            "--eva_ignore false leaves them out."
        )
    return SegmentationResult(
        key=key,
        data=data.name,
        data_digest=data.digest,
        input_px=config.input_px,
        n=len(reported),
        classes=list(classes),
        told="test (val chose the epoch)" if len(parts[2]) else "val (it chose the epoch too)",
        metric=METRIC,
        models=models,
        caveats=caveats,
    )


def _fit(
    config: ProbeSegmentationConfig,
    data: Benchmark,
    held: MaskedMaps,
    parts: Parts,
    head: Head,
    advance: Callable[[int], object],
) -> list[SegmentationRun]:
    from pathfm.segmentation.probe_fit import SegmentationProtocol, fit_run

    patience = config.patience_epochs or EVA_PATIENCE.get(data.name, 200)
    protocol = SegmentationProtocol(
        head, config.lr, batch=config.batch, steps=config.steps, patience_epochs=patience
    )
    device, runs = pick_device(config.device), []
    for run in range(config.n_runs):
        found = fit_run(
            held,
            *parts,
            protocol,
            seed=config.seed,
            run=run,
            device=device,
            eva_ignore=config.eva_ignore,
        )
        runs.append(found)
        advance(1)
    return runs


def _model(
    config: ProbeSegmentationConfig,
    name: str,
    backbone: Backbone,
    head: Head,
    held: MaskedMaps,
    pictures: Pictures,
    parts: Parts,
    runs: Sequence[SegmentationRun],
) -> SegmentationModel:
    from pathfm.segmentation.probe_heads import TokenHead, parameters_of
    from pathfm.uncertainty import interval_of_mean

    tables = [run.test or run.val for run in runs]
    rows = parts[2] if len(parts[2]) else parts[1]
    values = [table.mean for table in tables]
    by_picture = np.mean([table.pictures for table in tables], axis=0)
    groups = [pictures.groups[i] for i in rows]
    judged = {g for g, value in zip(groups, by_picture, strict=True) if np.isfinite(value)}
    about = interval_of_mean(by_picture, groups) if len(judged) > 1 else None
    each = {c: float(np.mean([t.per_class[c] for t in tables])) for c in held.classes}
    val = [run.val.mean for run in runs]
    test = values if len(parts[2]) else []
    write_eva_results(config.out / f"{_file_name(name)}.{head}.results.json", val, test)
    return SegmentationModel(
        name=name,
        protocol=head,
        backbone_digest=backbone.digest,
        weights_note=backbone.weights_note,
        values=values,
        val=val,
        mean=float(np.mean(values)),
        sd=float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        interval=[about.low, about.high] if about else [],
        interval_of="mean over runs, patients (or pictures) resampled" if about else "",
        per_class={c: None if np.isnan(v) else v for c, v in each.items()},
        parameters=parameters_of(TokenHead(head, held.widths, len(held.classes))),
        epochs=float(np.mean([run.epochs for run in runs])),
    )


def _refuse_shared(pictures: Pictures, parts: Parts) -> None:
    seen: dict[str, int] = {}
    for k, rows in enumerate(parts):
        for group in {pictures.groups[i] for i in rows}:
            if seen.setdefault(group, k) != k:
                raise PathfmError(f"{group} is in two splits: its nuclei would be learnt by heart")


def _batches(pixels: NDArray[np.uint8], size: int) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(pixels), size):
        yield pixels[start : start + size]


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[-100:].lstrip(".") or "_"


def _key(config: ProbeSegmentationConfig, data: Benchmark, digests: Sequence[str]) -> str:
    options = config.model_dump(
        mode="json", exclude={"out", "tracking", "device", "weights", "data"}
    )
    facts = [_FORMAT, options, data.digest, list(digests)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
