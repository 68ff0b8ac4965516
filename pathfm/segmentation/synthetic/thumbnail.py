"""Synthetic thumbnails of known truth, at about 8 µm/px, for training the foreground U-Net.

They need not please the eye; they need to hold what real thumbnails hold: glass of every tint and
frames without glass, smooth pale stroma, fat and lung, many stains, seams of stitched scans, pen,
dust, hairs, bubbles, coverslip edges, folds, white letterboxes and black scanner padding.

Truth: tissue includes fat, alveoli and clefts narrower than about 8 px; wide lumens and tears are
glass. Opaque ink is not tissue, also where it lies on tissue. Folds are tissue.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pathfm.segmentation.synthetic.canvas import Array, Canvas, Kind, Mask, f32
from pathfm.segmentation.synthetic.glass import lay_dirt, lay_frame, lay_glass, lay_ink


@dataclass(frozen=True)
class SyntheticThumbnail:
    """A drawn thumbnail: `rgb` (h, w, 3) uint8, `kinds` (h, w) uint8 of `Kind`, stain, µm/px."""

    rgb: NDArray[np.uint8]
    kinds: NDArray[np.uint8]
    stain: str
    mpp: float

    @property
    def tissue(self) -> Mask:
        """(h, w) True where tissue of any kind lies."""
        return (self.kinds >= Kind.TISSUE) & (self.kinds <= Kind.PALE)


def draw_thumbnail(seed: int, draw: int, size_px: int = 384) -> SyntheticThumbnail:
    """Thumbnail number `draw` of a seed, size_px square: a pure function of (seed, draw)."""
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, draw], np.uint64)))
    shape = (size_px, size_px)
    canvas = Canvas(rng, size_px, np.zeros((*shape, 3), np.float32), np.zeros(shape, np.uint8))
    lay_glass(canvas)
    signed = _outline(canvas)
    if (signed > 0).any():
        _tissue(canvas, signed)
    lay_dirt(canvas)
    lay_ink(canvas)
    lay_frame(canvas)
    return SyntheticThumbnail(_camera(canvas), canvas.kinds, "any", canvas.span(6, 24))


def _outline(c: Canvas) -> Array:
    """Signed field, > 0 on tissue, in units of half the picture."""
    kinds = ("blob", "pieces", "band", "ring", "cores", "full", "empty")
    kind = kinds[int(c.rng.choice(7, p=(0.38, 0.13, 0.12, 0.06, 0.06, 0.16, 0.09)))]
    nothing = np.full((c.size, c.size), -9.0, np.float32)
    if kind == "empty":
        return nothing
    if kind == "full":
        return -nothing
    rough = c.noise(c.size / c.between(2.5, 6), 2) * c.between(0.02, 0.14)
    ragged = c.noise(c.between(6, 24), 3) * c.between(0.003, 0.03)
    signed = nothing
    count = {"pieces": int(c.between(2, 9)), "cores": int(c.between(6, 16))}.get(kind, 1)
    for _ in range(count):
        u, v = c.plane()
        cx, cy = (c.between(-0.75, 0.75) * (0.35 if count == 1 else 1) for _ in range(2))
        if kind == "blob":
            rx, ry = c.between(0.35, 1.1), c.between(0.3, 0.95)
        elif kind == "band":
            rx, ry = c.between(0.8, 2.5), c.between(0.05, 0.3)
        elif kind == "ring":
            rx, ry = c.between(0.4, 0.8), c.between(0.3, 0.7)
        else:
            rx, ry = c.between(0.07, 0.32), c.between(0.05, 0.25)
        bend = c.between(-0.3, 0.3) * (u - cx) ** 2 if kind == "band" else 0
        radius = np.hypot((u - cx) / rx, (v - cy + bend) / ry)
        inner = (1 - radius) * min(rx, ry)
        if kind == "ring":
            inner = c.between(0.04, 0.16) - np.abs(inner)
        signed = np.maximum(signed, inner)
    signed = signed + rough + ragged
    if kind == "blob" and c.chance(0.4):  # cut with a knife
        for _ in range(int(c.between(1, 4))):
            u, _ = c.plane()
            signed = np.minimum(signed, c.between(0.25, 0.7) - u)
    return np.asarray(signed, np.float32)


# Optical densities of two stains at concentration 1, and how strong each usually is.
_STAINS: tuple[tuple[float, tuple[float, ...], tuple[float, ...], float, float], ...] = (
    (0.52, (0.22, 0.80, 0.56), (0.56, 0.72, 0.41), 1.0, 1.0),  # eosin, haematoxylin
    (0.09, (0.27, 0.57, 0.78), (0.65, 0.60, 0.35), 0.6, 0.6),  # DAB brown, haematoxylin
    (0.05, (0.10, 0.15, 0.20), (0.50, 0.40, 0.25), 0.5, 0.35),  # pale IHC: counterstain only
    (0.05, (0.20, 0.75, 0.65), (0.80, 0.50, 0.20), 0.8, 0.9),  # Masson: red, blue
    (0.08, (0.20, 0.45, 0.95), (0.70, 0.80, 0.90), 1.0, 0.7),  # silver: gold to black
    (0.05, (0.85, 0.65, 0.30), (0.90, 0.75, 0.35), 0.8, 1.0),  # Giemsa: deep blue
    (0.05, (0.30, 0.80, 0.35), (0.60, 0.65, 0.35), 0.9, 0.6),  # PAS: magenta
    (0.04, (0.35, 0.25, 0.12), (0.60, 0.55, 0.20), 0.5, 0.6),  # Luxol, cresyl: pale blue
    (0.04, (0.50, 0.62, 0.55), (0.75, 0.80, 0.75), 0.9, 0.9),  # elastin, iron: brown-black
    (0.04, (0.45, 0.45, 0.45), (0.45, 0.45, 0.45), 0.7, 0.7),  # anything: drawn below
)


def _stain(c: Canvas) -> tuple[Array, Array, float, float]:
    chances = np.array([row[0] for row in _STAINS])
    number = int(c.rng.choice(len(_STAINS), p=chances / chances.sum()))
    _, first, second, a, b = _STAINS[number]
    spread = 0.6 if number == len(_STAINS) - 1 else 0.13
    one, two = (
        f32(od) * (1 + c.rng.uniform(-spread, spread, 3).astype(np.float32))
        for od in (first, second)
    )
    return one, two, a, b


def _tissue(c: Canvas, signed: Array) -> None:
    one, two, strong_one, strong_two = _stain(c)
    # Pale, usual, and now and then as dark as ink.
    kind = int(np.searchsorted((0.2, 0.92), c.between(0, 1), side="right"))
    pale = c.between(*((0.18, 0.45), (0.5, 1.5), (1.6, 3.5))[kind])
    regions, other = c.noise(c.between(20, 110), 3), c.noise(c.between(12, 70), 3)
    flat = c.chance(0.3)
    fine = c.between(0.0, 0.06) if flat else c.between(0.08, 0.4)
    first = 0.55 + c.between(0.02, 0.3) * regions + fine * _pattern(c)
    second = 0.22 + c.between(0.0, 0.35) * other + fine * _pattern(c)
    if c.chance(0.4):  # islands of another tissue, with an edge of their own
        island = 1 / (1 + np.exp(-c.between(3, 15) * (c.noise(c.between(25, 90)) - 0.4)))
        first += island * c.between(-0.35, 0.4)
        second += island * c.between(-0.2, 0.8)
    first, second = np.maximum(first, 0.10) * strong_one, np.maximum(second, 0.03) * strong_two
    cover = np.clip(signed * (c.size / 2) / c.between(0.8, 2.5) + 0.5, 0, 1)
    truth = signed > 0
    holes, lumens = _openings(c)
    truth &= ~(lumens > 0.5)
    cover = cover * (1 - lumens) * (1 - holes)
    if c.chance(0.3):
        cover = cover * _fold(c)
    od = (first * cover * pale)[..., None] * one + (second * cover * pale)[..., None] * two
    if c.chance(0.5):  # a section's edge refracts: a thin dark or bright rim
        rim = np.exp(-((signed * c.size / 2 / 1.2) ** 2)) * c.between(-0.05, 0.12)
        od = od + rim[..., None]
    c.rgb *= np.exp(-np.maximum(od, 0))
    c.mark(truth, Kind.TISSUE)


def _pattern(c: Canvas) -> Array:
    """Texture of cells at thumbnail scale."""
    kind = int(c.rng.integers(5))
    if kind == 0:
        return c.noise(c.between(1, 2.5), 1)
    if kind == 1:  # fibres
        return c.noise(c.between(1.5, 4), 2, stretch=c.between(3, 9))
    if kind == 2:  # glands, tubules: ridges
        return np.asarray(1.0 - 2.2 * np.abs(c.noise(c.between(5, 16), 1)), np.float32)
    if kind == 3:  # lobules
        return np.asarray(np.sign(c.noise(c.between(6, 25), 1)) * 0.7, np.float32)
    return c.noise(c.between(2, 8), 3)


def _openings(c: Canvas) -> tuple[Array, Array]:
    """What is white within tissue: small openings that stay tissue (0..1), and wide ones (0..1)."""
    holes = np.zeros((c.size, c.size), np.float32)
    if c.chance(0.4):  # sinusoids, small clefts
        field = c.noise(c.between(2.5, 6), 2) - c.between(0.9, 2.2)
        holes = np.clip(field * 3, 0, 1) * c.between(0.5, 1)
    if c.chance(0.25):  # cracks
        ridge = 1 - np.abs(c.noise(c.between(20, 60), 2)) / c.between(0.02, 0.06)
        holes = np.maximum(holes, np.clip(ridge, 0, 1))
    if c.chance(0.38):  # fat or alveoli: white cells in thin walls, here or everywhere
        cells = 1 - np.exp(-((_walls(c, c.between(4, 11)) / c.between(0.6, 1.1)) ** 2))
        where = np.clip(4 * (c.noise(c.between(30, 120), 2) - c.between(-1.6, 0.8)), 0, 1)
        holes = np.maximum(holes, cells * where * c.between(0.8, 0.97))
    lumens = np.zeros((c.size, c.size), np.float32)
    if c.chance(0.35):
        field = c.noise(c.between(25, 70), 2) - c.between(1.1, 2.0)
        lumens = np.clip(field * 20, 0, 1)
    return holes, np.asarray(lumens, np.float32)


def _walls(c: Canvas, cell_px: float) -> Array:
    """Distance (px) to the nearest wall of a Voronoi net of cells about `cell_px` wide."""
    n = int(c.size / cell_px) + 3
    seats = c.rng.random((n, n, 2), np.float32) * 0.8 + 0.1
    at = np.arange(c.size, dtype=np.float32) / cell_px + 1
    base = at.astype(np.int64)
    near = np.full((c.size, c.size), np.inf, np.float32)
    second = near.copy()
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            i, j = base + di, base + dj
            seat = seats[i][:, j]
            dy = at[:, None] - i[:, None].astype(np.float32) - seat[..., 0]
            dx = at[None] - j[None].astype(np.float32) - seat[..., 1]
            gap = np.sqrt(dx * dx + dy * dy)
            second = np.minimum(second, np.maximum(near, gap))
            near = np.minimum(near, gap)
    return np.asarray((second - near) * (cell_px / 2), np.float32)


def _fold(c: Canvas) -> Array:
    u, v = c.plane()
    across = (u - c.between(-0.6, 0.6)) * c.size / 2 + 8 * c.noise(60, 1)
    band = np.exp(-((across / c.between(1, 4)) ** 2)) * (np.abs(v - c.between(-0.5, 0.5)) < 0.5)
    return np.asarray(1 + c.between(0.4, 1.4) * band, np.float32)


def _camera(c: Canvas) -> NDArray[np.uint8]:
    """Sensor noise, and focus or sharpening."""
    if c.chance(0.5):
        c.rgb += c.rng.normal(0, c.between(0.3, 3), c.rgb.shape).astype(np.float32)
    picture = Image.fromarray(np.clip(c.rgb + 0.5, 0, 255).astype(np.uint8))
    if c.chance(0.5):
        picture = picture.filter(ImageFilter.GaussianBlur(c.between(0.3, 1.1)))
    elif c.chance(0.3):
        picture = picture.filter(ImageFilter.UnsharpMask(1.0, int(c.between(40, 150)), 0))
    return np.asarray(picture)
