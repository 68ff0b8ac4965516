"""Lines drawn on a canvas: coverage of strokes, curves and rings."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from pathfm.segmentation.synthetic.canvas import Array, Canvas, f32

Points = NDArray[np.float64]


def stroke(c: Canvas, points: Points, width_px: float, soft_px: float = 0.6) -> Array:
    """(size, size) 0..1 coverage of a line through points (n, 2), x before y."""
    picture = Image.new("L", (c.size, c.size))
    brush = ImageDraw.Draw(picture)
    brush.line([tuple(p) for p in points.tolist()], fill=255, width=max(1, round(width_px)))
    if width_px >= 3:
        r = width_px / 2
        for x, y in points.tolist():
            brush.ellipse((x - r, y - r, x + r, y + r), fill=255)
    soft = picture.filter(ImageFilter.GaussianBlur(soft_px))
    return f32(np.asarray(soft, np.float32) / 255)


def bristles(c: Canvas, points: Points, width_px: float) -> Array:
    """(size, size) 0..1 coverage of a dry stroke: parallel streaks that begin and end anywhere."""
    picture = Image.new("L", (c.size, c.size))
    brush = ImageDraw.Draw(picture)
    ahead = np.gradient(points, axis=0)
    normal = np.stack([-ahead[:, 1], ahead[:, 0]], 1) / (np.hypot(*ahead.T)[:, None] + 1e-9)
    full = c.between(0.35, 0.85)
    for offset in np.arange(-width_px / 2, width_px / 2, 1.6):
        line = points + normal * (offset + c.rng.normal(0, 0.4))
        start = 0
        while start < len(line) - 1:
            stop = start + 2 + int(c.rng.exponential(0.35 * len(line)))
            if c.chance(full):
                part = [tuple(p) for p in line[start : stop + 1].tolist()]
                brush.line(part, fill=int(c.between(110, 255)), width=2)
            start = stop
    soft = picture.filter(ImageFilter.GaussianBlur(0.6))
    return f32(np.asarray(soft, np.float32) / 255)


def curve(c: Canvas, reach: float) -> Points:
    """(40, 2) points of a bent line somewhere in the picture; `reach` in pictures."""
    start = c.rng.uniform(-0.1, 1.1, 2)
    end, bend = start + c.rng.normal(0, reach, 2), start + c.rng.normal(0, reach, 2)
    t = np.linspace(0, 1, 40)[:, None]
    return np.asarray(((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end) * c.size)


def ring(c: Canvas, radius_px: float, wobble: float, turns: float = 1.0) -> Points:
    """(80, 2) points of a bent ellipse about the middle, `turns` of it drawn."""
    t = c.between(0, 2 * np.pi) + np.linspace(0, 2 * np.pi * turns, 80)
    r = radius_px * np.ones(80)
    for k in (2, 3, 5):
        r *= 1 + wobble / k * c.between(-1, 1) * np.sin(k * t + c.between(0, 6.3))
    middle = c.size / 2 + c.rng.normal(0, 0.12, 2) * c.size
    return np.stack([np.cos(t) * r + middle[0], np.sin(t) * r * c.between(0.6, 1) + middle[1]], 1)
