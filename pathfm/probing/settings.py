"""What `pathfm probe` may be told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, field_validator

from pathfm.leakage import Policy
from pathfm.probing.few_shot import SHOTS
from pathfm.probing.protocol import (
    EVA_BATCH,
    EVA_LEARNING_RATE,
    EVA_RUNS,
    EVA_STEPS,
    HeadProtocol,
    ten_shot,
)
from pathfm.runtime import PathfmError, pick_device
from pathfm.tracking import TrackingConfig

if TYPE_CHECKING:
    import torch

Also = Literal["eva", "few-shot"]


class EvaConfig(BaseModel, frozen=True, extra="forbid"):
    """How eva's heads are trained; the defaults are kaiko-eva 0.4.5's. Used with `--also eva`."""

    learning_rates: tuple[float, ...] = Field(
        (EVA_LEARNING_RATE,),
        min_length=1,
        max_length=64,
        description="AdamW's, all trained at once; with several, validation chooses one for all runs",
    )
    n_runs: int | None = Field(
        None,
        ge=1,
        le=1000,
        description=f"first heads and batch orders, trained at once; unset: {EVA_RUNS}, of a data set trained "
        "on a few samples a class (patch_camelyon_10shot) 50, each with samples of its own",
    )
    n_steps: int = Field(EVA_STEPS, ge=1, le=10_000_000, description="most steps of each")
    batch_size: int = Field(EVA_BATCH, ge=1, le=1 << 20, description="samples a step")
    weight_decay: float = Field(0.01, ge=0, le=10, description="AdamW's, of the bias too")
    patience: int | None = Field(
        None,
        ge=1,
        description="epochs without a better validation score before a head stops; unset: a fifth of "
        "the steps, which is eva's figure for each of its data sets (patch_camelyon_10shot: 125 validations, "
        "one every tenth epoch)",
    )
    device: str = Field("auto", description="auto, cpu or cuda:N")


class ProbeConfig(BaseModel, frozen=True, extra="forbid"):
    """Which features to probe, and how often."""

    embeddings: list[Path] = Field(
        min_length=1,
        description="files written by embed, or folders of them; the first is the "
        "baseline the others are compared with (in a folder: `init`, else the first by name)",
    )
    out: Path = Field(Path("probe"), description="folder for probe.json")
    also: tuple[Also, ...] = Field(
        (),
        description="protocols besides the logistic probe and kNN: eva (linear heads as kaiko-eva "
        "trains them, minutes on a CPU), few-shot. A data set trained on a few samples a class always has eva",
    )
    n_seeds: int = Field(
        5,
        ge=1,
        le=1000,
        description="repeats, each with its own split and head; data with splits of its own is probed "
        "on these, once",
    )
    seed: int = Field(0, ge=0, lt=2**64, description="key of all splits, heads and draws")
    test_share: float = Field(0.3, gt=0, lt=1, description="share of each class tested on")
    validation_share: float = Field(
        0.2, gt=0, lt=1, description="share of the training half that chooses C"
    )
    c_values: tuple[float, ...] = Field(
        (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0),
        min_length=1,
        description="inverse L2 strengths tried (scikit-learn's C)",
    )
    k: int = Field(
        20,
        ge=1,
        le=10_000,
        description="neighbours of the kNN probe; at most the training pictures",
    )
    leaks: Policy = Field(
        "refuse",
        description="test pictures that a backbone has seen in pretraining: refuse them, or mark the table",
    )
    eva: EvaConfig = Field(EvaConfig(), description="eva's heads")
    shots: tuple[int, ...] = Field(
        SHOTS,
        min_length=1,
        max_length=64,
        description="samples a class of few-shot; unset, those that a class cannot give are left out",
    )
    resamples: int = Field(
        20, ge=2, le=10_000, description="draws of each number of shots in few-shot"
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="where the run is recorded")

    @field_validator("eva")
    @classmethod
    def _makes_sense(cls, eva: EvaConfig) -> EvaConfig:
        try:
            _protocol(eva, 0, 0)
        except PathfmError as error:
            raise ValueError(str(error)) from None
        return eva

    def head_protocol(self, shots: int = 0) -> HeadProtocol:
        """How eva's heads are trained; with `shots` samples a class, as its 10-shot form is."""
        return _protocol(self.eva, self.seed, shots)

    def eva_device(self) -> torch.device:
        """Where eva's heads are trained."""
        return pick_device(self.eva.device)


def _protocol(eva: EvaConfig, seed: int, shots: int) -> HeadProtocol:
    told = eva.model_dump(exclude={"device"}, exclude_none=True)
    return replace(ten_shot() if shots else HeadProtocol(), **told, seed=seed)
