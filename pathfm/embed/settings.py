"""What to embed, with what, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from pathfm.embeddings.info import Pooling, Storage
from pathfm.models.naming import WEIGHTS_HELP
from pathfm.runtime import PathfmError, Precision
from pathfm.tracking import TrackingConfig


class SlideOptions(BaseModel, frozen=True, extra="forbid"):
    """Which patches of a slide are embedded; for a corpus as data."""

    size_px: int | None = Field(
        None, ge=16, le=4096, description="side read, px at mpp; unset: input_px, nothing resized"
    )
    overlap_px: float = Field(0.0, ge=0, description="how far neighbours on the grid overlap, px")
    min_foreground: float = Field(
        0.4, ge=0, le=1, description="share of a patch that must be tissue; 0: the whole slide"
    )
    patches_per_slide: int | None = Field(
        None, ge=1, description="so many of the grid's patches drawn by seed; unset: all"
    )
    max_failed_fraction: float = Field(
        0.05, ge=0, le=1, description="share of patches, and of slides, that may be unreadable"
    )


class EmbedConfig(BaseModel, frozen=True, extra="forbid"):
    """What to embed, with what."""

    data: Path = Field(
        description="labelled folder (DATA/<class>/*.png|jpg|tif, or DATA/train|val|test/<class>/...), "
        "a .csv, a public data set as NAME=FOLDER, or a corpus: its slides"
    )
    weights: str = Field(description=WEIGHTS_HELP)
    backbone: str = Field(
        "vit_tiny_patch16_224", description="timm name, for weights that do not know theirs"
    )
    name: str = Field(
        "backbone",
        pattern=r"^[\w.-]{1,64}$",
        description="what tables call these features; also the file's name",
    )
    out: Path = Field(Path("embeddings"), description="folder the features are written to")
    store: Path | None = Field(
        None,
        description="folder of features by key, shared by whoever names it; unset: OUT/store",
    )
    input_px: int = Field(224, ge=16, le=2048, description="side of the input, px")
    pooling: Pooling = Field(
        "cls",
        description="cls (token or the architecture's pooling), mean of patch tokens, or both",
    )
    mpp: float | None = Field(
        None,
        gt=0,
        le=100,
        description="µm/px of the input. Pictures: brought to it and cropped; unset: their shorter "
        "side becomes input_px. A corpus needs it",
    )
    data_mpp: float | None = Field(
        None, gt=0, le=100, description="µm/px of the pictures, where the data does not say it"
    )
    mean: tuple[float, ...] | None = Field(
        None, description="of each channel on 0..1; unset: the model's own"
    )
    std: tuple[float, ...] | None = Field(
        None, description="of each channel on 0..1; unset: the model's own"
    )
    per_class: int | None = Field(
        None, ge=2, description="at most so many pictures of each class; unset: all"
    )
    seed: int = Field(
        0, ge=0, lt=2**64, description="chooses where per_class or patches_per_slide is set"
    )
    storage: Storage = Field("fp32", description="numbers on disk: fp32, or bf16 in half the space")
    batch_size: int = Field(32, ge=1, le=4096, description="pictures in one forward pass")
    threads: int = Field(2, ge=1, le=256, description="threads that decode and resize")
    device: str = Field("auto", description="auto, cpu or cuda:N")
    precision: Precision = Field(
        "auto",
        description="bf16, fp32, or auto: bf16 where the processor has it and it changes no "
        "feature's direction (cosine to fp32 at least 0.999 on the first batch)",
    )
    slides: SlideOptions = Field(SlideOptions(), description="which patches of a corpus's slides")
    tracking: TrackingConfig = Field(TrackingConfig(), description="where the run is recorded")

    @property
    def store_folder(self) -> Path:
        """Where features lie by key."""
        return self.store or self.out / "store"

    @property
    def own_tracking(self) -> TrackingConfig:
        """The tracking with its store and run name filled in."""
        return self.tracking.filled(self.out, f"embed {self.name}")


@dataclass(frozen=True)
class EmbedResult:
    """Where the features are, and whether they were there already.

    path: the file, or for a corpus the folder of bags. pictures_per_s: of this process, 0 where
    nothing was left to do. rankme: nan for a corpus.
    """

    path: Path
    skipped: bool
    pictures_per_s: float
    rankme: float
    exit_code: int = 0


def refuse_without_effect(config: EmbedConfig, of_slides: bool, knows_backbone: bool) -> None:
    """PathfmError for a setting that would change nothing."""
    fields: dict[str, Any] = type(config).model_fields
    idle: dict[str, str] = {}
    if knows_backbone:
        idle["backbone"] = f"weights {config.weights!r} name their architecture"
    if of_slides:
        why = f"{config.data} is a corpus"
        idle |= dict.fromkeys(("per_class", "data_mpp"), why)
        idle["storage"] = f"{why}, whose bags are float32 for the tools that read them"
    else:
        idle["slides"] = f"{config.data} is no corpus"
    for name, why in idle.items():
        if getattr(config, name) != fields[name].default:
            raise PathfmError(
                f"{name} = {getattr(config, name)!r} has no effect: {why}. Leave it out"
            )
