"""The settings of a training run, bounded and described; needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from pathfm.segmentation.loss_terms import LossTerm

ModelName = Literal[
    "unet", "unet_stem4", "segformer_b0", "segformer_b1", "segformer_b2", "segformer_b3",
    "segformer_b4", "segformer_b5",
]  # fmt: skip


class TrainSettings(BaseModel, frozen=True, extra="forbid"):
    """What a training run of a mask model wants to know."""

    out: Path = Field(Path("runs/foreground_unet"), description="folder of weights and metrics")
    model: ModelName = Field("unet", description="the network")
    start: Path | None = Field(
        None, description="weights of the same network to begin with; none: drawn from the seed"
    )
    loss: list[LossTerm] = Field(
        [LossTerm(name="bce"), LossTerm(name="dice", smooth=1.0)],
        min_length=1,
        description="terms of the loss, summed: names, or {name, weight, options}; docs/losses.md",
    )
    pictures: list[Path] = Field(
        [],
        description="folders of the drawn training and validation pictures; none: synthetic only",
    )
    templates: Path | None = Field(
        None, description="folder of pen and coverslip cut-outs to lay over crops (HistoQC's)"
    )
    synthetic: int = Field(
        1500, ge=0, le=100_000, description="synthetic thumbnails to draw and cut crops from"
    )
    synthetic_px: int = Field(512, ge=64, le=2048, description="their side in px")
    real_share: float = Field(
        0.4, ge=0, le=1, description="share of crops that come from drawn pictures, when given"
    )
    crop_px: int = Field(256, ge=32, le=1024, description="side of a training crop in px")
    border_share: float = Field(
        0.3, ge=0, le=1, description="share of crops placed at a border of tissue"
    )
    rare_share: float = Field(
        0.35, ge=0, le=1, description="share of crops placed at ink, dust, bubbles, edges, fat"
    )
    paste_chance: float = Field(
        0.2, ge=0, le=1, description="chance that a crop gets a template laid over it, when given"
    )
    batch_size: int = Field(8, ge=1, le=4096, description="crops a step")
    steps: int = Field(3000, ge=1, description="optimizer steps")
    lr: float = Field(3e-3, gt=0, description="learning rate after the warm-up; then half a cosine")
    warmup_steps: int = Field(50, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(1e-4, ge=0, description="AdamW's, on weights with two axes or more")
    clip_grad_norm: float = Field(5.0, gt=0, description="gradients longer than this are shortened")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "fp32", description="auto: bf16 where the device is made for it"
    )
    device: str = Field("auto", description="torch device: auto, cpu, cuda, cuda:1")
    threads: int = Field(1, ge=1, description="CPU threads; part of what makes a run repeatable")
    seed: int = Field(
        0, ge=0, lt=2**63, description="of the weights, the synthetic pictures and the crops"
    )
    validate_every_steps: int = Field(500, ge=1, description="steps between validations")
    validation_synthetic: int = Field(
        40, ge=0, description="held-out synthetic thumbnails validated on"
    )
    checkpoint_every_steps: int = Field(250, ge=1, description="steps between checkpoints")

    @field_validator("loss", mode="before")
    @classmethod
    def _names_are_terms(cls, terms: Any) -> Any:
        """`--loss bce dice`: names alone are terms with their defaults."""
        words = [terms] if isinstance(terms, str) else terms
        if not isinstance(words, list):
            return words
        return [{"name": word} if isinstance(word, str) else word for word in words]

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> TrainSettings:
        if not self.pictures and self.synthetic == 0:
            raise ValueError("nothing to learn from: give --pictures FOLDER or --synthetic > 0")
        if self.border_share + self.rare_share > 1:
            raise ValueError(
                f"border_share {self.border_share} and rare_share {self.rare_share} are "
                f"{self.border_share + self.rare_share:g} together: at most 1"
            )
        if self.synthetic and self.crop_px > self.synthetic_px:
            raise ValueError(
                f"crop_px {self.crop_px} is more than synthetic_px {self.synthetic_px}: a crop is a "
                "part of a picture"
            )
        if self.batch_size == 1 and self.crop_px <= 32 and self.model.startswith("unet"):
            raise ValueError(
                f"batch_size 1 with crop_px {self.crop_px} leaves the deepest level one value a channel, "
                "which batch norm cannot train on: take crop_px 64 or batch_size 2"
            )
        return self
