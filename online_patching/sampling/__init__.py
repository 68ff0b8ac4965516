"""Draw numbers -> which patch of which slide. Pure functions of (seed, draw): docs/sampling.md.

sampler.py        PatchSampler: random patches for ever       draws.py    columns of draws; what samplers share
grid.py           GridSampler, EpochSampler: places in order  placing.py  tries of positions, read neighbourhoods
magnification.py  µm/px: lists, ranges, MaxAvg, MinMax        reach.py    what a slide can serve
transfer.py       the paper's laws over µm/px                 levels.py   the level each draw is read from
permutation.py    an order without a list                     weights.py  how often a slide is drawn
filters.py        which pixels are worth keeping     balanced.py  BalancedSampler: every class equally often
class_order.py    which class a draw is of
"""

from online_patching.sampling.balanced import BalancedSampler, ClassSupply
from online_patching.sampling.draws import Draws
from online_patching.sampling.filters import BlurFilter, HsvFilter
from online_patching.sampling.grid import EpochSampler, GridSampler
from online_patching.sampling.magnification import Continuous, MaxAvg, MinMax, Weighted
from online_patching.sampling.sampler import PatchSampler

__all__ = [
    "BalancedSampler",
    "BlurFilter",
    "ClassSupply",
    "Continuous",
    "Draws",
    "EpochSampler",
    "GridSampler",
    "HsvFilter",
    "MaxAvg",
    "MinMax",
    "PatchSampler",
    "Weighted",
]
