"""Batched augmentation of training crops, keyed by (seed, sample): other stains, lamps, cameras.

Pictures are (B, 3, h, w) float 0..1. Every choice comes from `online_patching.philox.words`, so a
sample looks the same in any batch, on any device (up to rounding).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from online_patching.philox import uniform, words
from pathfm.segmentation.jpeg import jpeg_artefacts
from pathfm.views.stain import DARKEST, HED, restaining

_STREAM, _NOISE_STREAM = 7301, 7302
_BLUR_TAPS = 9
_NOISE_PX = 512

# What haematoxylin, eosin and the rest may turn into when stains are exchanged; rows as above.
EXCHANGED = np.array(
    [
        [[0.65, 0.70, 0.29], [0.27, 0.57, 0.78], [0.27, 0.57, 0.78]],  # DAB on haematoxylin
        [[0.80, 0.55, 0.22], [0.20, 0.80, 0.56], [0.40, 0.60, 0.50]],  # Masson
        [[0.60, 0.60, 0.53], [0.20, 0.50, 0.84], [0.50, 0.60, 0.62]],  # silver
        [[0.85, 0.50, 0.17], [0.75, 0.60, 0.28], [0.60, 0.60, 0.50]],  # Giemsa, Luxol
        [[0.65, 0.70, 0.29], [0.30, 0.87, 0.40], [0.30, 0.80, 0.50]],  # PAS
        [[0.58, 0.60, 0.55], [0.56, 0.62, 0.55], [0.57, 0.59, 0.57]],  # elastin, iron: grey
    ]
)


@dataclass(frozen=True)
class AugmentSettings:
    """How strongly crops are changed. Chances are per crop; 0 everywhere changes nothing."""

    flips: bool = True
    stain_sd: float = 0.12  # of each stain's amount, relative
    stain_floor: float = 0.01  # half-width of what is added to each stain's amount
    exchange_chance: float = 0.12  # another stain altogether
    glass_chance: float = 0.5
    glass_grey: float = 0.12  # the glass darkens by up to this share in all channels
    glass_tint: float = 0.08  # and by up to this in each
    light_chance: float = 0.4
    light: float = 0.08  # half-width of the illumination's change over the crop
    gain: float = 0.05  # half-width, each channel
    gamma: float = 0.25  # half-width of log gamma
    blur_chance: float = 0.3
    blur_px: float = 1.6  # largest sigma
    sharpen_chance: float = 0.2
    sharpen: float = 1.5  # largest amount
    noise_chance: float = 0.4
    noise: float = 0.02  # largest sd, of 1
    jpeg_chance: float = 0.5
    jpeg_quality: tuple[int, int] = (35, 95)


NO_AUGMENTATION = AugmentSettings(
    False, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, (95, 95)
)  # fmt: skip


@dataclass(frozen=True)
class Choices:
    """What happens to each of B crops; arrays of B rows. A chance not taken has a neutral value."""

    turns: NDArray[np.int64]  # right angles, anticlockwise
    mirrored: NDArray[np.bool_]
    stain_scale: NDArray[np.float64]  # (B, 3)
    stain_shift: NDArray[np.float64]  # (B, 3)
    exchanged: NDArray[np.int64]  # row of EXCHANGED, or -1
    glass: NDArray[np.float64]  # (B, 3) factors
    light: NDArray[np.float64]  # (B, 3): along x, along y, towards the corners
    gain: NDArray[np.float64]  # (B, 3)
    gamma: NDArray[np.float64]  # (B,)
    sigma_px: NDArray[np.float64]  # (B,) of the blur
    sharpen: NDArray[np.float64]  # (B,) -1 is the blurred crop, 0 as it is, > 0 sharpened
    noise: NDArray[np.float64]  # (B,) sd
    noise_at: NDArray[np.int64]  # (B, 2) row, column in the tile of noise
    quality: NDArray[np.int64]  # (B,) JPEG quality; 0 is none


def choose(settings: AugmentSettings, seed: int, samples: ArrayLike) -> Choices:
    """The choices of each sample number: a pure function of (settings, seed, sample)."""
    s, n = settings, len(np.atleast_1d(np.asarray(samples)))
    u = uniform(words(seed, samples, 0, _STREAM, 40))
    # Irwin-Hall of 3 instead of a normal: bounded, so no crop is beyond recognition.
    bell = (u[:, 0:9].reshape(n, 3, 3).sum(axis=2) - 1.5) * 2
    side = 2 * u[:, 9:] - 1
    lit = (u[:, 30] < s.light_chance)[:, None]
    tinted = (u[:, 31] < s.glass_chance)[:, None]
    blurred = u[:, 32] < s.blur_chance
    sharp = ~blurred & (u[:, 32] < s.blur_chance + s.sharpen_chance)
    worst, best = s.jpeg_quality
    quality = worst + np.floor(u[:, 33] * (best - worst + 1)).astype(np.int64)
    return Choices(
        turns=np.floor(u[:, 28] * 4).astype(np.int64) * s.flips,
        mirrored=(u[:, 29] < 0.5) & s.flips,
        stain_scale=np.exp(s.stain_sd * bell),
        stain_shift=s.stain_floor * side[:, 0:3],
        exchanged=np.where(
            u[:, 34] < s.exchange_chance, np.floor(u[:, 35] * len(EXCHANGED)), -1
        ).astype(np.int64),
        glass=np.where(tinted, (1 - s.glass_grey * u[:, 36:37]) * (1 - s.glass_tint * u[:, 21:24]), 1),
        light=np.where(lit, s.light * side[:, 3:6], 0),
        gain=1 + s.gain * side[:, 6:9],
        gamma=np.exp(s.gamma * side[:, 9]),
        sigma_px=np.where(blurred, np.maximum(s.blur_px * u[:, 24], 0.2), 1.0),
        sharpen=np.where(blurred, -1.0, np.where(sharp, s.sharpen * u[:, 24], 0.0)),
        noise=np.where(u[:, 37] < s.noise_chance, s.noise * u[:, 25], 0),
        noise_at=np.floor(u[:, 26:28] * _NOISE_PX).astype(np.int64),
        quality=np.where(u[:, 38] < s.jpeg_chance, quality, 0),
    )  # fmt: skip


def augment(
    rgb: Tensor, masks: Tensor, settings: AugmentSettings, seed: int, samples: ArrayLike
) -> tuple[Tensor, Tensor]:
    """Changed pictures (B, 3, h, w) and masks (B, m, h, w), which follow every turn and flip.

    `samples` are B sample numbers. Crops are square where flips are on.
    """
    c = choose(settings, seed, samples)
    rgb, masks = turned(rgb, c), turned(masks, c)
    rgb = restained(rgb, c)
    rgb = lit(rgb, c)
    rgb = focused(rgb, c)
    rgb = noisy(rgb, c, seed)
    return compressed(rgb, c), masks


def turned(batch: Tensor, choices: Choices) -> Tensor:
    """Each of (B, c, h, w) turned by its right angles, then mirrored left to right."""
    out = torch.empty_like(batch)
    for k, (turns, mirrored) in enumerate(zip(choices.turns, choices.mirrored, strict=True)):
        one = torch.rot90(batch[k], int(turns), (1, 2)) if turns else batch[k]
        out[k] = one.flip(2) if mirrored else one
    return out


def restained(rgb: Tensor, choices: Choices) -> Tensor:
    """Stain amounts scaled and shifted, or given other colours, in optical density.

    Tellez et al., "Quantifying the effects of data augmentation and stain color normalization"
    (2019), section 3.2: deconvolve, a * stain + b, mix again. All is linear in optical density, so
    it is one 3x3 matrix and one shift a crop.
    """
    matrix, shift = _stain_matrices(choices)
    if np.allclose(matrix, np.eye(3)) and not shift.any():
        return rgb
    density = -torch.log(rgb.clamp(min=DARKEST))
    mixed = torch.bmm(_to(rgb, matrix.transpose(0, 2, 1)), density.flatten(2))
    density = mixed.view_as(rgb) + _to(rgb, shift)[:, :, None, None]
    return torch.exp(-density).clamp(0, 1)


def _stain_matrices(c: Choices) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(B, 3, 3) and (B, 3): a row of optical densities times the first, plus the second."""
    mixing = np.where((c.exchanged >= 0)[:, None, None], EXCHANGED[c.exchanged], HED)
    return restaining(c.stain_scale, c.stain_shift, mixing)


