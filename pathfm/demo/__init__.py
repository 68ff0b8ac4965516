"""``pathfm demo``: the whole way in one command, from slides to a probed model and a page about it.

    settings here     stages.py  what each stage is called with, and recorded as
                      inputs.py  the synthetic slides, and patches of known class

index -> foreground -> pretrain -> embed (initial and pretrained weights) -> probe -> report ->
compare, in one MLflow experiment: a parent run with a child for each stage. Without arguments it
draws its own slides, and cuts the labelled patches of the probe from other slides, drawn from other
seeds, that pretraining never sees. Every stage skips what is done, so the same command goes on
where it was interrupted.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, field_validator, model_validator

from pathfm.config import merge
from pathfm.foreground import ForegroundConfig
from pathfm.pretrain import PretrainConfig

SET_BY_DEMO = {
    "pretrain": ("corpus", "out", "tracking", "backbone", "weights", "dry_run", "estimate"),
    "foreground": ("corpus",),
}
"""Fields of the stages' configs that follow from the demo's own options."""

# Pretraining that two cores finish in minutes: 4,096 patches, small views (five times as many
# patches a second as at 224 and 96 px), a head in proportion (the paper's has 65,536 prototypes).
_PRETRAIN: dict[str, Any] = {
    "steps": 128,
    "batch_size": 32,
    "checkpoint_every_steps": 32,
    "monitor_patches": 256,
    "optim": {"lr": 2.5e-4, "warmup_steps": 10},
    "dino": {"out_dim": 2048, "hidden_dim": 1024},
    "views": {
        "global_1": {"size_px": 112},
        "global_2": {"size_px": 112},
        "local": {"size_px": 48},
        "n_local": 4,
    },
}


# From random weights a higher rate collapses the features (docs/log.md tells what was tried, from
# ImageNet's weights too).
_FROM_RANDOM: dict[str, Any] = {"optim": {"lr": 1e-4}}


def pretrain_settings(weights: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The demo's own settings of pretraining from `weights`, under those that are given."""
    values = copy.deepcopy(_PRETRAIN)
    if weights.startswith("random"):
        merge(values, _FROM_RANDOM)
    if given.get("method", "dino") != "dino":
        del values["dino"]
    merge(values, given)
    return values


class DemoConfig(BaseModel, frozen=True, extra="forbid"):
    """What to run the whole way on."""

    out: Path = Field(Path("demo_out"), description="folder for everything")
    slides: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="your slides, as `pathfm index` takes them; unset: synthetic ones",
    )
    mpp_overrides: Path | None = Field(
        None, description="CSV with columns file, mpp: µm/px where files carry none"
    )
    patches: Path | None = Field(
        None, description="labelled folder PATCHES/<class>/*.png for the probe; unset: synthetic"
    )
    backbone: str = Field("vit_tiny_patch16_224", description="timm name of the ViT")
    weights: str = Field(
        "random", description="where pretraining starts: random[:SEED], imagenet, or a .safetensors"
    )
    n_slides: int = Field(5, ge=1, le=100, description="synthetic slides to draw")
    per_class: int = Field(
        120,
        ge=30,
        description="synthetic labelled patches of each class; fewer are of too few slides",
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**32,
        description="seed of synthetic slides and patches, and of the probe's splits",
    )
    input_px: int = Field(224, ge=16, le=2048, description="input side of embeddings, px")
    n_seeds: int = Field(5, ge=1, le=1000, description="splits and heads of the probe")
    device: str = Field("auto", description="torch device of the embeddings: auto, cpu, cuda:N")
    tracking_uri: str | None = Field(
        None, description="MLflow store; unset: $MLFLOW_TRACKING_URI, else mlflow.db in OUT"
    )
    experiment: str = Field("pathfm-demo", min_length=1, description="MLflow experiment")
    foreground: ForegroundConfig = Field(ForegroundConfig(), description="the foreground stage")
    pretrain: PretrainConfig = Field(
        default_factory=lambda: PretrainConfig.model_validate(pretrain_settings("random", {})),
        description="the pretraining stage; small enough for two cores",
    )

    @field_validator("slides", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return (str(value),) if isinstance(value, (str, Path)) else value

    @model_validator(mode="before")
    @classmethod
    def _over_the_demo_s_own(cls, given: Any) -> Any:
        """What is not said is the demo's, not the default of a run on a GPU."""
        if not isinstance(given, Mapping) or not isinstance(given.get("pretrain", {}), Mapping):
            return given
        weights = str(given.get("weights", "random"))
        return {**given, "pretrain": pretrain_settings(weights, given.get("pretrain", {}))}

    @model_validator(mode="after")
    def _paths_are_the_demo_s(self) -> DemoConfig:
        for part, names in SET_BY_DEMO.items():
            for name in names:
                if name in getattr(self, part).model_fields_set:
                    raise ValueError(
                        f"{part}.{name} follows from the demo's own options: leave it out"
                    )
        return self


@dataclass(frozen=True)
class DemoResult:
    """Where everything is, how long it took, and the verdict."""

    out: Path
    report: Path
    compared: Path
    seconds: dict[str, float]
    verdict: str


def run(config: DemoConfig) -> DemoResult:
    """Runs every stage that is not done yet; prints the table, the two pages and what to type next."""
    from pathfm.demo.stages import run_stages

    return run_stages(config)
