"""Pairs of what `pathfm probe --also eva` predicted: two fits of one model, and two models by one fit.

    python benchmarks/probe_pairs.py PROBE_FOLDER... > benchmarks/results/evidence_pairs_DATE.txt

Fits: L-BFGS logistic regression (C by validation, then fitted on all of the training half) against the first run of
eva's batched AdamW heads (fitted without the validation part), on the first split's test pictures. Models: each against
the first of `probe.json`, on the same pictures. Interval and p_swap are over groups; McNemar takes pictures as
independent, which those of one slide are not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from common import about_this_run

from pathfm.probing.files import read_predictions
from pathfm.probing.result import load_result
from pathfm.runtime import PathfmError
from pathfm.uncertainty import Predictions, compare, mcnemar

FITS = ("logistic", "eva")


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("probes", type=Path, nargs="+", help="folders that `pathfm probe` wrote")
    given = parser.parse_args()
    print(about_this_run("torch", "numpy", "scipy"))
    for folder in given.probes:
        print(f"\n{about(folder)}\n{HEADER}")
        for line in lines_of(folder):
            print(line)


HEADER = (
    f"{'A':<22}{'B':<22}{'A, %':>7}{'B, %':>7}  {'B - A, points [95 %]':<24}{'p_swap':>8}{'same, %':>9}"
    f"{'only A':>8}{'only B':>8}  McNemar, mid-p"
)


def about(folder: Path) -> str:
    """What was probed, in a line."""
    result = load_result(folder / "probe.json")
    if result is None:
        raise SystemExit(f"{folder}: no probe.json of pathfm")
    return (
        f"{folder.name}: {result.data}, input {result.input_px} px, {result.n_test:,} test pictures of the "
        f"first split"
    )


def lines_of(folder: Path) -> list[str]:
    """A line a pair: the two fits of every model, then every model against the first by either fit."""
    result = load_result(folder / "probe.json")
    assert result is not None
    made = {}
    for name in (backbone.name for backbone in result.backbones):
        found = read_predictions(folder / "predictions" / f"{name}.safetensors")
        made[name] = {fit: first_run(found[fit], f"{name}, {fit}") for fit in FITS}
    first, *others = made
    pairs = [(made[name]["logistic"], made[name]["eva"]) for name in made]
    pairs += [(made[first][fit], made[other][fit]) for fit in FITS for other in others]
    return [line(a, b) for a, b in pairs]


def first_run(predictions: Predictions, name: str) -> Predictions:
    """The first repeat alone: the first split of logistic regression, the first of eva's runs on it."""
    return Predictions(
        predictions.truth,
        predictions.predicted[:1],
        predictions.n_classes,
        predictions.groups,
        name,
    )


def line(a: Predictions, b: Predictions) -> str:
    """One row of the table."""
    judged = a.predicted[0] >= 0
    if (judged != (b.predicted[0] >= 0)).any():
        raise PathfmError(f"{a.name} and {b.name} judged other pictures")
    truth, ours, theirs = a.truth[judged], a.predicted[0][judged], b.predicted[0][judged]
    difference, counts = compare(a, b), mcnemar(truth, ours, theirs)
    low, high = 100 * difference.interval.low, 100 * difference.interval.high
    told = f"{100 * difference.interval.estimate:+.1f} [{low:+.1f}, {high:+.1f}]"
    return (
        f"{a.name:<22}{b.name:<22}{100 * balanced(truth, ours):>7.1f}{100 * balanced(truth, theirs):>7.1f}  "
        f"{told:<24}{difference.p_swap:>8.2g}{100 * np.mean(ours == theirs):>9.1f}"
        f"{counts.only_a_right:>8}{counts.only_b_right:>8}  {counts.p_mid:.2g}"
    )


def balanced(truth: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over classes of the share that is told right."""
    return float(np.mean([(predicted[truth == c] == c).mean() for c in np.unique(truth)]))


if __name__ == "__main__":
    main()
