"""Mix transformers: the encoder of SegFormer, from pictures of any size to four feature maps.

Xie et al. 2021, "SegFormer" (arXiv 2105.15203), section 3.1. Stage i merges overlapping patches
(a strided convolution) and runs transformer blocks whose keys and values come from a sequence
shortened by sr x sr, and whose MLP holds a 3 x 3 depth-wise convolution instead of any positional
encoding. For comparison a position can be given by learned embeddings instead, or not at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathfm.runtime import PathfmError
from pathfm.segmentation.segformer.keyed import KeyedDrop

Positional = Literal["mix_ffn", "embedding", "none"]
STRIDES = (4, 8, 16, 32)
"""Pixels of the picture a cell of each stage's map stands for."""
MLP_RATIO = 4  # in every preset; the paper's table says 8 for early stages, its weights say 4


@dataclass(frozen=True)
class MixSettings:
    """An encoder's shape, stage by stage.

    widths: channels. depths: blocks. heads: attention heads. reductions: sr, so that keys and
    values are a sequence R = sr ** 2 times shorter. drop_path: the rate of the last block, rising
    linearly from 0. positional: where a block learns where it is. embedding_px: side of the
    pictures the position embeddings are stored for; other sizes are interpolated.
    Raises PathfmError for stages that are not four or do not fit each other.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    heads: tuple[int, ...] = (1, 2, 5, 8)
    reductions: tuple[int, ...] = (8, 4, 2, 1)
    drop_path: float = 0.0
    positional: Positional = "mix_ffn"
    embedding_px: int = 224

    def __post_init__(self) -> None:
        stages = (self.widths, self.depths, self.heads, self.reductions)
        if any(len(values) != len(STRIDES) for values in stages):
            raise PathfmError(
                f"a mix transformer has {len(STRIDES)} stages, these settings: {self}"
            )
        if any(width % heads for width, heads in zip(self.widths, self.heads, strict=True)):
            raise PathfmError(f"widths {self.widths} are no multiples of the heads {self.heads}")
        if self.positional not in get_args(Positional):
            known = ", ".join(get_args(Positional))
            raise PathfmError(f"positional = {self.positional!r}: wants one of {known}")


def to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, h * w, C) -> (B, C, h, w), a view."""
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C), a view."""
    return x.flatten(2).transpose(1, 2)


class EfficientAttention(nn.Module):
    """Self-attention on (B, h * w, C) whose keys and values are sr x sr times fewer (eq. 2).

    The shortening is a convolution of kernel = stride = sr and a layer norm. Rows and columns past
    the last whole sr x sr square give queries but no keys, as in the published models; a map that
    is smaller than sr is repeated at its edge until one square fits.
    """

    def __init__(self, width: int, heads: int, reduction: int) -> None:
        super().__init__()
        self.heads, self.reduction = heads, reduction
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        if reduction > 1:
            self.shorten = nn.Conv2d(width, width, reduction, stride=reduction)
            self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(B, h * w, C) -> (B, h * w, C)."""
        fewer = self._fewer(tokens, height, width) if self.reduction > 1 else tokens
        q, k, v = (
            layer(source).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for layer, source in ((self.query, tokens), (self.key, fewer), (self.value, fewer))
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def _fewer(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """The shortened sequence, (B, floor(h / sr) * floor(w / sr), C), at least one long."""
        x = to_map(tokens, height, width)
        right, below = max(0, self.reduction - width), max(0, self.reduction - height)
        if right or below:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        shorter: Tensor = self.norm(to_tokens(self.shorten(x)))
        return shorter


class MixFeedForward(nn.Module):
    """MLP(GELU(Conv3x3(MLP(x)))) on (B, h * w, C), depth-wise convolution, zero-padded (eq. 3).

    `mixes` False leaves the convolution out: a plain transformer's MLP.
    """

    def __init__(self, width: int, mixes: bool = True) -> None:
        super().__init__()
        inner = MLP_RATIO * width
        self.wide, self.narrow = nn.Linear(width, inner), nn.Linear(inner, width)
        self.mix = nn.Conv2d(inner, inner, 3, padding=1, groups=inner) if mixes else None

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(B, h * w, C) -> (B, h * w, C)."""
        x = self.wide(tokens)
        if self.mix is not None:
            x = to_tokens(self.mix(to_map(x, height, width)))
        out: Tensor = self.narrow(F.gelu(x))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)), each branch dropped at `drop_path`."""

    def __init__(
        self, width: int, heads: int, reduction: int, drop_path: float, mixes: bool
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = EfficientAttention(width, heads, reduction)
        self.feed_forward = MixFeedForward(width, mixes)
        self.drop1, self.drop2 = KeyedDrop(drop_path), KeyedDrop(drop_path)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(B, h * w, C) -> (B, h * w, C)."""
        tokens = tokens + self.drop1(self.attention(self.norm1(tokens), height, width))
        out: Tensor = tokens + self.drop2(self.feed_forward(self.norm2(tokens), height, width))
        return out


class Stage(nn.Module):
    """Overlapped patch merging, blocks, a last norm: (B, cin, h, w) -> (B, C, h / s, w / s), up.

    rates: drop path of each block. cells: side of the stored grid of position embeddings, 0: none.
    """

    def __init__(
        self, source: int, settings: MixSettings, number: int, rates: list[float], cells: int
    ) -> None:
        super().__init__()
        width = settings.widths[number]
        kernel, stride = (7, 4) if number == 0 else (3, 2)
        self.merge = nn.Conv2d(source, width, kernel, stride, padding=kernel // 2)
        self.merge_norm = nn.LayerNorm(width)
        self.embedding = nn.Parameter(torch.zeros(1, width, cells, cells)) if cells else None
        heads, reduction = settings.heads[number], settings.reductions[number]
        mixes = settings.positional == "mix_ffn"
        self.blocks = nn.ModuleList(Block(width, heads, reduction, r, mixes) for r in rates)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, cin, h, w) -> (B, C, ceil(h / s), ceil(w / s)), s = 4 in the first stage, else 2."""
        x = self.merge(x)
        height, width = x.shape[-2:]
        tokens = self.merge_norm(to_tokens(x))
        if self.embedding is not None:
            tokens = tokens + to_tokens(_resized(self.embedding, height, width))
        for block in self.blocks:
            tokens = block(tokens, height, width)
        return to_map(self.norm(tokens), height, width)


def _resized(grid: Tensor, height: int, width: int) -> Tensor:
    """Position embeddings (1, C, n, n) for another map, bicubic; itself where the size is its own."""
    if grid.shape[-2:] == (height, width):
        return grid
    return F.interpolate(grid, (height, width), mode="bicubic", align_corners=False, antialias=True)


class MixTransformer(nn.Module):
    """Four feature maps of a picture, at 1/4, 1/8, 1/16 and 1/32 of its size, rounded up.

    In: (B, 3, h, w), normalised, any h, w >= 1. Out: a list of (B, widths[i], h_i, w_i).
    """

    def __init__(self, settings: MixSettings) -> None:
        super().__init__()
        self.settings = settings
        blocks = sum(settings.depths)
        rates = [settings.drop_path * k / max(1, blocks - 1) for k in range(blocks)]
        sources = (3, *settings.widths[:-1])
        self.stages = nn.ModuleList()
        for number, (source, depth) in enumerate(zip(sources, settings.depths, strict=True)):
            cells = -(-settings.embedding_px // STRIDES[number])
            cells = cells if settings.positional == "embedding" else 0
            self.stages.append(Stage(source, settings, number, rates[:depth], cells))
            rates = rates[depth:]

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, h, w) -> the maps of all stages, finest first."""
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps
