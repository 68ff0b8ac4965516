"""Where a thumbnail is not a picture of the slide: letterboxes, scan borders, black corners."""

from __future__ import annotations

import numpy as np

from pathfm.segmentation.synthetic.canvas import Canvas, Kind, f32


def lay_frame(c: Canvas) -> None:
    """Bars round the scanned part, mostly pure white; black corners; a scanner's marks."""
    if c.chance(0.32):
        _letterbox(c)
    if c.chance(0.07):
        corner = c.plane()[0] > c.between(0.75, 1.25)
        c.rgb[corner] = c.between(0, 12) if c.chance(0.7) else c.between(120, 255)
        c.mark(corner, Kind.FRAME, over_tissue=True)
    if c.chance(0.03):  # a vignette of an overview camera
        u, v = c.plane()
        dark = np.clip((np.hypot(u, v) - c.between(1.0, 1.3)) * c.between(1, 6), 0, 1)
        c.blend(f32([8, 8, 8]), dark)
        c.mark(dark > 0.5, Kind.FRAME, over_tissue=True)
    if c.chance(0.06):
        x, y = c.rng.integers(0, max(c.size - 8, 1), 2)
        mark = np.s_[y : y + int(c.between(2, 5)), x : x + int(c.between(2, 9))]
        c.rgb[mark], c.kinds[mark] = c.between(0, 40), Kind.FRAME


def _letterbox(c: Canvas) -> None:
    """White (now and then black or grey) bars on some sides, with or without a rim."""
    tone = float(c.rng.choice([255, 255, 255, 255, 254, 243, 0]))
    sides = {"wide": (0, 1), "tall": (2, 3), "all": (0, 1, 2, 3)}.get(
        c.pick("wide", "tall", "all", "some", p=(0.25, 0.25, 0.2, 0.3)),
        tuple(np.flatnonzero(c.rng.random(4) < 0.4)),
    )
    rim_px, rim = int(c.between(1, 10)), f32(c.rng.uniform(-4, 12) + c.rng.normal(0, 2, 3))
    line = c.between(60, 200) if c.chance(0.2) else None
    rimmed = c.chance(0.4)
    depths = {side: int(c.span(0.01, 0.35) * c.size) for side in sides}
    for side, depth in depths.items():
        if rimmed:  # where the scanned part ends it is dimmer, or not yet tinted
            c.rgb[_strip(side, depth + rim_px)] -= rim
        if line is not None:
            c.rgb[_strip(side, depth + 1)] = line
    for side, depth in depths.items():
        strip = _strip(side, depth)
        c.rgb[strip], c.kinds[strip] = tone, Kind.FRAME


def _strip(side: int, depth_px: int) -> tuple[slice, slice]:
    """The first or last rows (side 0, 1) or columns (side 2, 3) of a picture."""
    part = slice(-depth_px, None) if side % 2 else slice(depth_px)
    if depth_px == 0:
        part = slice(0, 0)
    return (part, slice(None)) if side < 2 else (slice(None), part)
