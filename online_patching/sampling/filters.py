"""Pixel filters: which drawn patches are worth keeping, by their colours or their sharpness.

A loader asks every filter of its sampler about the pixels of a draw (its own view, not its context).
What one refuses moves to its next attempt, f(seed, draw, attempt), with the reason
"filter: <name>": so the stream stays the same for any number of workers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import SamplerError


@runtime_checkable
class PixelFilter(Protocol):
    """Says which patches to keep. Equal pixels must get equal answers, alone or in any batch."""

    @property
    def name(self) -> str:
        """What failures are counted under."""

    @property
    def config(self) -> dict[str, Any]:
        """What it is, as JSON types: part of a sampler's digest."""

    def keep(self, pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """For uint8 RGB patches (n, height, width, 3): n booleans."""


@dataclass(frozen=True)
class HsvFilter:
    """Keep a patch when at least `min_share` of its pixels have hue, saturation and value in these
    closed ranges, in OpenCV's units (hue 0-179 in steps of 2 degrees, the others 0-255).

    The default is the tissue test of Virchow and Midnight (arXiv 2309.07778, 2504.05186): purple to red hues,
    no glass, no black.
    """

    min_share: float = 0.6
    hue: tuple[int, int] = (90, 180)
    saturation: tuple[int, int] = (8, 255)
    value: tuple[int, int] = (103, 255)

    def __post_init__(self) -> None:
        if not 0 <= self.min_share <= 1:
            raise SamplerError(f"min_share {self.min_share:g} is not a share between 0 and 1.")
        for name, (low, high) in self._ranges.items():
            if not 0 <= low <= high <= 255:
                raise SamplerError(f"{name} {low} to {high} is not a range within 0 to 255.")

    @property
    def _ranges(self) -> dict[str, tuple[int, int]]:
        return {"hue": self.hue, "saturation": self.saturation, "value": self.value}

    @property
    def name(self) -> str:
        """What failures are counted under."""
        return "hsv"

    @property
    def config(self) -> dict[str, Any]:
        """What it is, as JSON types."""
        ranges = {name: list(limits) for name, limits in self._ranges.items()}
        return {"filter": "hsv", "min_share": self.min_share, **ranges}

    def keep(self, pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """For uint8 RGB patches (n, height, width, 3): n booleans."""
        of_value, of_hue = _hsv_tables(self)
        out = np.empty(len(pixels), bool)
        for i, patch in enumerate(pixels):  # one at a time: its planes stay in the cache
            value, spread, hue = hexagon(patch)
            good = of_value[value.astype(np.int32) << 8 | spread] & of_hue[hue]
            out[i] = np.count_nonzero(good) >= self.min_share * good.size
        return out


@dataclass(frozen=True)
class BlurFilter:
    """Keep a patch when the variance of its Laplacian is at least `min_variance`.

    The Laplacian is that of 4 neighbours on 8-bit grey (OpenCV's weights for RGB), without the outer
    pixels. Sharp patches vary more the coarser they are. On seven real slides (benchmarks/
    pixel_filters.py) the default keeps every patch as scanned, whose 1st percentiles are 71 to 5,609,
    at least 77 % after a Gaussian blur of 1 px, at most 36 % after 2 px and none after 4 px. None of them
    was scanned at 0.25 µm/px: look at your own there.
    """

    min_variance: float = 30.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_variance < np.inf:
            raise SamplerError(f"min_variance {self.min_variance:g} is not a number >= 0.")

    @property
    def name(self) -> str:
        """What failures are counted under."""
        return "blur"

    @property
    def config(self) -> dict[str, Any]:
        """What it is, as JSON types."""
        return {"filter": "blur", **asdict(self)}

    def keep(self, pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """For uint8 RGB patches (n, height, width, 3): n booleans."""
        return np.asarray([sharpness(patch) >= self.min_variance for patch in pixels], bool)


def sharpness(patch: NDArray[np.uint8]) -> float:
    """The variance of the Laplacian of one RGB patch (height, width, 3); 0 below 3 x 3 pixels."""
    if min(patch.shape[:2]) < 3:
        return 0.0
    red, green, blue = (patch[..., c].astype(np.int32) for c in range(3))
    gray = (9798 * red + 19235 * green + 3735 * blue + 16384) >> 15
    middle = gray[1:-1, 1:-1]
    laplacian = gray[:-2, 1:-1] + gray[2:, 1:-1] + gray[1:-1, :-2] + gray[1:-1, 2:] - 4 * middle
    # Whole numbers, so that the order of a sum cannot change a decision.
    total, squares = (
        int(laplacian.sum(dtype=np.int64)),
        int(np.square(laplacian).sum(dtype=np.int64)),
    )
    return float(squares / laplacian.size - (total / laplacian.size) ** 2)


def rgb_to_hsv(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """OpenCV's COLOR_RGB2HSV of uint8 pixels (..., 3), bit for bit."""
    value, spread, hue = hexagon(pixels)
    saturation, hues = _opencv_tables()
    return np.stack([hues[hue], saturation[value.astype(np.int32) << 8 | spread], value], axis=-1)


def hexagon(
    pixels: NDArray[np.uint8],
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int32]]:
    """Value (the largest channel), spread (largest less smallest), and the hue's place in the tables.

    The place is (sector, difference of the other two channels, spread); sectors in OpenCV's
    order: the largest is red, else green, else blue.
    """
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    r, g, b = red.astype(np.int32), green.astype(np.int32), blue.astype(np.int32)
    is_red, is_green = value == red, value == green
    place = np.where(is_red, g - b, np.where(is_green, b - r + 512, r - g + 1024))
    return value, spread, ((place + 255) << 8) | spread


@lru_cache(maxsize=1)
def _opencv_tables() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Saturation by (value, spread) and hue by (sector, difference, spread), in OpenCV's fixed point:
    12 bits after the point, reciprocals rounded to even, results rounded half up."""
    number = np.arange(1, 256)
    per_value = np.concatenate([[0], np.rint((255 << 12) / number)]).astype(np.int64)
    per_spread = np.concatenate([[0], np.rint((180 << 12) / (6.0 * number))]).astype(np.int64)
    spread = np.arange(256)
    saturation = (spread[None, :] * per_value[:, None] + 2048) >> 12
    difference = np.arange(-255, 257)
    shifted = difference[None, :, None] + 2 * np.arange(3)[:, None, None] * spread
    hue = (shifted * per_spread + 2048) >> 12
    hue = np.where(hue < 0, hue + 180, hue)
    clipped = np.clip(saturation, 0, 255).astype(np.uint8).reshape(-1)
    return clipped, np.clip(hue, 0, 255).astype(np.uint8).reshape(-1)


@lru_cache(maxsize=8)
def _hsv_tables(one: HsvFilter) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which (value, spread) and which hue places a filter counts."""
    saturation, hue = _opencv_tables()
    value = np.repeat(np.arange(256), 256)
    good = (saturation >= one.saturation[0]) & (saturation <= one.saturation[1])
    good &= (value >= one.value[0]) & (value <= one.value[1])
    return good, (hue >= one.hue[0]) & (hue <= one.hue[1])
