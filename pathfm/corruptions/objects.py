"""Things that lie on tissue: the stroke of a felt pen, and air under the coverslip.

Lengths are shares of the picture's shorter side. The benchmark pastes one stroke and one bubble cut
out of slides, always in one place; these are drawn, each in a place of its own.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pathfm.corruptions.rounding import Rgb, to_bytes

_Plane = NDArray[np.float32]

INKS = np.array([[0.06, 0.06, 0.08], [0.10, 0.18, 0.55], [0.08, 0.45, 0.22], [0.70, 0.08, 0.12]])
"""Shares of red, green and blue light that black, blue, green and red pens let through."""

RIM, RIM_WIDTH = 0.94, 0.04
"""Where in a bubble's radius light is bent away, and how wide the dark ring is (shares of it)."""

BUBBLE_LEVEL, RIM_DEPTH = 232.0, 150.0
"""Grey levels: the inside of a bubble, and how much darker its rim is."""


def mark(picture: Rgb, width_share: float, drawn: NDArray[np.float64]) -> Rgb:
    """The picture under a slightly bent stroke of ink across it, a light filter with soft edges.

    width_share: of the shorter side. drawn: x and y of a point the stroke passes (in the middle three
    fifths), its direction, its bend, the pen. Ink is densest at the stroke's borders, where it dries last.
    """
    side = min(picture.shape[:2])
    along, across = _turned(picture, drawn[0], drawn[1], math.pi * drawn[2])
    bend = (drawn[3] - 0.5) / side
    slope = 2.0 * bend * along
    distance = np.abs(across - bend * along**2) / np.sqrt(1.0 + slope**2)
    half = max(0.5, 0.5 * width_share * side)
    cover = np.clip(half - distance + 0.5, 0.0, 1.0)  # a border one pixel wide
    density = cover * (0.8 + 0.4 * np.minimum(distance / half, 1.0) ** 2)
    ink = -np.log(INKS[min(int(drawn[4] * len(INKS)), len(INKS) - 1)])
    return to_bytes(picture * np.exp(-density[..., None] * ink.astype(np.float32)))


def bubble(picture: Rgb, opacity: float, drawn: NDArray[np.float64]) -> Rgb:
    """The picture with a round bubble: a light veil, and a dark rim where light is bent away.

    opacity: share (0..1) by which the bubble replaces what is under it. drawn: x and y of its centre
    (in the middle three fifths) and its radius (0.2 to 0.45 of the shorter side).
    """
    side = min(picture.shape[:2])
    x, y = _turned(picture, drawn[0], drawn[1], 0.0)
    radius = (0.2 + 0.25 * drawn[2]) * side
    distance = np.sqrt(x**2 + y**2)
    look = BUBBLE_LEVEL - RIM_DEPTH * np.exp(-(((distance / radius - RIM) / RIM_WIDTH) ** 2))
    cover = np.float32(opacity) * np.clip(radius - distance + 0.5, 0.0, 1.0)
    return to_bytes(picture + cover[..., None] * (look[..., None] - picture))


def _turned(picture: Rgb, x: float, y: float, angle: float) -> tuple[_Plane, _Plane]:
    """Every pixel's coordinates (h, w) along and across a direction, from a point in the middle."""
    height, width = picture.shape[:2]
    dx = np.arange(width, dtype=np.float32) - (0.2 + 0.6 * x) * (width - 1)
    dy = np.arange(height, dtype=np.float32)[:, None] - (0.2 + 0.6 * y) * (height - 1)
    cos, sin = math.cos(angle), math.sin(angle)
    along: _Plane = (cos * dx + sin * dy).astype(np.float32)
    across: _Plane = (cos * dy - sin * dx).astype(np.float32)
    return along, across
