"""What a pretraining run measures and draws on the way; cheap to import."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field


class CollapseConfig(BaseModel, frozen=True, extra="forbid"):
    """From where on features or targets are said to have collapsed; nothing stops for it."""

    rankme_share: float = Field(
        0.5, ge=0, le=1, description="RankMe of the monitor patches below this share of its start"
    )
    feature_std_share: float = Field(
        0.1, ge=0, le=1, description="feature std below this share of its start"
    )
    marginal_entropy_share: float = Field(
        0.25,
        ge=0,
        le=1,
        description="entropy of the batch's mean target below this share of what the batch can reach, "
        "min(log K, log of its targets)",
    )
    teacher_entropy_share: float = Field(
        0.001, ge=0, le=1, description="entropy of a target below this share of log K"
    )
    information_share: float = Field(
        0.005,
        ge=0,
        le=1,
        description="what targets tell about their sample below this share of what the batch can "
        "reach, after the warm-up",
    )
    chance_share: float = Field(
        0.01, ge=0, le=1, description="loss within this share of chance (log K) after the warm-up"
    )
    patience_steps: int = Field(
        50, ge=1, description="optimizer steps in a row that loss and entropies must show it"
    )


class WatchConfig(BaseModel, frozen=True, extra="forbid"):
    """What is measured and drawn on the way; none of it changes what is learnt."""

    every_steps: int = Field(
        500,
        ge=1,
        description="optimizer steps between RankMe and feature std of the monitor patches",
    )
    pictures_every_steps: int = Field(
        5000,
        ge=1,
        description="optimizer steps between pictures of sampled patches and their views",
    )
    curves: bool = Field(
        True, description="draw pictures/curves.png with those pictures, and at the end"
    )
    probe_folder: Path | None = Field(
        None, description="labelled folder FOLDER/<class>/*.png|jpg|tif to probe; unset: no probe"
    )
    probe_every_steps: int = Field(
        2000,
        ge=1,
        description="optimizer steps between probes; also before the first and at the end",
    )
    probe_px: int = Field(224, ge=16, le=1024, description="side of the probe's input, px")
    probe_max_per_class: int = Field(
        200,
        ge=4,
        le=100_000,
        description="pictures of a class at most, train and validation part together: bounds the "
        "probe's time, and its memory of 3 x probe_px^2 bytes each",
    )
    probe_test_share: float = Field(
        0.3,
        gt=0,
        lt=1,
        description="share of each class that is never touched, for a last word later",
    )
    probe_validation_share: float = Field(
        0.3, gt=0, lt=1, description="share of the rest that scores"
    )
    probe_k: int = Field(20, ge=1, le=10_000, description="neighbours of the kNN probe")
    probe_c: float = Field(
        0.01, gt=0, le=1e6, description="inverse L2 strength of the logistic probe, not tuned"
    )
    probe_seed: int = Field(0, ge=0, lt=2**64, description="key of the probe's split and subset")
    batch_size: int = Field(
        32, ge=1, le=4096, description="pictures in one forward pass of probe and monitor"
    )
    collapse: CollapseConfig = Field(CollapseConfig(), description="when collapse is said")
