"""Labelled pictures and slides to judge a backbone with, one file a data set, and their splits."""

from pathfm.datasets.benchmark import Benchmark, Facts
from pathfm.datasets.folder import LabelledFolder, scan_folder
from pathfm.datasets.registry import DATASETS, open_dataset
from pathfm.datasets.splits import Split, stratified_split

__all__ = [
    "DATASETS",
    "Benchmark",
    "Facts",
    "LabelledFolder",
    "Split",
    "open_dataset",
    "scan_folder",
    "stratified_split",
]
