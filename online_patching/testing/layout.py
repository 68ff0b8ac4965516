"""Where what lies on a synthetic slide: classes, glass, folds, pen, nuclei, in micrometres.

Everything is computed once per slide on a lattice of nodes a few µm apart, from Philox words keyed
by (seed, node, stream), so a slide is a pure function of its seed and size. `drawing.py` turns the
lattice into pixels at any µm/px.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.philox import uniform, words

Array = NDArray[np.float32]


def f32(values: ArrayLike) -> Array:
    """The values as a float32 array."""
    return np.asarray(values, np.float32)


CLASS_NAMES = ("glass", "tumour", "stroma", "fat", "lymphoid", "necrosis")
GLASS, TUMOUR, STROMA, FAT, LYMPHOID, NECROSIS = range(6)

_PURPOSES = (
    "outline", "edge", "tumour", "necrosis", "fat", "lymphoid", "gland", "tint", "density",
    "direction", "warp", "nuclei", "pen", "fold", "dust", "stain", "texture", "sprite",
)  # fmt: skip
#: One stream of random words a purpose, far from the sampler's own.
STREAM = {name: 7000 + number for number, name in enumerate(_PURPOSES)}

#: Nuclei stand on a jittered grid; the chance that a site keeps its own depends on the class.
NUCLEUS_PITCH_UM = 7.5
_NUCLEI_KEPT = f32([0.0, 0.60, 0.13, 0.006, 0.95, 0.18])
KINDS = ("tumour", "spindle", "lymphocyte", "debris")
_KIND_OF_CLASS = np.array([0, 0, 1, 1, 2, 3], np.int64)
SPRITES_PER_KIND = 24

#: Signed fields change by about 1 over this distance.
SIGNED_UM = 40.0


@dataclass(frozen=True)
class Nuclei:
    """Parallel arrays, one entry a nucleus, sorted by y."""

    x_um: NDArray[np.float64]
    y_um: NDArray[np.float64]
    sprite: NDArray[np.int64]
    """kind * SPRITES_PER_KIND + shape"""


@dataclass(frozen=True)
class Layout:
    """A slide's lattice: node (i, j) lies at x = j * pitch_um, y = i * pitch_um."""

    pitch_um: float
    weights: Array
    """(6, ny, nx) soft class memberships of tissue; entry 0 (glass) is 0, the rest sum to 1."""
    cover: Array
    """(ny, nx) signed: > 0 inside tissue and outside the lumens of glands."""
    truth: NDArray[np.uint8]
    """(ny, nx) class of each node; 0 = glass. Lumens count as their gland's class."""
    thickness: Array
    """(ny, nx) factor on stain: about 1 ± 0.1, up to 2 within a fold."""
    direction: Array
    """(ny, nx) in 0..1: which of the two fibre textures shows."""
    pen: Array | None
    """(ny, nx) signed: > 0 under ink."""
    dust: Array | None
    """(ny, nx) signed: > 0 within a speck."""
    nuclei: Nuclei


def plan_layout(
    seed: int, width_um: float, height_um: float, *, pen: bool, fold: bool, dust: int
) -> Layout:
    """The layout of one slide; about 0.5 s for 2 x 2 mm."""
    pitch_um = 4.0
    shape = (int(height_um / pitch_um) + 3, int(width_um / pitch_um) + 3)
    grid = _Grid(seed, shape, pitch_um, min(width_um, height_um))
    outline = _outline(grid, width_um, height_um)
    inside = outline > 0
    weights, gland = _classes(grid, inside)
    # A lumen belongs to tumour only: elsewhere the gland field is lifted out of reach.
    cover = np.minimum(outline, (0.95 - gland) * 1.2 + 12 * (1 - weights[TUMOUR]))
    truth = np.where(inside, weights.argmax(axis=0), GLASS).astype(np.uint8)
    thickness = 1 + 0.07 * grid.noise("tint", 350.0, 2)
    if fold:
        thickness = thickness * _fold(grid, inside)
    return Layout(
        pitch_um=pitch_um,
        weights=weights,
        cover=cover,
        truth=truth,
        thickness=np.clip(thickness, 0.6, 2.2).astype(np.float32),
        direction=_sigmoid(grid.noise("direction", 160.0, 1) * 2.5),
        pen=_pen(grid) if pen else None,
        dust=_dust(grid, dust) if dust else None,
        nuclei=_nuclei(grid, truth, cover),
    )


