"""Marker on the slide: strokes, rings, loops, dots, letters; wet and opaque, or dry and streaky."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from pathfm.segmentation.synthetic.canvas import Array, Canvas, Kind, f32
from pathfm.segmentation.synthetic.strokes import Points, bristles, curve, ring, stroke

_INKS = f32([(20, 130, 95), (30, 70, 170), (25, 25, 28), (200, 25, 40), (0, 90, 60), (60, 120, 210),
     (225, 70, 70), (30, 30, 80), (210, 40, 90), (90, 40, 120), (40, 35, 20), (15, 160, 140),
     (20, 40, 110), (235, 190, 40)])  # fmt: skip

OPAQUE = 0.35
"""Ink that hides more than this share of what lies under it is not tissue, even over tissue."""


def lay_pen(c: Canvas) -> None:
    """Ink of one colour, now and then two; marks PEN on glass, and over tissue where opaque."""
    if not c.chance(0.4):
        return
    for _ in range(2 if c.chance(0.15) else 1):
        ink = _ink_colour(c)
        style = c.pick("strokes", "ring", "loops", "dots", "letters", p=(0.4, 0.2, 0.18, 0.1, 0.12))
        width = c.span(3, 30)
        if style == "ring":
            points = ring(c, c.size * c.between(0.2, 0.52), c.between(0, 0.5), c.between(0.6, 1.1))
            _ink(c, ink, points, min(width, 14))
        elif style == "loops":  # around what a pathologist wants cut out, mostly on tissue
            spots = np.argwhere(c.tissue)[:, ::-1]
            for _ in range(int(c.between(2, 13))):
                loop = ring(c, c.span(0.02, 0.09) * c.size, c.between(0, 0.6), c.between(0.8, 1.2))
                on = len(spots) and c.chance(0.8)
                to = spots[c.rng.integers(len(spots))] if on else c.rng.uniform(0, c.size, 2)
                _ink(c, ink, loop - loop.mean(axis=0) + to, c.span(2.5, 10))
        elif style == "dots":
            for _ in range(int(c.between(1, 7))):
                at = c.rng.uniform(0, c.size, 2)
                _ink(c, ink, np.stack([at, at + c.rng.normal(0, 2, 2)]), width)
        elif style == "letters":  # short strokes close together
            at = c.rng.uniform(0.1, 0.9, 2) * c.size
            for _ in range(int(c.between(3, 7))):
                points = at + np.cumsum(c.rng.normal(0, c.size / 25, (4, 2)), 0)
                _ink(c, ink, points, min(width, 7))
                at = at + np.array([c.size / 14, c.rng.normal(0, 3)])
        else:
            for _ in range(int(c.between(1, 4))):
                soft = c.between(0.5, 3) if c.chance(0.3) else 0.6
                _ink(c, ink, curve(c, c.between(0.2, 0.7)), width, soft)


def _ink_colour(c: Canvas) -> Array:
    """A marker's colour: a common one, or any strong hue, darker or lighter."""
    if c.chance(0.7):
        return f32(np.clip(_INKS[c.rng.integers(len(_INKS))] + c.rng.normal(0, 12, 3), 5, 250))
    channels = c.rng.permutation([0.0, c.between(0, 1), 1.0])
    dark = c.between(5, 90)
    return f32(dark + channels * c.between(60, 230 - dark))


def _ink(c: Canvas, ink: Array, points: Points, width_px: float, soft_px: float = 0.6) -> None:
    """One stroke laid on as dye: tissue shines through it as far as it is thin or streaky."""
    opacity = c.between(0.75, 0.98) if c.chance(0.7) else c.between(0.15, 0.7)
    dry = c.chance(0.4) and width_px >= 3
    whole = stroke(c, points, width_px, soft_px)
    if dry:
        alpha = bristles(c, points, width_px) * opacity
        if c.chance(0.5):  # a thin film between the streaks
            alpha = np.maximum(alpha, whole * c.between(0.05, 0.5))
    else:
        alpha = whole * opacity
        if c.chance(0.5):  # darker where ink has gathered
            alpha = alpha * np.clip(0.85 + 0.15 * c.noise(c.between(4, 20), 2), 0, 1)
    # Half as paint, half as a filter: what lies under ink darkens it.
    c.rgb *= 1 - alpha[..., None] * (1 - ink / 255) * np.float32(0.6)
    c.blend(ink, alpha * np.float32(0.85))
    # Truth has no speckles: a person draws a stroke, not its grain.
    hides = ndimage.uniform_filter(alpha, 5) if dry else whole * opacity
    c.mark(hides > OPAQUE, Kind.PEN, over_tissue=True)
    c.mark(alpha > 0.12, Kind.PEN)
