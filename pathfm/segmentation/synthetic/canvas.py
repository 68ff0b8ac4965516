"""A thumbnail under work: its pixels, what each of them is, its random stream."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]


class Kind(IntEnum):
    """What a pixel of a thumbnail is."""

    GLASS = 0
    TISSUE = 1
    FAT = 2
    PALE = 3
    PEN = 4
    BUBBLE = 5
    EDGE = 6
    DUST = 7
    FRAME = 8


TISSUE_KINDS = (Kind.TISSUE, Kind.FAT, Kind.PALE)


def f32(values: ArrayLike) -> Array:
    """The values as a float32 array."""
    return np.asarray(values, np.float32)


@dataclass
class Canvas:
    """One thumbnail under work: float32 RGB 0..255, its kinds, and its own random stream."""

    rng: np.random.Generator
    size: int
    rgb: Array
    kinds: NDArray[np.uint8]

    @property
    def tissue(self) -> Mask:
        """(size, size) True where tissue of any kind lies."""
        return (self.kinds >= Kind.TISSUE) & (self.kinds <= Kind.PALE)

    def mark(self, where: Mask, kind: Kind, *, over_tissue: bool = False) -> None:
        """Makes pixels `kind`: where there is no tissue, or everywhere."""
        self.kinds[where if over_tissue else where & ~self.tissue] = kind

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return bool(self.rng.random() < p)

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
        return float(self.rng.uniform(low, high))

    def span(self, low: float, high: float) -> float:
        """Log-uniform in [low, high): for sizes."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def pick(self, *choices: str, p: tuple[float, ...] | None = None) -> str:
        """One of the choices, weighted by p (any sum)."""
        shares = None if p is None else np.array(p) / sum(p)
        return choices[int(self.rng.choice(len(choices), p=shares))]

    def noise(self, scale_px: float, octaves: int = 3, stretch: float = 1.0) -> Array:
        """(size, size) smooth noise, mean 0, sd 1; `stretch` > 1 draws it out along a bent way.

        Octaves are summed on a grid as fine as the finest of them, and only the sum is enlarged.
        """
        finest = max(scale_px / 2 ** (octaves - 1), 1.0)
        room = 1.6 if stretch > 1 else 1.0  # turned and bent noise needs more of it
        height = int(room * self.size / finest) + 6
        width = int(room * self.size / (finest * stretch)) + 6
        total = np.zeros((height, width), np.float32)
        for octave in range(octaves):
            times = max(scale_px / 2**octave, 1.0) / finest
            shape = int(height / times) + 4, int(width / times) + 4
            drawn = Image.fromarray(self.rng.standard_normal(shape, np.float32))
            box = (1.0, 1.0, 1 + width / times, 1 + height / times)
            wide = drawn.resize((width, height), Image.Resampling.BICUBIC, box=box)
            total += np.float32(0.5**octave) * np.asarray(wide)
        grown = self._grown(Image.fromarray(total), finest, stretch)
        return np.asarray((grown - grown.mean()) / (grown.std() + 1e-6), np.float32)

    def _grown(self, grid: Image.Image, pitch_px: float, stretch: float) -> Array:
        """The grid at (size, size): enlarged, and, when stretched, turned and bent."""
        size = self.size
        if stretch <= 1:
            box = (2.0, 2.0, 2 + size / pitch_px, 2 + size / pitch_px)
            return f32(np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC, box=box)))
        corners = 4  # of the mesh, each way
        at = np.linspace(-0.5, 0.5, corners)
        angle = self.between(0, 2 * np.pi)
        x = at[None] * np.cos(angle) + at[:, None] * np.sin(angle)
        y = at[:, None] * np.cos(angle) - at[None] * np.sin(angle)
        bend = self.between(0, 0.07)
        xy = np.stack([x, y], 2) + self.rng.uniform(-bend, bend, (corners, corners, 2))
        xy = xy * size / (pitch_px * np.array([stretch, 1])) + np.array(grid.size) / 2
        edges = np.linspace(0, size, corners).astype(int).tolist()
        mesh = []
        for i in range(corners - 1):
            for j in range(corners - 1):
                quad = [xy[i, j], xy[i + 1, j], xy[i + 1, j + 1], xy[i, j + 1]]
                to = (edges[j], edges[i], edges[j + 1], edges[i + 1])
                mesh.append((to, tuple(np.concatenate(quad).tolist())))
        bent = grid.transform((size, size), Image.Transform.MESH, mesh, Image.Resampling.BICUBIC)
        return f32(np.asarray(bent))

    def plane(self) -> tuple[Array, Array]:
        """Coordinates -1..1, turned by a random angle."""
        at = np.linspace(-1, 1, self.size, dtype=np.float32)
        angle = np.float32(self.between(0, 2 * np.pi))
        u = at[None] * np.cos(angle) + at[:, None] * np.sin(angle)
        v = at[:, None] * np.cos(angle) - at[None] * np.sin(angle)
        return u.astype(np.float32), v.astype(np.float32)

    def blend(self, colour: ArrayLike, alpha: ArrayLike) -> None:
        """Lays a colour over the picture with opacity alpha, (h, w) or one number."""
        a = f32(alpha)
        self.rgb += (f32(colour) - self.rgb) * (a[..., None] if a.ndim else a)
