"""Stains as colours of optical density: what haematoxylin, eosin and DAB take out of red, green, blue.

A pixel's optical density is -log of its share of the light, and stains add up in it (Beer and
Lambert). So changing the amounts of stains is one 3 x 3 matrix and one shift of densities. Numpy
only: what draws the amounts, and what changes pixels, are elsewhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Optical densities of haematoxylin, eosin and DAB in R, G, B; rows of about unit length.

Ruifrok & Johnston, "Quantification of histochemical staining by color deconvolution" (Anal. Quant.
Cytol. Histol. 23, 2001), table 1, as scikit-image's `rgb_from_hed` has them."""

DARKEST = 1 / 255
"""The least share of the light that is told from none: densities end there."""

_Array = NDArray[np.float64]


def unit_rows(stains: _Array) -> _Array:
    """The same stains (..., 3, 3) with rows of length 1, so that amounts are densities."""
    unit: _Array = stains / np.linalg.norm(stains, axis=-1, keepdims=True)
    return unit


def restaining(
    scale: _Array, shift: _Array, becomes: _Array | None = None
) -> tuple[_Array, _Array]:
    """(matrix (n, 3, 3), shift (n, 3)): a row of densities times the first, plus the second.

    scale, shift: (n, 3), what each of `HED`'s stains is multiplied by and then gets added (in the
    unit of the densities). becomes: (n, 3, 3) or (3, 3), the stains to mix again with; `HED` unless
    told. Tellez et al., "Whole-slide mitosis detection in H&E breast histology" (2018) and
    "Quantifying the effects of data augmentation and stain color normalization" (2019), 3.2:
    deconvolve, a * stain + b, mix again.
    """
    unit = unit_rows(HED)
    mixing = unit if becomes is None else unit_rows(becomes)
    matrix = np.linalg.inv(unit) @ (scale[:, :, None] * mixing)
    return matrix, (shift[:, None, :] @ mixing)[:, 0]
