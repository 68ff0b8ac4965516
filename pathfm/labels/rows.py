"""Rows of a corpus, or regions of its slides, each of a class or of none; and how they are drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching import BalancedSampler, Corpus
from pathfm.labels import LabelsConfig
from pathfm.runtime import PathfmError


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """`labels[i]` is the class number of row i of `slides` (a Corpus, or a view of regions), -1 for
    none. `usable` rows without a class may be drawn as unlabelled; others never. `notes` are what a
    person should be told."""

    slides: Corpus
    labels: NDArray[np.int64]
    usable: NDArray[np.bool_]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def sampler(self, config: LabelsConfig, **settings: Any) -> BalancedSampler:
        """Draws balanced by class; `settings` are PatchSampler's. Rows that are not usable have weight 0.

        SamplerError when a class can serve no patch; PathfmError when there is nothing unlabelled to
        draw, or a weight is of no class.
        """
        unlabelled = config.unlabelled
        if unlabelled and not (self.usable & (self.labels < 0)).any():
            raise PathfmError(
                f"labels.unlabelled {unlabelled}: every slide of the corpus that may be drawn has a class. "
                "Set it to 0"
            )
        weights = weights_of(config.weights, self.class_names)
        return BalancedSampler(
            self.slides,
            self.labels,
            self.class_names,
            class_weights=weights,
            unlabelled=unlabelled,
            slide_weights=self.usable.astype(np.float64),
            **settings,
        )


def chosen_classes(config: LabelsConfig, found: Iterable[str], where: str) -> tuple[str, ...]:
    """The classes that are used: those of the config, or all found, by name.

    PathfmError for a class of the config that is not found, and for fewer than two.
    """
    there = Counter(name for name in found if name)
    missing = [name for name in config.classes if name not in there]
    listed = ", ".join(sorted(there)[:12]) + (", ..." if len(there) > 12 else "")
    if missing:
        raise PathfmError(
            f"labels.classes: no {missing[0]!r} in {where}; there: {listed or 'none'}"
        )
    names = config.classes or tuple(sorted(there))
    if len(names) < 2:
        only = f"only the class {names[0]!r}" if names else "no class"
        raise PathfmError(f"{where}: {only}; labels need at least two classes to tell apart")
    return names


def numbered(names: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    """The class number of each name, -1 for one that is no class."""
    number = {name: k for k, name in enumerate(classes)}
    return np.asarray([number.get(name, -1) for name in names], np.int64)


def weights_of(given: Mapping[str, int], classes: Sequence[str]) -> list[int]:
    """A weight a class, 1 where none is given. PathfmError for a weight of no class."""
    strange = [name for name in given if name not in classes]
    if strange:
        raise PathfmError(
            f"labels.class_weights: {strange[0]!r} is no class; classes are {', '.join(classes)}"
        )
    return [given.get(name, 1) for name in classes]
