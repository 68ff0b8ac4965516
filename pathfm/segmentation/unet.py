"""A small U-Net for thumbnails: any size in, logits of the same size out.

U-Net (Ronneberger et al. 2015, arXiv 1505.04597) with three changes that make it cheap on a CPU:
it works at half resolution on 2 x 2 px folded into channels (pixel unshuffle) and unfolds its
logits again, its convolutions are padded so that sizes agree, and it is narrow: 0.49 M
parameters, about 8,700 multiply-adds a pixel (`models.multiply_adds_per_pixel` counts them).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 48, 64, 96)
SHIPPED_WEIGHTS = Path(__file__).parent / "weights" / "unet_thumbnail.safetensors"


class ConvPair(nn.Sequential):
    """Two times 3 x 3 convolution, batch norm, ReLU: (B, cin, h, w) -> (B, cout, h, w)."""

    def __init__(self, cin: int, cout: int) -> None:
        layers: list[nn.Module] = []
        for source in (cin, cout):
            layers += [
                nn.Conv2d(source, cout, 3, padding=1, bias=False),
                nn.BatchNorm2d(cout),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class ThumbnailUNet(nn.Module):
    """Tissue logits of an RGB thumbnail.

    Input (B, 3, h, w) float, 0..1; output (B, h, w) logits, tissue where > 0, or
    (B, classes, h, w) for more than one class. Any h, w >= 1: the picture is padded by repeating
    its edge to a multiple of `stride`, and cut back. stem: side of the squares of pixels that are
    folded into channels; 4 is faster and coarser than 2.
    """

    def __init__(
        self, widths: tuple[int, ...] = WIDTHS, *, classes: int = 1, stem: int = 2
    ) -> None:
        super().__init__()
        self.classes, self.stem = classes, stem
        self.stride = stem * 2 ** (len(widths) - 1)
        folded = 3 * stem**2
        self.down = nn.ModuleList(
            ConvPair(cin, cout) for cin, cout in zip((folded, *widths[:-1]), widths, strict=True)
        )
        self.up = nn.ModuleList(
            ConvPair(deep + skip, skip)
            for deep, skip in zip(widths[:0:-1], widths[-2::-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], classes * stem**2, 1)

    def forward(self, rgb: Tensor) -> Tensor:
        """(B, 3, h, w) 0..1 -> logits, (B, h, w) or (B, classes, h, w)."""
        height, width = rgb.shape[-2:]
        x = F.pad(rgb, (0, -width % self.stride, 0, -height % self.stride), mode="replicate")
        x = F.pixel_unshuffle(2 * x - 1, self.stem)
        kept: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            kept.append(x)
        kept.pop()
        for block in self.up:
            skip = kept.pop()
            wider = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([wider, skip], dim=1))
        logits = F.pixel_shuffle(self.head(x), self.stem)[..., :height, :width]
        return logits[:, 0] if self.classes == 1 else logits
