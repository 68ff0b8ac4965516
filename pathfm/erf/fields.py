"""Effective receptive fields: where the gradient of an output's central cell has its energy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from online_patching.philox import words
from pathfm.erf.networks import Outputs
from pathfm.runtime import PathfmError

Energy = NDArray[np.float64]
SHARES = (0.5, 0.9)
_SIGN_STREAM = 7310


@dataclass(frozen=True)
class Field2d:
    """The energy of one output's gradient over the picture, and the radii that hold its shares.

    energy: (h, w), sums to 1. centre: (y, x) in pixels of the middle of the output's cell.
    """

    network: str
    output: str
    trained: bool
    weights: str
    energy: Energy
    centre: tuple[float, float]

    def radius_px(self, share: float) -> float:
        """Radius of the smallest circle round the centre that holds this share of the energy."""
        return energy_radius(self.energy, self.centre, share)


def random_signs(seed: int, draw: int, count: int) -> Tensor:
    """`count` numbers that are +1 or -1, a function of (seed, draw)."""
    blocks = [
        words(seed, [draw], block, _SIGN_STREAM, 1024)[0] for block in range(-(-count // 1024))
    ]
    bits = np.concatenate(blocks)[:count] & 1
    return torch.from_numpy(2.0 * bits - 1).float()


def receptive_fields(
    outputs: Outputs,
    pictures: Sequence[Tensor],
    seed: int,
    signs: Callable[[int, int, int], Tensor] = random_signs,
) -> dict[str, tuple[Energy, tuple[float, float]]]:
    """(energy (h, w) that sums to 1, centre (y, x) in pixels) of each output.

    pictures: (1, 3, h, w) each, all of one size. signs: (seed, number of the picture, channels) ->
    weights of the channels. Raises PathfmError where no gradient arrives, or none that is a number.
    """
    energies: dict[str, Energy] = {}
    centres: dict[str, tuple[float, float]] = {}
    for number, picture in enumerate(pictures):
        rgb = picture.clone().requires_grad_()
        for name, (out, stride_px, offset_px) in outputs(rgb).items():
            rows, columns = out.shape[-2:]
            cell = out[0, :, rows // 2, columns // 2]
            signed = (cell * signs(seed, number, len(cell)).to(cell)).sum()
            (gradient,) = torch.autograd.grad(signed, rgb, retain_graph=True)
            energy = gradient[0].double().square().sum(0).numpy()
            scaled = energy / total if (total := energy.sum()) else energy
            energies[name] = energies.get(name, np.zeros_like(energy)) + scaled
            row_px, column_px = rows // 2 * stride_px, columns // 2 * stride_px
            centres[name] = (row_px + offset_px, column_px + offset_px)
    for name, energy in energies.items():
        if not 0 < energy.sum() < np.inf:
            raise PathfmError(
                f"the gradient of {name} is {energy.sum():.3g} in all: the output does not depend on "
                "the picture, or the weights are damaged"
            )
    return {name: (energy / energy.sum(), centres[name]) for name, energy in energies.items()}


def energy_radius(energy: Energy, centre: tuple[float, float], share: float) -> float:
    """Radius in pixels of the smallest circle round `centre` that holds a share of the energy.

    Pixels count whole, by the distance of their middles.
    """
    rows, columns = (np.arange(n) + 0.5 for n in energy.shape)
    distance = np.hypot(rows[:, None] - centre[0], columns - centre[1]).ravel()
    order = np.argsort(distance, kind="stable")
    held = np.cumsum(energy.ravel()[order])
    at = min(int(np.searchsorted(held, share * held[-1])), held.size - 1)
    return float(distance[order[at]])
