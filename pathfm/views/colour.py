"""What colour steps come to: one 3 x 3 matrix and one share of the mean grey a view, in float64.

Brightness, contrast, saturation, hue and greyscale are linear in red, green and blue, so their
product is worked out on the host, once a view, and pixels are touched once. Numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathfm.views.params import ViewTable
from pathfm.views.stain import restaining

LUMA = np.array([0.299, 0.587, 0.114])
"""ITU-R 601 weights, as PIL and torchvision use them for greyscale."""

_RGB_TO_YIQ = np.array(
    [
        [0.299, 0.587, 0.114],
        [0.59590059, -0.27455667, -0.32134392],
        [0.21153661, -0.52273617, 0.31119955],
    ]
)
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)

_Array = NDArray[np.float64]


def colour_matrices(table: ViewTable) -> tuple[_Array, _Array]:
    """(matrix (n, 3, 3), share (n,)) so that a pixel becomes matrix @ rgb + share * g.

    g is the mean grey of the picture before any change: contrast c around it after brightness b
    adds (1 - c) b g to every channel, and neither saturation, hue nor greyscale changes a grey
    offset. So the five steps, in this order, are one matrix and one scalar.
    """
    grey, eye = np.tile(LUMA, (3, 1)), np.eye(3)
    strength = table.saturation[:, None, None]
    saturate = strength * eye + (1.0 - strength) * grey
    matrix = _YIQ_TO_RGB @ _turns_in_iq(table.hue) @ _RGB_TO_YIQ @ saturate
    matrix = np.where(table.gray[:, None, None], grey @ matrix, matrix)
    return (
        (table.contrast * table.brightness)[:, None, None] * matrix,
        (1.0 - table.contrast) * table.brightness,
    )


def _turns_in_iq(hue_turns: _Array) -> _Array:
    """(n, 3, 3): rotations about the axis of luma, in YIQ."""
    turn = np.tile(np.eye(3), (len(hue_turns), 1, 1))
    angle = 2.0 * math.pi * hue_turns
    turn[:, 1, 1] = turn[:, 2, 2] = np.cos(angle)
    turn[:, 1, 2], turn[:, 2, 1] = -np.sin(angle), np.sin(angle)
    return turn


def stain_matrices(table: ViewTable) -> tuple[_Array, _Array]:
    """(matrix (n, 3, 3), shift (n, 3)): densities become matrix @ densities + shift.

    Densities are natural logarithms, -ln of the share of light; the table's shifts are base-10.
    """
    matrix, shift = restaining(table.stain_scale, math.log(10.0) * table.stain_shift)
    return matrix.transpose(0, 2, 1), shift


@dataclass(frozen=True)
class Finish:
    """What happens to n views' colours after cropping, as numbers; float32 where not booleans.

    A pixel (share of light, R, G, B) becomes exp(-(stain @ -ln pixel + shift)) where `restained`, then
    matrix @ pixel + offset + grey @ (mean pixel), which is normalised, cut off at `lowest` and
    `highest` (0 and 1, normalised), then `twice_middle` minus itself where `solarize` and not below
    `middle` (0.5, normalised). Last three: (3,).
    """

    transpose: NDArray[np.bool_]
    restained: NDArray[np.bool_]
    solarize: NDArray[np.bool_]
    stain: NDArray[np.float32]
    shift: NDArray[np.float32]
    matrix: NDArray[np.float32]
    offset: NDArray[np.float32]
    grey: NDArray[np.float32]
    lowest: NDArray[np.float32]
    highest: NDArray[np.float32]
    middle: NDArray[np.float32]
    twice_middle: NDArray[np.float32]


def finishing(table: ViewTable, mean: Sequence[float], std: Sequence[float]) -> Finish:
    """The numbers of a table's views, normalisation by mean and std (on 0..1) among them."""
    centre, spread = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    matrix, share = colour_matrices(table)
    stain, shift = stain_matrices(table)
    restained = (table.stain_scale != 1) | (table.stain_shift != 0)
    numbers = {
        "stain": stain,
        "shift": shift,
        "matrix": matrix / spread[:, None],
        "offset": np.broadcast_to(-centre / spread, (len(table), 3)),
        "grey": share[:, None, None] * LUMA / spread[:, None],
        "lowest": -centre / spread,
        "highest": (1 - centre) / spread,
        "middle": (0.5 - centre) / spread,
        "twice_middle": (1 - 2 * centre) / spread,
    }
    return Finish(
        transpose=table.transpose,
        restained=restained.any(axis=1),
        solarize=table.solarize,
        **{name: np.ascontiguousarray(value, np.float32) for name, value in numbers.items()},
    )