@dataclass(frozen=True)
class _Grid:
    """The lattice and its noise."""

    seed: int
    shape: tuple[int, int]
    pitch_um: float
    side_um: float
    """The slide's shorter side: what its shapes are scaled to."""

    def noise(self, purpose: str, scale_um: float, octaves: int = 3) -> Array:
        """(ny, nx) smooth noise: mean 0, sd about 1, features about `scale_um` wide."""
        total = np.zeros(self.shape, np.float32)
        for octave in range(octaves):
            step_um = scale_um / 2**octave
            ny, nx = (int(n * self.pitch_um / step_um) + 5 for n in self.shape)
            # Keyed by row and column, so that a larger slide of the same seed extends a smaller.
            keys = (np.arange(ny)[:, None] << 24) + np.arange(nx)[None, :]
            drawn = words(self.seed, keys.ravel(), octave, STREAM[purpose], 1)
            values = (uniform(drawn).reshape(ny, nx) - 0.5).astype(np.float32)
            rows = _spline(np.arange(self.shape[0]) * (self.pitch_um / step_um), ny)
            columns = _spline(np.arange(self.shape[1]) * (self.pitch_um / step_um), nx)
            total += np.float32(0.5**octave) * (rows @ values @ columns.T)
        return total * np.float32(6.0)

    def random(self, purpose: str, count: int, per_item: int) -> NDArray[np.float64]:
        """(count, per_item) numbers in [0, 1), keyed by (seed, row, purpose)."""
        return uniform(words(self.seed, np.arange(count), 255, STREAM[purpose], per_item))

    def places_um(self) -> tuple[Array, Array]:
        """x (1, nx) and y (ny, 1) of the nodes."""
        y, x = (np.arange(n, dtype=np.float32) * np.float32(self.pitch_um) for n in self.shape)
        return x[None, :], y[:, None]


def _spline(positions: NDArray[np.float64], nodes: int) -> Array:
    """(n, nodes) cubic B-spline weights at positions counted in nodes; rows sum to 1."""
    first = np.floor(positions).astype(np.int64)
    t = positions - first
    parts = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3)
    matrix = np.zeros((len(positions), nodes), np.float32)
    for offset, part in enumerate(parts):
        matrix[np.arange(len(positions)), first + offset] = part / 6
    return matrix


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-np.clip(x, -30, 30))), np.float32)


def _outline(grid: _Grid, width_um: float, height_um: float) -> Array:
    """Signed outline of one to three pieces of tissue."""
    x, y = grid.places_um()
    draws = grid.random("outline", 3, 5)
    pieces = 1 + int(draws[0, 4] * 2.999)
    signed = np.full(grid.shape, -1e9, np.float32)
    along_x = width_um >= height_um
    for piece in range(pieces):
        u = draws[piece]
        centre = (piece + 0.5) / pieces, 0.5 + 0.06 * (u[1] - 0.5)
        half = (0.40 + 0.06 * u[2]) / pieces, 0.36 + 0.08 * u[3]
        (cx, cy), (rx, ry) = (centre, half) if along_x else (centre[::-1], half[::-1])
        rx, ry = rx * width_um, ry * height_um
        radius = np.hypot((x - cx * width_um) / rx, (y - cy * height_um) / ry)
        signed = np.maximum(signed, ((1 - radius) * min(rx, ry)).astype(np.float32))
    signed = signed + 0.035 * grid.side_um * grid.noise("outline", grid.side_um / 4, 2)
    signed = signed + 7.0 * grid.noise("edge", 60.0, 3)
    return np.asarray(signed / SIGNED_UM, np.float32)


