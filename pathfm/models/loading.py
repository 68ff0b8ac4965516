"""A text that names a model -> Embedder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pathfm.backbone import Backbone, load_backbone
from pathfm.models.callables import from_eva, from_python
from pathfm.models.embedder import Embedder
from pathfm.models.hugging_face import from_hugging_face

WEIGHTS_HELP = (
    "random[:SEED] | imagenet | dinov2 | a .safetensors file | a pretrain run's folder | a Hugging "
    "Face folder (timm's or transformers', safetensors only) | timm:NAME | python:MODULE:FUNCTION | "
    "eva:NAME of kaiko-eva's registry"
)
_Scale = Sequence[float] | None
_OTHERS: dict[str, Callable[[str, _Scale, _Scale], Embedder]] = {
    "hf": from_hugging_face,
    "python": from_python,
    "eva": from_eva,
}


def load_model(
    weights: str,
    backbone: str = "vit_tiny_patch16_224",
    input_px: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **architecture: Any,
) -> Embedder:
    """The model that `weights` names (see `WEIGHTS_HELP`), in eval mode on the CPU.

    backbone: timm name, for weights that do not know their architecture; `architecture` goes to
    timm. input_px: side a transformer's position embedding is resampled to; None: as it was made.
    mean, std: of pixels on 0..1, in place of the model's own. Raises PathfmError.
    """
    kind, _, rest = weights.partition(":")
    if kind in _OTHERS:
        found = _OTHERS[kind](rest, mean, std)
    elif kind == "timm":
        found = of_backbone(load_backbone(rest, "imagenet", input_px), mean, std)
    elif is_transformers_folder(Path(weights)):
        found = from_hugging_face(weights, mean, std)
    else:
        found = of_backbone(load_backbone(backbone, weights, input_px, **architecture), mean, std)
    if input_px is not None:
        found.check_input(input_px, "input_px")
    return found


def names_its_architecture(weights: str) -> bool:
    """Whether `backbone` says nothing about a model that these weights name."""
    return weights.partition(":")[0] in {*_OTHERS, "timm"} or is_transformers_folder(Path(weights))


def is_transformers_folder(path: Path) -> bool:
    """Whether a folder holds what transformers' `save_pretrained` writes, told by its config."""
    try:
        text = (path / "config.json").read_text()
        return "model_type" in json.loads(text) and '"architecture"' not in text
    except (OSError, ValueError, TypeError):
        return False


def of_backbone(
    backbone: Backbone, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Embedder:
    """One of our backbones as an Embedder."""

    def tokens(x: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        return backbone.tokens(x) if patches else (backbone.embed(x), None)

    found = _OfBackbone(
        backbone,
        tokens,
        name=backbone.name,
        weights_note=backbone.weights_note,
        digest=backbone.digest,
        mean=backbone.mean if mean is None else mean,
        std=backbone.std if std is None else std,
    )
    found.backbone = backbone
    return found


class _OfBackbone(Embedder):
    """One of our backbones, which knows best what it can be fed."""

    backbone: Backbone

    def check_input(self, size_px: int, what: str) -> None:
        """As the backbone says."""
        self.backbone.check_input(size_px, what)
