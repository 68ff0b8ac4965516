"""What optics do: out of focus, and moved while the shutter was open.

Lengths are in pixels of a picture whose shorter side is 224 px, and scale with it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from pathfm.corruptions.rounding import Rgb, to_bytes

REFERENCE_SIDE_PX = 224
"""The side for which lengths are given: that of ImageNet-C and of nearly every backbone's input."""

_LEAST_HALF_PX = 8


def defocus(picture: Rgb, blur: tuple[float, float], _: NDArray[np.float64]) -> Rgb:
    """The picture convolved with a disk, borders mirrored.

    blur: (radius px, standard deviation px of the small Gaussian that softens the disk's edge).
    Hendrycks & Dietterich 2019, `defocus_blur`.
    """
    radius_px = blur[0] * _scale(picture)
    kernel = disk(radius_px, blur[1])
    half = kernel.shape[0] // 2
    height, width = picture.shape[:2]
    # numpy mirrors over and over where the margin is wider than the picture
    padded = np.pad(picture, ((half, half), (half, half), (0, 0)), mode="reflect")
    shape = tuple(scipy.fft.next_fast_len(n, real=True) for n in padded.shape[:2])
    spectrum = scipy.fft.rfft2(padded.astype(np.float32), shape, axes=(0, 1))
    spectrum *= _disk_spectrum(radius_px, blur[1], shape)[..., None]
    whole = scipy.fft.irfft2(spectrum, shape, axes=(0, 1))
    return to_bytes(whole[2 * half : 2 * half + height, 2 * half : 2 * half + width])


def motion(picture: Rgb, blur: tuple[float, float], drawn: NDArray[np.float64]) -> Rgb:
    """The picture dragged along a line, the edge repeated outside.

    blur: (radius px, standard deviation px): weights exp(-i² / 2 sd²) at i = 0 .. 2 radius whole
    pixels along the line. drawn: the first number is the angle, from -45° to 45° to the x axis.
    `imagecorruptions`' form of Hendrycks & Dietterich's motion blur.
    """
    scale = _scale(picture)
    steps = 2 * max(1, round(blur[0] * scale)) + 1
    weights = np.exp(-0.5 * (np.arange(steps) / (blur[1] * scale)) ** 2)
    weights /= weights.sum()
    angle = math.radians(90.0 * drawn[0] - 45.0)
    height, width = picture.shape[:2]
    left = [math.ceil(i * math.cos(angle) - 0.5) for i in range(steps)]
    up = [math.ceil(i * math.sin(angle) - 0.5) for i in range(steps)]
    far = steps
    padded = np.pad(picture.astype(np.float32), ((far, far), (far, far), (0, 0)), mode="edge")
    out = np.zeros(picture.shape, np.float32)
    for weight, dx, dy in zip(weights, left, up, strict=True):
        y, x = far + dy, far + dx
        out += np.float32(weight) * padded[y : y + height, x : x + width]
    return to_bytes(out)


@lru_cache(maxsize=32)
def disk(radius_px: float, soft_px: float) -> NDArray[np.float32]:
    """A disk of sum 1 on an odd square, softened by a Gaussian over 3 px (5 px for radii above 8)."""
    half = max(_LEAST_HALF_PX, math.ceil(radius_px))
    at = np.arange(-half, half + 1)
    filled = (at[:, None] ** 2 + at[None, :] ** 2 <= radius_px**2).astype(np.float64)
    filled /= filled.sum()
    reach = 1 if radius_px <= _LEAST_HALF_PX else 2
    tap = np.exp(-0.5 * (np.arange(-reach, reach + 1) / soft_px) ** 2)
    tap /= tap.sum()
    mirrored = np.pad(filled, reach, mode="reflect")
    rows = sum(w * mirrored[i : i + 2 * half + 1] for i, w in enumerate(tap))
    kernel: NDArray[np.float64] = sum(w * rows[:, i : i + 2 * half + 1] for i, w in enumerate(tap))
    return kernel.astype(np.float32)


@lru_cache(maxsize=32)
def _disk_spectrum(
    radius_px: float, soft_px: float, shape: tuple[int, int]
) -> NDArray[np.complex64]:
    spectrum: NDArray[np.complex64] = scipy.fft.rfft2(disk(radius_px, soft_px), shape)
    return spectrum


def _scale(picture: Rgb) -> float:
    return float(min(picture.shape[:2])) / REFERENCE_SIDE_PX
