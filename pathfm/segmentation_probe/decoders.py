"""Heads on frozen patch tokens, (B, C, h, w) maps -> logits (B, classes, H, W) of the picture's size.

`conv` is kaiko-eva 0.4.5's ConvDecoderMS (from DINOv2's "+ms"): upsample x 2 (nearest), 3 x 3 convolution to
64 channels, upsample x 2, 3 x 3 convolution to the classes. `mlp` is SegFormer's all-MLP decoder. `linear` is
one linear layer a token. All end with bilinear upsampling to the picture (half-pixel centres).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathfm.heads.fit import drawn_head
from pathfm.runtime import PathfmError
from pathfm.segmentation.segformer.decoder import AllMlpDecoder

_STREAM_INIT = 407
CONV_CHANNELS = 64
MLP_CHANNELS = 256
"""Channels of the fused map: SegFormer's in B0 and B1."""

HeadName = Literal["conv", "mlp", "linear"]


class TokenHead(nn.Module):
    """Logits at the picture's size from the maps of one or several layers.

    widths: channels of each map. classes: classes of the truth, background included, at least two.
    Several maps are brought to the first one's size and concatenated (`conv`, `linear`, as eva does),
    or projected one by one and summed (`mlp`).
    """

    def __init__(self, name: HeadName, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        if name not in get_args(HeadName):
            raise PathfmError(f"no head {name!r}: there are {', '.join(get_args(HeadName))}")
        if classes < 2 or not widths:
            raise PathfmError(
                f"{classes} classes and {len(widths)} maps: wants two and one, or more"
            )
        self.name, self.widths, self.classes = name, tuple(widths), classes
        if name == "mlp":
            self.layers: nn.Module = AllMlpDecoder(widths, MLP_CHANNELS, classes)
        elif name == "conv":
            self.layers = nn.Sequential(
                nn.Upsample(scale_factor=2),
                nn.Conv2d(sum(widths), CONV_CHANNELS, 3, padding=1),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(CONV_CHANNELS, classes, 3, padding=1),
            )
        else:
            self.layers = nn.Conv2d(sum(widths), classes, 1)

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """[(B, widths[i], h_i, w_i), ...] and (H, W) -> (B, classes, H, W).

        Raises PathfmError for maps of another number or width than it was built for.
        """
        if [x.shape[1] for x in maps] != list(self.widths):
            raise PathfmError(
                f"a head on maps of {list(self.widths)} channels was given {[tuple(x.shape) for x in maps]}"
            )
        logits = self.layers(maps if self.name == "mlp" else concatenated(maps))
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def concatenated(maps: Sequence[Tensor]) -> Tensor:
    """Maps at the first one's size (bilinear), channels one behind the other."""
    size = maps[0].shape[-2:]
    same = [
        x
        if x.shape[-2:] == size
        else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        for x in maps
    ]
    return same[0] if len(same) == 1 else torch.cat(same, 1)


def make_head(
    name: HeadName, widths: Sequence[int], classes: int, seed: int, run: int
) -> TokenHead:
    """The untrained head; its weights are a function of (seed, run)."""
    return drawn_head(lambda: TokenHead(name, widths, classes), seed, run, _STREAM_INIT)


def parameters_of(head: nn.Module) -> int:
    """How many numbers a head learns."""
    return cast(int, sum(p.numel() for p in head.parameters()))
