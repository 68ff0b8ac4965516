"""Where tissue lies: outlines of specimens, biopsies, rings, fragments, smears."""

from __future__ import annotations

import numpy as np

from pathfm.segmentation.synthetic.canvas import Array, Canvas, f32

SHAPES = ("blob", "pieces", "band", "ring", "cores", "villi", "smear", "full", "empty")
_CHANCES = (0.32, 0.11, 0.10, 0.09, 0.06, 0.07, 0.07, 0.12, 0.06)


def draw_outline(c: Canvas) -> tuple[Array, str]:
    """Distance to the border in px, roughly, > 0 on tissue, and the shape's name."""
    shape = c.pick(*SHAPES, p=_CHANCES)
    half = c.size / 2
    if shape == "empty":
        return np.full((c.size, c.size), -999.0, np.float32), shape
    if shape == "full":
        return np.full((c.size, c.size), 999.0, np.float32), shape
    if shape == "smear":
        film = c.between(-0.1, 2.2) - c.plane()[0] + 0.15 * c.noise(60, 3)
        return f32(film * half), shape
    signed = _bodies(c, shape)
    rough = c.noise(c.span(40, 160), 2) * c.between(0.02, 0.1)
    ragged = c.noise(c.span(5, 22), 3) * c.span(0.002, 0.03)
    signed = signed + rough + ragged
    if shape == "villi":  # fingers and folds at the border
        fingers = 1 - 2.2 * np.abs(c.noise(c.span(5, 14), 2))
        signed = f32(np.minimum(signed, 0.14) + fingers * c.between(0.05, 0.12))
    elif shape in ("blob", "pieces") and c.chance(0.4):  # cut with a knife
        for _ in range(int(c.between(1, 4))):
            signed = np.minimum(signed, c.between(0.25, 0.75) - c.plane()[0])
    return np.asarray(signed * half, np.float32), shape


def _bodies(c: Canvas, shape: str) -> Array:
    """One or many bodies, in units of half the picture."""
    signed = np.full((c.size, c.size), -9.0, np.float32)
    few = 2 if c.chance(0.35) else 1
    count = {"pieces": int(c.span(2, 14)), "cores": int(c.between(5, 16))}.get(shape, few)
    if shape in ("ring", "band"):
        count = 1
    warp_x, warp_y = (c.noise(c.span(60, 200), 1) * c.between(0, 0.12) for _ in range(2))
    spread = 0.35 if count <= 2 else 0.95
    for _ in range(count):
        u, v = c.plane()
        cx, cy = c.between(-spread, spread), c.between(-spread, spread)
        rx, ry = _radii(c, shape)
        u, v = f32(u + warp_x - cx), f32(v + warp_y - cy)
        bend = c.between(-0.4, 0.4) * u**2 if shape == "band" else 0
        inner = f32((1 - np.hypot(u / rx, (v + bend) / ry)) * min(rx, ry))
        if shape == "ring":
            wall = c.between(0.05, 0.2) * (1 + 0.35 * c.noise(c.between(20, 60), 2))
            inner = f32(wall - np.abs(inner))
            if c.chance(0.3):  # torn open
                inner = f32(np.minimum(inner, np.hypot(u - rx, v) - c.between(0.1, 0.5)))
        signed = f32(np.maximum(signed, inner))
    return signed


def _radii(c: Canvas, shape: str) -> tuple[float, float]:
    if shape in ("blob", "villi"):
        return c.between(0.35, 1.1), c.between(0.3, 0.95)
    if shape == "band":
        return c.between(0.8, 2.5), c.span(0.03, 0.3)
    if shape == "ring":
        return c.between(0.4, 0.95), c.between(0.3, 0.8)
    if shape == "cores":
        r = c.between(0.08, 0.2)
        return r, r * c.between(0.85, 1.15)
    return c.span(0.04, 0.35), c.span(0.03, 0.28)
