"""Patch tokens of any frozen model as maps, for heads that answer pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfm.backbone import Backbone
from pathfm.models.embedder import Embedder
from pathfm.models.loading import OfBackbone
from pathfm.runtime import PathfmError


def check_maps(model: Embedder, last: int = 1) -> None:
    """Raises PathfmError where a model cannot give the tokens of so many blocks, as far as can be told.

    A model from elsewhere gives those of its last block; whether it gives any, its first answer tells.
    """
    if not isinstance(model, OfBackbone):
        if last > 1:
            raise PathfmError(
                f"last_blocks = {last}: {model.name} gives the tokens of its last block only, want 1"
            )
        return
    backbone = model.backbone
    if not hasattr(backbone.network, "forward_intermediates"):
        raise PathfmError(f"{backbone.name} gives no maps of its layers: choose another backbone")
    if not 1 <= last <= len(backbone.blocks):
        raise PathfmError(
            f"last_blocks = {last}: {backbone.name} has {len(backbone.blocks)} blocks, wants 1 to that many"
        )


def keeps_norm(model: Embedder) -> bool:
    """Whether tokens come after the model's last norm whatever is asked: so it is with models from elsewhere."""
    return not isinstance(model, OfBackbone)


def token_maps(model: Embedder, x: Tensor, last: int = 1, norm: bool = False) -> list[Tensor]:
    """Maps of the last `last` blocks (a transformer) or stages, the earliest first: [(B, C, h, w), ...].

    x: normalised float (B, 3, s, s). norm: whether the last norm follows; eva's encoders leave it out
    (timm's `features_only`). CLS and registers are dropped. Models from elsewhere give one map, as they
    themselves end. Raises PathfmError for an input size that cannot be fed, for more blocks than there
    are, and for a model without patch tokens or with a number of them that is no square.
    """
    for side in x.shape[-2:]:
        model.check_input(int(side), "input_px")
    check_maps(model, last)
    if isinstance(model, OfBackbone):
        return _of_backbone(model.backbone, x, last, norm)
    patches = model.patch_tokens(x)
    if patches is None:
        raise PathfmError(
            f"{model.name} gives one vector a picture, no patch tokens: a head has no map to stand on"
        )
    side = math.isqrt(patches.shape[1])
    if patches.ndim != 3 or side * side != patches.shape[1] or x.shape[-1] != x.shape[-2]:
        raise PathfmError(
            f"{model.name} made tokens {tuple(patches.shape)} of pictures {tuple(x.shape)}: no square "
            "map. Let `num_prefix_tokens` say how many come before the patches"
        )
    return [patches.transpose(1, 2).reshape(len(x), -1, side, side)]


def embed_maps(
    model: Embedder,
    batches: Iterable[NDArray[np.uint8]],
    device: torch.device,
    last: int = 1,
    norm: bool = False,
) -> list[NDArray[np.float32]]:
    """The maps of whole data sets: one array (n, C, h, w) float32 a block.

    batches: uint8 (b, s, s, 3) of the model's input size. Raises PathfmError for tokens that are not
    finite, and as `token_maps` does.
    """
    model = model.to(device)
    parts: list[list[NDArray[np.float32]]] = []
    for pixels in batches:
        with torch.inference_mode():
            maps = token_maps(model, model.normalised(pixels), last, norm)
        parts.append([m.float().cpu().numpy() for m in maps])
        if not all(np.isfinite(m).all() for m in parts[-1]):
            raise PathfmError(
                f"{model.name}: tokens that are not finite; the backbone has diverged"
            )
    return [np.concatenate(block) for block in zip(*parts, strict=True)]


def _of_backbone(backbone: Backbone, x: Tensor, last: int, norm: bool) -> list[Tensor]:
    maps = cast(Any, backbone.network).forward_intermediates(
        x, indices=last, norm=norm, output_fmt="NCHW", intermediates_only=True
    )
    return cast(list[Tensor], list(maps))
