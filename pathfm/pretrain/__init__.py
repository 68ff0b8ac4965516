"""`pathfm pretrain`: corpus -> a self-supervised backbone, with checkpoints that resume.

    settings.py        the parts of the settings below
    loop.py            train() and train_step(): the story
    sampler.py         what is drawn from a corpus
    feed.py            batches of patches, with labels where there are any
    trainer.py         what a run carries from step to step: built and saved
    resuming.py        going on where a run was stopped
    micro.py           micro-batches, their views made when they are worked on
    optim.py           parameter groups and schedules
    parallel.py        one method on several ranks: DDP, FSDP2, compiled blocks; batchnorm.py
    stopping.py        signals, and a gradient that is not finite
    records.py         sampled.jsonl, failures.jsonl, metrics, the bar: what a run leaves behind
    seen.py            what the backbone has seen, in a file that stays with it
    watching.py        probe, RankMe, collapse, pictures on the way
    bookends.py        after the last step: summary.json and the backbone
    dry_run.py         what a run would read and cost, of forecast.py's plans

A run folder: config.yaml, metrics.jsonl, sampled.jsonl, seen.jsonl, failures.jsonl, checkpoints/,
backbone/ (with pretrained_on.json), pictures/, summary.json. The same command goes on where a run was
stopped or killed, on any number of ranks; bit for bit on a CPU with the same number.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from pathfm.labels import LabelsConfig
from pathfm.methods.settings import (
    DinoSettings,
    Dinov2Settings,
    SimclrSettings,
    SupconSettings,
    SupervisedSettings,
)
from pathfm.pretrain.settings import (
    MULTI_CROP,
    EstimateConfig,
    FirstGlobalView,
    OptimConfig,
    ReadingConfig,
    SecondGlobalView,
    ViewsConfig,
    views_of,
)
from pathfm.pretrain.watch_settings import WatchConfig
from pathfm.runtime import Precision
from pathfm.tracking import TrackingConfig

__all__ = [
    "EstimateConfig",
    "FirstGlobalView",
    "OptimConfig",
    "PretrainConfig",
    "PretrainResult",
    "ReadingConfig",
    "SecondGlobalView",
    "ViewsConfig",
    "run",
]


class PretrainConfig(BaseModel, frozen=True, extra="forbid"):
    """What to train, on what, for how long."""

    corpus: Path = Field(Path("corpus"), description="folder that index and foreground made")
    out: Path = Field(Path("runs/pretrain"), description="run folder; an unfinished run goes on")
    method: Literal["dino", "dinov2", "simclr", "supcon", "supervised"] = Field(
        "dino", description="objective; supcon and supervised learn from labels"
    )
    backbone: str = Field(
        "vit_small_patch16_224", min_length=1, description="timm name of a ViT or a ConvNet"
    )
    weights: str = Field(
        "imagenet",
        min_length=1,
        description="imagenet or dinov2 (timm's downloads) | a .safetensors file | a run's folder | "
        "random[:SEED]",
    )
    input_px: int | None = Field(
        None,
        ge=16,
        le=2048,
        description="side that the position embedding is resampled to at the start, px; unset: as the "
        "weights have it, 224 for architectures made for larger inputs",
    )
    drop_path: float = Field(
        0.0, ge=0, lt=1, description="stochastic depth: rate at the last block, a line from 0"
    )
    labels: LabelsConfig = Field(
        LabelsConfig(), description="labels of patches, and batches balanced by them"
    )
    patch_px: int = Field(256, ge=16, le=4096, description="side of the patches read, px")
    mpp: tuple[float, ...] = Field(
        (0.25, 0.5, 1.0, 2.0), min_length=1, description="magnifications drawn from, µm/px"
    )
    mpp_law: Literal["uniform", "log", "max-avg", "min-max"] | None = Field(
        None,
        description="every µm/px between the finest and the coarsest of mpp may be drawn, by this law "
        "(docs/sampling.md); unset: those of mpp alone, each as often",
    )
    slide_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="share of the slides that are drawn from, chosen by the seed: for studies; unset: all",
    )
    patches_per_slide: int | None = Field(
        None,
        ge=1,
        description="distinct patches that a slide may ever yield: for studies; unset: no end of them",
    )
    min_foreground: float = Field(
        0.4, ge=0, le=1, description="smallest share of tissue in a patch"
    )
    batch_size: int = Field(
        256, ge=1, le=65536, description="patches in an optimizer step, of all ranks together"
    )
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="patches a rank works on at a time, gradients being added up; unset: all its own",
    )
    steps: int = Field(10_000, ge=1, description="optimizer steps of the whole run")
    optim: OptimConfig = Field(OptimConfig(), description="optimizer")
    dino: DinoSettings = Field(DinoSettings(), description="method dino")
    dinov2: Dinov2Settings = Field(Dinov2Settings(), description="method dinov2")
    simclr: SimclrSettings = Field(SimclrSettings(), description="method simclr")
    supcon: SupconSettings = Field(SupconSettings(), description="method supcon")
    supervised: SupervisedSettings = Field(SupervisedSettings(), description="method supervised")
    views: ViewsConfig = Field(ViewsConfig(), description="augmentation; defaults by method")
    seed: int = Field(
        0, ge=0, lt=2**64, description="patches, views and new weights follow from it"
    )
    loader: ReadingConfig = Field(ReadingConfig(), description="reading")
    device: str = Field(
        "auto", description="auto, cpu or cuda:N; under torchrun each takes its own"
    )
    precision: Precision = Field(
        "auto", description="of forward passes: bf16, fp32, or auto: bf16 where the hardware has it"
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="on several ranks: whole weights on each, or shards of them (1 B parameters)",
    )
    compile: bool = Field(
        False, description="compile each block of the backbone, on a GPU the views too (minutes)"
    )
    checkpoint_every_steps: int = Field(
        500, ge=1, description="optimizer steps between checkpoints"
    )
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that are kept")
    stop_after_steps: int | None = Field(
        None, ge=1, description="stop cleanly once this many steps are done, to go on another time"
    )
    monitor_patches: int = Field(
        512, ge=8, le=8192, description="first draws, embedded again and again for RankMe"
    )
    watch: WatchConfig = Field(WatchConfig(), description="what is measured and drawn on the way")
    max_sampled_rows: int = Field(
        1_000_000,
        ge=0,
        description="rows of sampled.jsonl; later draws follow from the seed anyway",
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="where the run is recorded")
    dry_run: bool = Field(
        False,
        exclude=True,  # of no run, so in no run's config
        description="train nothing, write nothing: print requests, bytes, patches by µm/px and slide, "
        "hours and egress",
    )
    estimate: EstimateConfig = Field(EstimateConfig(), exclude=True, description="of --dry-run")

    @model_validator(mode="before")
    @classmethod
    def _views_of_the_method(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not isinstance(given.get("views", {}), Mapping):
            return given
        return {
            **given,
            "views": views_of(str(given.get("method", "dino")), given.get("views", {})),
        }

    @field_validator("mpp")
    @classmethod
    def _sane_mpp(cls, mpp: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.05 <= value <= 8 for value in mpp):
            raise ValueError("every magnification must lie within 0.05 to 8 µm/px")
        return mpp

    @model_validator(mode="after")
    def _goes_together(self) -> PretrainConfig:
        optim, views = self.optim, self.views
        if optim.warmup_steps > self.steps:
            raise ValueError(
                f"optim.warmup_steps {optim.warmup_steps} exceeds steps {self.steps}: set it to {self.steps} at most"
            )
        if optim.min_lr > optim.lr:
            raise ValueError(f"optim.min_lr {optim.min_lr} exceeds optim.lr {optim.lr}")
        if self.method not in MULTI_CROP and views.n_local:
            raise ValueError(
                f"views.n_local {views.n_local}: method {self.method} takes no local crops, give 0"
            )
        wanted = 1 if self.method == "supervised" else 2
        if views.n_global != wanted:
            raise ValueError(
                f"views.n_global {views.n_global}: method {self.method} takes {wanted}"
            )
        self._draws_are_of_slides()
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} exceeds batch_size {self.batch_size}"
            )
        spreads = self.method == "dinov2" and self.dinov2.regulariser_weight > 0
        if self.batch_size < 2 and (self.method in ("simclr", "supcon") or spreads):
            which = f"the {self.dinov2.regulariser} term of dinov2" if spreads else self.method
            raise ValueError(
                f"batch_size {self.batch_size}: {which} compares patches of a batch, and alone teaches "
                "nothing: give at least 2"
            )
        return self

    def _draws_are_of_slides(self) -> None:
        """ValueError where what is drawn is limited in a way that its sampler does not know."""
        limits = [n for n in ("slide_share", "patches_per_slide") if getattr(self, n) is not None]
        if self.labels.source == "patches" and self.mpp_law is not None:
            limits.append("mpp_law")
        if limits and self.labels.source is not None:
            raise ValueError(
                f"{limits[0]} is of slides without labels, and labels.{self.labels.source} is given: leave one out"
            )
        if self.mpp_law is not None and len(set(self.mpp)) < 2:
            raise ValueError(
                f"mpp_law {self.mpp_law} draws between two µm/px, mpp has one: {self.mpp[0]:g}"
            )


@dataclass(frozen=True)
class PretrainResult:
    """Where the run is and how far it came; `finished` is False when it was told to stop.

    exit_code: 0, or 128 + the number of the signal that stopped it (143 SIGTERM, 138 SIGUSR1, 130 Ctrl-C): what
    launchers take for "start me again".
    """

    folder: Path
    steps: int
    finished: bool
    exit_code: int = 0


def run(config: PretrainConfig) -> PretrainResult:
    """Trains to the end, or goes on from the newest valid checkpoint in `config.out`.

    With `dry_run` it only prints what that would read. Raises PathfmError, or a PatchingError of the slides' side.
    """
    if config.dry_run:
        from pathfm.pretrain.dry_run import show

        show(config)
        return PretrainResult(config.out, 0, finished=False)
    from pathfm.pretrain.loop import train

    there = config.out.exists()
    try:
        return train(config)
    finally:
        if not there:  # a run that could not begin leaves no folder; only an empty one goes
            with suppress(OSError):
                config.out.rmdir()
