"""A text that names a model -> Embedder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pathfm.backbone import Backbone, load_backbone
from pathfm.models.callables import from_eva, from_python
from pathfm.models.embedder import Embedder
from pathfm.models.hugging_face import from_hugging_face
from pathfm.models.naming import is_transformers_folder

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
    """The model that `weights` names (docs/embeddings.md), in eval mode on the CPU.

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


def of_backbone(
    backbone: Backbone, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Embedder:
    """One of our backbones as an Embedder."""

    def tokens(x: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        return backbone.tokens(x) if patches else (backbone.embed(x), None)

    found = OfBackbone(
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


class OfBackbone(Embedder):
    """One of our backbones, which knows best what it can be fed."""

    backbone: Backbone

    def check_input(self, size_px: int, what: str) -> None:
        """As the backbone says."""
        self.backbone.check_input(size_px, what)
