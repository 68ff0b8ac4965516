"""Verb `check-data`: is this data set whole, balanced as published, split by patient, and, where `read`
asks for it, readable?

Without data it lists the public data sets: what they hold, where to get them, under which licence.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, Field
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from pathfm.datasets import DATASETS, Benchmark, open_dataset
from pathfm.datasets.benchmark import SPLITS
from pathfm.datasets.registry import UNCONFIRMED
from pathfm.runtime import PathfmError, progress

_BATCH = 256  # samples handed to the threads at a time
_MOST_TOLD = 20
_WIDTH = 120
_RIGHT = "nothing is wrong"
_RIGHT_UNREAD = (
    "names, counts and splits are right; pictures were not read: --read True reads them all"
)


class CheckDataConfig(BaseModel, frozen=True, extra="forbid"):
    """Which data set, and how closely to look."""

    data: str = Field(
        "",
        description="NAME=FOLDER of a public data set, a labelled folder, or a .csv of samples; "
        "unset: list the public ones",
    )
    read: bool = Field(
        False,
        description="decode every picture and mask, name those that cannot be read, and count "
        "those with equal bytes in two splits",
    )
    threads: int = Field(2, ge=1, le=256, description="threads that decode")
    mpp: float | None = Field(
        None, gt=0, description="µm/px of the patches that a table places in slides"
    )
    size_px: int = Field(224, ge=1, le=8192, description="side of those patches, px")


@dataclass(frozen=True)
class CheckDataResult:
    """What was found: samples, and one sentence for each thing that is wrong."""

    samples: int
    wrong: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """2 when something is wrong."""
        return 2 if self.wrong else 0


def run(config: CheckDataConfig) -> CheckDataResult:
    """Prints what a data set holds and what is wrong with it; changes nothing."""
    if not config.data:
        _list_public()
        return CheckDataResult(0, ())
    found = open_dataset(config.data, partial=True, mpp=config.mpp, size_px=config.size_px)
    _tell(found)
    wrong = list(found.shortfalls())
    torn = found.torn_groups()
    if torn:
        wrong.append(f"{len(torn):,} groups are in more than one split, first {torn[0]}")
    if config.read:
        unread = list(damaged(found, config.threads))
        copies = "" if unread else found.copies()
        wrong += [*unread, copies] if copies else unread
    for line in wrong[:_MOST_TOLD]:
        print(f"wrong: {line}")
    if len(wrong) > _MOST_TOLD:
        print(f"wrong: ... and {len(wrong) - _MOST_TOLD:,} more")
    if doubts := found.doubts():
        print(f"unsure: {'; '.join(doubts)}: {UNCONFIRMED}")
    if not wrong:
        print(f"{found.name}: {_RIGHT if config.read else _RIGHT_UNREAD}")
    return CheckDataResult(len(found), tuple(wrong))


def damaged(found: Benchmark, threads: int) -> Iterator[str]:
    """A sentence for each sample whose picture or mask cannot be read; every one is decoded."""
    if found.facts.task == "slide":
        raise PathfmError(f"{found.name}: slides are checked by `pathfm index`, not by read")

    def problem(i: int) -> str:
        try:
            found.read(i)
            if found.facts.task == "segmentation":
                found.mask(i)
        except PathfmError as error:
            return str(error)
        return ""

    with (
        progress(len(found), "samples", f"read {found.name}") as bar,
        ThreadPoolExecutor(threads, "pathfm-decode") as pool,
    ):
        for start in range(0, len(found), _BATCH):
            batch = range(start, min(len(found), start + _BATCH))
            yield from filter(None, pool.map(problem, batch))
            bar.advance(len(batch))


def _list_public() -> None:
    table = Table(
        "name", "task", "train", "val", "test", "classes", "µm/px", "reported", box=SIMPLE
    )
    for name, entry in DATASETS.items():
        facts = entry.facts
        sizes = [f"{facts.counts[split]:,}" if split in facts.counts else "" for split in SPLITS]
        reported = "val *" if facts.selects_on_reported else facts.reported
        table.add_row(name, facts.task, *sizes, str(len(facts.classes)), f"{facts.mpp:g}", reported)
    Console(width=_WIDTH).print(table)
    print("* the split that chooses the checkpoint is the one that is reported\n")
    for name, entry in DATASETS.items():
        print(f"{name:<22}{entry.facts.licence:<32}{entry.facts.page}")


def _tell(found: Benchmark) -> None:
    """Counts by split and class."""
    splits = [split for split in (*SPLITS, "") if split in set(found.splits)]
    told = Table(found.name, *(split or "all" for split in splits), box=SIMPLE)
    of = np.asarray(found.splits, dtype=object)
    counts = {split: found.labels[of == split] for split in splits}
    if found.facts.task != "segmentation":
        for number, name in enumerate(found.classes):
            told.add_row(name, *(f"{(counts[split] == number).sum():,}" for split in splits))
    told.add_row("samples", *(f"{len(counts[split]):,}" for split in splits))
    groups = [
        len({g for g, s in zip(found.groups, of, strict=True) if g and s == p}) for p in splits
    ]
    told.add_row("patients or slides", *(f"{n:,}" if n else "unknown" for n in groups))
    Console(width=_WIDTH).print(told)
