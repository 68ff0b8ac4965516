"""Another laboratory's stain: amounts of haematoxylin, eosin and DAB scaled and shifted."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from pathfm.corruptions.rounding import Rgb, to_bytes
from pathfm.views.stain import DARKEST, restaining

_DENSITY = -np.log(np.maximum(np.arange(256) / 255.0, DARKEST)).astype(np.float32)


def stain(picture: Rgb, strength: float, drawn: NDArray[np.float64]) -> Rgb:
    """The picture with each of three stains' amounts times 1 + a and plus b.

    a and b lie within ± strength; b in base-10 optical density. drawn: three numbers for a, three for
    b. Tellez et al. 2019, 3.2; the definition of the views' stain jitter.
    """
    moved = strength * (2.0 * drawn[:6] - 1.0)
    matrix, shift = restaining(1.0 + moved[None, :3], math.log(10.0) * moved[None, 3:])
    density = _DENSITY[picture].reshape(-1, 3)
    mixed = density @ matrix[0].astype(np.float32) + shift[0].astype(np.float32)
    return to_bytes(255.0 * np.exp(-mixed)).reshape(picture.shape)
