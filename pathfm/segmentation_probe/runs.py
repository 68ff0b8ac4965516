"""Several runs of the segmentation protocol: on a data set's own splits, or on folds by patient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pathfm.heads.folds import grouped_folds, parts_of, told_of
from pathfm.probing.parts import Parts, Rows
from pathfm.runtime import PathfmError
from pathfm.segmentation_probe.fit import MaskedMaps, SegmentationProtocol, fit_run
from pathfm.segmentation_probe.scores import DiceTable
from pathfm.uncertainty import Interval, interval_of_mean


@dataclass(frozen=True, eq=False)
class DiceScores:
    """What several runs found. All scores are mean Dice without background, 0..1.

    values: one a run, over the reported pictures; with folds each is reported once a run. val: the best
    validation score a run (mean over folds). by_picture: mean over runs of the reported `rows`.
    interval: of the mean over runs, resampling groups; None where only one is judged. epochs: of each fit.
    """

    told: str
    values: tuple[float, ...]
    val: tuple[float, ...]
    rows: Rows
    by_picture: NDArray[np.float64]
    per_class: dict[str, float | None]
    interval: Interval | None
    epochs: tuple[int, ...]


def splits_for(
    splits: Sequence[str], groups: Sequence[str], n_folds: int | None, seed: int, run: int
) -> list[Parts]:
    """The data's own parts, or with `n_folds` those of every fold of this run."""
    if n_folds is None:
        return [parts_of(splits, groups)]
    return grouped_folds(groups, n_folds, seed=seed, repeat=run)


def probe_maps(
    data: MaskedMaps,
    splits: Sequence[str],
    groups: Sequence[str],
    protocol: SegmentationProtocol,
    n_runs: int = 5,
    n_folds: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    eva_ignore: bool = False,
    advance: Callable[[int], object] | None = None,
) -> DiceScores:
    """Fits `n_runs` heads on the pictures' own splits or, with `n_folds`, every fold in each of them.

    groups: who must not be on two sides. Run r draws its heads, batches and folds from (seed, r). advance
    is told of each fit. Raises PathfmError where a split cannot be made, and where no reported picture
    holds a class beside the background.
    """
    tables: list[NDArray[np.float64]] = []
    val, epochs, told = [], [], ""
    rows = np.array([], np.int64)
    for run in range(n_runs):
        table = np.full((len(data.masks), len(data.classes)), np.nan)
        fits, reported = [], []
        for k, parts in enumerate(splits_for(splits, groups, n_folds, seed, run)):
            number = run * (n_folds or 1) + k
            told = told_of(parts, n_folds)
            fit = fit_run(
                data, parts, protocol, seed=seed, run=number, device=device, eva_ignore=eva_ignore
            )
            table[parts.reported] = (fit.test or fit.val).values
            reported.append(parts.reported)
            fits.append(fit)
            if advance is not None:
                advance(1)
        rows = np.sort(np.concatenate(reported))
        tables.append(table[rows])
        val.append(float(np.mean([fit.val.mean for fit in fits])))
        epochs += [fit.epochs for fit in fits]
    found = [DiceTable(table, data.classes) for table in tables]
    by_picture = np.mean([one.pictures for one in found], axis=0)
    if not np.isfinite(by_picture).any():
        raise PathfmError(
            f"none of {len(rows)} reported pictures holds a class beside {data.classes[0]!r}: there is "
            "nothing to judge"
        )
    return DiceScores(
        told=told,
        values=tuple(one.mean for one in found),
        val=tuple(val),
        rows=rows,
        by_picture=by_picture,
        per_class=_per_class(found),
        interval=interval_over(by_picture, [groups[i] for i in rows]),
        epochs=tuple(epochs),
    )


def interval_over(by_picture: NDArray[np.float64], groups: Sequence[str]) -> Interval | None:
    """The interval of a mean over pictures, resampling groups; None where only one group has a value."""
    judged = {g for g, value in zip(groups, by_picture, strict=True) if np.isfinite(value)}
    return interval_of_mean(by_picture, groups) if len(judged) > 1 else None


def _per_class(tables: Sequence[DiceTable]) -> dict[str, float | None]:
    """Each class's Dice over the pictures that have it, mean over runs; None where none has it."""
    each = {name: np.mean([t.per_class[name] for t in tables]) for name in tables[0].classes}
    return {name: None if np.isnan(value) else float(value) for name, value in each.items()}
