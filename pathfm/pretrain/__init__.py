"""`pathfm pretrain`: corpus -> a self-supervised backbone, with checkpoints that resume.

    settings here      loop.py      train() and train_step(): the story
    records.py         sampled.jsonl, pictures, summary.json: what a run leaves behind
    dry_run.py         what a run would read and cost, of forecast.py's plans

A run folder: config.yaml, metrics.jsonl, sampled.jsonl, checkpoints/, backbone/, pictures/,
summary.json. The same command goes on where a run was stopped or killed; bit for bit on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from pathfm.methods.settings import DinoSettings
from pathfm.runtime import Precision
from pathfm.tracking import TrackingConfig
from pathfm.views import ViewSpec

if TYPE_CHECKING:
    from online_patching import Corpus, PatchSampler

Decay = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FirstGlobalView(ViewSpec, frozen=True, extra="forbid"):
    """DINO's first global crop: always blurred."""

    size_px: int = Field(224, ge=8, le=1024, description="side of the view in pixels")
    scale: tuple[float, float] = Field(
        (0.4, 1.0), description="smallest and largest share of the patch's area that is cropped"
    )
    blur: float = Field(1.0, ge=0, le=1, description="probability of a Gaussian blur")


class SecondGlobalView(FirstGlobalView, frozen=True, extra="forbid"):
    """DINO's second global crop: seldom blurred, sometimes solarised."""

    blur: float = Field(0.1, ge=0, le=1, description="probability of a Gaussian blur")
    solarize: float = Field(
        0.2, ge=0, le=1, description="probability that values >= 0.5 are inverted"
    )


class ViewsConfig(BaseModel, frozen=True, extra="forbid"):
    """The views of each patch: two global crops for teacher and student, local ones beside them."""

    global_1: FirstGlobalView = Field(FirstGlobalView(), description="the first global crop")
    global_2: SecondGlobalView = Field(SecondGlobalView(), description="the second global crop")
    local: ViewSpec = Field(ViewSpec(), description="every local crop")
    n_local: int = Field(8, ge=0, le=64, description="number of local crops")

    @model_validator(mode="after")
    def _globals_go_through_in_one_pass(self) -> ViewsConfig:
        one, two = self.global_1.size_px, self.global_2.size_px
        if one != two:
            raise ValueError(f"global_1.size_px {one} and global_2.size_px {two} must be equal")
        return self

    @property
    def specs(self) -> list[ViewSpec]:
        """One spec a view, the two global ones first."""
        return [self.global_1, self.global_2, *[self.local] * self.n_local]


class OptimConfig(BaseModel, frozen=True, extra="forbid"):
    """AdamW and its schedules, all in optimizer steps."""

    lr: float = Field(5e-4, gt=0, lt=1, description="learning rate after warm-up, not scaled by us")
    min_lr: float = Field(1e-6, ge=0, lt=1, description="learning rate at the last step, a cosine")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps from 0 to lr, a line")
    weight_decay: tuple[Decay, Decay] = Field(
        (0.04, 0.4), description="first and last, along a cosine; not on biases and norms"
    )
    clip_grad_norm: float = Field(3.0, gt=0, description="largest norm of the whole gradient")


class ReadingConfig(BaseModel, frozen=True, extra="forbid"):
    """How patches are read; none of it changes which."""

    workers: int = Field(0, ge=0, le=256, description="loader processes; 0: threads in this one")
    threads: int = Field(2, ge=1, le=256, description="decode threads of each process")
    prefetch: int | None = Field(
        None,
        ge=1,
        le=64,
        description="batches read ahead; unset: 2, or what a network's latency needs",
    )


class EstimateConfig(BaseModel, frozen=True, extra="forbid"):
    """What `--dry-run` counts, and what time and money are reckoned with."""

    draws: int = Field(
        16_384, ge=1, le=2**22, description="first draws of the run that are planned, at most"
    )
    time_patches: int = Field(
        256, ge=0, le=65_536, description="patches that are really read to time it; 0: none are"
    )
    patches_per_s: float | None = Field(
        None, gt=0, description="rate at which training takes patches, where it is known"
    )
    price_per_gb: float = Field(0, ge=0, description="price of a GB (10^9 bytes) read remotely")
    price_per_1000_gets: float = Field(0, ge=0, description="price of 1,000 remote requests")


