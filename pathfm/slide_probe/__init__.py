"""Slides judged by bags of frozen patch features: kaiko-eva's ABMIL, and mean pooling beside it.

bags.py     Bags: features a slide, labels, patients, splits
abmil.py    the heads
table.py    a folder of HDF5 and a CSV -> Bags
fit.py      the protocol: one run, its best epoch, its probabilities
runs.py     several runs, on given splits or folds, with an interval over patients
"""

from pathfm.slide_probe.bags import Bags, bags_of

__all__ = ["Bags", "bags_of"]
