"""Channels of decoded pixels: to three, and from YCbCr."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def three_channels(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The first three channels; gray three times."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    return pixels[:, :, :3]


def ycbcr_to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """JFIF's full-range YCbCr (ITU-T T.871) to RGB, rounded to nearest."""
    y, cb, cr = (pixels[:, :, i].astype(np.float32) for i in range(3))
    rgb = np.stack(
        [
            y + 1.402 * (cr - 128),
            y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
            y + 1.772 * (cb - 128),
        ],
        axis=2,
    )
    return np.asarray(np.clip(np.rint(rgb), 0, 255), np.uint8)
