"""Every data set by name, and one function that opens any of them, a folder or a table."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pathfm.datasets import (
    bach,
    bracs,
    breakhis,
    camelyon16,
    consep,
    crc,
    gleason,
    mhist,
    monusac,
    panda,
    patch_camelyon,
    unitopatho,
)
from pathfm.datasets.benchmark import Benchmark, Facts
from pathfm.datasets.labelled import open_folder
from pathfm.datasets.listing import lacking
from pathfm.datasets.mask_folder import is_mask_folder, open_mask_folder
from pathfm.datasets.table import open_table
from pathfm.runtime import PathfmError

_MOST_TOLD = 3
UNCONFIRMED = (
    "expected from counts that no source at hand confirms, while the sizes of the splits are confirmed; "
    "compare with the publisher's page"
)
"""What is said of counts of a class that differ from unconfirmed ones."""


@dataclass(frozen=True)
class Entry:
    """What is published about a data set, and how a copy of it is opened."""

    facts: Facts
    open: Callable[[Path], Benchmark]


_ENTRIES = (
    Entry(bach.FACTS, bach.open_bach),
    Entry(bracs.FACTS, bracs.open_bracs),
    Entry(breakhis.FACTS, breakhis.open_breakhis),
    Entry(crc.FACTS, crc.open_crc),
    Entry(gleason.FACTS, gleason.open_gleason),
    Entry(mhist.FACTS, mhist.open_mhist),
    Entry(patch_camelyon.FACTS, patch_camelyon.open_patch_camelyon),
    Entry(patch_camelyon.FACTS_10SHOT, patch_camelyon.open_patch_camelyon_10shot),
    Entry(unitopatho.FACTS, unitopatho.open_unitopatho),
    Entry(camelyon16.FACTS, camelyon16.open_camelyon16),
    Entry(camelyon16.FACTS_SMALL, camelyon16.open_camelyon16_small),
    Entry(panda.FACTS, panda.open_panda),
    Entry(panda.FACTS_SMALL, panda.open_panda_small),
    Entry(consep.FACTS, consep.open_consep),
    Entry(monusac.FACTS, monusac.open_monusac),
)

DATASETS: Mapping[str, Entry] = MappingProxyType({entry.facts.name: entry for entry in _ENTRIES})
"""The public data sets by name."""


def open_dataset(
    name_or_folder: str | Path,
    root: Path | None = None,
    *,
    partial: bool = False,
    mpp: float | None = None,
    size_px: int = 224,
) -> Benchmark:
    """A data set by its name and folder ("bach" and a root, or "bach=/data/bach"), a labelled
    folder, a folder of images and masks, or a .csv.

    A public one whose counts or class balance are not the published ones is refused, unless
    `partial`; counts of a class that no source confirms are told on stderr instead. `mpp` and
    `size_px` are for patches that a table places in slides. `PathfmError` tells what is missing,
    where to get it and under which licence.
    """
    text = str(name_or_folder)
    name, separator, folder = text.partition("=")
    if separator and name in DATASETS and root is None:
        text, root = name, Path(folder)
    if text in DATASETS:
        if root is None:
            raise PathfmError(
                f"{text} is a public data set: say where it lies, {text}=FOLDER "
                f"(or ./{text} for a labelled folder of that name)"
            )
        return _public(DATASETS[text], root, partial)
    path = Path(text) if root is None else root / text
    if path.suffix.lower() == ".csv":
        return open_table(path, mpp=mpp, size_px=size_px)
    if mpp is not None:
        raise PathfmError(f"{path}: mpp is for a table of places in slides; pictures have theirs")
    if not path.is_dir():
        raise PathfmError(f"{path}: neither a folder, a .csv nor a data set{_meant(name)}")
    return open_mask_folder(path) if is_mask_folder(path) else open_folder(path)


def _public(entry: Entry, root: Path, partial: bool) -> Benchmark:
    if not root.is_dir():
        raise lacking(entry.facts, root, "there is no such folder")
    found = entry.open(root)
    short = found.shortfalls()
    if short and not partial:
        more = f" (and {len(short) - _MOST_TOLD} more)" if len(short) > _MOST_TOLD else ""
        raise lacking(entry.facts, root, "; ".join(short[:_MOST_TOLD]) + more)
    doubts = found.doubts()
    if doubts and not partial:
        more = f" (and {len(doubts) - _MOST_TOLD} more)" if len(doubts) > _MOST_TOLD else ""
        told = "; ".join(doubts[:_MOST_TOLD]) + more
        print(f"{found.name} at {root}: WARNING {told}: {UNCONFIRMED}", file=sys.stderr)
    return found


def _meant(name: str) -> str:
    near = difflib.get_close_matches(name, DATASETS, 1)
    known = ", ".join(DATASETS)
    return f"; did you mean {near[0]}?" if near else f" ({known})"
