"""Few-shot against the paper's words in a loop and scikit-learn; the logistic probe's choice of C."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from pathfm.metrics import initial_head
from pathfm.probing.few_shot import few_shot, predict_from
from pathfm.probing.linear import fit_probe
from pathfm.probing.orders import draw_shots
from pathfm.probing.parts import Parts
from pathfm.runtime import PathfmError
from tests.test_metrics import blobs


def task() -> tuple[np.ndarray, np.ndarray, Parts]:
    x, y = blobs(400, 9, 3, seed=7)
    rows = np.random.default_rng(0).permutation(400)
    return x + 3, y, Parts(np.sort(rows[:250]), np.sort(rows[250:300]), np.sort(rows[300:]))


@pytest.mark.parametrize("k", [1, 6])
def test_both_methods_are_what_the_papers_say(k: int) -> None:
    x, y, parts = task()
    rows = draw_shots(parts.train, y, k, 0, 0)
    got = predict_from(x[rows], y[rows], x[parts.test], 3)
    centre = sum(x[row].astype(np.float64) for row in rows) / len(rows)
    made = [
        np.array([(v - centre) / np.linalg.norm(v - centre) for v in part.astype(np.float64)])
        for part in (x[rows], x[parts.test])
    ]
    means = [made[0][y[rows] == label].mean(axis=0) for label in range(3)]
    nearest = [np.argmin([np.linalg.norm(query - mean) for mean in means]) for query in made[1]]
    np.testing.assert_array_equal(got["simpleshot"], nearest)
    head = LogisticRegression(C=9 * 3 / 100, tol=1e-9, max_iter=5000).fit(made[0], y[rows])
    assert (got["logistic"] != head.predict(made[1])).mean() <= 0.01  # one on the border


def test_scores_are_balanced_accuracies_on_the_reported_rows_of_every_draw() -> None:
    x, y, parts = task()
    found = few_shot(x, y, parts, 3, shots=(1, 4), resamples=3, seed=5)["simpleshot"]
    assert found.shots == [1, 4]
    for i, k in enumerate((1, 4)):
        expected = []
        for resample in range(3):
            rows = draw_shots(parts.train, y, k, 5, resample)
            predicted = predict_from(x[rows], y[rows], x[parts.test], 3)["simpleshot"]
            expected.append(balanced_accuracy_score(y[parts.test], predicted))
        assert found.values[i] == pytest.approx(expected)
        assert found.mean[i] == pytest.approx(np.mean(expected))
        assert found.sd[i] == pytest.approx(np.std(expected, ddof=1))


def test_more_shots_tell_more() -> None:
    x, y, parts = task()
    for scores in few_shot(x, y, parts, 3, shots=(1, 32), resamples=10).values():
        assert scores.mean[1] > scores.mean[0] + 0.1
        assert scores.sd[1] < scores.sd[0]


def test_more_shots_than_samples_and_a_single_draw_are_refused() -> None:
    x, y, parts = task()
    with pytest.raises(PathfmError, match="fewer than the 200 shots asked for"):
        few_shot(x, y, parts, 3, shots=(1, 200))
    with pytest.raises(PathfmError, match="1 resamples: at least 2"):
        few_shot(x, y, parts, 3, shots=(1,), resamples=1)
    with pytest.raises(PathfmError, match="each at least 1 and there once"):
        few_shot(x, y, parts, 3, shots=(2, 2))


def test_the_logistic_probe_takes_the_c_that_validation_likes_and_gives_scikit_learns_shares() -> (
    None
):
    x, y, parts = task()
    c_values = (1e-4, 0.01, 1.0)
    probe = fit_probe(x, y, parts.train, parts.val, c_values, initial_head(9, 3, 0, 0))
    mean, sd = x[parts.train].mean(axis=0), x[parts.train].std(axis=0)
    scaled = (x.astype(np.float64) - mean) / sd
    heads = {
        c: LogisticRegression(C=c, tol=1e-9, max_iter=5000).fit(scaled[parts.train], y[parts.train])
        for c in c_values
    }
    scores = {
        c: balanced_accuracy_score(y[parts.val], head.predict(scaled[parts.val]))
        for c, head in heads.items()
    }
    assert probe.c == max(c_values, key=lambda c: (round(scores[c], 9), -c))
    shares = probe.probabilities(x[parts.test])
    np.testing.assert_allclose(shares, heads[probe.c].predict_proba(scaled[parts.test]), atol=2e-4)
    np.testing.assert_array_equal(probe.predict(x[parts.test]), shares.argmax(axis=1))


def test_a_refit_uses_the_rows_it_is_given_and_the_same_c() -> None:
    x, y, parts = task()
    both = np.concatenate([parts.train, parts.val])
    start = initial_head(9, 3, 0, 0)
    once = fit_probe(x, y, parts.train, parts.val, (0.01, 1.0), start)
    again = fit_probe(x, y, parts.train, parts.val, (0.01, 1.0), start, refit=both)
    assert again.c == once.c
    np.testing.assert_allclose(again.scale.mean, x[both].astype(np.float64).mean(axis=0))
    assert np.abs(again.head - once.head).max() > 1e-4
