"""What lies on slides that is neither tissue nor ink: dust, hairs, bubbles, edges of coverslips."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from pathfm.segmentation.synthetic.canvas import Array, Canvas, Kind, f32
from pathfm.segmentation.synthetic.strokes import curve, stroke


def lay_artefacts(c: Canvas) -> None:
    """Dust, hairs, bubbles and coverslip edges, each now and then; over tissue it stays tissue."""
    if c.chance(0.6):
        _dust(c)
    if c.chance(0.15):
        _dirt(c)
    for _ in range(int(c.between(1, 5)) if c.chance(0.22) else 0):
        _hair(c)
    if c.chance(0.22):
        _bubbles(c)
    if c.chance(0.2):
        _coverslip(c)


def _dust(c: Canvas) -> None:
    picture = Image.new("L", (c.size, c.size))
    brush = ImageDraw.Draw(picture)
    for _ in range(int(c.span(1, 60))):
        x, y = c.rng.uniform(0, c.size, 2)
        rx, ry = c.rng.uniform(0.3, c.between(0.6, 4.0), 2)
        if c.chance(0.3):  # a flake
            corners = [(x + c.rng.normal(0, rx), y + c.rng.normal(0, rx)) for _ in range(4)]
            brush.polygon(corners, fill=int(c.between(90, 255)))
        else:
            brush.ellipse((x - rx, y - ry, x + rx, y + ry), fill=int(c.between(90, 255)))
    tone = np.float32(c.between(15, 150)) + f32(c.rng.normal(0, 14, 3))
    alpha = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.5)), np.float32) / 255
    c.blend(tone, alpha)
    c.mark(alpha > 0.25, Kind.DUST)


def _dirt(c: Canvas) -> None:
    """A dirty slide: very many specks of one origin, strewn evenly or in drifts, fine to coarse."""
    picture = Image.new("L", (c.size, c.size))
    brush = ImageDraw.Draw(picture)
    most = c.span(0.8, 4.5)  # px, radius of the largest
    count = int(c.span(60, 1200) * min(1.0, 4 / most**2))
    drifts = c.rng.uniform(0, c.size, (int(c.between(1, 6)), 2))
    spread = c.span(0.05, 0.3) * c.size
    even = c.chance(0.5)
    for _ in range(count):
        near = drifts[int(c.rng.integers(len(drifts)))] + c.rng.normal(0, spread, 2)
        x, y = c.rng.uniform(0, c.size, 2) if even else near
        rx, ry = np.exp(c.rng.uniform(np.log(0.4), np.log(most), 2))
        depth = int(c.between(80, 255))
        if c.chance(0.4):
            corners = [(x + c.rng.normal(0, rx), y + c.rng.normal(0, ry)) for _ in range(5)]
            brush.polygon(corners, fill=depth)
        else:
            brush.ellipse((x - rx, y - ry, x + rx, y + ry), fill=depth)
    soft = picture.filter(ImageFilter.GaussianBlur(c.between(0.3, 1.0)))
    alpha = np.asarray(soft, np.float32) / 255 * c.between(0.35, 1)
    c.blend(np.float32(c.between(5, 140)) + f32(c.rng.normal(0, 16, 3)), alpha)
    c.mark(alpha > 0.2, Kind.DUST)


def _hair(c: Canvas) -> None:
    """A hair or a fibre of cloth: thin, bent, of any colour."""
    tone = np.float32(c.between(40, 190)) + f32(c.rng.normal(0, 25, 3))
    alpha = stroke(c, curve(c, c.between(0.1, 0.35)), c.between(1, 2.4), 0.5) * c.between(0.3, 0.95)
    c.blend(tone, alpha)
    c.mark(alpha > 0.2, Kind.DUST)


def _bubbles(c: Canvas) -> None:
    """Air under the coverslip: alone, in chains, in foam; round when small, bent when big."""
    style = c.pick("few", "chain", "foam", "big", p=(0.4, 0.2, 0.15, 0.25))
    contrast = c.span(0.15, 0.9)
    if style == "big":
        u, v = c.plane()
        r = np.hypot(u - c.between(-0.8, 0.8), (v - c.between(-0.8, 0.8)) * c.between(0.6, 1.6))
        away = (c.between(0.15, 0.7) - r + c.between(0.02, 0.15) * c.noise(c.span(40, 120), 2)) / 2
        _bubble(c, np.asarray(away * c.size, np.float32), contrast)
        return
    count = {"few": int(c.between(1, 6)), "chain": int(c.between(4, 12))}.get(style, 25)
    at, step = c.rng.uniform(0.05, 0.95, 2) * c.size, c.rng.normal(0, 1, 2)
    step = step / np.hypot(*step)
    field = np.full((c.size, c.size), -999.0, np.float32)
    y, x = np.ogrid[0 : c.size, 0 : c.size]
    largest = {"few": 60.0, "chain": 14.0}.get(style, 12.0)
    for _ in range(count):
        radius = c.span(2.5, largest)
        if style == "few":
            at = c.rng.uniform(0, c.size, 2)
        elif style == "chain":
            at = at + step * radius * 2.2 + c.rng.normal(0, 2, 2)
        else:
            at = at + c.rng.normal(0, 12, 2)
        squeeze = c.between(0.85, 1.15)
        one = np.float32(radius) - np.hypot(x - at[0], (y - at[1]) * squeeze).astype(np.float32)
        field = np.maximum(field, one)
    _bubble(c, field, contrast)


def _bubble(c: Canvas, away: Array, contrast: float) -> None:
    """Bubbles from their distance field (px, > 0 inside): a dark rim, lit on one side within."""
    width = c.between(0.7, 2.2)
    rim = np.exp(-((away / width) ** 2)) * contrast
    glow = np.exp(-(((away - 2.2 * width) / (1.4 * width)) ** 2)) * contrast * c.between(0, 0.7)
    inside = np.clip(away, 0, 1)
    gy, gx = np.gradient(away)
    angle = c.between(0, 2 * np.pi)
    side = 0.75 + 0.25 * (gx * np.cos(angle) + gy * np.sin(angle))
    clearer = c.between(-0.05, 0.35)  # tissue without mountant looks grey and dull, or lighter
    c.blend(c.rgb.mean(axis=2, keepdims=True) + 6, inside * max(clearer, 0))
    c.rgb *= 1 + (inside * c.between(-0.06, 0.03))[..., None].astype(np.float32)
    c.blend(f32([1, 1, 1]) * c.between(20, 130) + f32(c.rng.normal(0, 5, 3)), rim * side)
    c.blend(f32([252, 252, 252]), glow * (1.5 - side) * 0.6)
    c.mark(away > -width, Kind.BUBBLE)


def _coverslip(c: Canvas) -> None:
    """The edge of a coverslip: one or two thin lines, nearly along an axis, with grime beside."""
    angle = int(c.rng.integers(4)) * np.pi / 2 + c.rng.normal(0, 0.06)
    if c.chance(0.2):
        angle = c.between(0, 2 * np.pi)
    at = np.linspace(-1, 1, c.size, dtype=np.float32) * (c.size / 2)
    across = at[None] * np.cos(angle) + at[:, None] * np.sin(angle)
    along = at[:, None] * np.cos(angle) - at[None] * np.sin(angle)
    across = across - c.between(-0.95, 0.95) * c.size / 2 + c.between(-4e-4, 4e-4) * along**2
    if c.chance(0.4):  # glue and dirt run along it
        across = across + c.between(0.3, 1.5) * c.noise(c.span(15, 80), 2)
    tone = np.float32(c.between(20, 170))
    for shift in (0.0, c.between(3, 26))[: 1 + c.chance(0.5)]:
        line = np.exp(-(((across - shift) / c.between(0.5, 2.2)) ** 2)) * c.between(0.15, 0.95)
        c.blend(tone, line)
        c.mark(line > 0.12, Kind.EDGE)
    if c.chance(0.35):  # a bright twin: light refracted at the glass
        c.blend(np.float32(252), np.exp(-(((across - 3) / 1.2) ** 2)) * 0.7)
    beyond = np.clip(across, 0, 1)
    c.rgb *= 1 - (beyond * c.between(-0.02, 0.07))[..., None].astype(np.float32)
    if c.chance(0.5):
        _grime(c, across.astype(np.float32))


def _grime(c: Canvas, across: Array) -> None:
    """Bands and clouds of dirt near an edge; on glass part of the EDGE where dark."""
    near = np.exp(-np.maximum(np.sign(c.between(-1, 1)) * across, 0) / c.span(5, 60))
    near = near * (np.abs(across) < 120)
    clouds = np.clip(0.5 * c.noise(c.span(3, 25), 3, stretch=c.between(1, 5)), 0, 1.5)
    alpha = near * clouds * c.between(0.05, 0.4)
    c.blend(np.float32(c.between(60, 190)) + f32(c.rng.normal(0, 8, 3)), np.clip(alpha, 0, 0.9))
    c.mark(alpha > 0.2, Kind.EDGE)
