"""Labelled pictures to judge a backbone with, one file a data set, and their splits."""

from pathfm.datasets.folder import LabelledFolder, scan_folder
from pathfm.datasets.splits import Split, stratified_split

__all__ = ["LabelledFolder", "Split", "scan_folder", "stratified_split"]
