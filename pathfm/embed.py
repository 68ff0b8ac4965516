"""Verb `embed`: a backbone and a labelled folder -> frozen features, written once.

Pictures are resized so that the shorter side is `input_px` (bilinear, antialiased), cropped in the
centre and normalised with the backbone's own mean and standard deviation, as eva does; the feature
is the CLS token. Decoding and resizing happen in threads while the backbone works.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from pathfm.datasets import LabelledFolder, scan_folder
from pathfm.datasets.preparing import prepare, read_batches
from pathfm.embeddings import Embeddings, EmbeddingsInfo, stored_key
from pathfm.metrics import rankme
from pathfm.runtime import (
    Precision,
    as_dict,
    autocast,
    make_folder,
    pick_device,
    plan_precision,
    progress,
    provenance,
    save_config,
)
from pathfm.tracking import TrackingConfig, open_run

if TYPE_CHECKING:
    import torch

    from pathfm.backbone import Backbone

# Measured on a Xeon with avx512_bf16, ViT-Ti at 224 px, two threads: 114 pictures/s in bf16, 45 in
# fp32, lowest cosine between the two 0.9998 over 128 patches.
_MIN_COSINE = 0.999

__all__ = [
    "EmbedConfig",
    "EmbedResult",
    "compute_features",
    "lowest_cosine",
    "prepare",
    "read_batches",
    "run",
]


class EmbedConfig(BaseModel, frozen=True, extra="forbid"):
    """What to embed, with what."""

    data: Path = Field(description="labelled folder: DATA/<class>/*.png|jpg|tif")
    weights: str = Field(
        description="random[:SEED] | imagenet | dinov2 | a .safetensors file | a pretrain run's folder"
    )
    backbone: str = Field("vit_tiny_patch16_224", description="timm name of the backbone")
    name: str = Field(
        "backbone",
        pattern=r"^[\w.-]{1,64}$",
        description="what tables call these features; also the file's name",
    )
    out: Path = Field(Path("embeddings"), description="folder the features are written to")
    input_px: int = Field(224, ge=16, le=2048, description="side of the input, px")
    per_class: int | None = Field(
        None, ge=2, description="at most so many pictures of each class; unset: all"
    )
    seed: int = Field(0, ge=0, description="chooses the pictures when per_class is set")
    batch_size: int = Field(32, ge=1, le=4096, description="pictures in one forward pass")
    threads: int = Field(2, ge=1, le=256, description="threads that decode and resize")
    device: str = Field("auto", description="auto, cpu or cuda:N")
    precision: Precision = Field(
        "auto",
        description="bf16, fp32, or auto: bf16 where the processor has it and it changes no "
        "feature's direction (cosine to fp32 at least 0.999 on the first batch)",
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="where the run is recorded")


@dataclass(frozen=True)
class EmbedResult:
    """Where the features are, and whether they were there already."""

    path: Path
    skipped: bool
    pictures_per_s: float
    rankme: float


def run(config: EmbedConfig) -> EmbedResult:
    """Writes `<out>/<name>.safetensors`, unless it holds exactly these features already."""
    from pathfm.backbone import load_backbone

    folder = scan_folder(config.data)
    if config.per_class is not None:
        folder = folder.subset(config.per_class, config.seed)
    path = make_folder(config.out) / f"{config.name}.safetensors"
    device = pick_device(config.device)
    save_config(config, config.out, f"{config.name}.yaml")
    backbone = load_backbone(config.backbone, config.weights, img_size=config.input_px)
    backbone.check_input(config.input_px, "input_px")
    info = EmbeddingsInfo(
        name=config.name,
        backbone=backbone.name,
        backbone_digest=backbone.digest,
        weights_note=backbone.weights_note,
        data=config.data.name,
        data_digest=folder.digest,
        input_px=config.input_px,
    )
    plan = plan_precision(config.precision, device)
    usable = {replace(info, precision=p).key for p in {plan} | _fallback(config)}
    if stored_key(path) in usable:
        found = Embeddings.load(path)
        if found.info.name == config.name:
            print(f"embed {config.name}: {path} is up to date ({len(found.features):,} pictures)")
            return EmbedResult(path, True, 0.0, rankme(found.features))
    return _embed(config, folder, backbone, device, info, plan, path)


def _fallback(config: EmbedConfig) -> set[Precision]:
    """Precisions that "auto" may have ended with."""
    return {"fp32"} if config.precision == "auto" else set()


def _embed(
    config: EmbedConfig,
    folder: LabelledFolder,
    backbone: Backbone,
    device: torch.device,
    info: EmbeddingsInfo,
    plan: Precision,
    path: Path,
) -> EmbedResult:
    tracking = config.tracking.model_copy(
        update={
            "uri": config.tracking.store(config.out),
            "run_name": config.tracking.run_name or f"embed {config.name}",
        }
    )
    record = config.out / "tracking" / config.name
    params = as_dict(config) | {"weights_note": info.weights_note}
    with open_run(tracking, record, params, provenance() | {"stage": "embed"}) as tracked:
        tracked.cohort(info.data, info.data_digest, "evaluation")
        began_s = time.monotonic()
        features, precision = compute_features(config, folder, backbone, device, plan)
        info = replace(info, precision=precision)
        rate = len(folder) / (time.monotonic() - began_s)
        rank = rankme(features)
        classes, paths, groups = folder.classes, folder.paths, folder.groups
        Embeddings(features, folder.labels, classes, paths, groups, info).save(path)
        tracked.summary(pictures_per_s=rate, rankme=rank, pictures=len(folder))
        tracked.tag("embeddings.key", info.key)
    print(
        f"embed {config.name}: {len(folder):,} pictures at {config.input_px} px -> {path}, "
        f"{rate:.1f} pictures/s ({precision}), RankMe {rank:.1f} of {features.shape[1]}"
    )
    return EmbedResult(path, False, rate, rank)


def compute_features(
    config: EmbedConfig,
    folder: LabelledFolder,
    backbone: Backbone,
    device: torch.device,
    precision: Precision,
) -> tuple[NDArray[np.float32], Precision]:
    """CLS features of every picture, float32 (n, d) in the folder's order, and their precision.

    When bf16 was not asked for but planned, the first batch is done both ways and decides.
    """
    import torch

    backbone = backbone.to(device).eval()
    mean = torch.as_tensor(backbone.mean, device=device).view(1, 3, 1, 1)
    std = torch.as_tensor(backbone.std, device=device).view(1, 3, 1, 1)

    def features(pixels: NDArray[np.uint8], precision: Precision) -> NDArray[np.float32]:
        x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div_(255.0)
        with autocast(device, precision):
            y = backbone.embed((x - mean) / std)
        return np.asarray(y.float().cpu().numpy())

    parts: list[NDArray[np.float32]] = []
    files = [folder.root / path for path in folder.paths]
    with torch.inference_mode(), progress(len(files), "pictures", f"embed {config.name}") as bar:
        for pixels in read_batches(files, config.input_px, config.batch_size, config.threads):
            part = features(pixels, precision)
            if not parts and precision == "bf16" and config.precision == "auto":
                exact = features(pixels, "fp32")
                cosine = lowest_cosine(part, exact)
                if not cosine >= _MIN_COSINE:  # also when it is NaN
                    print(f"embed {config.name}: fp32, for bf16 agrees to cosine {cosine:.4f} only")
                    part, precision = exact, "fp32"
            parts.append(part)
            bar.advance(len(pixels))
    return np.concatenate(parts), precision


def lowest_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """The lowest cosine between equal rows of two feature matrices (n, d)."""
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / np.maximum(norms, 1e-12)).min())
