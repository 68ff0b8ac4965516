"""Channels of decoded pixels: to three, and from YCbCr."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_AWAY = np.arange(256) - 128
# JFIF's full-range YCbCr (ITU-T T.871), rounded as libjpeg and OpenSlide do: sums in 1/65536.
_R_CR = ((91_881 * _AWAY + 32_768) >> 16).astype(np.int16)
_B_CB = ((116_130 * _AWAY + 32_768) >> 16).astype(np.int16)
_G_CB, _G_CR = (-22_554 * _AWAY).astype(np.int32), (-46_802 * _AWAY + 32_768).astype(np.int32)


def three_channels(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The first three channels; gray three times."""
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    return pixels[:, :, :3]


def over_white(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB of RGBA laid over white, as glass is; alpha is not multiplied in already."""
    alpha = pixels[:, :, 3:]
    if alpha.size and alpha.min() == 255:
        return pixels[:, :, :3]
    seen = pixels[:, :, :3].astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16))
    return np.asarray((seen + 127) // 255, np.uint8)


def ycbcr_to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """JFIF's full-range YCbCr to RGB: at most one grey level from the exact value."""
    y, cb, cr = (pixels[:, :, i] for i in range(3))
    luma = y.astype(np.int16)
    out = np.empty((*y.shape, 3), np.uint8)
    green = ((_G_CB[cb] + _G_CR[cr]) >> 16).astype(np.int16)
    for number, chroma in enumerate((_R_CR[cr], green, _B_CB[cb])):
        out[:, :, number] = np.clip(luma + chroma, 0, 255)
    return out
