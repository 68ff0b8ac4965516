"""mCE, site index, calibration and label noise: by hand, by loops out of the papers, by torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import NearestNeighbors

from pathfm.measures import (
    balanced_rows,
    best_k,
    calibration,
    corruption_errors,
    flip_labels,
    neighbours,
    site_index,
)
from pathfm.runtime import PathfmError

# --- mCE --------------------------------------------------------------------------------------------


def test_mce_by_hand() -> None:
    """Two corruptions, two severities; the reference errs 0.2 on clean pictures, we 0.1."""
    ours, reference = [[0.1, 0.3], [0.2, 0.4]], [[0.3, 0.5], [0.4, 0.4]]
    got = corruption_errors(ours, 0.1, reference, 0.2)
    np.testing.assert_allclose(got.ce, [50.0, 75.0])
    np.testing.assert_allclose(got.relative, [100 * 0.2 / 0.4, 100 * 0.4 / 0.4])
    assert got.mce == pytest.approx(62.5)
    assert got.relative_mce == pytest.approx(75.0)
    assert got.unnormalised == pytest.approx(0.25)


_SHARE = st.floats(0, 1)
_TABLES = st.lists(st.lists(_SHARE, min_size=5, max_size=5), min_size=1, max_size=10)


@settings(deadline=None)
@given(_TABLES, _SHARE, _SHARE, st.data())
def test_mce_is_a_loop_out_of_the_paper(
    ours: list[list[float]], clean: float, clean_ref: float, data: st.DataObject
) -> None:
    """Over tables that do not lie within rounding of a guard: there a mean may fall to either side."""

    def apart(row: list[float]) -> bool:
        mean = sum(row) / 5
        return abs(mean - 0.01) > 1e-9 and abs(mean - clean_ref - 0.01) > 1e-9

    row = st.lists(_SHARE, min_size=5, max_size=5).filter(apart)
    reference = data.draw(st.lists(row, min_size=len(ours), max_size=len(ours)))
    ce, relative = [], []
    for e, r in zip(ours, reference, strict=True):
        if sum(r) / 5 > 0.01:
            ce.append(100 * sum(e) / sum(r))
        if sum(r) / 5 - clean_ref > 0.01:
            relative.append(100 * sum(x - clean for x in e) / sum(x - clean_ref for x in r))
    got = corruption_errors(ours, clean, reference, clean_ref)
    assert (got.used.sum(), got.relative_used.sum()) == (len(ce), len(relative))
    assert got.mce == pytest.approx(np.mean(ce) if ce else np.nan, nan_ok=True)
    expected = np.mean(relative) if relative else np.nan
    assert got.relative_mce == pytest.approx(expected, abs=1e-6, nan_ok=True)


def test_a_model_is_at_100_of_itself() -> None:
    table = np.random.default_rng(0).uniform(0.2, 0.9, (10, 5))
    got = corruption_errors(table, 0.1, table, 0.1)
    assert got.mce == pytest.approx(100)
    assert got.relative_mce == pytest.approx(100)


def test_a_corruption_that_does_nothing_to_the_reference_has_no_relative_error() -> None:
    reference = [[0.2, 0.2], [0.3, 0.5], [0.18, 0.19], [0.0, 0.004]]
    got = corruption_errors([[0.3, 0.3]] * 4, 0.1, reference, 0.2)
    assert got.relative_used.tolist() == [False, True, False, False]
    assert got.used.tolist() == [True, True, True, False]
    assert np.isnan(got.relative[[0, 2, 3]]).all()
    assert np.isnan(got.ce[3])
    assert got.relative_mce == pytest.approx(got.relative[1])
    assert got.mce == pytest.approx(got.ce[:3].mean())


def test_with_nothing_left_the_mean_is_no_number_and_the_plain_error_stays() -> None:
    got = corruption_errors([[0.5, 0.5]], 0.1, [[0.0, 0.0]], 0.0)
    assert np.isnan([got.mce, got.relative_mce]).all()
    assert got.unnormalised == 0.5


@pytest.mark.parametrize(
    ("errors", "reference", "message"),
    [
        ([[0.1, 0.2]], [[0.1], [0.2]], r"\(1, 2\)"),
        ([0.1], [0.1], r"\(1,\)"),
        ([[1.2]], [[0.1]], "1.2"),
        ([[float("nan")]], [[0.1]], "between 0 and 1"),
    ],
)
def test_what_is_no_table_of_errors_is_refused(errors, reference, message: str) -> None:
    with pytest.raises(PathfmError, match=message):
        corruption_errors(errors, 0.0, reference, 0.0)


# --- calibration ------------------------------------------------------------------------------------


def some_probabilities(n: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = 3 * rng.normal(size=(n, classes))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return p, rng.integers(0, classes, n)


@pytest.mark.parametrize("n_bins", [1, 10, 15])
@pytest.mark.parametrize("classes", [2, 5])
def test_ece_is_a_loop_out_of_the_paper(n_bins: int, classes: int) -> None:
    p, y = some_probabilities(400, classes, seed=classes)
    got = calibration(p, y, n_bins)
    total = 0.0
    for m in range(1, n_bins + 1):
        inside = [i for i in range(400) if (m - 1) / n_bins < max(p[i]) <= m / n_bins]
        assert got.counts[m - 1] == len(inside)
        if inside:
            right = np.mean([p[i].argmax() == y[i] for i in inside])
            total += len(inside) / 400 * abs(right - np.mean([max(p[i]) for i in inside]))
            assert got.accuracy[m - 1] == pytest.approx(right)
    assert got.ece == pytest.approx(total)


@pytest.mark.slow  # to import torchmetrics takes many seconds
def test_ece_is_torchmetrics() -> None:
    import torch
    from torchmetrics.functional.classification import multiclass_calibration_error

    for classes in (2, 5):
        p, y = some_probabilities(400, classes, seed=classes)
        tensors = torch.from_numpy(p), torch.from_numpy(y)
        for n_bins in (1, 10, 15):
            theirs = multiclass_calibration_error(*tensors, classes, n_bins, norm="l1")
            assert calibration(p, y, n_bins).ece == pytest.approx(float(theirs), abs=1e-6)


def test_confidence_on_a_bound_belongs_to_the_bin_below_it() -> None:
    p = np.array([[0.6, 0.4], [0.8, 0.2], [1.0, 0.0], [0.7, 0.3]])
    assert calibration(p, [0, 0, 0, 0], n_bins=10).counts.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 0, 1]


def test_sure_and_right_is_calibrated_and_sure_and_wrong_is_not() -> None:
    sure = np.eye(3)[[0, 1, 2, 0]]
    assert calibration(sure, [0, 1, 2, 0]).ece == 0
    wrong = calibration(sure, [1, 2, 0, 1])
    assert wrong.ece == 1
    assert wrong.overconfidence == 1


def test_what_are_no_probabilities_is_refused() -> None:
    p, y = some_probabilities(5, 3, 0)
    for bad_p, bad_y, message in (
        (p * 2, y, "logits"),
        (np.where(p == p[0, 0], np.nan, p), y, "1 of 5 rows"),
        (p, y[:4], "do not belong"),
        (p, y + 3, "outside the 3 classes"),
        (p[:0], y[:0], "do not belong"),
    ):
        with pytest.raises(PathfmError, match=message):
            calibration(bad_p, bad_y)
    with pytest.raises(PathfmError, match="0 bins"):
        calibration(p, y, 0)


# --- site index -------------------------------------------------------------------------------------


def some_hospitals(
    n: int = 240, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
    """Features, classes, sites, slides: four slides at each of three sites, three classes."""
    rng = np.random.default_rng(seed)
    y, site = rng.integers(0, 3, n), rng.integers(0, 3, n)
    slide = [f"{s}-{i}" for s, i in zip(site, rng.integers(0, 4, n), strict=True)]
    x = rng.normal(size=(n, 6)) + np.eye(6)[y] * 1.5 + np.eye(6)[3 + site] * 1.5
    return x.astype(np.float32), y, [f"hospital {s}" for s in site], slide


def slow_index(x, y, site, slide, k: int) -> tuple[float, list[list[int]]]:
    """The definition, one picture at a time, on scikit-learn's neighbours of unit vectors."""
    unit = x.astype(np.float64) / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True)
    order = NearestNeighbors(n_neighbors=len(x)).fit(unit).kneighbors(unit, return_distance=False)
    so = os = 0
    kept = []
    for i, row in enumerate(order):
        others = [int(j) for j in row if j != i and slide[j] != slide[i]][:k]
        kept.append(others)
        so += sum(y[j] == y[i] and site[j] != site[i] for j in others)
        os += sum(y[j] != y[i] and site[j] == site[i] for j in others)
    return so / (so + os), kept


