"""Stains as optical densities: what matrix, nuclei and the stain's own target take up.

Values are read off permitted thumbnails and H&E tables by eye (OD = -ln(colour / glass)) and are
spread widely: the model must not learn a colour.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pathfm.segmentation.synthetic.canvas import Array, Canvas, f32


@dataclass(frozen=True)
class Stain:
    """A drawn stain: (3,) optical densities in R, G, B at amount 1, and usual amounts."""

    name: str
    matrix: Array
    nuclei: Array
    target: Array
    target_amount: float  # 0: nothing has the target's colour
    strength: float  # of everything


# chance, name, matrix, nuclei, target, most of the target, spread of the colours
_TABLE = (
    (0.40, "H&E", (0.20, 0.68, 0.40), (0.62, 0.80, 0.40), (0.10, 0.85, 0.60), 0.35, 0.16),
    (0.06, "H&E", (0.24, 0.50, 0.28), (0.55, 0.66, 0.30), (0.35, 0.60, 0.30), 0.40, 0.18),
    (0.10, "IHC", (0.10, 0.10, 0.08), (0.42, 0.34, 0.18), (0.32, 0.60, 0.86), 1.00, 0.15),
    (0.06, "IHC", (0.10, 0.14, 0.18), (0.40, 0.32, 0.20), (0.30, 0.46, 0.60), 0.50, 0.15),
    (0.05, "Masson", (0.20, 0.70, 0.55), (0.60, 0.80, 0.60), (0.90, 0.55, 0.20), 1.00, 0.16),
    (0.02, "Masson", (0.20, 0.70, 0.55), (0.60, 0.80, 0.60), (0.85, 0.30, 0.55), 0.90, 0.16),
    (0.05, "silver", (0.12, 0.34, 0.75), (0.30, 0.60, 1.00), (0.90, 1.00, 1.10), 0.60, 0.18),
    (0.02, "silver", (0.16, 0.20, 0.28), (0.40, 0.50, 0.60), (1.20, 1.20, 1.20), 0.70, 0.18),
    (0.03, "elastic", (0.40, 0.62, 0.45), (0.80, 0.90, 0.80), (1.50, 1.55, 1.50), 0.90, 0.15),
    (0.03, "elastic", (1.00, 1.10, 1.00), (1.20, 1.20, 1.15), (1.60, 1.60, 1.55), 0.90, 0.12),
    (0.02, "elastic", (0.06, 0.25, 0.60), (0.50, 0.70, 0.60), (1.20, 1.25, 1.20), 0.80, 0.15),
    (0.04, "Luxol", (0.34, 0.19, 0.06), (0.60, 0.55, 0.22), (0.80, 0.42, 0.10), 0.70, 0.18),
    (0.02, "Nissl", (0.16, 0.14, 0.05), (0.60, 0.52, 0.18), (0.40, 0.36, 0.12), 0.50, 0.18),
    (0.04, "Giemsa", (0.85, 0.72, 0.28), (1.10, 0.95, 0.35), (0.40, 0.60, 0.30), 0.40, 0.18),
    (0.04, "PAS", (0.16, 0.42, 0.18), (0.50, 0.55, 0.30), (0.35, 1.00, 0.40), 0.80, 0.16),
    (0.02, "Sirius red", (0.03, 0.10, 0.42), (0.10, 0.50, 0.50), (0.10, 1.00, 0.70), 1.00, 0.18),
    (0.02, "Alcian blue", (0.10, 0.25, 0.15), (0.20, 0.60, 0.40), (0.80, 0.25, 0.15), 0.80, 0.18),
    (0.06, "other", (0.40, 0.40, 0.40), (0.50, 0.50, 0.50), (0.60, 0.60, 0.60), 0.80, 0.75),
)  # fmt: skip


def draw_stain(c: Canvas) -> Stain:
    """A stain of random kind, tone and strength: a fifth pale, a sixth very dark."""
    chances = np.array([row[0] for row in _TABLE])
    number = int(c.rng.choice(len(_TABLE), p=chances / chances.sum()))
    _, name, matrix, nuclei, target, most, spread = _TABLE[number]
    together = 1 + c.rng.uniform(-spread, spread, 3)
    colours = [
        f32(od) * (together * (1 + c.rng.uniform(-spread, spread, 3) / 2)).astype(np.float32)
        for od in (matrix, nuclei, target)
    ]
    kind = int(np.searchsorted((0.2, 0.83), c.between(0, 1), side="right"))
    strength = c.span(*((0.18, 0.45), (0.5, 1.3), (1.3, 2.8))[kind])
    if number in (2, 3) and c.chance(0.35):  # IHC without a positive cell
        most = 0.0
    return Stain(name, colours[0], colours[1], colours[2], most * c.between(0.2, 1), strength)
