"""Grey levels back to bytes, in one place."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rgb = NDArray[np.uint8]


def to_bytes(levels: NDArray[np.floating[Any]]) -> Rgb:
    """Levels 0..255 as uint8, rounded to the nearest (halves to even), cut off outside."""
    rounded: Rgb = np.clip(np.rint(levels), 0.0, 255.0).astype(np.uint8)
    return rounded
