"""Data sets that unpack to a folder a class: `<folder>/<class>/**/*.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pathfm.datasets.benchmark import Facts, SplitName
from pathfm.datasets.listing import files_under, lacking


def list_classes(
    facts: Facts, root: Path, folders: Mapping[SplitName, str], suffixes: Sequence[str]
) -> tuple[list[str], list[int], list[str]]:
    """Paths, labels and splits of a folder a split, each with a folder a class.

    Order as torchvision's (and so eva's): by class, folder, name. `PathfmError` names the first
    folder that is missing or empty.
    """
    paths: list[str] = []
    labels: list[int] = []
    splits: list[str] = []
    for split, folder in folders.items():
        for label, name in sorted(enumerate(facts.classes), key=lambda item: item[1]):
            here = f"{folder}/{name}"
            if not (root / here).is_dir():
                raise lacking(facts, root, f"there is no folder {here}")
            found = files_under(root, here, suffixes)
            if not found:
                raise lacking(facts, root, f"the folder {here} has no {' or '.join(suffixes)}")
            paths += found
            labels += [label] * len(found)
            splits += [split] * len(found)
    return paths, labels, splits
