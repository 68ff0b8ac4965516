"""SegFormer, our own: a mix transformer, an all-MLP decoder, presets B0 to B5.

mit.py      the encoder: overlapped patches, efficient attention, Mix-FFN
decoder.py  the decoder; takes any list of feature maps, frozen ones too
keyed.py    drop path and dropout without global random state

Written from the paper (Xie et al. 2021, arXiv 2105.15203). No pretrained weights: the published ones are
licensed for non-commercial use only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pathfm.runtime import PathfmError
from pathfm.segmentation.segformer.decoder import AllMlpDecoder
from pathfm.segmentation.segformer.keyed import KeyedDrop, key_drops
from pathfm.segmentation.segformer.mit import STRIDES, MixSettings, MixTransformer

__all__ = [
    "DECODER_CHANNELS",
    "PRESETS",
    "STRIDES",
    "AllMlpDecoder",
    "KeyedDrop",
    "MixSettings",
    "MixTransformer",
    "SegFormer",
    "key_drops",
    "segformer",
]

_WIDE = (64, 128, 320, 512)
PRESETS: Mapping[str, MixSettings] = MappingProxyType(
    {
        "b0": MixSettings((32, 64, 160, 256), (2, 2, 2, 2)),
        "b1": MixSettings(_WIDE, (2, 2, 2, 2)),
        "b2": MixSettings(_WIDE, (3, 4, 6, 3)),
        "b3": MixSettings(_WIDE, (3, 4, 18, 3)),
        "b4": MixSettings(_WIDE, (3, 8, 27, 3)),
        "b5": MixSettings(_WIDE, (3, 6, 40, 3)),
    }
)
DECODER_CHANNELS: Mapping[str, int] = MappingProxyType(
    {"b0": 256, "b1": 256, "b2": 768, "b3": 768, "b4": 768, "b5": 768}
)


class SegFormer(nn.Module):
    """Logits of an RGB picture, at its own size.

    Input (B, 3, h, w) float, 0..1, any h, w >= 1; output (B, h, w) for one class, else
    (B, classes, h, w). The decoder's logits, one a 4 x 4 px square, are upsampled bilinearly by
    exactly 4 and cut to size: squares stay where they are when h, w are no multiples of 4.
    """

    def __init__(
        self, settings: MixSettings, channels: int, classes: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.classes = classes
        self.encoder = MixTransformer(settings)
        self.decoder = AllMlpDecoder(settings.widths, channels, classes, dropout)

    def quarter_logits(self, rgb: Tensor) -> Tensor:
        """(B, 3, h, w) 0..1 -> (B, classes, ceil(h / 4), ceil(w / 4)), as the paper has them."""
        out: Tensor = self.decoder(self.encoder(2 * rgb - 1))
        return out

    def forward(self, rgb: Tensor) -> Tensor:
        """(B, 3, h, w) 0..1 -> logits, (B, h, w) or (B, classes, h, w)."""
        height, width = rgb.shape[-2:]
        logits = self.quarter_logits(rgb)
        size = [STRIDES[0] * side for side in logits.shape[-2:]]
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        logits = logits[..., :height, :width]
        return logits[:, 0] if self.classes == 1 else logits


def segformer(
    preset: str = "b0", classes: int = 1, *, dropout: float = 0.0, **changes: Any
) -> SegFormer:
    """A SegFormer of a preset, "b0" to "b5"; `changes` replace fields of its `MixSettings`."""
    if preset not in PRESETS:
        raise PathfmError(f"no SegFormer {preset!r}. There are {', '.join(PRESETS)}")
    settings = replace(PRESETS[preset], **changes)
    return SegFormer(settings, DECODER_CHANNELS[preset], classes, dropout)
