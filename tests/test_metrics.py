"""Each number against an independent one: scikit-learn, or the paper's formula in a loop."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.metrics import confusion_matrix as sk_confusion
from sklearn.neighbors import KNeighborsClassifier

from pathfm.metrics import (
    Standardiser,
    balanced_accuracy,
    confusion_matrix,
    decide,
    fit_logistic,
    initial_head,
    knn_predict,
    rankme,
    recall_per_class,
)


def blobs(n: int, dim: int, n_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n).astype(np.int64)
    centres = rng.normal(size=(n_classes, dim))
    return (centres[labels] + 1.2 * rng.normal(size=(n, dim))).astype(np.float32), labels


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
@pytest.mark.filterwarnings(
    "ignore:y_pred contains classes:UserWarning", "ignore:A single label:UserWarning"
)
def test_balanced_accuracy_and_confusion_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = np.array(pairs).T
    assert balanced_accuracy(truth, predicted, 5) == pytest.approx(
        balanced_accuracy_score(truth, predicted)
    )
    expected = sk_confusion(truth, predicted, labels=range(5))
    np.testing.assert_array_equal(confusion_matrix(truth, predicted, 5), expected)


def test_recall_of_a_class_that_does_not_occur_is_nan() -> None:
    recall = recall_per_class(confusion_matrix([0, 0, 1], [0, 1, 1], 3))
    np.testing.assert_allclose(recall, [0.5, 1.0, np.nan])


def test_rankme_is_the_papers_formula() -> None:
    features = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    sigma = np.sqrt(np.linalg.eigvalsh(features.astype(np.float64).T @ features.astype(np.float64)))
    entropy = 0.0
    for s in sigma:
        p = s / sigma.sum() + 1e-7
        entropy -= p * math.log(p)
    assert rankme(features) == pytest.approx(math.exp(entropy), rel=1e-9)


def test_rankme_counts_directions() -> None:
    basis = np.eye(8)[:, :8]
    assert rankme(basis) == pytest.approx(8, rel=1e-4)
    assert rankme(np.outer(np.arange(1, 9), np.ones(8))) == pytest.approx(1, abs=1e-3)
    assert rankme(np.zeros((5, 3))) == 1.0


@pytest.mark.parametrize("k", [1, 5, 20, 500])
def test_knn_is_scikit_learns(k: int) -> None:
    train, labels = blobs(120, 10, 4, seed=1)
    test, _ = blobs(2100, 10, 4, seed=2)  # more than one block
    oracle = KNeighborsClassifier(min(k, 120), metric="cosine").fit(train.astype(float), labels)
    expected = oracle.predict(test.astype(float))
    np.testing.assert_array_equal(knn_predict(train, labels, test, k), expected)


@pytest.mark.parametrize("c", [0.001, 0.1, 10.0])
def test_the_logistic_head_is_scikit_learns(c: float) -> None:
    x, labels = blobs(300, 12, 4, seed=3)
    scaled = Standardiser.of(x)(x)
    head = fit_logistic(scaled, labels, c, initial_head(12, 4, 0, 0), tolerance=1e-8)
    oracle = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(scaled, labels)
    np.testing.assert_allclose(head[:-1], oracle.coef_.T, atol=1e-4)
    bias = head[-1] - head[-1].mean()  # a shift of all biases changes nothing
    np.testing.assert_allclose(bias, oracle.intercept_ - oracle.intercept_.mean(), atol=1e-4)
    np.testing.assert_array_equal(decide(scaled, head), oracle.predict(scaled))


def test_the_drawn_head_changes_the_path_not_the_result() -> None:
    x, labels = blobs(200, 8, 3, seed=4)
    scaled = Standardiser.of(x)(x)
    starts = [initial_head(8, 3, seed, 0) for seed in (0, 1)]
    assert np.abs(starts[0] - starts[1]).max() > 1e-3
    a, b = (fit_logistic(scaled, labels, 1.0, start, tolerance=1e-8) for start in starts)
    np.testing.assert_allclose(a[:-1], b[:-1], atol=1e-5)


def test_a_constant_feature_is_not_blown_up() -> None:
    x = np.array([[1.0, 5.0], [3.0, 5.0]])
    np.testing.assert_allclose(Standardiser.of(x)(x), [[-1, 0], [1, 0]])
