"""What the tests of views share: patches, tables that change one thing, both ways to make pixels."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pathfm.views.params import ViewSpec, ViewTable
from pathfm.views.render import make_views, render
from pathfm.views.resampling import Shape

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
PLAIN = ViewSpec(size_px=48, flip=0, turn=0, jitter=0, gray=0, blur=0)
EVERYTHING = ViewSpec(size_px=48, scale=(0.2, 0.9), solarize=0.5)
MIXED = [
    EVERYTHING,
    EVERYTHING.model_copy(update={"hed": 0.1, "restain": 0.6, "interpolation": "bicubic"}),
    ViewSpec(size_px=24),
    EVERYTHING.model_copy(update={"antialias": False, "hed": 0.05}),
]
DRAWS = np.arange(8) * 1_000_003


def some_patches(size_px: int = 96) -> Tensor:
    """Eight smooth-and-noisy uint8 patches (8, S, S, 3), not symmetric in anything."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, 3, 7, 7, generator=generator)
    noise = 0.1 * torch.randn(8, 3, size_px, size_px, generator=generator)
    picture = F.interpolate(coarse, size_px, mode="bicubic") + noise
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def table(n: int = 1, size: float = 96.0, **changes) -> ViewTable:
    """A table that changes nothing, with some of its fields changed."""
    neutral = dict.fromkeys(("brightness", "contrast", "saturation"), np.ones(n))
    neutral |= dict.fromkeys(("x", "y", "hue", "sigma_px"), np.zeros(n))
    neutral |= {"width": np.full(n, size), "height": np.full(n, size)}
    for name in ("flip_x", "flip_y", "transpose", "gray", "solarize"):
        neutral[name] = np.zeros(n, bool)
    neutral |= {"stain_scale": np.ones((n, 3)), "stain_shift": np.zeros((n, 3))}
    return ViewTable(**(neutral | {name: np.array([value] * n) for name, value in changes.items()}))


def planes(patches: Tensor) -> Tensor:
    """uint8 (B, S, S, 3) as float (B, 3, S, S) on 0..1."""
    return patches.permute(0, 3, 1, 2).float().div(255).contiguous()


def renderer(engine: str) -> Callable[..., Tensor]:
    """Views (n, 3, s, s) of float pictures (B, 3, S, S), made by one engine."""

    def made(image, drawn, size_px, mean=ZERO, std=ONE, **shape):
        groups = [(drawn, Shape(size_px, **shape))]
        (views,) = render(image.permute(0, 2, 3, 1), groups, mean, std, engine)
        return views

    return made


def views_of(patches, draws, specs, seed=3, engine="auto"):
    return make_views(patches, draws, specs, seed=seed, mean=ZERO, std=ONE, engine=engine)
