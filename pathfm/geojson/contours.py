"""A mask's outline: polygons with holes along its cells' edges, and the same with fewer vertices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from pathfm.geojson.raster import Polygon, Ring

Mask = NDArray[np.bool_]


def contours(
    mask: Mask,
    scale: float | tuple[float, float] = 1.0,
    tolerance_px: float = 0.0,
    name: str = "Tissue",
    colour: tuple[int, int, int] | None = (0, 200, 83),
) -> list[Polygon]:
    """A polygon for each piece of the mask, holes cut out; pieces hang together along edges.

    Vertices are the corners where the outline turns, times `scale` (units of the coordinates per
    cell, one number or that of x and of y): rasterising them gives the mask back bit for bit.
    Rings are simple (a corner where two cells touch diagonally is never passed twice) and holes
    touch their outer ring in single points at most, so the polygons are valid for JTS and QuPath.
    Outer rings run clockwise on the screen (positive by the shoelace formula), holes the other way.
    `tolerance_px` > 0, in cells, drops vertices: see `simplified`. In order of the first cell.
    """
    from scipy import ndimage

    scales = np.array(scale if isinstance(scale, tuple) else (scale, scale), np.float64)
    labels, _ = ndimage.label(mask)
    outer: dict[int, Ring] = {}
    holes: dict[int, list[Ring]] = defaultdict(list)
    for ring in _rings(mask):
        x, y = min(((x, y) for x, y in ring), key=lambda corner: (corner[1], corner[0]))
        corners = np.array(ring, np.float64)
        if mask[y, x]:  # below and right of the ring's first corner is its inside
            outer[int(labels[y, x])] = _turned(corners, 1.0)
        else:
            holes[int(labels[y - 1, x])].append(_turned(corners, -1.0))
    return [
        Polygon(
            tuple(simplified(ring, tolerance_px) * scales for ring in (outer[k], *holes[k])),
            name,
            colour,
        )
        for k in sorted(outer)
    ]


def _turned(ring: Ring, sign: float) -> Ring:
    """The ring so that its shoelace area has the sign, its first vertex kept first."""
    x, y = ring.T
    area = float(x @ np.roll(y, -1) - y @ np.roll(x, -1))
    return ring if area * sign > 0 else np.roll(ring[::-1], 1, axis=0)


def _rings(mask: Mask) -> Iterator[list[tuple[int, int]]]:
    """The simple closed outlines as lists of corners (x, y).

    Along a grid line, corners in order are start, end, start, end ... of the outline's straight
    parts; so each corner has one partner along its row and one along its column, and following
    them in turn closes a ring. Where two cells touch diagonally there are two corners in one
    place, one for each cell.
    """
    xs, ys, to_right, below = _corners(mask)
    along_row = _partners(np.lexsort((to_right, xs, ys)))
    along_column = _partners(np.lexsort((below, ys, xs)))
    places = list(zip(xs.tolist(), ys.tolist(), strict=True))
    seen = bytearray(len(places))
    for start in range(len(places)):
        if seen[start]:
            continue
        ring, at = [], start
        while not seen[at]:
            other = along_row[at]
            seen[at] = seen[other] = 1
            ring += [places[at], places[other]]
            at = along_column[other]
        yield from _simple(ring)


def _corners(mask: Mask) -> tuple[NDArray[np.int64], ...]:
    """x, y of each corner, and whether its straight parts go right of it and below it."""
    padded = np.pad(mask.astype(bool), 1)
    upper_left, upper_right = padded[:-1, :-1], padded[:-1, 1:]
    lower_left, lower_right = padded[1:, :-1], padded[1:, 1:]
    odd = upper_left ^ upper_right ^ lower_left ^ lower_right
    found = []
    ys, xs = np.nonzero(odd)
    # one cell differs from the other three: the parts run along that cell's sides
    right = (upper_right != lower_right)[ys, xs]
    down = (lower_left != lower_right)[ys, xs]
    found.append((xs, ys, right, down))
    diagonal = (
        (upper_left == lower_right) & (upper_right == lower_left) & (upper_left ^ upper_right)
    )
    ys, xs = np.nonzero(diagonal)
    falling = upper_left[ys, xs]  # tissue upper left and lower right; otherwise the other two
    no, yes = np.zeros(len(xs), bool), np.ones(len(xs), bool)
    found.append((xs, ys, no, ~falling))  # the left cell: upper (nothing below) when falling
    found.append((xs, ys, yes, falling))
    x, y, r, d = (np.concatenate(parts).astype(np.int64) for parts in zip(*found, strict=True))
    return x, y, r, d


def _partners(order: NDArray[np.int64]) -> list[int]:
    partner = np.empty_like(order)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return [int(k) for k in partner.tolist()]


def _simple(ring: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """The ring cut where it passes a place twice, each part a ring that does not."""
    if len(set(ring)) == len(ring):
        yield ring
        return
    path: list[tuple[int, int]] = []
    where: dict[tuple[int, int], int] = {}
    for corner in ring:
        if corner in where:
            start = where[corner]
            yield path[start:]
            for gone in path[start:]:
                del where[gone]
            del path[start:]
        where[corner] = len(path)
        path.append(corner)
    yield path


def simplified(ring: Ring, tolerance: float) -> Ring:
    """The ring with fewer vertices: none that is dropped lies further than `tolerance` from it.

    Douglas & Peucker (1973) between the ring's first vertex and the one furthest from it, with
    distances to segments. A ring that would keep fewer than three vertices stays as it is, and so
    does any at tolerance 0. Simplified rings of one mask may touch or cross each other or
    themselves by up to the tolerance.
    """
    if tolerance <= 0 or len(ring) < 4:
        return ring
    closed = np.concatenate([ring, ring[:1]])
    keep = np.zeros(len(closed), bool)
    far = int(((ring - ring[0]) ** 2).sum(axis=1).argmax())
    keep[[0, far, -1]] = True
    waiting = [(0, far), (far, len(ring))]
    while waiting:
        start, stop = waiting.pop()
        if stop - start < 2:
            continue
        distances = _distances(closed[start + 1 : stop], closed[start], closed[stop])
        furthest = int(distances.argmax())
        if distances[furthest] > tolerance:
            middle = start + 1 + furthest
            keep[middle] = True
            waiting += [(start, middle), (middle, stop)]
    kept = ring[keep[:-1]]
    return kept if len(kept) >= 3 else ring


def _distances(points: Ring, a: Ring, b: Ring) -> NDArray[np.float64]:
    """Distance of each point from the segment a-b."""
    along = b - a
    length2 = float(along @ along)
    t = np.clip((points - a) @ along / length2, 0.0, 1.0) if length2 else np.zeros(len(points))
    return np.asarray(np.linalg.norm(points - (a + t[:, None] * along), axis=1))
