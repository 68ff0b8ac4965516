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
from typing import Any

from pydantic import Field

from pathfm.runtime import PathfmError, as_dict, make_folder, provenance, save_config
from pathfm.segmentation.train_settings import TrainSettings
from pathfm.tracking import TrackingConfig, open_run

WEIGHTS = "weights.safetensors"
_RULES = 3  # raised when the way from thumbnail to crop changes: older weights are made anew
_NOT_OF_THE_WEIGHTS = {
    "out", "tracking", "pictures", "templates", "start", "validate_every_steps", "checkpoint_every_steps", "device",
}  # fmt: skip


class ForegroundTrainConfig(TrainSettings, frozen=True, extra="forbid"):
    """What ``pathfm foreground-train`` wants to know."""

    tracking: TrackingConfig = Field(TrackingConfig(), description="where the run is recorded")


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
    start = _sha256(config.start) if config.start else ""
    key = _key(config, data.digest, start)
    weights = config.out / WEIGHTS
    earlier = _earlier(weights, key)
    if earlier is not None:
        print(f"foreground-train: {weights} is up to date")
        return _told(weights, earlier)
    save_config(config, make_folder(config.out), "foreground_train.yaml")
    tracking = config.tracking.filled(config.out, config.out.name)
    trainer = Trainer(config, data, key)
    tags = provenance() | {"stage": "foreground-train"}
    with open_run(tracking, config.out, as_dict(config), tags, trainer.run_id) as tracked:
        tracked.cohort("drawn thumbnails", data.digest, "training")
        trainer.train(tracked)
        facts = {
            "key": key,
            "settings": config.model_dump(mode="json", exclude=_NOT_OF_THE_WEIGHTS),
            "trained_on": data.told(),
            "started_from_sha256": start,
            "pasted": [template.name for template in data.templates],
            "validation": trainer.scores,
            "made_with": {k: tags[k] for k in ("git_commit", "python", "version.torch")},
        }
        save_model(trainer.model, config.model, weights, facts)
        tracked.artifact(weights)
        tracked.artifact(config.out / "crops.jpg")
    return _told(weights, facts)


def _key(config: ForegroundTrainConfig, data_digest: str, start: str) -> str:
    """SHA-256 of everything the weights depend on."""
    settings = config.model_dump(mode="json", exclude=_NOT_OF_THE_WEIGHTS)
    whole = [_RULES, settings, data_digest, start]
    return hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def _sha256(weights: Path) -> str:
    from pathfm.checkpoint import file_sha256  # late: it brings torch

    try:
        return file_sha256(weights)
    except OSError as error:
        raise PathfmError(f"start {weights}: cannot be read ({error.strerror})") from error


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
