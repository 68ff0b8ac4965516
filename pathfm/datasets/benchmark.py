"""A labelled data set as every stage sees it: a table of samples, and how to read one.

`Facts` are what is published about a data set (splits, counts, licence, where to get it);
`Benchmark` is a copy of it on this machine. Which rows are for choosing and which are reported
is part of the data (`facts.reported`), so that no caller has to know it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pathfm.runtime import PathfmError

Task = Literal["classification", "slide", "segmentation"]
SplitName = Literal["train", "val", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "test")

_SHARE_TOLERANCE = 0.01


@dataclass(frozen=True)
class Facts:
    """What is published about a data set. Counts are of samples a split, or a split and class.

    `reported` is the split whose score goes into a table. Where it is "val", the same rows also
    choose the checkpoint: `selects_on_reported`, and every table has to say so.
    `shares` (of the classes, in every split) and `class_counts` are checked where they are known; a copy
    is refused for the latter only where `class_counts_confirmed` names who says so, else it is warned of.
    """

    name: str
    title: str
    task: Task
    classes: tuple[str, ...]
    mpp: float  # µm/px of the pictures, or of level 0 of the slides; nan: unknown or varies
    counts: Mapping[SplitName, int]
    licence: str
    page: str
    layout: str  # what the download unpacks to, relative to the root
    reported: SplitName = "val"
    class_counts: Mapping[SplitName, tuple[int, ...]] = field(default_factory=dict)
    class_counts_confirmed: str = ""  # by what; "": by no source that could be read
    shares: tuple[float, ...] = ()
    shots: int = 0  # train on so many a class, drawn anew each run; 0: on all
    slide_patches: int = 0  # patches that eva samples of a slide
    slide_mpp: float = 0.0  # and their µm/px
    tile_px: int = 0  # eva cuts pictures into tiles of this side; 0: whole pictures
    ignored: tuple[int, ...] = ()  # mask classes that neither loss nor score counts

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", MappingProxyType(dict(self.counts)))
        object.__setattr__(self, "class_counts", MappingProxyType(dict(self.class_counts)))
        for split, of_classes in self.class_counts.items():
            if len(of_classes) != len(self.classes) or sum(of_classes) != self.counts[split]:
                raise PathfmError(f"{self.name}: the class counts of {split} are not its count")

    def __reduce__(self) -> tuple[object, ...]:
        values = [
            getattr(self, item.name) for item in fields(self)
        ]  # mapping proxies do not travel
        return (Facts, tuple(dict(v) if isinstance(v, Mapping) else v for v in values))

    @property
    def selects_on_reported(self) -> bool:
        """Whether the rows that choose the checkpoint are those that are reported."""
        return self.reported == "val"


@runtime_checkable
class Source(Protocol):
    """Where samples come from. `content(i)` is a digest of what sample i is made of."""

    def read(self, i: int) -> NDArray[np.uint8]:
        """Sample i as uint8 (height, width, 3)."""

    def content(self, i: int) -> str:
        """A hexadecimal digest, the same on every machine."""


@runtime_checkable
class MaskedSource(Source, Protocol):
    """A source of pictures with a class a pixel."""

    def mask(self, i: int) -> NDArray[np.uint8]:
        """The class of every pixel, uint8 (height, width), 0 = background."""


@runtime_checkable
class SlideSource(Protocol):
    """A source of whole slides, which are embedded patch by patch."""

    def slide(self, i: int) -> str:
        """The slide's path or URI."""

    def content(self, i: int) -> str:
        """A hexadecimal digest, the same on every machine."""


@runtime_checkable
class CutFromSlides(Source, Protocol):
    """A source of patches that are cut from slides."""

    def slide_digest(self, i: int) -> str:
        """The `SlideIndex.digest` of the slide that sample i is cut from."""


