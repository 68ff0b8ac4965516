"""What tissue is made of at thumbnail scale: amounts of matrix and nuclei, and how open it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pathfm.segmentation.synthetic.canvas import Array, Canvas, f32


@dataclass
class Texture:
    """Amounts (size, size): matrix, nuclei, target, and openness, 1 where glass shines through."""

    matrix: Array
    nuclei: Array
    target: Array
    open: Array


def _flat(c: Canvas, value: float = 0.0) -> Array:
    return np.full((c.size, c.size), value, np.float32)


def solid(c: Canvas, um: float) -> Texture:
    """Parenchyma: many nuclei, glands, lobules or follicles; `um` is px per µm."""
    fine = _grain(c, um)
    strength = 0.03 if c.chance(0.2) else c.between(0.06, 0.3)
    matrix = c.between(0.5, 0.9) + strength * fine + c.between(0, 0.12) * c.noise(60, 2)
    nuclei = c.between(0.15, 0.7) - strength * fine + c.between(0, 0.2) * c.noise(30, 3)
    if c.chance(0.3):  # nodules: lymph follicles, islands of tumour
        nodule = _soft(c.noise(c.span(12, 50), 1) - c.between(0.6, 1.4), c.between(3, 15))
        nuclei = nuclei + nodule * c.between(0.1, 0.7)
        matrix = matrix - nodule * c.between(0, 0.3)
    opened = _flat(c)
    if c.chance(0.5):  # sinusoids, gland lumens, retraction
        opened = f32(np.clip((c.noise(c.span(2, 6), 2) - c.between(1.0, 2.2)) * 2.5, 0, 0.95))
    return Texture(matrix, nuclei, _soft(c.noise(c.span(8, 60), 3) - c.between(0, 1.5), 3), opened)


def fibres(c: Canvas, um: float) -> Texture:
    """Stroma, muscle, nerve: fibres along one way, with clefts between bundles."""
    length = c.between(3, 9)
    fine = c.noise(c.span(1.5, 4), 2, stretch=length)
    matrix = c.between(0.4, 0.9) + c.between(0.03, 0.2) * fine
    nuclei = c.between(0.03, 0.2) + 0.05 * c.noise(c.span(2, 20), 2)
    opened = _flat(c)
    if c.chance(0.6):
        cleft = 1 - np.abs(c.noise(c.span(6, 24), 2, stretch=c.between(2, 6))) / c.span(0.03, 0.15)
        where = _soft(c.noise(c.span(30, 120), 1) + c.between(-0.8, 1), 3)
        opened = f32(np.clip(cleft, 0, 1) * where * c.between(0.5, 1))
    return Texture(matrix, nuclei, _soft(fine + c.between(-1, 1), 2), opened)


def pale(c: Canvas, um: float) -> Texture:
    """Oedema, mucin, cartilage, brain, dead tissue: smooth and faint, never quite glass."""
    amount = c.span(0.12, 0.4)
    matrix = f32(amount * (1 + 0.15 * c.noise(c.span(10, 60), 2) + 0.1 * c.noise(2, 1)))
    nuclei = matrix * c.between(0, 0.5) * (1 + 0.3 * c.noise(c.span(1.5, 8), 2))
    return Texture(matrix, nuclei, _flat(c, amount * c.between(0, 0.6)), _flat(c))


def loose(c: Canvas, um: float) -> Texture:
    """Loose connective tissue: wisps and threads with glass between them."""
    wisps = np.abs(c.noise(c.span(3, 12), 3, stretch=c.between(1, 3)))
    opened = f32((wisps - c.between(0.15, 0.5)) * c.between(1.5, 4))
    opened = f32(np.clip(opened, 0, c.between(0.7, 0.95)))
    matrix = c.between(0.3, 0.8) + 0.1 * c.noise(c.span(10, 50), 2)
    return Texture(matrix, _flat(c, c.between(0.02, 0.2)), _flat(c, c.between(0, 0.6)), opened)


def fat(c: Canvas, um: float) -> Texture:
    """Fat: white cells 50-110 µm wide in thin membranes, now and then a vessel or a septum."""
    cell_px = max(c.between(50, 110) * um, 2.5)
    walls = cell_walls(c, cell_px)
    opened = (1 - np.exp(-((walls / c.between(0.45, 0.9)) ** 2))) * c.between(0.82, 0.97)
    septa = np.clip(1 - np.abs(c.noise(c.span(40, 110), 2)) / c.span(0.03, 0.15), 0, 1)
    opened = opened * (1 - septa * c.between(0, 1))
    matrix = c.between(0.35, 0.9) + 0.1 * c.noise(c.span(6, 30), 2)
    return Texture(matrix, _flat(c, c.between(0.03, 0.25)), _flat(c, c.between(0, 0.5)), opened)


def alveoli(c: Canvas, um: float) -> Texture:
    """Lung: air spaces 100-300 µm wide, in walls of uneven thickness."""
    cell_px = max(c.between(100, 300) * um, 3.5)
    walls = cell_walls(c, cell_px)
    thick = np.maximum(c.between(0.6, 1.6) * (1 + 0.5 * c.noise(c.span(15, 60), 2)), 0.35)
    opened = (1 - np.exp(-((walls / thick) ** 2))) * c.between(0.9, 1.0)
    nuclei = c.between(0.15, 0.6) + 0.1 * c.noise(4, 2)
    matrix = c.between(0.4, 0.9) + 0.15 * c.noise(c.span(10, 60), 2)
    return Texture(matrix, nuclei, _flat(c, c.between(0, 0.8)), opened)


def smear(c: Canvas, um: float) -> Texture:
    """Cells spread over glass: a faint film, specks, clumps and streaks along the smear."""
    streaks = c.noise(c.span(3, 14), 2, stretch=c.between(1, 6))
    specks = np.clip(c.noise(c.between(1, 1.6), 1) - c.between(0.3, 1.6), 0, 3)
    dense = np.clip(c.noise(c.span(40, 160), 2) * 0.35 + c.between(0.4, 1.0), 0.1, 1.6)
    nuclei = dense * (c.between(0.05, 0.4) * specks + np.clip(0.1 * streaks, 0, 1))
    matrix = dense * c.span(0.04, 0.6) * (1 + 0.25 * streaks)
    opened = _flat(c)
    if c.chance(0.5):  # single cells can be told apart: discs, some of them with a nucleus
        cell_px = c.span(3, 9)
        discs = np.clip(cell_walls(c, cell_px) - c.between(0, 0.12) * cell_px, 0, 1)
        few = _soft(c.noise(cell_px, 1) - c.between(0.5, 2.0), 8)
        matrix, nuclei = matrix * (0.3 + discs), nuclei + few * discs * c.between(0.2, 1)
        opened = f32(np.clip(1 - dense - discs, 0, 0.8))
    return Texture(matrix, nuclei, dense * 0.1, opened)


def cell_walls(c: Canvas, cell_px: float) -> Array:
    """Distance (px) to the nearest wall of a Voronoi net of cells about `cell_px` wide."""
    n = int(c.size / cell_px) + 4
    seats = c.rng.random((n, n, 2), np.float32) * 0.8 + 0.1
    at = np.arange(c.size, dtype=np.float32) / np.float32(cell_px) + 1
    base = at.astype(np.int64)
    part = at - base
    near = np.full((c.size, c.size), np.inf, np.float32)
    second = near.copy()
    for di in (-1, 0, 1):
        for dj in (-1, 0, 1):
            seat = seats[base + di][:, base + dj]
            dy = (part - np.float32(di))[:, None] - seat[..., 0]
            dx = (part - np.float32(dj))[None] - seat[..., 1]
            gap = dx * dx + dy * dy
            second = np.minimum(second, np.maximum(near, gap))
            near = np.minimum(near, gap)
    return np.asarray((np.sqrt(second) - np.sqrt(near)) * np.float32(cell_px / 2), np.float32)


def _grain(c: Canvas, um: float) -> Array:
    """Texture of cells, about mean 0 and sd 1."""
    kind = int(c.rng.integers(4))
    if kind == 0:
        return c.noise(c.between(1, 2.5), 1)
    if kind == 1:  # glands, tubules: ridges
        return np.asarray(1.0 - 1.6 * np.abs(c.noise(max(c.between(60, 140) * um, 3), 1)))
    if kind == 2:  # lobules
        return np.clip(c.noise(c.span(6, 25), 2) * 3, -1, 1)
    return c.noise(c.between(2, 8), 3)


def _soft(field: Array, steepness: float) -> Array:
    """0..1: a soft step at 0."""
    return np.asarray(1 / (1 + np.exp(np.clip(-steepness * field, -30, 30))), np.float32)
