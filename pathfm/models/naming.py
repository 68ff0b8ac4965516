"""How models are named; cheap to import, as help texts need it."""

from __future__ import annotations

import json
from pathlib import Path

WEIGHTS_HELP = (
    "random[:SEED] | imagenet | dinov2 | a .safetensors file | a pretrain run's folder | a Hugging "
    "Face folder (timm's or transformers', safetensors only) | timm:NAME | python:MODULE:FUNCTION | "
    "eva:NAME of kaiko-eva's registry"
)
_PREFIXES = {"hf", "python", "eva", "timm"}


def names_its_architecture(weights: str) -> bool:
    """Whether `backbone` says nothing about a model that these weights name."""
    return weights.partition(":")[0] in _PREFIXES or is_transformers_folder(Path(weights))


def is_transformers_folder(path: Path) -> bool:
    """Whether a folder holds what transformers' `save_pretrained` writes, told by its config."""
    try:
        text = (path / "config.json").read_text()
        return "model_type" in json.loads(text) and '"architecture"' not in text
    except (OSError, ValueError, TypeError):
        return False
