"""Polygons as pixels, by the rule of scikit-image, which eva draws its masks with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_EPS = 1e-12
_MAX_CELLS = 1_000_000  # pixels x edges looked at in one go: some 20 MB


def fill_polygon(mask: NDArray[np.uint8], vertices: NDArray[np.float64], value: int) -> None:
    """Sets the pixels of `mask` (height, width) whose centre is in or on the polygon.

    `vertices` (n, 2) are x, y in pixels, pixel (r, c) has its centre at (c, r); what lies outside
    the mask is left out. Overlapping loops follow the even-odd rule. Source: O'Rourke,
    Computational Geometry in C, 7.4 (a ray to either side; where they disagree, the point is on an edge).
    """
    if not len(vertices):
        return
    mask, vertices = mask.T, vertices[:, ::-1]  # rays run along y: eva hands its x over as rows
    height, width = mask.shape
    left, top = np.clip(np.floor(vertices.min(axis=0)), 0, (width, height)).astype(int)
    right, bottom = np.clip(np.ceil(vertices.max(axis=0)) + 1, 0, (width, height)).astype(int)
    if right <= left or bottom <= top:
        return
    edges = np.concatenate([np.roll(vertices, 1, axis=0), vertices], axis=1)  # (n, 4): from, to
    n_rows = max(1, _MAX_CELLS // (len(edges) * int(right - left)))
    for start in range(top, bottom, n_rows):
        y = np.arange(start, min(bottom, start + n_rows), dtype=np.float64)
        reached = (np.minimum(edges[:, 1], edges[:, 3]) <= y[-1] + _EPS) & (
            np.maximum(edges[:, 1], edges[:, 3]) >= y[0] - _EPS
        )
        near = edges[reached]
        n_columns = max(1, _MAX_CELLS // max(1, len(near) * len(y)))
        for first in range(left, right, n_columns):
            x = np.arange(first, min(right, first + n_columns), dtype=np.float64)
            mask[start : start + len(y), first : first + len(x)][_contains(near, x, y)] = value


def _contains(
    edges: NDArray[np.float64], x: NDArray[np.float64], y: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """Which points of the grid (len(y), len(x)) are in or on the polygon; edges elsewhere may lack."""
    x0, y0 = edges[:, 0] - x[:, None], edges[:, 1] - y[:, None]  # (w, n), (h, n): seen from there
    x1, y1 = edges[:, 2] - x[:, None], edges[:, 3] - y[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):  # level edges, which no ray crosses
        crossing = (x1[None] * y0[:, None] - x0[None] * y1[:, None]) / (y0 - y1)[:, None]
    to_right = ((y1 > 0) != (y0 > 0))[:, None] & (crossing > 0)
    to_left = ((y1 < 0) != (y0 < 0))[:, None] & (crossing < 0)
    odd_right = to_right.sum(axis=2) % 2 == 1
    odd_left = to_left.sum(axis=2) % 2 == 1
    on_vertex = ((np.abs(x1) < _EPS)[None] & (np.abs(y1) < _EPS)[:, None]).any(axis=2)
    inside: NDArray[np.bool_] = odd_right | (odd_right != odd_left) | on_vertex
    return inside
