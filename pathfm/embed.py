"""Verb `embed`: a backbone and a labelled folder -> frozen features, written once.

Pictures are resized so that the shorter side is `input_px` (bilinear, antialiased), cropped in the
centre and normalised with the backbone's own mean and standard deviation, as eva does; the feature
is the CLS token. Decoding and resizing happen in threads while the backbone works.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field

from pathfm.datasets import LabelledFolder, scan_folder
from pathfm.datasets.folder import read_picture
from pathfm.embeddings import Embeddings, EmbeddingsInfo, stored_key
from pathfm.metrics import rankme
from pathfm.runtime import (
    PathfmError,
    Precision,
    as_dict,
    autocast,
    make_folder,
    pick_device,
    pick_dtype,
    progress,
    provenance,
)
from pathfm.tracking import TrackingConfig, open_run

if TYPE_CHECKING:
    import torch

    from pathfm.backbone import Backbone

_AHEAD = 3  # batches decoded before the backbone asks for them: bounds the pictures in memory


class EmbedConfig(BaseModel, frozen=True, extra="forbid"):
    """What to embed, with what."""

    data: Path = Field(description="labelled folder: DATA/<class>/*.png|jpg|tif")
    weights: str = Field(
        description="random[:SEED] | imagenet | a .safetensors file | a pretrain run's folder"
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
    batch_size: int = Field(64, ge=1, le=4096, description="pictures in one forward pass")
    threads: int = Field(2, ge=1, le=256, description="threads that decode and resize")
    device: str = Field("auto", description="auto, cpu or cuda:N")
    precision: Precision = Field("auto", description="auto (bf16 on a GPU, else fp32), bf16, fp32")
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
    backbone = load_backbone(config.backbone, config.weights, img_size=config.input_px)
    info = EmbeddingsInfo(
        name=config.name,
        backbone=backbone.name,
        backbone_digest=backbone.digest,
        weights_note=backbone.weights_note,
        data=config.data.name,
        data_digest=folder.digest,
        input_px=config.input_px,
        precision=str(pick_dtype(device, config.precision)).removeprefix("torch."),
    )
    if stored_key(path) == info.key:
        found = Embeddings.load(path)
        if found.info.name == config.name:
            print(f"embed {config.name}: {path} is up to date ({len(found.features):,} pictures)")
            return EmbedResult(path, True, 0.0, rankme(found.features))
    return _embed(config, folder, backbone, device, info, path)


def _embed(
    config: EmbedConfig,
    folder: LabelledFolder,
    backbone: Backbone,
    device: torch.device,
    info: EmbeddingsInfo,
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
        features = compute_features(config, folder, backbone, device)
        rate = len(folder) / (time.monotonic() - began_s)
        rank = rankme(features)
        classes, paths, groups = folder.classes, folder.paths, folder.groups
        Embeddings(features, folder.labels, classes, paths, groups, info).save(path)
        tracked.summary(pictures_per_s=rate, rankme=rank, pictures=len(folder))
        tracked.tag("embeddings.key", info.key)
    print(
        f"embed {config.name}: {len(folder):,} pictures at {config.input_px} px -> {path}, "
        f"{rate:.1f} pictures/s, RankMe {rank:.1f} of {features.shape[1]}"
    )
    return EmbedResult(path, False, rate, rank)


def compute_features(
    config: EmbedConfig, folder: LabelledFolder, backbone: Backbone, device: torch.device
) -> NDArray[np.float32]:
    """CLS features of every picture, float32 (n, d), in the folder's order."""
    import torch

    backbone = backbone.to(device).eval()
    mean = torch.as_tensor(backbone.mean, device=device).view(1, 3, 1, 1)
    std = torch.as_tensor(backbone.std, device=device).view(1, 3, 1, 1)
    parts: list[NDArray[np.float32]] = []
    files = [folder.root / path for path in folder.paths]
    with torch.inference_mode(), progress(len(files), "pictures", f"embed {config.name}") as bar:
        for pixels in read_batches(files, config.input_px, config.batch_size, config.threads):
            x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div_(255.0)
            with autocast(device, config.precision):
                y = backbone.embed((x - mean) / std)
            parts.append(y.float().cpu().numpy())
            bar.advance(len(pixels))
    return np.concatenate(parts)


def read_batches(
    files: Sequence[Path], size_px: int, batch_size: int, threads: int
) -> Iterator[NDArray[np.uint8]]:
    """The pictures as uint8 (b, size, size, 3), in order, a few batches decoded ahead.

    A picture that cannot be read ends the iteration with `PathfmError` naming it.
    """
    chunks = [files[at : at + batch_size] for at in range(0, len(files), batch_size)]
    with ThreadPoolExecutor(threads, "pathfm-decode") as pool:
        waiting: list[list[Future[NDArray[np.uint8]]]] = []

        def submit(chunk: Sequence[Path]) -> None:
            waiting.append([pool.submit(prepare, file, size_px) for file in chunk])

        try:
            for chunk in chunks[:_AHEAD]:
                submit(chunk)
            for i in range(len(chunks)):
                batch = np.stack([future.result() for future in waiting.pop(0)])
                if i + _AHEAD < len(chunks):
                    submit(chunks[i + _AHEAD])
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def prepare(file: Path, size_px: int) -> NDArray[np.uint8]:
    """One picture, shorter side resized to `size_px`, centre-cropped: uint8 (size, size, 3)."""
    image = read_picture(file)
    width, height = image.size
    short = min(width, height)
    if short == 0:
        raise PathfmError(f"{file}: the picture is empty")
    if short != size_px:
        # torchvision's Resize(int) truncates the longer side; eva's protocol uses it
        size = (size_px * width // short, size_px * height // short)
        image = image.resize(size, Image.Resampling.BILINEAR)  # PIL antialiases when shrinking
    left, top = round((image.width - size_px) / 2), round((image.height - size_px) / 2)
    return np.asarray(image.crop((left, top, left + size_px, top + size_px)))
