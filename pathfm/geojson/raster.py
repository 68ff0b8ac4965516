"""Which pixels lie inside polygons."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.float64]
_CROSSINGS_AT_ONCE = 1 << 20
"""Crossings of edges with rows worked on at a time: about 50 MB."""


@dataclass(frozen=True, eq=False)
class Polygon:
    """An area: its outer ring, then its holes, each (n, 2) float64 x, y without the closing vertex.

    ``name`` is its class ("" for none), ``colour`` the class's RGB. A ring needs three vertices at
    least; anything else raises ValueError.
    """

    rings: tuple[Ring, ...]
    name: str = ""
    colour: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if not self.rings:
            raise ValueError("a polygon needs an outer ring")
        for ring in self.rings:
            if ring.ndim != 2 or ring.shape[1] != 2 or len(ring) < 3:
                raise ValueError(f"a ring is (3 or more, 2) numbers, not {ring.shape}")
            if not np.isfinite(ring).all():
                raise ValueError("a ring has a vertex that is no number")

    @property
    def vertices(self) -> int:
        """How many vertices all its rings have."""
        return sum(len(ring) for ring in self.rings)


def rasterise(
    polygons: Iterable[Polygon],
    shape: tuple[int, int],
    scale: float | tuple[float, float] = 1.0,
) -> NDArray[np.bool_]:
    """The pixels inside the polygons: a bool array of `shape` (height, width).

    `scale` (or scale of x, of y) is how many of the array's pixels make one unit of the
    coordinates: (width / slide width, height / slide height) for level-0 coordinates.
    A pixel is inside a polygon when its centre is, by the even-odd rule over all of the polygon's
    rings, and in the result when it is inside any polygon. A centre on an edge belongs to the
    right and lower side, so polygons that share an edge neither overlap nor leave a gap.
    What lies outside the array is cut off. Cost: one step for each edge and each row it crosses.
    """
    height, width = shape
    scales = np.array(scale if isinstance(scale, tuple) else (scale, scale), np.float64)
    out = np.zeros(shape, bool)
    for polygon in polygons:
        rings = [ring * scales for ring in polygon.rings]
        low = np.min([ring.min(axis=0) for ring in rings], axis=0)
        high = np.max([ring.max(axis=0) for ring in rings], axis=0)
        left, top = np.floor(np.clip(low, 0, (width, height))).astype(int)
        right, bottom = np.ceil(np.clip(high, 0, (width, height))).astype(int)
        if right > left and bottom > top:
            box = np.zeros((bottom - top, right - left + 1), np.uint8)
            for ring in rings:
                _flip_right_of(box, ring - (left, top))
            out[top:bottom, left:right] |= np.bitwise_xor.accumulate(box, axis=1)[:, :-1].view(bool)
    return out


def _flip_right_of(box: NDArray[np.uint8], ring: Ring) -> None:
    """For each edge and row: flip the first pixel whose centre is not left of where they cross.

    The last column of `box` takes what lies right of the picture.
    """
    height, width = box.shape[0], box.shape[1] - 1
    x0, y0 = ring.T
    x1, y1 = np.roll(ring, -1, axis=0).T
    downwards = y1 > y0
    y_top, y_bottom = np.where(downwards, (y0, y1), (y1, y0))
    x_top, x_bottom = np.where(downwards, (x0, x1), (x1, x0))
    # rows whose centre r + 0.5 lies in [y_top, y_bottom): half open, a vertex counts once
    first = np.clip(np.ceil(y_top - 0.5), 0, height).astype(np.int64)
    stop = np.clip(np.ceil(y_bottom - 0.5), 0, height).astype(np.int64)
    crossed = np.flatnonzero(stop > first)
    first, counts = first[crossed], (stop - first)[crossed]
    x_top, y_top = x_top[crossed], y_top[crossed]
    slope = (x_bottom[crossed] - x_top) / (y_bottom[crossed] - y_top)
    flat = box.reshape(-1)
    for part in _parts(counts):
        edge = np.repeat(part, counts[part])
        before = np.cumsum(counts[part]) - counts[part]
        rows = first[edge] + np.arange(len(edge)) - np.repeat(before, counts[part])
        x = x_top[edge] + (rows + 0.5 - y_top[edge]) * slope[edge]
        columns = np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
        np.bitwise_xor.at(flat, rows * (width + 1) + columns, np.uint8(1))


def _parts(counts: NDArray[np.int64]) -> Iterable[NDArray[np.int64]]:
    """The edges in parts of about _CROSSINGS_AT_ONCE crossings."""
    parts = np.cumsum(counts) // _CROSSINGS_AT_ONCE
    cuts = np.flatnonzero(np.diff(parts)) + 1
    return np.split(np.arange(len(counts)), cuts) if len(counts) else ()