@pytest.mark.parametrize("k", [1, 5, 31])
def test_the_site_index_is_pathorob_s_definition_in_a_loop(k: int) -> None:
    x, y, site, slide = some_hospitals()
    nearest = neighbours(x, slide)
    expected, rows = slow_index(x, y, site, slide, k)
    np.testing.assert_array_equal(nearest[:, :k], rows)
    got = site_index(nearest, y, site, k)
    assert got.index == pytest.approx(expected, abs=1e-12)
    assert got.same_both + got.same_class + got.same_site + got.same_neither == pytest.approx(1)


def test_k_is_the_best_for_naming_the_class() -> None:
    x, y, _, slide = some_hospitals(seed=3)
    nearest = neighbours(x, slide, most=60)
    scores = {}
    for k in (1, 3, 5, 7, 9, 11, 21, 31, 41, 51):
        votes = [np.bincount(y[row[:k]], minlength=3).argmax() for row in nearest]
        scores[k] = balanced_accuracy_score(y, votes)
    assert best_k(nearest, y, most=60) == max(scores, key=lambda k: scores[k])


def slow_chance(y, site, slide) -> float:
    """Every candidate of every picture, one at a time."""
    so = os = 0.0
    for i in range(len(y)):
        others = [j for j in range(len(y)) if j != i and slide[j] != slide[i]]
        so += sum(y[j] == y[i] and site[j] != site[i] for j in others) / len(others)
        os += sum(y[j] != y[i] and site[j] == site[i] for j in others) / len(others)
    return so / (so + os)


