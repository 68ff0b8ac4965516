"""What `robustness.json` holds. Errors and ECE on 0..1, CE in per cent of the reference's; null where left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathfm.measures import SiteIndex
from pathfm.robustness.judging import Judged
from pathfm.robustness.summing import Summed
from pathfm.uncertainty import Interval


@dataclass(frozen=True)
class Figure:
    """A figure, its interval over groups of tested pictures, its sd over splits; None where there is none."""

    value: float
    low: float | None
    high: float | None
    sd: float | None = None


@dataclass(frozen=True)
class CorruptionResult:
    """One corruption: errors and calibration errors by severity, mildest first; CE and relative CE."""

    name: str
    errors: list[float]
    ece: list[float]
    ce: float | None
    relative_ce: float | None


@dataclass(frozen=True)
class NoisyLabels:
    """Balanced error on clean test labels after training with a share of labels wrong."""

    share: float
    error: float
    sd: float | None


@dataclass(frozen=True)
class Site:
    """PathoROB's index of a model at k, and the k that was best for naming its classes.

    n: pictures, as many of each class from each site. chance: the index of features that tell nothing.
    """

    index: float
    chance: float
    n: int
    k: int
    best_k: int
    per_class: list[float | None]


@dataclass(frozen=True)
class ModelResult:
    """Everything measured on one model."""

    name: str
    backbone: str
    backbone_digest: str
    weights_note: str
    clean_error: Figure
    mean_corrupted_error: Figure
    mce: Figure | None
    relative_mce: Figure | None
    clean_ece: float
    mean_corrupted_ece: float
    corruptions: list[CorruptionResult]
    noisy_labels: list[NoisyLabels]
    site: Site | None
    c: list[float]  # chosen inverse L2 strength of each split


@dataclass(frozen=True)
class RobustnessResult:
    """The whole file."""

    data: str
    data_digest: str
    classes: list[str]
    n: int
    n_groups: int  # of the reported pictures
    interval_of: str  # what intervals draw anew: "groups" (patients or slides), or "pictures" where none are known
    sizes: list[
        list[int]
    ]  # fitted on (with those that chose C, where train did), reported: of each split
    n_tested: int  # in any split
    n_splits: int
    own_splits: bool
    selected_on: str  # who chose C: "val", or "train": a part of it that is not fitted on meanwhile
    reported_on: str  # "test", or "val": where it also chose, errors are too small
    shots: int  # pictures a class that each split is fitted on, drawn anew; 0: all of train
    seed: int
    input_px: int
    precision: str
    severities: list[int]
    reference: str
    models: list[ModelResult]
    caveats: list[str]


def model_result(
    about: tuple[str, str, str, str],
    judged: Judged,
    sums: Summed,
    corruptions: Sequence[str],
    shares: Sequence[float],
    site: Site | None,
) -> ModelResult:
    """One model's figures in order. about: name, backbone, digest and weights note."""
    name, backbone, digest, note = about
    ece = judged.ece.mean(axis=0)
    by_corruption = ece[1:].reshape(len(corruptions), -1)
    return ModelResult(
        name=name,
        backbone=backbone,
        backbone_digest=digest,
        weights_note=note,
        clean_error=_figure(sums.clean, sums.clean_interval, judged.error[:, 0]),
        mean_corrupted_error=_figure(
            sums.ce.unnormalised, sums.unnormalised_interval, judged.error[:, 1:].mean(axis=1)
        ),
        mce=_ratio(sums.ce.mce, sums.mce_interval),
        relative_mce=_ratio(sums.ce.relative_mce, sums.relative_interval),
        clean_ece=float(ece[0]),
        mean_corrupted_ece=float(ece[1:].mean()),
        corruptions=[
            CorruptionResult(
                name=corruption,
                errors=sums.error[i].tolist(),
                ece=by_corruption[i].tolist(),
                ce=_number(sums.ce.ce[i]),
                relative_ce=_number(sums.ce.relative[i]),
            )
            for i, corruption in enumerate(corruptions)
        ],
        noisy_labels=[
            NoisyLabels(share, float(judged.noisy[:, i].mean()), _sd(judged.noisy[:, i]))
            for i, share in enumerate(shares)
        ],
        site=site,
        c=list(judged.c),
    )


def site_result(found: SiteIndex, best: int) -> Site:
    """A site index as it is written down."""
    per_class = [_number(value) for value in found.per_class]
    return Site(found.index, found.chance, found.n, found.k, best, per_class)


def _figure(
    value: float, interval: Interval | None, by_split: NDArray[np.float64] | None = None
) -> Figure:
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return Figure(value, low, high, None if by_split is None else _sd(by_split))


def _ratio(value: float, interval: Interval | None) -> Figure | None:
    return None if np.isnan(value) else _figure(value, interval)


def _sd(values: NDArray[np.float64]) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
