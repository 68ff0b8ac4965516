"""A thumbnail under work: its pixels, its truth, its random stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

Array = NDArray[np.float32]
Mask = NDArray[np.bool_]


def f32(values: ArrayLike) -> Array:
    """The values as a float32 array."""
    return np.asarray(values, np.float32)


@dataclass
class Canvas:
    """One thumbnail under work: float32 RGB 0..255, its truth, and its own random stream."""

    rng: np.random.Generator
    size: int
    rgb: Array
    truth: Mask

    def chance(self, p: float) -> bool:
        """True with probability p."""
        return bool(self.rng.random() < p)

    def between(self, low: float, high: float) -> float:
        """Uniform in [low, high)."""
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
        """Lays a colour over the picture with opacity alpha, (h, w) or one number."""
        a = f32(alpha)
        self.rgb += (f32(colour) - self.rgb) * (a[..., None] if a.ndim else a)
