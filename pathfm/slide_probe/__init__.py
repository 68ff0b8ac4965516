"""Slides judged by bags of frozen patch features: kaiko-eva's ABMIL, and mean pooling beside it.

bags.py     Bags: features a slide, labels, patients, splits
folds.py    the three parts of a split, checked; folds that keep patients together
abmil.py    the heads
table.py    a folder of HDF5 and a CSV -> Bags
fit.py      the protocol: one run, its best epoch, its probabilities
runs.py     several runs, on given splits or folds, with an interval over patients
"""

from pathfm.slide_probe.bags import Bags, bags_of
from pathfm.slide_probe.folds import Parts, fold_of, grouped_folds, parts_of

__all__ = ["Bags", "Parts", "bags_of", "fold_of", "grouped_folds", "parts_of"]