def lit(rgb: Tensor, choices: Choices) -> Tensor:
    """Glass colour, uneven light, gain of each channel and gamma."""
    c, (h, w) = choices, rgb.shape[2:]
    x = torch.linspace(-1, 1, w, device=rgb.device)[None, None, None]
    y = torch.linspace(-1, 1, h, device=rgb.device)[None, None, :, None]
    along_x, along_y, corners = _to(rgb, c.light)[:, :, None, None, None].unbind(1)
    light = 1 + along_x * x + along_y * y + corners * ((x * x + y * y) / 2 - 1 / 3)
    factors = _to(rgb, c.glass * c.gain)[:, :, None, None]
    return (rgb * light * factors).clamp(0, 1) ** _to(rgb, c.gamma)[:, None, None, None]


def focused(rgb: Tensor, choices: Choices) -> Tensor:
    """x + amount * (x - blurred x): out of focus at -1, sharpened above 0."""
    rows = np.flatnonzero(choices.sharpen)
    if not len(rows):
        return rgb
    part = rgb[_index(rgb, rows)]
    reach = _BLUR_TAPS // 2
    at = np.arange(-reach, reach + 1)
    taps = np.exp(-0.5 * (at / choices.sigma_px[rows, None]) ** 2)
    kernel = _to(rgb, taps / taps.sum(axis=1, keepdims=True)).repeat_interleave(3, 0)
    groups, (h, w) = len(kernel), rgb.shape[2:]
    flat = F.pad(part.reshape(1, groups, h, w), (reach,) * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=groups)
    blurred = F.conv2d(flat, kernel[:, None, :, None], groups=groups).view_as(part)
    out = rgb.clone()
    amount = _to(rgb, choices.sharpen[rows])[:, None, None, None]
    out[_index(rgb, rows)] = (part + amount * (part - blurred)).clamp(0, 1)
    return out


