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
        """Lays a colour over the picture with opacity alpha, (h, w) or one number."""
        a = f32(alpha)
        self.rgb += (f32(colour) - self.rgb) * (a[..., None] if a.ndim else a)
