"""What is not tissue on a synthetic thumbnail: glass, stitching, dirt, ink, frames."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from pathfm.segmentation.synthetic.canvas import Array, Canvas, Kind, f32

_GLASS = f32([(246, 246, 246), (238, 238, 240), (240, 238, 252), (250, 250, 250), (249, 243, 224),
     (240, 232, 214), (232, 236, 244), (244, 238, 240), (226, 226, 228), (236, 244, 238)])  # fmt: skip


def lay_glass(c: Canvas) -> None:
    """Glass of some tint, with uneven light, grime, stains and seams."""
    base = _GLASS[c.rng.integers(len(_GLASS))] + c.rng.normal(0, 3, 3).astype(np.float32)
    c.rgb[:] = base
    if c.chance(0.6):  # uneven light
        c.rgb += (c.noise(c.size / 2, 1) * c.between(0.5, 4))[..., None]
    if c.chance(0.25):  # grime without colour or with a little
        speckle = np.maximum(c.noise(c.between(3, 12), 3) - c.between(0.3, 1.6), 0)
        c.rgb -= speckle[..., None] * c.rng.uniform(2, 14, 3).astype(np.float32)
    if c.chance(0.16):
        _smudges(c)
    if c.chance(0.35):
        _seams(c)


def _smudges(c: Canvas) -> None:
    """Pale stains on the glass with soft or sharp edges: mountant, drops of dye, finger marks."""
    field = c.noise(c.between(8, 45), 3) - c.between(1.0, 2.2)
    alpha = np.clip(field * c.between(1, 12), 0, 1) * c.between(0.2, 1)
    tint = np.float32(c.between(1, 7)) * (1 + c.rng.uniform(-0.5, 0.5, 3).astype(np.float32))
    c.rgb -= alpha[..., None] * tint


def _seams(c: Canvas) -> None:
    """Stitching: blocks of slightly other brightness, thin lines between some of them."""
    step = int(c.between(24, 150))
    x0, y0 = (int(c.between(0, step)) for _ in range(2))
    n = c.size // step + 2
    blocks = c.rng.normal(0, c.between(0.5, 3.5), (n, n, 1)).astype(np.float32)
    grown = blocks.repeat(step, 0).repeat(step, 1)
    c.rgb += grown[y0 : y0 + c.size, x0 : x0 + c.size]
    if c.chance(0.5):
        depth = c.between(1, 9)
        c.rgb[(np.arange(c.size) + y0) % step == 0] -= depth
        c.rgb[:, (np.arange(c.size) + x0) % step == 0] -= depth * c.between(0, 1)
    if c.chance(0.4):  # areas that were not scanned, filled with white
        blank = (c.rng.random((n, n, 1)) < 0.3).repeat(step, 0).repeat(step, 1)
        c.rgb[blank[y0 : y0 + c.size, x0 : x0 + c.size, 0]] = c.between(243, 255)


def _stroke(c: Canvas, points: NDArray[np.float64], width_px: float) -> Array:
    """(size, size) 0..1 coverage of a line through points (n, 2)."""
    picture = Image.new("L", (c.size, c.size))
    brush = ImageDraw.Draw(picture)
    brush.line([tuple(p) for p in points.tolist()], fill=255, width=max(1, round(width_px)))
    if width_px >= 3:
        for x, y in points.tolist():
            r = width_px / 2
            brush.ellipse((x - r, y - r, x + r, y + r), fill=255)
    blurred = picture.filter(ImageFilter.GaussianBlur(0.6))
    return f32(np.asarray(blurred, np.float32) / 255)


def _curve(c: Canvas, reach: float) -> NDArray[np.float64]:
    """(40, 2) points of a bent line somewhere in the picture."""
    start = c.rng.uniform(-0.1, 1.1, 2)
    end, bend = start + c.rng.normal(0, reach, 2), start + c.rng.normal(0, reach, 2)
    t = np.linspace(0, 1, 40)[:, None]
    return np.asarray(((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end) * c.size)


def lay_dirt(c: Canvas) -> None:
    """Dust, hairs, bubbles, the edge of a coverslip: none is tissue, little of it hides any."""
    if c.chance(0.6):
        picture = Image.new("L", (c.size, c.size))
        brush = ImageDraw.Draw(picture)
        for _ in range(int(c.between(1, 1 + 60 ** c.between(0.3, 1)))):
            x, y = c.rng.uniform(0, c.size, 2)
            rx, ry = c.rng.uniform(0.3, c.between(0.6, 5.0), 2)
            brush.ellipse((x - rx, y - ry, x + rx, y + ry), fill=int(c.between(90, 255)))
        tone = np.float32(c.between(20, 150)) + c.rng.normal(0, 14, 3).astype(np.float32)
        c.blend(tone, np.asarray(picture.filter(ImageFilter.GaussianBlur(0.5)), np.float32) / 255)
    for _ in range(int(c.between(1, 4)) if c.chance(0.2) else 0):
        tone = np.float32(c.between(60, 190)) + c.rng.normal(0, 10, 3).astype(np.float32)
        c.blend(tone, _stroke(c, _curve(c, 0.25), 1) * c.between(0.3, 0.9))
    for _ in range(int(c.between(1, 5)) if c.chance(0.15) else 0):
        u, v = c.plane()
        r = np.hypot(u - c.between(-1, 1), v - c.between(-1, 1)) - c.between(0.03, 0.4)
        ring = np.exp(-((r * c.size / 2 / c.between(0.7, 2)) ** 2))
        c.blend(f32([120, 120, 125]), ring * c.between(0.2, 0.8))
        c.rgb += ((r < 0) * c.between(-6, 4))[..., None].astype(np.float32)
    if c.chance(0.12):
        u, _ = c.plane()
        away = (u - c.between(-0.95, 0.95)) * c.size / 2
        line = np.exp(-((away / c.between(0.7, 2.5)) ** 2)) * c.between(0.2, 0.9)
        c.blend(np.float32(c.between(40, 170)), line)
        c.rgb -= (np.float32(c.between(0, 14)) * (away > 0))[..., None]


_INKS = f32([(20, 130, 95), (30, 70, 170), (25, 25, 28), (200, 25, 40), (0, 90, 60), (60, 120, 210),
     (225, 70, 70), (30, 30, 80), (210, 40, 90), (90, 40, 120)])  # fmt: skip


def lay_ink(c: Canvas) -> None:
    """Marker: often along the tissue, sometimes over it, sometimes dry and streaky."""
    if not c.chance(0.3):
        return
    ink = _INKS[c.rng.integers(len(_INKS))] + c.rng.normal(0, 12, 3).astype(np.float32)
    for _ in range(int(c.between(1, 4))):
        alpha = _stroke(c, _curve(c, c.between(0.2, 0.7)), c.between(3, 26))
        opacity = c.between(0.5, 0.97)
        if c.chance(0.4):  # a dry pen: tissue shows through and stays tissue
            alpha = alpha * np.clip(0.6 + 0.5 * c.noise(c.between(2, 8), 2), 0, 1)
        else:
            c.mark(alpha * opacity > 0.6, Kind.PEN, over_tissue=True)
        c.blend(ink, alpha * opacity)


def lay_frame(c: Canvas) -> None:
    """Letterboxes of pure white, black scanner padding, tilted black corners, scan marks."""
    if c.chance(0.22):
        tone = float(c.rng.choice([255, 255, 255, 0, 240]))
        for side in range(4):
            if c.chance(0.5):
                depth = int(c.between(0.02, 0.35) * c.size)
                if c.chance(0.5):  # a rim where the scanned part ends
                    rim = _strip(side, depth + int(c.between(1, 14)))
                    c.rgb[rim] -= c.rng.uniform(-3, 14, 3).astype(np.float32)
                c.rgb[_strip(side, depth)] = tone
                c.kinds[_strip(side, depth)] = Kind.FRAME
    if c.chance(0.07):
        u, _ = c.plane()
        corner = u > c.between(0.75, 1.25)
        c.rgb[corner] = c.between(0, 12) if c.chance(0.7) else c.between(120, 190)
        c.kinds[corner] = Kind.FRAME
    if c.chance(0.08):
        x, y = c.rng.integers(0, c.size - 8, 2)
        c.rgb[y : y + 3, x : x + 7] = 10
        c.kinds[y : y + 3, x : x + 7] = Kind.FRAME


def _strip(side: int, depth_px: int) -> tuple[slice, slice]:
    """The first or last rows (side 0, 1) or columns (side 2, 3) of a picture."""
    part = slice(-depth_px, None) if side % 2 else slice(depth_px)
    return (part, slice(None)) if side < 2 else (slice(None), part)
