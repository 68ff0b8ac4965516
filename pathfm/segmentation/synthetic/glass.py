"""Glass of every tint, unevenly lit, stitched, and not quite clean."""

from __future__ import annotations

import numpy as np

from pathfm.segmentation.synthetic.canvas import Canvas, f32

_GLASS = f32([(246, 246, 246), (252, 252, 252), (241, 241, 242), (240, 238, 250), (243, 240, 247),
     (249, 243, 224), (240, 232, 214), (246, 241, 232), (232, 236, 244), (236, 240, 243),
     (244, 238, 240), (226, 226, 228), (236, 241, 237), (214, 214, 218), (235, 225, 195)])  # fmt: skip


def lay_glass(c: Canvas) -> None:
    """Glass of some tint, with uneven light, grime, stains and seams."""
    tone = _GLASS[c.rng.integers(len(_GLASS))] + f32(c.rng.normal(0, 3, 3))
    if c.chance(0.2):  # any tint, as strong as old mountant or a badly balanced camera make it
        tone = f32(c.between(225, 255) - c.rng.uniform(0, 34, 3))
    c.rgb[:] = np.clip(tone, 0, 255)
    if c.chance(0.5):  # uneven light
        c.rgb += (c.noise(c.size / 2, 1) * c.between(0.5, 4))[..., None]
    if c.chance(0.3):  # a gradient across the slide
        c.rgb += (c.plane()[0] * c.between(0, 9))[..., None] * f32(c.rng.uniform(0.7, 1.3, 3))
    if c.chance(0.22):  # grime without colour or with a little
        speckle = np.maximum(c.noise(c.between(2, 12), 3) - c.between(0.3, 1.6), 0)
        c.rgb -= speckle[..., None] * f32(c.rng.uniform(2, 14) + c.rng.normal(0, 1.5, 3))
    if c.chance(0.2):
        _smudges(c)
    if c.chance(0.4):
        _seams(c)


def _smudges(c: Canvas) -> None:
    """Pale stains on the glass with soft or sharp edges: mountant, drops of dye, finger marks."""
    field = c.noise(c.between(8, 60), 3, stretch=c.between(1, 3)) - c.between(0.8, 2.0)
    alpha = np.clip(field * c.between(1, 12), 0, 1) * c.between(0.2, 1)
    tint = np.float32(c.between(1, 9)) * (1 + f32(c.rng.uniform(-0.5, 0.5, 3)))
    c.rgb -= alpha[..., None] * tint


def _seams(c: Canvas) -> None:
    """Stitching: blocks or stripes of slightly other brightness, lines between, blanks."""
    step = int(c.between(24, 150))
    x0, y0 = (int(c.between(0, step)) for _ in range(2))
    n = c.size // step + 2
    blocks = f32(c.rng.normal(0, c.between(0.5, 3.5), (n, n, 1)))
    stripes = c.chance(0.35)  # a line scanner
    if stripes:
        blocks = np.broadcast_to(blocks[:1], blocks.shape)
    grown = blocks.repeat(step, 0).repeat(step, 1)
    c.rgb += grown[y0 : y0 + c.size, x0 : x0 + c.size]
    if c.chance(0.3):  # each block is darker towards its own border
        across = np.abs((np.arange(c.size) + x0) % step / step - 0.5) ** 2 * c.between(2, 24)
        c.rgb -= f32(across)[None, :, None]
    if c.chance(0.5):
        depth = c.between(1, 9)
        c.rgb[:, (np.arange(c.size) + x0) % step == 0] -= depth
        if not stripes:
            c.rgb[(np.arange(c.size) + y0) % step == 0] -= depth * c.between(0, 1)
    if not stripes and c.chance(0.35):  # areas that were not scanned, filled with white
        blank = (c.rng.random((n, n, 1)) < 0.3).repeat(step, 0).repeat(step, 1)
        c.rgb[blank[y0 : y0 + c.size, x0 : x0 + c.size, 0]] = c.between(243, 255)
