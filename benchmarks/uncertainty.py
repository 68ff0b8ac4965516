"""Bootstrap intervals and picture digests: seconds, beside scipy's.

    python benchmarks/uncertainty.py > benchmarks/results/uncertainty_DATE.txt

Peers, in the same run and on the same samples: scipy.stats.bootstrap calling a metric a resample (the mean over
runs of the balanced accuracy, by scikit-learn), and scipy.fft.dctn a picture for the digest. Each timed `--rounds`
times in turn; medians of CPU seconds of one thread. scipy is given a fortieth of the resamples (its time
is proportional) and that is marked.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy

import numpy as np
import scipy.fft
import scipy.stats
from common import about_this_run, last_core, pin
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from pathfm.leakage import digest_picture, distances
from pathfm.leakage.digests import stacked
from pathfm.uncertainty import Options, Predictions, compare, score

RESAMPLES, SHARE = 2000, 40
CASES = (  # samples, groups (0: none), classes, runs: BACH's validation, BreakHis's, NCT-CRC's, PCam's
    (132, 35, 4, 5),
    (339, 17, 4, 5),
    (7180, 0, 9, 5),
    (32768, 0, 2, 5),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    pin(last_core())
    print(about_this_run("numpy", "scipy", "scikit-learn"))
    print(
        f"CPU seconds of one thread, medians of {arguments.rounds} rounds, {RESAMPLES:,} resamples, BCa\n"
    )
    print("samples  groups  classes  runs  scipy / ours  ours, s  scipy, s *  A against B, s")
    for case in CASES:
        print(intervals(case, arguments.rounds))
    print(
        "\n* a fortieth of the resamples, times forty; for pictures without groups, groups of one\n"
    )
    print(digests(arguments.rounds))


def intervals(case: tuple[int, int, int, int], rounds: int) -> str:
    """One row: the interval of a score, ours and scipy's, and a comparison."""
    n, n_groups, classes, runs = case
    truth, first = drawn(n, classes, runs, 0.8, seed=1)
    _, second = drawn(n, classes, runs, 0.82, seed=2)
    groups = [f"patient {i % n_groups}" for i in range(n)] if n_groups else []
    a, b = (
        Predictions(truth, p, classes, groups, name) for p, name in ((first, "a"), (second, "b"))
    )
    options = Options(n_resamples=RESAMPLES)
    members = [np.flatnonzero(a.group_of == g) for g in range(a.n_groups)]

    def statistic(drawn_groups: np.ndarray) -> float:
        rows = np.concatenate([members[g] for g in drawn_groups])
        return float(np.mean([balanced_accuracy_score(truth[rows], run[rows]) for run in first]))

    def scipys() -> None:
        scipy.stats.bootstrap(
            (np.arange(a.n_groups),),
            statistic,
            n_resamples=RESAMPLES // SHARE,
            method="percentile",  # BCa adds a call a group
            vectorized=False,
            rng=np.random.default_rng(0),
        )

    ours, theirs, pair = in_turn(
        rounds if n < 1000 else 1,
        lambda: score(Predictions(truth, first, classes, groups), options=options),
        scipys,
        lambda: compare(a, b, options=options),
    )
    shown = f"{a.n_groups:,}"
    return (
        f"{n:7,}  {shown:>6}  {classes:7}  {runs:4}  {SHARE * theirs / ours:12.0f}  {ours:7.3f}  "
        f"{SHARE * theirs:9.1f}  {pair:14.3f}"
    )


def digests(rounds: int) -> str:
    """Pictures a second, and a search."""
    rng = np.random.default_rng(0)
    pictures = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8)).resize((224, 224)))
        for _ in range(200)
    ]

    def by_scipy() -> None:
        for picture in pictures:
            luma = picture.astype(np.float64) @ [0.299, 0.587, 0.114]
            _ = scipy.fft.dctn(luma)[:16, :16] > 0

    ours, theirs = in_turn(rounds, lambda: [digest_picture(p) for p in pictures], by_scipy)
    known = stacked(map(digest_picture, pictures))
    many = rng.permuted(np.tile(known, (100, 1)), axis=1)
    (search,) = in_turn(rounds, lambda: distances(many[:2000], many))
    return (
        f"digest of a picture of 224 px: {1000 * ours / 200:.2f} ms, scipy's whole DCT {1000 * theirs / 200:.2f} ms "
        f"({theirs / ours:.1f} x)\n2,000 digests, eight orientations, against {len(many):,}: {search:.2f} s"
    )


def drawn(
    n: int, classes: int, runs: int, right: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Classes and predictions of several runs, `right` of them right."""
    truth = np.random.default_rng(0).integers(0, classes, n)
    rng = np.random.default_rng(seed)
    wrong = rng.integers(0, classes, (runs, n))
    return truth, np.where(rng.random((runs, n)) < right, truth, wrong)


def in_turn(rounds: int, *works: Callable[[], object]) -> list[float]:
    """Median CPU seconds of each, one after the other in every round."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(rounds):
        for work, taken in zip(works, times, strict=True):
            began = time.process_time()
            work()
            taken.append(time.process_time() - began)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()
