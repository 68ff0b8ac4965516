"""eva's metrics against torchmetrics, which eva calls, also where classes are missing."""

from __future__ import annotations

import statistics
import warnings

import numpy as np
import pytest
import torch
from torchmetrics import classification as tm

from pathfm.probing.scores import eva_metrics, statistics_of
from pathfm.probing.selecting import macro_accuracy


def drawn(seed: int, n: int, n_classes: int, present: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    outputs = 1 if n_classes == 2 else n_classes
    logits = (3 * rng.normal(size=(n, outputs))).astype(np.float32)
    return logits.round(1), rng.integers(0, present, n)  # rounded: ties between scores


@pytest.mark.parametrize("present", [5, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_multiclass_metrics_are_torchmetrics(seed: int, present: int) -> None:
    logits, truth = drawn(seed, 70, 5, present)
    got = eva_metrics(logits, truth, 5)
    z, y = torch.from_numpy(logits), torch.from_numpy(truth)
    for name in ("Accuracy", "F1Score", "Precision", "Recall", "AUROC"):
        metric = getattr(tm, f"Multiclass{name}")(num_classes=5, average="macro")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of classes that do not occur
            expected = float(metric(z, y))
        assert got[f"Multiclass{name}"] == pytest.approx(expected, abs=2e-6), name


@pytest.mark.parametrize("present", [2, 1])
def test_binary_metrics_are_torchmetrics(present: int) -> None:
    logits, truth = drawn(3, 90, 2, present)
    got = eva_metrics(logits, truth, 2)
    z, y = torch.from_numpy(logits[:, 0]), torch.from_numpy(truth)
    for name in ("Accuracy", "F1Score", "Precision", "Recall", "AUROC"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = float(getattr(tm, f"Binary{name}")()(z, y))
        assert got[f"Binary{name}"] == pytest.approx(expected, abs=2e-6), name
    stats = tm.BinaryStatScores()(z, y).tolist()
    tp, fp, tn, fn = stats[:4]
    balanced = 0.5 * (tp / max(tp + fn, 1) + tn / max(tn + fp, 1))
    assert got["BinaryBalancedAccuracy"] == pytest.approx(balanced)


def test_the_average_loss_weighs_batches_not_samples() -> None:
    logits = np.array([[0.0], [0.0], [50.0]], np.float32)
    got = eva_metrics(logits, np.array([0, 1, 0]), 2, batch=2)["AverageLoss"]
    assert got == pytest.approx((np.log(2) + 50) / 2)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_the_score_of_many_heads_is_that_of_each(n_classes: int) -> None:
    rng = np.random.default_rng(1)
    truth = torch.from_numpy(rng.integers(0, n_classes, 40))
    predicted = torch.from_numpy(rng.integers(0, n_classes, (6, 40)))
    got = macro_accuracy(truth, predicted, n_classes)
    for head, found in zip(got, predicted, strict=True):
        metric = tm.MulticlassAccuracy(num_classes=n_classes, average="macro")
        assert float(head) == pytest.approx(float(metric(found, truth)), abs=1e-7)


def test_a_class_that_is_only_predicted_counts_nothing_right() -> None:
    truth, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([[0, 2, 1, 1]])
    assert float(macro_accuracy(truth, predicted, 4)) == pytest.approx((0.5 + 1 + 0) / 3)


def test_runs_are_summed_up_as_evas_recorder_does() -> None:
    runs = [{"AverageLoss": 0.5, "X": 0.1}, {"AverageLoss": 0.7, "X": 0.4}]
    got = statistics_of(runs, "val")
    assert list(got) == ["val/AverageLoss", "val/X"]
    assert got["val/X"]["stdev"] == pytest.approx(statistics.stdev([0.1, 0.4]))
    assert got["val/X"]["values"] == [0.1, 0.4]
    assert statistics_of(runs[:1], "val")["val/X"]["stdev"] == 0