class PretrainConfig(BaseModel, frozen=True, extra="forbid"):
    """What to train, on what, for how long."""

    corpus: Path = Field(Path("corpus"), description="folder that index and foreground made")
    out: Path = Field(Path("runs/pretrain"), description="run folder; an unfinished run goes on")
    method: Literal["dino"] = Field("dino", description="self-supervised method")
    backbone: str = Field("vit_small_patch16_224", min_length=1, description="timm name of a ViT")
    weights: str = Field(
        "imagenet",
        min_length=1,
        description="imagenet (timm's download) | a .safetensors file | a run's folder | "
        "random[:SEED]",
    )
    patch_px: int = Field(256, ge=16, le=4096, description="side of the patches read, px")
    mpp: tuple[float, ...] = Field(
        (0.25, 0.5, 1.0, 2.0), min_length=1, description="magnifications drawn from, µm/px"
    )
    min_foreground: float = Field(
        0.4, ge=0, le=1, description="smallest share of tissue in a patch"
    )
    batch_size: int = Field(256, ge=1, le=65536, description="patches in an optimizer step")
    steps: int = Field(10_000, ge=1, description="optimizer steps of the whole run")
    optim: OptimConfig = Field(OptimConfig(), description="optimizer")
    dino: DinoSettings = Field(DinoSettings(), description="method dino")
    views: ViewsConfig = Field(ViewsConfig(), description="augmentation")
    seed: int = Field(
        0, ge=0, lt=2**64, description="patches, views and new weights follow from it"
    )
    loader: ReadingConfig = Field(ReadingConfig(), description="reading")
    device: str = Field("auto", description="auto, cpu or cuda:N")
    precision: Precision = Field(
        "auto", description="of forward passes: bf16, fp32, or auto: bf16 where the hardware has it"
    )
    checkpoint_every_steps: int = Field(
        500, ge=1, description="optimizer steps between checkpoints"
    )
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints that are kept")
    stop_after_steps: int | None = Field(
        None, ge=1, description="stop cleanly once this many steps are done, to go on another time"
    )
    monitor_patches: int = Field(
        512, ge=8, le=8192, description="first draws, embedded at start and end for RankMe"
    )
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

    @field_validator("mpp")
    @classmethod
    def _sane_mpp(cls, mpp: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0.05 <= value <= 8 for value in mpp):
            raise ValueError("every magnification must lie within 0.05 to 8 µm/px")
        return mpp

    @model_validator(mode="after")
    def _warm_up_ends(self) -> PretrainConfig:
        if self.optim.warmup_steps > self.steps:
            raise ValueError(
                f"optim.warmup_steps {self.optim.warmup_steps} exceeds steps {self.steps}"
            )
        return self


@dataclass(frozen=True)
class PretrainResult:
    """Where the run is and how far it came; `finished` is False when it was told to stop."""

    folder: Path
    steps: int
    finished: bool


def sampler_of(config: PretrainConfig, corpus: Corpus) -> PatchSampler:
    """What a run draws: the same whether it trains or only tells what it would read."""
    from online_patching import PatchSampler

    return PatchSampler(
        corpus,
        size_px=config.patch_px,
        mpp=config.mpp,
        min_foreground=config.min_foreground,
        seed=config.seed,
    )


def run(config: PretrainConfig) -> PretrainResult:
    """Trains to the end, or goes on from the newest valid checkpoint in `config.out`.

    With `dry_run` it only prints what that would read. Raises PathfmError, or a PatchingError of the slides' side.
    """
    if config.dry_run:
        from pathfm.pretrain.dry_run import show

        show(config)
        return PretrainResult(config.out, 0, finished=False)
    from pathfm.pretrain.loop import train

    return train(config)
