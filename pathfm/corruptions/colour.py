"""Colours that a scanner or a screen gets wrong: value, saturation and hue of HSV.

With V the largest and m the smallest of (R, G, B), each shift is a map of the channels that needs no
way through hue, except for the shift of hue itself. Everything is on 0..1 and rounded once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pathfm.corruptions.rounding import Rgb, to_bytes

_Unit = NDArray[np.float32]

_VALUES = np.arange(256, dtype=np.float32) / np.float32(255.0)


def brightness(picture: Rgb, shift: float, _: NDArray[np.float64]) -> Rgb:
    """V + shift, cut off at 1: hue and saturation stay, so channels are multiplied by V' / V.

    Black has no hue: it becomes grey.
    """
    value = picture.max(axis=2)
    risen = np.minimum(_VALUES + np.float32(shift), np.float32(1.0))
    factor = np.divide(risen, _VALUES, out=np.zeros_like(risen), where=_VALUES > 0)
    out = picture * factor[value][..., None]
    out[value == 0] = 255.0 * risen[0]
    return to_bytes(out)


def saturation(picture: Rgb, shift: float, _: NDArray[np.float64]) -> Rgb:
    """S + shift with S = (V - m) / V, cut off at 1: V and hue stay.

    Channel x becomes V (1 - S' (V - x) / (V - m)). A grey pixel has no hue; it is given 0 (red), as
    HSV conversions do and as the published benchmark has it, so white glass turns pink.
    """
    light = _VALUES[picture]
    value, spread, below = _parts(light)
    share = np.divide(spread, value, out=np.zeros_like(value), where=value > 0)
    share = np.minimum(share + np.float32(shift), np.float32(1.0))
    grey = spread == 0
    below /= np.where(grey, np.float32(1.0), spread)[..., None]
    below[grey] = (0.0, 1.0, 1.0)
    return to_bytes(255.0 * value[..., None] * (1.0 - share[..., None] * below))


def hue(picture: Rgb, turns: float, _: NDArray[np.float64]) -> Rgb:
    """H + turns (of the colour circle): red goes towards yellow. Grey stays grey."""
    light = _VALUES[picture]
    value, spread, _below = _parts(light)
    sixths = _sixths_of_hue(light, value, spread) + np.float32(6.0 * turns)
    out = np.empty_like(light)
    for channel, at in enumerate((5.0, 3.0, 1.0)):  # where on the circle a channel is least
        n = (sixths + np.float32(at)) % np.float32(6.0)
        out[..., channel] = value - spread * np.clip(np.minimum(n, 4.0 - n), 0.0, 1.0)
    return to_bytes(255.0 * out)


def _parts(light: _Unit) -> tuple[_Unit, _Unit, _Unit]:
    """V, V - m (both (h, w)) and V - x (h, w, 3)."""
    value = light.max(axis=2)
    return value, value - light.min(axis=2), value[..., None] - light


def _sixths_of_hue(light: _Unit, value: _Unit, spread: _Unit) -> _Unit:
    """Hue in sixths of the circle, red 0, green 2, blue 4; 0 for grey."""
    red, green, blue = light[..., 0], light[..., 1], light[..., 2]
    over = np.where(spread == 0, np.float32(1.0), spread)
    found = np.where(value == green, 2.0 + (blue - red) / over, 4.0 + (red - green) / over)
    found = np.where(value == red, (green - blue) / over, found)
    return np.where(spread == 0, np.float32(0.0), found).astype(np.float32)
