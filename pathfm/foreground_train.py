"""``pathfm foreground-train``: drawn and synthetic thumbnails in, weights of the mask model out.

Writes into ``out``: ``weights.safetensors`` (fp16; its header says what it was made from and how it
does on the validation pictures), ``crops.jpg`` (what the network saw first), ``metrics.jsonl``,
``checkpoints/`` and ``foreground_train.yaml``. A stopped run goes on from its newest checkpoint and
ends with the very same weights; a finished one is left alone while its settings are the same.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from pathfm.runtime import PathfmError, as_dict, make_folder, provenance, save_config
from pathfm.segmentation.loss_terms import LossTerm
from pathfm.tracking import TrackingConfig, open_run

WEIGHTS = "weights.safetensors"
_NOT_OF_THE_WEIGHTS = {
    "out", "tracking", "pictures", "templates", "validate_every_steps", "checkpoint_every_steps", "device",
}  # fmt: skip
ModelName = Literal[
    "unet", "unet_stem4", "segformer_b0", "segformer_b1", "segformer_b2", "segformer_b3",
    "segformer_b4", "segformer_b5",
]  # fmt: skip


class ForegroundTrainConfig(BaseModel, frozen=True, extra="forbid"):
    """What ``pathfm foreground-train`` wants to know."""

    out: Path = Field(Path("runs/foreground_unet"), description="folder of weights and metrics")
    model: ModelName = Field("unet", description="the network")
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
    seed: int = Field(0, ge=0, description="of the weights, the synthetic pictures and the crops")
    validate_every_steps: int = Field(500, ge=1, description="steps between validations")
    validation_synthetic: int = Field(
        40, ge=0, description="held-out synthetic thumbnails validated on"
    )
    checkpoint_every_steps: int = Field(250, ge=1, description="steps between checkpoints")
    tracking: TrackingConfig = Field(TrackingConfig(), description="where the run is recorded")

    @field_validator("loss", mode="before")
    @classmethod
    def _names_are_terms(cls, terms: Any) -> Any:
        """`--loss bce dice`: names alone are terms with their defaults."""
        words = [terms] if isinstance(terms, str) else terms
        if not isinstance(words, list):
            return words
        return [{"name": word} if isinstance(word, str) else word for word in words]

    @model_validator(mode="after")
    def _something_to_learn_from(self) -> ForegroundTrainConfig:
        if not self.pictures and self.synthetic == 0:
            raise ValueError("nothing to learn from: give --pictures FOLDER or --synthetic > 0")
        return self


@dataclass(frozen=True)
class ForegroundTrainResult:
    """What a training run made."""

    weights: Path
    facts: dict[str, Any]


def run(config: ForegroundTrainConfig) -> ForegroundTrainResult:
    """Trains the model, or says that it is there already.

    Raises ``PathfmError`` when pictures are missing or changed, when one of those to train on has
    no licence that allows it, or when the loss is no number.
    """
    import torch

    from pathfm.segmentation.models import save_model
    from pathfm.segmentation.train import Trainer
    from pathfm.segmentation.training_data import gather

    torch.set_num_threads(config.threads)
    data = gather(config.pictures, config.templates)
    key = _key(config, data.digest)
    weights = config.out / WEIGHTS
    earlier = _earlier(weights, key)
    if earlier is not None:
        print(f"foreground-train: {weights} is up to date")
        return _told(weights, earlier)
    save_config(config, make_folder(config.out), "foreground_train.yaml")
    tracking = config.tracking.model_copy(
        update={
            "uri": config.tracking.store(config.out),
            "run_name": config.tracking.run_name or config.out.name,
        }
    )
    trainer = Trainer(config, data, key)
    tags = provenance() | {"stage": "foreground-train"}
    with open_run(tracking, config.out, as_dict(config), tags, trainer.run_id) as tracked:
        tracked.cohort("drawn thumbnails", data.digest, "training")
        trainer.train(tracked)
        facts = {
            "key": key,
            "settings": config.model_dump(mode="json", exclude=_NOT_OF_THE_WEIGHTS),
            "trained_on": data.told(),
            "validation": trainer.scores,
            "made_with": {k: tags[k] for k in ("git_commit", "python", "version.torch")},
        }
        save_model(trainer.model, config.model, weights, facts)
        tracked.artifact(weights)
        tracked.artifact(config.out / "crops.jpg")
    return _told(weights, facts)


def _key(config: ForegroundTrainConfig, data_digest: str) -> str:
    """SHA-256 of everything the weights depend on."""
    settings = config.model_dump(mode="json", exclude=_NOT_OF_THE_WEIGHTS)
    return hashlib.sha256(json.dumps([settings, data_digest]).encode()).hexdigest()


def _earlier(weights: Path, key: str) -> dict[str, Any] | None:
    """The facts of weights made from the very same things, or None."""
    from pathfm.segmentation.models import load_model

    if not weights.exists():
        return None
    try:
        _, facts = load_model(weights)
    except PathfmError:
        return None
    return facts if facts.get("key") == key else None


def _told(weights: Path, facts: dict[str, Any]) -> ForegroundTrainResult:
    """Prints how the model does and what to run next."""
    for name, value in facts["validation"].items():
        print(f"  {name}: {value:.4f}")
    print(f"weights: {weights}")
    print(f"next: pathfm foreground-evaluate --weights {weights} --pictures FOLDER")
    print(f"      pathfm foreground CORPUS --weights {weights}")
    return ForegroundTrainResult(weights, facts)