@dataclass(frozen=True, eq=False)
class Benchmark:
    """The samples of a data set, in a fixed order, and how to read them.

    `labels` are int64 (n,), -1 in segmentation; `splits` "train", "val", "test", or "" where the
    data has none; `groups` (patient, else slide) "" where unknown; `mpp` float64 (n,), nan where
    unknown. `paths` name the samples: relative to the root, or `file#row`.
    """

    facts: Facts
    root: Path
    paths: tuple[str, ...]
    labels: NDArray[np.int64]
    splits: tuple[str, ...]
    groups: tuple[str, ...]
    mpp: NDArray[np.float64]
    source: Source | SlideSource
    order: NDArray[np.int64]  # sample i is number order[i] of the source

    def __post_init__(self) -> None:
        n, n_classes = len(self.paths), len(self.facts.classes)
        lengths = {len(x) for x in (self.labels, self.splits, self.groups, self.mpp, self.order)}
        if lengths != {n}:
            raise PathfmError(f"{self.name}: {n:,} samples, but columns of {sorted(lengths)} rows")
        lowest = -1 if self.facts.task == "segmentation" else 0
        if n and not lowest <= self.labels.min() <= self.labels.max() < n_classes:
            raise PathfmError(
                f"{self.name}: labels {self.labels.min()} to {self.labels.max()}, "
                f"but {n_classes} classes"
            )

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def name(self) -> str:
        """What tables call the data set."""
        return self.facts.name

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; `labels` are their numbers."""
        return self.facts.classes

    def read(self, i: int) -> NDArray[np.uint8]:
        """Sample i as uint8 (height, width, 3). `PathfmError` names one that cannot be read."""
        if not isinstance(self.source, Source):
            raise PathfmError(f"{self.name}: its samples are whole slides; embed their patches")
        return self.source.read(int(self.order[i]))

    def mask(self, i: int) -> NDArray[np.uint8]:
        """The class of every pixel of sample i, uint8 (height, width); segmentation only."""
        if not isinstance(self.source, MaskedSource):
            raise PathfmError(f"{self.name}: a {self.facts.task} data set has no masks")
        return self.source.mask(int(self.order[i]))

    def slide(self, i: int) -> str:
        """The path or URI of slide i; slide tasks only."""
        if not isinstance(self.source, SlideSource):
            raise PathfmError(f"{self.name}: a {self.facts.task} data set has no slides")
        return self.source.slide(int(self.order[i]))

    def slide_digests(self) -> tuple[str, ...]:
        """The `SlideIndex.digest` of the slide each sample is cut from; () where they are pictures."""
        if not isinstance(self.source, CutFromSlides):
            return ()
        return tuple(self.source.slide_digest(int(number)) for number in self.order)

    def rows(self, split: SplitName) -> NDArray[np.int64]:
        """Row numbers of a split, in the order in which eva has them."""
        return np.flatnonzero(np.asarray(self.splits, dtype=object) == split)

    def subset(self, rows: NDArray[np.int64]) -> Benchmark:
        """The same data set with these rows only, in this order."""
        return replace(
            self,
            paths=tuple(self.paths[i] for i in rows),
            labels=self.labels[rows],
            splits=tuple(self.splits[i] for i in rows),
            groups=tuple(self.groups[i] for i in rows),
            mpp=self.mpp[rows],
            order=self.order[rows],
        )

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """A digest of what each sample is made of: reads all the data; of a slide the size and both ends."""
        return tuple(self.source.content(int(number)) for number in self.order)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over every sample's path, label, split, group and content: reads all the data.

        Of a slide only the size and both ends are read (`contents`).
        """
        total = hashlib.sha256(f"{self.name}\0{','.join(self.classes)}\n".encode())
        columns = zip(self.paths, self.labels, self.splits, self.groups, self.contents, strict=True)
        for path, label, split, group, content in columns:
            total.update(f"{path}\0{label}\0{split}\0{group}\0{content}\n".encode())
        return total.hexdigest()

    def shortfalls(self) -> tuple[str, ...]:
        """What this copy lacks of the published set, or has too much: one sentence each."""
        facts = self.facts
        found = []
        for split in SPLITS:
            labels = self.labels[self.rows(split)]
            wanted = facts.counts.get(split)
            if wanted is not None and len(labels) != wanted:
                found.append(f"{split} has {len(labels):,} samples, published are {wanted:,}")
            if len(labels) and facts.task != "segmentation":
                found += self._balance(split, np.bincount(labels, minlength=len(facts.classes)))
        return tuple(found)

    def doubts(self) -> tuple[str, ...]:
        """Classes whose counts are not the expected ones, where no source confirms these: a sentence each."""
        if self.facts.class_counts_confirmed:
            return ()
        told = []
        for split, expected in self.facts.class_counts.items():
            counts = np.bincount(self.labels[self.rows(split)], minlength=len(self.classes))
            for name, n, wanted in zip(self.classes, counts.tolist(), expected, strict=True):
                if n != wanted:
                    told.append(f"{split} has {n:,} of class {name}, expected {wanted:,}")
        return tuple(told)

    def _balance(self, split: SplitName, counts: NDArray[np.int64]) -> list[str]:
        told = []
        confirmed = self.facts.class_counts_confirmed
        published = self.facts.class_counts.get(split, ()) if confirmed else ()
        for c, (name, n) in enumerate(zip(self.classes, counts.tolist(), strict=True)):
            if published and n != published[c]:
                told.append(f"{split} has {n:,} of class {name}, published are {published[c]:,}")
            elif self.facts.counts and not n:
                told.append(f"{split} has none of class {name}")
        for c, share in enumerate(self.facts.shares):
            is_share = counts[c] / counts.sum()
            if abs(is_share - share) > _SHARE_TOLERANCE:
                told.append(
                    f"{split} is {100 * is_share:.1f} % {self.classes[c]}, "
                    f"published are {100 * share:.0f} %"
                )
        return told

    def copies(self) -> str:
        """A sentence when samples of one split have the very bytes of samples of another, else "".

        Counts the samples outside the first split that holds such bytes; reads all the data (`contents`).
        """
        first: dict[str, int] = {}
        split_at = {split: place for place, split in enumerate((*SPLITS, ""))}
        rows = sorted(range(len(self)), key=lambda row: split_at[self.splits[row]])
        found: list[tuple[int, int]] = []
        for row in rows:
            other = first.setdefault(self.contents[row], row)
            if self.splits[other] != self.splits[row]:
                found.append((other, row))
        if not found:
            return ""
        one, two = (self.paths[row] for row in found[0])
        return (
            f"{len(found):,} of {len(self):,} samples have the very bytes of a sample in another split, "
            f"first {two} those of {one}: they are learnt and judged"
        )

    def torn_groups(self) -> tuple[str, ...]:
        """Groups with samples in more than one split, sorted: the same patient learnt and judged."""
        seen: dict[str, set[str]] = {}
        for group, split in zip(self.groups, self.splits, strict=True):
            if group and split:
                seen.setdefault(group, set()).add(split)
        return tuple(sorted(group for group, splits in seen.items() if len(splits) > 1))
