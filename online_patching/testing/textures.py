"""Periodic textures and the shapes of nuclei: what a drawing is stamped and woven from.

The same for every slide, made once a process from Philox words.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from online_patching.philox import uniform, words
from online_patching.testing.layout import KINDS, SPRITES_PER_KIND, STREAM, Array, f32

TEXEL_UM = 0.25
_TABLE_PX = 1024


def gather(
    table: Array, x_um: NDArray[np.float64], y_um: NDArray[np.float64], texel_um: float
) -> Array:
    """(h, w) of a periodic table at places in µm, nearest texel."""
    i = np.floor(y_um / texel_um).astype(np.int64) % table.shape[0]
    j = np.floor(x_um / texel_um).astype(np.int64) % table.shape[1]
    return f32(table.take(i, axis=0).take(j, axis=1))


# Per kind: radius and its spread (µm), elongation, haematoxylin, chromatin contrast, softness (µm).
_LOOK_OF_KIND = {
    "tumour": (4.4, 1.0, 1.35, 0.95, 0.55, 0.8),
    "spindle": (3.3, 0.6, 2.9, 1.10, 0.25, 0.7),
    "lymphocyte": (2.9, 0.3, 1.10, 1.50, 0.30, 0.6),
    "debris": (1.4, 0.6, 1.30, 1.40, 0.10, 0.5),
}


@lru_cache(maxsize=16)
def nucleus_sprites(mpp: float) -> tuple[Array, ...]:
    """One square array of haematoxylin a nucleus shape, at `mpp`; same for every slide."""
    grain = tables()["grain"]
    u = uniform(words(0, np.arange(len(KINDS) * SPRITES_PER_KIND), 0, STREAM["sprite"], 6))
    sprites = []
    for number, draw in enumerate(u):
        radius, spread, stretch, dark, contrast, soft = _LOOK_OF_KIND[
            KINDS[number // SPRITES_PER_KIND]
        ]
        radius_um = radius + spread * (2 * draw[0] - 1)
        stretch = stretch * (1 + 0.25 * (draw[1] - 0.5))
        long_um, short_um = radius_um * np.sqrt(stretch), radius_um / np.sqrt(stretch)
        half_px = int(np.ceil((long_um + soft) / mpp))
        at = np.arange(-half_px, half_px + 1) * mpp
        cos, sin = np.cos(draw[2] * np.pi), np.sin(draw[2] * np.pi)
        along, across = at[None] * cos + at[:, None] * sin, at[:, None] * cos - at[None] * sin
        angle = np.arctan2(across, along)
        wobble = 1 + 0.08 * np.sin(3 * angle + 6.3 * draw[3]) + 0.06 * np.sin(2 * angle + draw[4])
        gap_um = (1 - np.hypot(along / long_um, across / short_um) / wobble) * short_um
        # A pixel wider than the rim sees only part of it: soften by the pixel, keep the mass.
        inside = np.clip(gap_um / max(soft, mpp) + 0.5, 0, 1)
        rim = np.exp(-((gap_um / 0.9) ** 2)) * contrast
        chromatin = gather(grain, at + 97.0 * draw[3], at + 61.0 * draw[4], TEXEL_UM * 0.7)
        value = (
            dark * (1 + 0.3 * (draw[5] - 0.5)) * (1 + contrast * (0.30 * chromatin - 0.25)) + rim
        )
        sprites.append(np.asarray(np.maximum(value, 0.2) * inside, np.float32))
    return tuple(sprites)


@lru_cache(maxsize=1)
def tables() -> dict[str, Array]:
    """Periodic textures, (1024, 1024) each, mean 0 and sd 1 (wall: 0..1; noise: grey levels)."""
    n = _TABLE_PX
    white = uniform(words(0, np.arange(n), 0, STREAM["texture"], n)) - 0.5
    waves = np.fft.rfft2(white)
    fy, fx = np.fft.fftfreq(n)[:, None] / TEXEL_UM, np.fft.rfftfreq(n)[None] / TEXEL_UM

    def filtered(gain: NDArray[np.float64]) -> Array:
        made = np.fft.irfft2(waves * gain, s=(n, n))
        made = (made - made.mean()) / made.std()
        return f32(np.clip(made, -2.5, 2.5))

    radial = np.hypot(fx, fy)
    grain = filtered(np.exp(-((radial * 1.9) ** 2)) * (1 - np.exp(-((radial * 9.0) ** 2))))
    streaks = filtered(
        np.exp(-((fx * 22.0) ** 2) - (fy * 2.2) ** 2) * (1 - np.exp(-((fy * 14.0) ** 2)))
    )
    t = np.arange(n) * (2 * np.pi / n)
    bent = np.rint(22 * np.sin(3 * t) + 9 * np.sin(7 * t + 1)).astype(np.int64)
    rows = (np.arange(n)[:, None] + bent[None]) % n
    fibre = np.take_along_axis(streaks, rows, axis=0)
    return {
        "grain": grain,
        "fibre": fibre,
        "crossing": np.ascontiguousarray(fibre.T[::-1]),
        "wall": _fat_walls(),
        "noise": (white * 5.0).astype(np.float32),
    }


def _fat_walls() -> Array:
    """Walls between fat cells, 1 on a wall and 0 within: a Voronoi diagram on a torus of 512 µm."""
    n, cells = _TABLE_PX, 9
    jitter = uniform(words(0, np.arange(cells * cells), 1, STREAM["texture"], 2))
    jitter = jitter.reshape(cells, cells, 2)
    at = (np.arange(n) + 0.5) * (cells / n)
    row = np.floor(at).astype(np.int64)
    near = np.full((n, n), np.inf, np.float32)
    second = near.copy()
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            i, j = row + di, row + dj
            seat = jitter[np.ix_(i % cells, j % cells)]
            gap = np.hypot(
                at[:, None] - i[:, None] - 0.15 - 0.7 * seat[..., 0],
                at[None] - j[None] - 0.15 - 0.7 * seat[..., 1],
            ).astype(np.float32)
            second = np.minimum(second, np.maximum(near, gap))
            near = np.minimum(near, gap)
    gap_um = (second - near) * np.float32(0.5 * n / cells)
    return np.asarray(np.exp(-((gap_um / 2.6) ** 2)), np.float32)
