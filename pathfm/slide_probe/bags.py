"""Bags: for each slide the features of its patches, a label, a patient and perhaps a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from pathfm.runtime import PathfmError

Features = NDArray[np.float32]

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Bags:
    """n slides with labels (n,) int64, each a bag of features (patches, dim) float32.

    slides: ids. classes: names. patients: one a slide, "" where unknown, which makes the slide a patient
    of its own. splits: "train", "val" or "test" a slide, or () where there are none. source: i -> the
    features of slide i; `read` checks what it gives. encoder_digest: of the model that made them, ""
    where the files do not say.
    Raises PathfmError for parts that do not belong together.
    """

    slides: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    dim: int
    source: Callable[[int], Features] = field(repr=False)
    patients: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()
    encoder_digest: str = ""

    def __post_init__(self) -> None:
        n = len(self.slides)
        for what, values in (("patients", self.patients), ("splits", self.splits)):
            if values and len(values) != n:
                raise PathfmError(f"{n} slides and {len(values)} {what}: give one a slide, or none")
        if len(self.labels) != n or not n:
            raise PathfmError(f"{n} slides and {len(self.labels)} labels: give one label a slide")
        if len(set(self.slides)) < n:
            twice = next(s for s in self.slides if self.slides.count(s) > 1)
            raise PathfmError(f"slide {twice!r} is there twice: leave one out")
        if not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise PathfmError(
                f"labels from {self.labels.min()} to {self.labels.max()} for {len(self.classes)} "
                f"classes: they count from 0"
            )
        unknown = {*self.splits} - {*SPLITS}
        if unknown:
            raise PathfmError(f"split {min(unknown)!r}: wants one of {', '.join(SPLITS)}")

    def __len__(self) -> int:
        return len(self.slides)

    @property
    def groups(self) -> tuple[str, ...]:
        """Who must not be on two sides of a split: the patient, or the slide where unknown."""
        given = self.patients or ("",) * len(self)
        return tuple(
            f"patient {patient}" if patient else f"slide {slide}"
            for patient, slide in zip(given, self.slides, strict=True)
        )

    def read(self, i: int) -> Features:
        """The features of slide i, (patches, dim) float32, at least one patch, all finite.

        Raises PathfmError, naming the slide, for anything else.
        """
        features, slide = self.source(i), self.slides[i]
        if features.ndim != 2 or features.shape[1] != self.dim or not len(features):
            raise PathfmError(
                f"slide {slide}: features {features.shape}, wants (patches, {self.dim}) with at least "
                "one patch: embed it again with the model of the others, or leave it out"
            )
        if not np.isfinite(features).all():
            bad = int((~np.isfinite(features)).any(axis=1).sum())
            raise PathfmError(
                f"slide {slide}: {bad} of {len(features):,} features hold NaN or infinity: embed it again"
            )
        return np.asarray(features, np.float32)

    def loaded(self, limit_bytes: int, most_patches: int | None = None, seed: int = 0) -> Bags:
        """The same bags read and checked once, kept in memory as long as they fit `limit_bytes`.

        most_patches: at most so many patches a slide, evenly spaced in the file's order (a grid's
        order is spatial). Bags past the limit are read, checked and thinned at every use.
        """

        def thinned(i: int) -> Features:
            features = self.read(i)
            if most_patches is None or len(features) <= most_patches:
                return features
            spaced = np.linspace(0, len(features) - 1, most_patches).round().astype(np.int64)
            return np.asarray(features[spaced])

        kept: list[Features | None] = []
        left = limit_bytes
        for i in range(len(self)):
            features = thinned(i)
            left -= features.nbytes
            kept.append(features if left >= 0 else None)

        def source(i: int) -> Features:
            found = kept[i]
            return thinned(i) if found is None else found

        return replace(self, source=source)

    def means(self) -> Features:
        """The mean feature of every slide, (n, dim) float32: mean pooling, for any other probe."""
        return np.stack(
            [self.read(i).mean(axis=0, dtype=np.float64) for i in range(len(self))]
        ).astype(np.float32)


def bags_of(
    features: Sequence[NDArray[np.floating]],
    labels: Sequence[int] | NDArray[np.integer],
    classes: Sequence[str],
    *,
    slides: Sequence[str] = (),
    patients: Sequence[str] = (),
    splits: Sequence[str] = (),
) -> Bags:
    """Bags of arrays in memory, (patches, dim) each; slides are named "0", "1", ... unless named."""
    if not len(features) or features[0].ndim != 2:
        raise PathfmError("bags are arrays (patches, dim), at least one")
    return Bags(
        slides=tuple(slides) or tuple(map(str, range(len(features)))),
        labels=np.asarray(labels, np.int64),
        classes=tuple(classes),
        dim=int(features[0].shape[1]),
        source=lambda i: np.asarray(features[i], np.float32),
        patients=tuple(patients),
        splits=tuple(splits),
    )


def same_slides(found: Sequence[Bags], names: Sequence[str]) -> None:
    """Raises PathfmError unless all bags are of the same slides with the same labels and splits."""
    first = found[0]
    for name, bags in zip(names[1:], found[1:], strict=True):
        same = bags.slides == first.slides and bags.splits == first.splits
        if not same or not np.array_equal(bags.labels, first.labels):
            raise PathfmError(f"{names[0]} and {name} are not of the same slides: embed both again")
