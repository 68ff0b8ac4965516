"""Patch tokens of frozen backbones as maps, for heads to be fitted on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfm.backbone import Backbone
from pathfm.runtime import PathfmError


@torch.inference_mode()
def token_maps(backbone: Backbone, x: Tensor, last: int = 1, norm: bool = False) -> list[Tensor]:
    """Maps of the last `last` blocks (a transformer) or stages, the earliest first: [(B, C, h, w), ...].

    x: normalised float (B, 3, H, W). norm: whether the last norm follows; eva's encoders leave it out
    (timm's `features_only`). CLS and registers are dropped. Raises PathfmError for an input size
    the backbone cannot take, and for more blocks than there are.
    """
    for side in x.shape[-2:]:
        backbone.check_input(int(side), "input_px")
    network = cast(Any, backbone.network)
    if not hasattr(network, "forward_intermediates"):
        raise PathfmError(f"{backbone.name} gives no maps of its layers: choose another backbone")
    if not 1 <= last <= len(backbone.blocks):
        raise PathfmError(
            f"last = {last}: {backbone.name} has {len(backbone.blocks)} blocks, wants 1 to that many"
        )
    maps = network.forward_intermediates(
        x, indices=last, norm=norm, output_fmt="NCHW", intermediates_only=True
    )
    return cast(list[Tensor], list(maps))


def embed_maps(
    backbone: Backbone,
    batches: Iterable[NDArray[np.uint8]],
    device: torch.device,
    last: int = 1,
    norm: bool = False,
) -> list[NDArray[np.float32]]:
    """The maps of whole data sets: one array (n, C, h, w) float32 a block.

    batches: uint8 (b, H, W, 3) of the backbone's input size. Raises PathfmError for tokens that are
    not finite.
    """
    mean, std = (
        torch.tensor(v, device=device).view(3, 1, 1) for v in (backbone.mean, backbone.std)
    )
    backbone = backbone.to(device).eval()
    parts: list[list[NDArray[np.float32]]] = []
    for pixels in batches:
        x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div_(255)
        maps = token_maps(backbone, (x - mean) / std, last, norm)
        parts.append([m.float().cpu().numpy() for m in maps])
        if not all(np.isfinite(m).all() for m in parts[-1]):
            raise PathfmError(
                f"{backbone.name}: tokens that are not finite; the backbone has diverged"
            )
    return [np.concatenate(block) for block in zip(*parts, strict=True)]
