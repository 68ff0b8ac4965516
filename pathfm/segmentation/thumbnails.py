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
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]


def _f32(values: ArrayLike) -> Array:
    return np.asarray(values, np.float32)


@dataclass
class _Canvas:
    """One thumbnail under work: float32 RGB 0..255, its truth, and its own random stream."""

    rng: np.random.Generator
    size: int
    rgb: Array
    truth: Mask

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def noise(self, scale_px: float, octaves: int = 3, stretch: float = 1.0) -> Array:
        """(size, size) smooth noise, mean 0, sd 1; `stretch` > 1 draws it out along x."""
        total = np.zeros((self.size, self.size), np.float32)
        for octave in range(octaves):
            step = max(scale_px / 2**octave, 1.0)
            ny = int(self.size / step) + 5
            nx = int(self.size / (step * stretch)) + 5
            drawn = Image.fromarray(self.rng.standard_normal((ny, nx), np.float32))
            wide = drawn.resize(
                (int(nx * step * stretch), int(ny * step)), Image.Resampling.BICUBIC
            )
            total += np.float32(0.5**octave) * np.asarray(wide)[: self.size, : self.size]
        return np.asarray((total - total.mean()) / (total.std() + 1e-6), np.float32)

    def plane(self) -> tuple[Array, Array]:
        """Coordinates -1..1, turned by a random angle."""
        at = np.linspace(-1, 1, self.size, dtype=np.float32)
        angle = np.float32(self.between(0, 2 * np.pi))
        u = at[None] * np.cos(angle) + at[:, None] * np.sin(angle)
        v = at[:, None] * np.cos(angle) - at[None] * np.sin(angle)
        return u.astype(np.float32), v.astype(np.float32)

    def blend(self, colour: ArrayLike, alpha: ArrayLike) -> None:
        a = _f32(alpha)
        self.rgb += (_f32(colour) - self.rgb) * (a[..., None] if a.ndim else a)


