"""What features were made of: the model, the data, and all that lies between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FORMAT = "pathfm.embeddings.2"

Pooling = Literal["cls", "cls+mean", "mean"]
Storage = Literal["fp32", "bf16"]


RESIZED = "shorter side resized, centre cropped, bilinear, antialiased"
"""The geometry of pictures whatever their µm/px: as kaiko-eva and most others take them."""


@dataclass(frozen=True)
class EmbeddingsInfo:
    """What features were made of. Two infos with one `key` have the same features."""

    name: str  # for tables: "init", "pretrained"
    backbone: str
    backbone_digest: str
    weights_note: str
    data: str
    data_digest: str
    input_px: int
    precision: str = "fp32"  # of the forward pass
    pooling: str = "cls"
    transform: str = ""  # from a picture to the model's input, as `describe_transform` says it
    storage: str = "fp32"  # of the numbers on disk
    mpp: float = 0.0  # µm/px of the input; 0 where it is not known, or not one for all rows

    @property
    def key(self) -> str:
        """A digest of what the features depend on; the name and the notes are not part of it."""
        parts = (
            self.backbone,  # two architectures may have the very same tensors (GELU, QuickGELU)
            self.backbone_digest,
            self.data_digest,
            str(self.input_px),
            self.precision,
            self.pooling,
            self.transform,
            self.storage,
        )
        return hashlib.sha256("\0".join((FORMAT, *parts)).encode()).hexdigest()


def describe_transform(
    geometry: str, input_px: int, mean: Sequence[float], std: Sequence[float]
) -> str:
    """The way from a picture to a model's input as canonical JSON, part of the key.

    geometry: in words, such as "shorter side resized, centre cropped"; mean, std: of each channel on
    0..1. Model digests cover tensors alone, and one model with two normalisations gives two features.
    """
    facts = {
        "geometry": geometry,
        "input_px": input_px,
        "mean": [float(value) for value in mean],
        "std": [float(value) for value in std],
    }
    return json.dumps(facts, sort_keys=True)