def _classes(grid: _Grid, inside: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Soft memberships, each with its share, painted one over the other; and the gland field."""
    scale_um = float(np.clip(grid.side_um / 3, 100.0, 600.0))
    tumour = grid.noise("tumour", scale_um)
    fields = {
        TUMOUR: (tumour, 0.42, scale_um),
        FAT: (grid.noise("fat", scale_um) - 0.8 * tumour, 0.18, scale_um),
        LYMPHOID: (grid.noise("lymphoid", scale_um / 2.5), 0.12, scale_um / 2.5),
    }
    weights = np.zeros((len(CLASS_NAMES), *grid.shape), np.float32)
    weights[STROMA] = 1

    def paint(
        number: int, share_of: NDArray[np.bool_], field: Array, share: float, scale: float
    ) -> None:
        level = np.quantile(field[share_of], 1 - share) if share_of.any() else np.inf
        alpha = _sigmoid((field - np.float32(level)) * np.float32(scale / 14.0))
        np.multiply(weights, 1 - alpha, out=weights)
        weights[number] += alpha

    paint(TUMOUR, inside, *fields[TUMOUR])
    core = inside & (weights[TUMOUR] > 0.5)
    deep = tumour + 0.5 * grid.noise("necrosis", scale_um / 2)
    paint(NECROSIS, core, deep, 0.24, scale_um)
    paint(FAT, inside, *fields[FAT])
    paint(LYMPHOID, inside, *fields[LYMPHOID])
    return weights, grid.noise("gland", 95.0, 2)


def _fold(grid: _Grid, inside: NDArray[np.bool_]) -> Array:
    """Factor on thickness: a band about 30 µm wide and a third of the slide long."""
    x, y = grid.places_um()
    angle, at, _ = grid.random("fold", 1, 3)[0]
    ys, xs = np.nonzero(inside)
    if len(xs) == 0:
        return np.ones(grid.shape, np.float32)
    anchor = int(at * len(xs))
    dx, dy = x - xs[anchor] * grid.pitch_um, y - ys[anchor] * grid.pitch_um
    cos, sin = np.cos(angle * np.pi), np.sin(angle * np.pi)
    across = dx * cos + dy * sin + 25.0 * grid.noise("warp", 200.0, 2)
    along = dx * -sin + dy * cos
    length_um = 0.17 * grid.side_um
    band = np.exp(-((across / 14.0) ** 2)) * np.exp(-((along / length_um) ** 4))
    return np.asarray(1 + 0.9 * band, np.float32)


def _pen(grid: _Grid) -> Array:
    """Signed stroke of a marker along a bent line near one corner."""
    x, y = grid.places_um()
    u = grid.random("pen", 1, 8)[0]
    width_um, height_um = grid.shape[1] * grid.pitch_um, grid.shape[0] * grid.pitch_um
    start = np.array([u[0] * 0.25, u[1] * 0.25])
    end = np.array([0.45 + u[2] * 0.3, u[3] * 0.15])
    bend = np.array([u[4] * 0.5, 0.1 + u[5] * 0.25])
    if u[6] < 0.5:
        start[1], end[1], bend[1] = 1 - start[1], 1 - end[1], 1 - bend[1]
    nearest = np.full(grid.shape, np.inf, np.float32)
    for t in np.linspace(0, 1, 160):
        px, py = (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end
        gap = np.hypot(x - np.float32(px * width_um), y - np.float32(py * height_um))
        nearest = np.minimum(nearest, gap.astype(np.float32))
    half_um = 0.016 * grid.side_um
    return np.asarray((half_um - nearest) / SIGNED_UM, np.float32)


def _dust(grid: _Grid, specks: int) -> Array:
    x, y = grid.places_um()
    signed = np.full(grid.shape, -1e3, np.float32)
    for u in grid.random("dust", specks, 5):
        cx, cy = u[0] * grid.shape[1] * grid.pitch_um, u[1] * grid.shape[0] * grid.pitch_um
        radius_um = 4.0 + 14.0 * u[2] ** 2
        stretch = 0.5 + u[3]
        gap = np.hypot((x - np.float32(cx)) * stretch, y - np.float32(cy))
        np.maximum(signed, (radius_um - gap) / SIGNED_UM, out=signed)
    return signed


def _nuclei(grid: _Grid, truth: NDArray[np.uint8], cover: Array) -> Nuclei:
    """Nuclei of the whole slide: sites of a jittered grid, thinned by class."""
    rows, columns = (int(n * grid.pitch_um / NUCLEUS_PITCH_UM) for n in grid.shape)
    keys = ((np.arange(rows)[:, None] << 24) + np.arange(columns)[None, :]).ravel()
    u = uniform(words(grid.seed, keys, 0, STREAM["nuclei"], 4))
    row, column = keys >> 24, keys & (2**24 - 1)
    x_um = (column + 0.5 + 0.8 * (u[:, 0] - 0.5)) * NUCLEUS_PITCH_UM
    y_um = (row + 0.5 + 0.8 * (u[:, 1] - 0.5)) * NUCLEUS_PITCH_UM
    i = np.minimum((y_um / grid.pitch_um + 0.5).astype(np.int64), grid.shape[0] - 1)
    j = np.minimum((x_um / grid.pitch_um + 0.5).astype(np.int64), grid.shape[1] - 1)
    here, depth = truth[i, j], cover[i, j]
    clumps = np.clip(1 + 0.35 * grid.noise("density", 70.0, 2)[i, j], 0.2, 1.6)
    chance = _NUCLEI_KEPT[here] * clumps
    chance = np.where((here == TUMOUR) & (depth < 0.45), 0.97, chance)  # a gland's lining
    keep = np.flatnonzero((u[:, 2] < chance) & (depth > 0.08))
    keep = keep[np.argsort(y_um[keep], kind="stable")]
    shape = (u[keep, 3] * SPRITES_PER_KIND).astype(np.int64)
    sprite = _KIND_OF_CLASS[here[keep]] * SPRITES_PER_KIND + shape
    return Nuclei(x_um=x_um[keep], y_um=y_um[keep], sprite=sprite)