def draw_thumbnail(seed: int, draw: int, size_px: int = 384) -> tuple[NDArray[np.uint8], Mask]:
    """Thumbnail (size_px, size_px, 3) uint8 and truth (size_px, size_px) bool.

    A pure function of (seed, draw).
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, draw], np.uint64)))
    shape = (size_px, size_px)
    canvas = _Canvas(rng, size_px, np.zeros((*shape, 3), np.float32), np.zeros(shape, np.bool_))
    _glass(canvas)
    signed = _outline(canvas)
    if (signed > 0).any():
        _tissue(canvas, signed)
    _dirt(canvas)
    _ink(canvas)
    _frame(canvas)
    return _camera(canvas), canvas.truth


# --- glass ----------------------------------------------------------------------------------------

_GLASS = _f32([(246, 246, 246), (238, 238, 240), (240, 238, 252), (250, 250, 250), (249, 243, 224),
     (240, 232, 214), (232, 236, 244), (244, 238, 240), (226, 226, 228), (236, 244, 238)])  # fmt: skip


def _glass(c: _Canvas) -> None:
    base = _GLASS[c.rng.integers(len(_GLASS))] + c.rng.normal(0, 3, 3).astype(np.float32)
    c.rgb[:] = base
    if c.chance(0.6):  # uneven light
        c.rgb += (c.noise(c.size / 2, 1) * c.between(0.5, 4))[..., None]
    if c.chance(0.25):  # grime without colour or with a little
        speckle = np.maximum(c.noise(c.between(3, 12), 3) - c.between(0.3, 1.6), 0)
        c.rgb -= speckle[..., None] * c.rng.uniform(2, 14, 3).astype(np.float32)
    if c.chance(0.25):
        _smudges(c)
    if c.chance(0.35):
        _seams(c)


def _smudges(c: _Canvas) -> None:
    """Pale stains on the glass with soft or sharp edges: mountant, drops of dye, finger marks."""
    field = c.noise(c.between(8, 45), 3) - c.between(1.0, 2.2)
    alpha = np.clip(field * c.between(1, 12), 0, 1) * c.between(0.2, 1)
    tint = np.float32(c.between(2, 9)) * (1 + c.rng.uniform(-0.5, 0.5, 3).astype(np.float32))
    c.rgb -= alpha[..., None] * tint


def _seams(c: _Canvas) -> None:
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


# --- where tissue is ------------------------------------------------------------------------------


def _outline(c: _Canvas) -> Array:
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


# --- what tissue looks like -----------------------------------------------------------------------

# Optical densities of two stains at concentration 1, and how strong each usually is.
_STAINS: tuple[tuple[float, tuple[float, ...], tuple[float, ...], float, float], ...] = (
    (0.55, (0.22, 0.80, 0.56), (0.56, 0.72, 0.41), 1.0, 1.0),  # eosin, haematoxylin
    (0.09, (0.27, 0.57, 0.78), (0.65, 0.60, 0.35), 0.6, 0.6),  # DAB brown, haematoxylin
    (0.05, (0.10, 0.15, 0.20), (0.50, 0.40, 0.25), 0.5, 0.35),  # pale IHC: counterstain only
    (0.05, (0.20, 0.75, 0.65), (0.80, 0.50, 0.20), 0.8, 0.9),  # Masson: red, blue
    (0.04, (0.25, 0.45, 0.80), (0.70, 0.80, 0.90), 1.0, 0.7),  # silver: gold to black
    (0.05, (0.85, 0.65, 0.30), (0.90, 0.75, 0.35), 0.8, 1.0),  # Giemsa: deep blue
    (0.05, (0.30, 0.80, 0.35), (0.60, 0.65, 0.35), 0.9, 0.6),  # PAS: magenta
    (0.04, (0.35, 0.25, 0.12), (0.60, 0.55, 0.20), 0.5, 0.6),  # Luxol, cresyl: pale blue
    (0.04, (0.50, 0.62, 0.55), (0.75, 0.80, 0.75), 0.9, 0.9),  # elastin, iron: brown-black
    (0.04, (0.45, 0.45, 0.45), (0.45, 0.45, 0.45), 0.7, 0.7),  # anything: drawn below
)


def _stain(c: _Canvas) -> tuple[Array, Array, float, float]:
    chances = np.array([row[0] for row in _STAINS])
    number = int(c.rng.choice(len(_STAINS), p=chances / chances.sum()))
    _, first, second, a, b = _STAINS[number]
    spread = 0.6 if number == len(_STAINS) - 1 else 0.13
    one, two = (
        _f32(od) * (1 + c.rng.uniform(-spread, spread, 3).astype(np.float32))
        for od in (first, second)
    )
    return one, two, a, b


def _tissue(c: _Canvas, signed: Array) -> None:
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
    c.truth |= truth


def _pattern(c: _Canvas) -> Array:
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


def _openings(c: _Canvas) -> tuple[Array, Array]:
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


def _walls(c: _Canvas, cell_px: float) -> Array:
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


def _fold(c: _Canvas) -> Array:
    u, v = c.plane()
    across = (u - c.between(-0.6, 0.6)) * c.size / 2 + 8 * c.noise(60, 1)
    band = np.exp(-((across / c.between(1, 4)) ** 2)) * (np.abs(v - c.between(-0.5, 0.5)) < 0.5)
    return np.asarray(1 + c.between(0.4, 1.4) * band, np.float32)


# --- what lies on the glass -----------------------------------------------------------------------


def _stroke(c: _Canvas, points: NDArray[np.float64], width_px: float) -> Array:
    """(size, size) 0..1 coverage of a line through points (n, 2)."""
    picture = Image.new("L", (c.size, c.size))
    brush = ImageDraw.Draw(picture)
    brush.line([tuple(p) for p in points.tolist()], fill=255, width=max(1, round(width_px)))
    if width_px >= 3:
        for x, y in points.tolist():
            r = width_px / 2
            brush.ellipse((x - r, y - r, x + r, y + r), fill=255)
    blurred = picture.filter(ImageFilter.GaussianBlur(0.6))
    return _f32(np.asarray(blurred, np.float32) / 255)


def _curve(c: _Canvas, reach: float) -> NDArray[np.float64]:
    """(40, 2) points of a bent line somewhere in the picture."""
    start = c.rng.uniform(-0.1, 1.1, 2)
    end, bend = start + c.rng.normal(0, reach, 2), start + c.rng.normal(0, reach, 2)
    t = np.linspace(0, 1, 40)[:, None]
    return np.asarray(((1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end) * c.size)


def _dirt(c: _Canvas) -> None:
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
        c.blend(_f32([120, 120, 125]), ring * c.between(0.2, 0.8))
        c.rgb += ((r < 0) * c.between(-6, 4))[..., None].astype(np.float32)
    if c.chance(0.12):
        u, _ = c.plane()
        away = (u - c.between(-0.95, 0.95)) * c.size / 2
        line = np.exp(-((away / c.between(0.7, 2.5)) ** 2)) * c.between(0.2, 0.9)
        c.blend(np.float32(c.between(40, 170)), line)
        c.rgb -= (np.float32(c.between(0, 14)) * (away > 0))[..., None]


_INKS = _f32([(20, 130, 95), (30, 70, 170), (25, 25, 28), (200, 25, 40), (0, 90, 60), (60, 120, 210),
     (225, 70, 70), (30, 30, 80), (240, 190, 40), (90, 40, 120)])  # fmt: skip


def _ink(c: _Canvas) -> None:
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
            c.truth &= ~(alpha * opacity > 0.6)
        c.blend(ink, alpha * opacity)


def _frame(c: _Canvas) -> None:
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
                c.truth[_strip(side, depth)] = False
    if c.chance(0.07):
        u, _ = c.plane()
        corner = u > c.between(0.75, 1.25)
        c.rgb[corner] = c.between(0, 12) if c.chance(0.7) else c.between(120, 190)
        c.truth[corner] = False
    if c.chance(0.08):
        x, y = c.rng.integers(0, c.size - 8, 2)
        c.rgb[y : y + 3, x : x + 7] = 10
        c.truth[y : y + 3, x : x + 7] = False


def _strip(side: int, depth_px: int) -> tuple[slice, slice]:
    """The first or last rows (side 0, 1) or columns (side 2, 3) of a picture."""
    part = slice(-depth_px, None) if side % 2 else slice(depth_px)
    return (part, slice(None)) if side < 2 else (slice(None), part)


def _camera(c: _Canvas) -> NDArray[np.uint8]:
    """Sensor noise, and focus or sharpening."""
    if c.chance(0.5):
        c.rgb += c.rng.normal(0, c.between(0.3, 3), c.rgb.shape).astype(np.float32)
    picture = Image.fromarray(np.clip(c.rgb + 0.5, 0, 255).astype(np.uint8))
    if c.chance(0.5):
        picture = picture.filter(ImageFilter.GaussianBlur(c.between(0.3, 1.1)))
    elif c.chance(0.3):
        picture = picture.filter(ImageFilter.UnsharpMask(1.0, int(c.between(40, 150)), 0))
    return np.asarray(picture)
