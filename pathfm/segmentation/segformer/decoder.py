"""The all-MLP decoder of SegFormer: feature maps of several sizes -> logits.

Xie et al. 2021, section 3.2: a linear layer brings each map to C channels, all are upsampled to the
first one's size and concatenated, a linear layer fuses them (batch norm, ReLU), another classifies.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathfm.runtime import PathfmError
from pathfm.segmentation.segformer.keyed import KeyedDrop


class AllMlpDecoder(nn.Module):
    """Logits at the first map's size from maps of any sizes; also a head on frozen features.

    widths: channels of each map. channels: C. dropout: share of the fused channels dropped.

    The paper upsamples 4 C channels and multiplies by a C x 4 C matrix at a quarter of the
    picture's size, most of what B0 costs. Upsampling (whose weights sum to 1) commutes with linear
    layers, so here the two linear layers of a map are multiplied first, W_i = fuse_i linear_i, and
    applied at the map's own size: the same function of the same parameters, to rounding, and 13
    times fewer multiply-adds in B0's decoder.
    """

    def __init__(
        self, widths: Sequence[int], channels: int, classes: int = 1, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, channels) for width in widths)
        self.fuse = nn.Linear(channels * len(widths), channels, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.drop = KeyedDrop(dropout, channels)
        self.classify = nn.Conv2d(channels, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """[(B, widths[i], h_i, w_i), ...] -> (B, classes, h_0, w_0).

        Raises PathfmError when the maps are not as many, or not as wide, as it was built for.
        """
        wanted = [layer.in_features for layer in self.linears]
        if [x.shape[1] for x in maps] != wanted:
            raise PathfmError(
                f"a decoder of maps with {wanted} channels was given maps of shapes "
                f"{[tuple(x.shape) for x in maps]}: build it with their widths"
            )
        fused = self._fused(maps)
        out: Tensor = self.classify(self.drop(F.relu(self.norm(fused))))
        return out

    def _fused(self, maps: Sequence[Tensor]) -> Tensor:
        """fuse(concat(upsampled linear_i(map_i))), (B, C, h_0, w_0), without the concatenation."""
        size = maps[0].shape[-2:]
        with _without_autocast(maps[0].device):  # products of weights in fp32
            parts = self.fuse.weight.chunk(len(self.linears), dim=1)
            products = [p @ w for p, w in zip(parts, self._affine(), strict=True)]
            weights = [product[:, :-1, None, None] for product in products]
            bias = torch.stack([product[:, -1] for product in products]).sum(0)
        total = F.conv2d(maps[0], weights[0], bias)
        for x, weight in zip(maps[1:], weights[1:], strict=True):
            narrow = F.conv2d(x, weight)
            total = total + _upsampled(narrow, size)
        return total

    def _affine(self) -> list[Tensor]:
        """Each linear layer as one matrix (C, width + 1), its bias the last column."""
        return [
            torch.cat([layer.get_parameter("weight"), layer.get_parameter("bias")[:, None]], 1)
            for layer in self.linears
        ]


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context of full precision; tensors without memory know no autocast to be left."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _upsampled(x: Tensor, size: torch.Size) -> Tensor:
    """(B, C, h, w) bilinearly at another size; itself where it has that size."""
    if x.shape[-2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
