"""A labelled folder looked at during training: kNN and a logistic probe on a validation part.

The folder is split once, by seed, class and group: a test part that is never opened here, and of
the rest a part that fits and a part that scores. Nothing is chosen by the scores, no C, no epoch.
The test part is the test half of `pathfm probe --n-seeds 1` with the same seed and test share.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pathfm import ranks as among_ranks
from pathfm.datasets import LabelledFolder, scan_folder, stratified_split
from pathfm.datasets.folder import check_picture
from pathfm.datasets.preparing import read_batches
from pathfm.metrics import (
    Standardiser,
    balanced_accuracy,
    confusion_matrix,
    decide,
    fit_logistic,
    initial_head,
    knn_predict,
    recall_per_class,
)
from pathfm.pretrain.embedding import Pixels, Watched, embed_shared, normalised, share_of
from pathfm.pretrain.watch_settings import WatchConfig
from pathfm.ranks import Ranks
from pathfm.runtime import PathfmError

_VALIDATION_REPEAT = 1 << 20  # as in probing/linear.py: attempts from here on split a training half
_THREADS = 2


@dataclass(frozen=True)
class ProbeScores:
    """Balanced accuracies on the validation part, 0..1, and the logistic probe's recall a class."""

    knn: float
    logistic: float
    recall: tuple[float, ...]


@dataclass(frozen=True)
class ProbeData:
    """The chosen pictures of a folder, and which of them fit and which score."""

    folder: LabelledFolder
    fit: NDArray[np.int64]
    validation: NDArray[np.int64]
    n_test: int  # pictures of the folder that are never touched
    digest: str

    @property
    def words(self) -> str:
        """The probe in half a line."""
        return (
            f"{self.folder.root.name}, {len(self.folder.classes)} classes, {len(self.fit):,} pictures "
            f"to fit and {len(self.validation):,} to score, {self.n_test:,} left for tests"
        )


def check_probe(config: WatchConfig) -> None:
    """Raises PathfmError for a probe folder that cannot be used; decodes nothing.

    The files that the probe would decode are opened as far as their sizes.
    """
    if config.probe_folder is None:
        return
    chosen, _, _ = _chosen(config)
    for path in chosen.paths:
        check_picture(chosen.root / path)


def choose_pictures(config: WatchConfig) -> ProbeData:
    """The split of `config.probe_folder`: a function of its files and the probe's settings.

    Raises PathfmError for a folder that is none or a corpus, or a class too small to be in all three
    parts.
    """
    chosen, n_fit, n_test = _chosen(config)
    numbers = np.arange(len(chosen))
    options = [config.probe_px, config.probe_k, config.probe_c, config.probe_seed, n_fit]
    digest = hashlib.sha256(json.dumps([chosen.digest, options]).encode()).hexdigest()
    return ProbeData(chosen, numbers[:n_fit], numbers[n_fit:], n_test, digest)


def _chosen(config: WatchConfig) -> tuple[LabelledFolder, int, int]:
    """(the pictures that fit and then those that score, how many fit, how many are left for tests)."""
    assert config.probe_folder is not None
    _refuse_corpus(config.probe_folder)
    folder = scan_folder(config.probe_folder)
    outer = stratified_split(
        folder.labels, config.probe_test_share, config.probe_seed, 0, folder.groups
    )
    rest = _rows(folder, outer.train)
    inner = stratified_split(
        rest.labels,
        config.probe_validation_share,
        config.probe_seed,
        _VALIDATION_REPEAT,
        rest.groups,
    )
    share = config.probe_validation_share
    n_validation = max(1, round(share * config.probe_max_per_class))
    fit = _rows(rest, inner.train).subset(
        max(1, config.probe_max_per_class - n_validation), config.probe_seed
    )
    validation = _rows(rest, inner.test).subset(n_validation, config.probe_seed)
    chosen = replace(
        rest,
        paths=fit.paths + validation.paths,
        labels=np.concatenate([fit.labels, validation.labels]),
        groups=fit.groups + validation.groups,
    )
    return chosen, len(fit), len(outer.test)


def _refuse_corpus(root: Path) -> None:
    """A corpus's masks and thumbnails would pass for classes of pictures."""
    for name in ("corpus.json", "slides.parquet"):
        if (root / name).is_file():
            raise PathfmError(
                f"watch.probe_folder {root} holds a corpus ({name}): a probe wants labelled patches, "
                f"{root.parent}/LABELLED/<class>/*.png"
            )


class InTrainingProbe:
    """The pictures of this rank's share, decoded once, and the probe on them as often as wanted."""

    def __init__(self, config: WatchConfig, ranks: Ranks) -> None:
        self._config, self._ranks = config, ranks
        with among_ranks.together():
            self.data = choose_pictures(config)
            folder = self.data.folder
            own = [folder.root / folder.paths[i] for i in share_of(len(folder), ranks)]
            batches = read_batches(own, config.probe_px, config.batch_size, _THREADS)
            self._pixels: Pixels = np.concatenate(list(batches))

    def score(self, trainer: Watched) -> ProbeScores:
        """Embeds on all ranks, fits and scores on the first, tells all; call it on every rank."""

        def views_of(rows: slice) -> Tensor:
            return normalised(self._pixels[rows], trainer)

        n, size = len(self.data.folder), self._config.batch_size
        features = embed_shared(trainer, n, self._ranks, views_of, size)
        scores = fit_and_score(features, self.data, self._config) if self._ranks.first else None
        told = among_ranks.gather_objects(scores)[0]
        assert isinstance(told, ProbeScores)
        return told


def open_probe(config: WatchConfig, ranks: Ranks) -> InTrainingProbe | None:
    """The probe that is asked for, its pictures decoded; None where none is. On every rank."""
    return None if config.probe_folder is None else InTrainingProbe(config, ranks)


def fit_and_score(
    features: NDArray[np.float32], data: ProbeData, config: WatchConfig
) -> ProbeScores:
    """Both probes of features (n, D) in the order of `data`; standardised by the fitting part."""
    labels, n_classes = data.folder.labels, len(data.folder.classes)
    a, b = data.fit, data.validation
    if not np.isfinite(features).all():  # the loop stops for such weights; here they score nothing
        return ProbeScores(0.0, 0.0, (0.0,) * n_classes)
    nearest = knn_predict(features[a], labels[a], features[b], config.probe_k, n_classes)
    scale = Standardiser.of(features[a])
    head = initial_head(features.shape[1], n_classes, config.probe_seed, 0)
    head = fit_logistic(scale(features[a]), labels[a], config.probe_c, head)
    decided = decide(scale(features[b]), head)
    recall = recall_per_class(confusion_matrix(labels[b], decided, n_classes))
    return ProbeScores(
        knn=balanced_accuracy(labels[b], nearest, n_classes),
        logistic=balanced_accuracy(labels[b], decided, n_classes),
        recall=tuple(float(value) for value in recall),
    )


def _rows(folder: LabelledFolder, rows: NDArray[np.int64]) -> LabelledFolder:
    return replace(
        folder,
        paths=tuple(folder.paths[i] for i in rows),
        labels=folder.labels[rows],
        groups=tuple(folder.groups[i] for i in rows) if folder.groups else (),
    )