def noisy(rgb: Tensor, choices: Choices, seed: int) -> Tensor:
    """Normal noise of each crop's sd, cut from one tile of noise at the crop's place."""
    rows = np.flatnonzero(choices.noise)
    if not len(rows):
        return rgb
    tile = torch.from_numpy(_noise_tile(seed))
    h, w = rgb.shape[2:]
    out = rgb.clone()
    for row in rows.tolist():
        top, left = choices.noise_at[row]
        down = torch.arange(int(top), int(top) + h) % _NOISE_PX
        along = torch.arange(int(left), int(left) + w) % _NOISE_PX
        grain = tile[:, down][:, :, along].to(rgb.device)
        out[row] = (rgb[row] + float(choices.noise[row]) * grain).clamp(0, 1)
    return out


_tiles: dict[int, NDArray[np.float32]] = {}


def _noise_tile(seed: int) -> NDArray[np.float32]:
    """(3, 512, 512) standard normal numbers of a seed; kept, since every batch needs them."""
    if seed not in _tiles:
        _tiles.clear()
        u = uniform(words(seed, np.arange(3 * _NOISE_PX * _NOISE_PX // 2), 0, _NOISE_STREAM, 2))
        radius, angle = np.sqrt(-2 * np.log(1 - u[:, 0])), 2 * np.pi * u[:, 1]  # Box & Muller
        normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        _tiles[seed] = normal.reshape(3, _NOISE_PX, _NOISE_PX).astype(np.float32)
    return _tiles[seed]


def compressed(rgb: Tensor, choices: Choices) -> Tensor:
    """JPEG's marks, at each crop's quality."""
    rows = np.flatnonzero(choices.quality)
    if not len(rows):
        return rgb
    out = rgb.clone()
    index = _index(rgb, rows)
    out[index] = jpeg_artefacts(rgb[index], choices.quality[rows])
    return out


def _to(like: Tensor, values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, like.dtype)


def _index(like: Tensor, rows: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(rows).to(like.device)