def test_the_chance_index_is_that_of_all_candidates_in_a_loop() -> None:
    x, y, site, slide = some_hospitals(120)
    nearest = neighbours(x, slide)
    got = site_index(nearest, y, site, 5, slide)
    assert got.chance == pytest.approx(slow_chance(y, site, slide), abs=1e-12)
    alone = site_index(nearest, y, site, 5)
    assert alone.chance == pytest.approx(slow_chance(y, site, range(120)), abs=1e-12)
    assert got.n == 120
    even = np.arange(60) % 3, [str(i // 30) for i in range(60)]
    crossed = site_index(neighbours(x[:60]), *even, 5)
    assert crossed.chance == pytest.approx(
        1 / 3
    )  # three classes at two sites: (2 - 1) / (2 + 3 - 2)


@pytest.mark.parametrize("sizes", [(400, 400, 20, 20), (400, 20, 400, 20)])
def test_features_that_tell_nothing_are_at_chance_however_unequal_the_cells(sizes) -> None:
    """A rare class, a rare site: without balance 0.91 and 0.09."""
    y = np.repeat([0, 0, 1, 1], sizes)
    site = np.repeat(["s1", "s2", "s1", "s2"], sizes)
    rng, found = np.random.default_rng(0), []
    for seed in range(10):
        x = rng.normal(size=(len(y), 8))
        kept = balanced_rows(y, site, seed)
        assert np.bincount(2 * y[kept] + (site[kept] == "s2")).tolist() == [20] * 4
        found.append(site_index(neighbours(x[kept]), y[kept], site[kept], 21))
    assert np.mean([one.index for one in found]) == pytest.approx(0.5, abs=0.03)
    assert [one.chance for one in found] == pytest.approx([0.5] * 10)
    whole = site_index(neighbours(x), y, site, 21)
    assert abs(whole.chance - 0.5) > 0.35  # what is told where nobody balances
    assert whole.index == pytest.approx(whole.chance, abs=0.02)


def test_which_pictures_balance_keeps_follows_from_the_seed_and_their_rows() -> None:
    y, site = np.repeat([0, 1], 30), np.repeat(["a", "b", "a", "b"], [10, 20, 5, 25])
    kept = balanced_rows(y, site, 3)
    assert len(kept) == 4 * 5
    assert (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(kept, balanced_rows(y, site, 3))
    assert set(kept.tolist()) != set(balanced_rows(y, site, 4).tolist())


def test_a_class_that_a_site_lacks_is_refused_with_what_to_do() -> None:
    y, site = [0, 0, 1, 1, 2, 2], ["a", "b", "a", "b", "a", "a"]
    with pytest.raises(PathfmError, match=r"class 2 has no picture from b \(1 of 6 pairs.*Leave"):
        balanced_rows(y, site, 0)


@pytest.mark.parametrize(("axis", "expected"), [(0, 1.0), (1, 0.0)])
def test_features_of_class_alone_give_1_and_of_site_alone_0(axis: int, expected: float) -> None:
    rng = np.random.default_rng(0)
    y, site = np.repeat([0, 1], 100), np.tile(np.repeat([0, 1], 50), 2)
    kind = (y, site)[axis]
    x = np.eye(2)[kind] + 1e-3 * rng.normal(size=(200, 2))
    got = site_index(neighbours(x), y, [str(s) for s in site], 20)
    assert got.index == expected
    assert got.per_class.tolist() == [expected] * 2


def test_neighbours_do_not_depend_on_how_the_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, _, slide = some_hospitals(90)
    whole = neighbours(x, slide)
    monkeypatch.setattr("pathfm.measures.sites._BLOCK_FLOATS", 90 * 7)
    np.testing.assert_array_equal(neighbours(x, slide), whole)
    own = np.asarray(slide)
    assert (own[whole] != own[:, None]).all()


@pytest.mark.parametrize(
    ("y", "site", "k", "message"),
    [
        ([0, 1, 0, 1], ["a"] * 4, 1, "one site"),
        ([0, 0, 1, 1], ["a", "a", "b", "b"], 1, "no class occurs at two sites"),
        ([0, 0, 0, 0], ["a", "a", "b", "b"], 1, "no site has two classes"),
        ([0, 1, 0, 1], ["a", "a", "b", "b"], 4, "k = 4"),
    ],
)
def test_where_the_index_says_nothing_it_is_refused(y, site, k: int, message: str) -> None:
    nearest = neighbours(np.random.default_rng(0).normal(size=(4, 3)))
    with pytest.raises(PathfmError, match=message):
        site_index(nearest, y, site, k)


def test_one_slide_has_no_neighbours_and_nan_has_none_either() -> None:
    with pytest.raises(PathfmError, match="one slide"):
        neighbours(np.ones((3, 2)), ["a"] * 3)
    with pytest.raises(PathfmError, match="not finite"):
        neighbours(np.array([[1.0, np.nan], [0.0, 1.0]]))


# --- label noise ------------------------------------------------------------------------------------


def test_the_share_told_is_wrong_and_all_wrong_classes_are_alike() -> None:
    labels = np.repeat(np.arange(4), 3000)
    for share in (0.0, 0.1, 0.25, 1.0):
        wrong = flip_labels(labels, share, 4, seed=1) != labels
        assert wrong.sum() == round(share * 12_000)
    table = np.zeros((4, 4))
    np.add.at(table, (labels, flip_labels(labels, 1.0, 4, seed=1)), 1)
    off = table[~np.eye(4, dtype=bool)]
    assert np.diag(table).tolist() == [0] * 4
    assert ((off - 1000) ** 2 / 1000).sum() < 26.1  # chi-square, 8 degrees of freedom: 1 in 1,000


def test_more_noise_is_the_same_noise_and_more_of_it() -> None:
    labels = np.arange(500) % 5
    some, more = (flip_labels(labels, share, 5, seed=3, repeat=2) for share in (0.1, 0.4))
    wrong = some != labels
    np.testing.assert_array_equal(more[wrong], some[wrong])
    assert (flip_labels(labels, 0.1, 5, seed=3, repeat=1) != some).any()
    assert (flip_labels(labels, 0.1, 5, seed=4, repeat=2) != some).any()
    with pytest.raises(PathfmError, match="share 1"):
        flip_labels(labels, 1.5, 5, 0)
    with pytest.raises(PathfmError, match="one class"):
        flip_labels(labels * 0, 0.1, 1, 0)


def test_of_equally_near_pictures_those_that_come_first_are_neighbours() -> None:
    features = np.repeat(np.eye(3), 40, axis=0)
    found = neighbours(features, most=5)
    assert found[70].tolist() == [40, 41, 42, 43, 44]
    assert found[41].tolist() == [40, 42, 43, 44, 45]
    every = neighbours(features)
    assert every.shape == (120, 119)
    assert every[0].tolist() == list(range(1, 120))
