"""Scores with their doubts: metrics, resamples, scores of several runs, and two models on the same samples."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from sklearn import metrics as sk

from online_patching.philox import integers, words
from pathfm.metrics import balanced_accuracy
from pathfm.runtime import PathfmError
from pathfm.uncertainty import (
    METRICS,
    Options,
    Predictions,
    compare,
    interval_of,
    interval_of_mean,
    mcnemar,
    resampling,
    score,
)
from pathfm.uncertainty.resampling import draw_counts, draw_swaps, replicate
from pathfm.uncertainty.sums import bootstrap, confusion_sums

QUICK = Options(n_resamples=400, seed=3)


def judged(n=120, groups=12, classes=3, runs=2, right=0.7, seed=0, name="a"):
    """Predictions that are right in `right` of all samples, in groups of unequal sizes."""
    rng = np.random.default_rng(seed)
    truth = np.random.default_rng(99).integers(0, classes, n)
    group = np.random.default_rng(98).integers(0, groups, n) ** 2 // groups
    wrong = rng.integers(0, classes, (runs, n))
    predicted = np.where(rng.random((runs, n)) < right, truth, wrong)
    return Predictions(truth, predicted, classes, [f"patient {g}" for g in group], name)


def replicates_of(p, metric, options):
    f = METRICS[metric]
    sums = confusion_sums(p)
    shape = (p.n_classes, p.n_classes)
    return bootstrap(lambda s: f(s.reshape(*s.shape[:-1], *shape)), sums, options, n=p.n)


def table_of(truth, predicted, classes):
    return sk.confusion_matrix(truth, predicted, labels=range(classes)).astype(float)


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("accuracy", sk.accuracy_score),
        ("balanced_accuracy", sk.balanced_accuracy_score),
        ("macro_f1", lambda t, p: sk.f1_score(t, p, average="macro", zero_division=0)),
        ("cohen_kappa", sk.cohen_kappa_score),
        (
            "quadratic_kappa",
            lambda t, p: sk.cohen_kappa_score(t, p, weights="quadratic", labels=range(5)),
        ),
    ],
)
def test_metrics_of_many_tables_equal_scikit_learns_one_by_one(name, oracle):
    rng = np.random.default_rng(1)
    pairs = [
        (rng.integers(0, 4, 60), rng.integers(0, 5, 60)) for _ in range(7)
    ]  # class 4: never true
    if name == "balanced_accuracy":
        pairs = [
            (t, np.minimum(p, 3)) for t, p in pairs
        ]  # scikit-learn warns of classes that are never true
    tables = np.stack([table_of(t, p, 5) for t, p in pairs])
    assert METRICS[name](tables) == pytest.approx([oracle(t, p) for t, p in pairs], abs=1e-12)


def test_macro_accuracy_counts_a_class_that_is_only_predicted_as_never_found():
    table = np.array([[3.0, 1, 0, 0], [0, 2, 2, 0], [0, 0, 0, 0], [0, 0, 0, 0]])  # class 3: nowhere
    assert METRICS["macro_accuracy"](table) == pytest.approx((3 / 4 + 2 / 4 + 0) / 3)
    assert METRICS["balanced_accuracy"](table) == pytest.approx((3 / 4 + 2 / 4) / 2)


@pytest.mark.slow  # importing torchmetrics takes seconds
def test_macro_accuracy_is_torchmetrics_own():
    import torch
    from torchmetrics.classification import MulticlassAccuracy

    rng = np.random.default_rng(2)
    theirs = MulticlassAccuracy(6, average="macro")
    for classes in (3, 5, 6):  # with fewer some are never true, or neither true nor predicted
        t, p = rng.integers(0, classes - 1, 50), rng.integers(0, classes, 50)
        expected = float(theirs(torch.from_numpy(p), torch.from_numpy(t)))
        assert METRICS["macro_accuracy"](table_of(t, p, 6)) == pytest.approx(expected, abs=1e-6)


def test_a_table_without_samples_has_no_value():
    for metric in METRICS.values():
        assert np.isnan(metric(np.zeros((2, 3, 3)))).all()


def test_a_resample_is_a_function_of_seed_and_number_alone():
    kind_of = np.arange(1500)  # more groups than one key of Philox has words for
    all_at_once = draw_counts(7, np.arange(20), kind_of, 1500)
    one_by_one = np.concatenate([draw_counts(7, np.array([r]), kind_of, 1500) for r in range(20)])
    assert np.array_equal(all_at_once, one_by_one)
    assert (all_at_once.sum(axis=1) == 1500).all()
    drawn = np.concatenate([words(7, [5], a, 431, n)[0] for a, n in ((0, 1024), (1, 476))])
    by_hand = np.bincount(integers(drawn, 1500), minlength=1500)
    assert np.array_equal(all_at_once[5], by_hand)
    assert not np.array_equal(draw_counts(8, np.arange(1), kind_of, 1500)[0], all_at_once[0])


def test_blocks_of_any_size_give_the_same_replicates(monkeypatch):
    whole = replicates_of(judged(), "balanced_accuracy", QUICK)[1]
    monkeypatch.setattr(resampling, "_BLOCK", 100)
    assert np.array_equal(replicates_of(judged(), "balanced_accuracy", QUICK)[1], whole)


def test_every_replicate_is_the_metric_of_the_drawn_patients_pictures():
    p = judged()
    _, replicates = replicates_of(p, "balanced_accuracy", QUICK)
    counts = draw_counts(QUICK.seed, np.arange(30), np.arange(p.n_groups), p.n_groups)
    for row, found in zip(counts, replicates, strict=False):
        rows = np.concatenate(
            [np.tile(np.flatnonzero(p.group_of == g), int(times)) for g, times in enumerate(row)]
        )
        each = [balanced_accuracy(p.truth[rows], run[rows], 3) for run in p.predicted]
        assert found == pytest.approx(np.mean(each), abs=1e-12)


@pytest.mark.parametrize(("method", "theirs"), [("percentile", "percentile"), ("bca", "BCa")])
@pytest.mark.parametrize("right", [0.6, 0.97])
@pytest.mark.parametrize("grouped", [True, False])
def test_intervals_equal_scipys_of_the_same_replicates(method, theirs, right, grouped):
    p = judged(right=right)
    if (
        not grouped
    ):  # then alike samples are counted together, and left out together in the jackknife
        p = Predictions(p.truth, p.predicted, 3)
    options = Options(n_resamples=999, method=method, level=0.9, seed=1)
    made, replicates = replicates_of(p, "balanced_accuracy", options)

    def statistic(groups):  # of patients, as scipy draws them
        rows = np.concatenate([np.flatnonzero(p.group_of == g) for g in groups])
        return np.mean([balanced_accuracy(p.truth[rows], run[rows], 3) for run in p.predicted])

    expected = scipy.stats.bootstrap(
        (np.arange(p.n_groups),),
        statistic,
        n_resamples=0,
        bootstrap_result=SimpleNamespace(bootstrap_distribution=replicates),
        method=theirs,
        confidence_level=0.9,
        vectorized=False,
    )
    assert (made.low, made.high) == pytest.approx(tuple(expected.confidence_interval), abs=1e-12)
    assert made.se == pytest.approx(expected.standard_error)
    assert made.method == method
    assert score(p, "balanced_accuracy", options).interval.low == made.low


def test_patches_that_are_groups_of_their_own_are_counted_by_kind_with_the_same_result():
    p = judged()
    alone = Predictions(p.truth, p.predicted, 3)
    named = Predictions(p.truth, p.predicted, 3, [f"{i:04}" for i in range(len(p.truth))])
    sums = confusion_sums(alone)
    assert sums.sums.shape[1] <= 27 < len(sums.kind_of) == 120
    assert score(alone, options=QUICK) == score(named, options=QUICK)
    twice = Predictions(p.truth, p.predicted, 3, [f"{i // 2}" for i in range(len(p.truth))])
    assert score(twice, options=QUICK).interval.n_groups == 60


def test_the_spread_of_runs_is_told_apart_from_the_interval():
    truth = np.repeat([0, 1], 50)
    one = np.where(np.arange(100) % 10 == 0, 1 - truth, truth)  # 90 % right
    two = np.where(np.arange(100) % 5 == 0, 1 - truth, truth)  # 80 %
    found = score(Predictions(truth, [one, two], 2), "accuracy", QUICK)
    assert found.values == pytest.approx((0.9, 0.8))
    assert found.sd == pytest.approx(0.1 / np.sqrt(2))
    assert found.interval.estimate == pytest.approx(0.85)
    assert found.told() == f"{found.interval.told()}, sd 7.1 over 2 runs"
    alone = score(Predictions(truth, one, 2), "accuracy", QUICK)
    assert alone.sd is None
    assert alone.told() == alone.interval.told()


def test_a_run_is_judged_by_the_samples_it_did_not_train_on():
    truth = np.array([0, 1, 0, 1, 0, 1])
    predicted = [[0, 1, 0, 0, -1, -1], [-1, -1, 0, 1, 1, 1]]
    found = score(Predictions(truth, predicted, 2), "accuracy", Options(n_resamples=100))
    assert found.values == pytest.approx((0.75, 0.75))
    half = Predictions(truth, [[0, 1, 0, -1, -1, -1]], 2, ["a", "a", "b", "b", "c", "d"])
    assert (half.n, half.n_groups) == (3, 2)


def test_samples_of_unknown_patients_are_groups_of_their_own():
    p = Predictions([0, 1, 0, 1], [0, 1, 1, 1], 2, ["a", "", "", "a"])
    assert p.n_groups == 3
    assert p.group_of[0] == p.group_of[3] != p.group_of[1] != p.group_of[2]


def test_the_same_model_twice_differs_by_nothing_and_no_p_says_otherwise():
    found = compare(judged(), judged(name="b"), options=QUICK)
    assert (found.interval.low, found.interval.estimate, found.interval.high) == (0, 0, 0)
    assert (found.p_bootstrap, found.p_swap) == (1.0, 1.0)
    assert "says nothing" in found.interval.caveats[0]


def test_a_difference_is_resampled_in_pairs():
    a, b = judged(), judged(seed=5, right=0.85, name="b")
    found = compare(a, b, "accuracy", Options(n_resamples=500, method="percentile"))
    sample = Options(n_resamples=500, method="percentile")
    one, two = (replicates_of(p, "accuracy", sample)[1] for p in (a, b))
    assert found.interval.low == pytest.approx(np.quantile(two - one, 0.025), abs=1e-12)
    assert found.values == pytest.approx(
        np.array(score(b, "accuracy").values) - np.array(score(a, "accuracy").values)
    )
    back = compare(b, a, "accuracy", sample)
    assert back.interval.low == pytest.approx(-found.interval.high, abs=1e-12)
    assert (back.p_bootstrap, back.p_swap) == (found.p_bootstrap, found.p_swap)


def test_swapping_whole_patients_gives_the_p_of_all_swaps_counted_out():
    a, b = judged(groups=9, right=0.5), judged(groups=9, seed=5, right=0.75, name="b")
    groups = a.n_groups
    found = compare(a, b, "accuracy", Options(n_resamples=20_000))

    def difference(swap):
        mask = np.asarray(swap)[a.group_of]
        first = np.where(mask, b.predicted, a.predicted)
        second = np.where(mask, a.predicted, b.predicted)
        return (second == a.truth).mean() - (first == a.truth).mean()

    all_of_them = [difference(s) for s in itertools.product([False, True], repeat=groups)]
    share = np.mean(np.abs(all_of_them) >= abs(difference([False] * groups)) - 1e-12)
    assert 0.001 < share < 0.5
    assert found.p_swap == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / 20_000))


def test_with_samples_of_their_own_swapping_is_mcnemars_exact_test():
    a = judged(n=80, runs=1)
    b = judged(n=80, runs=1, seed=4, right=0.8, name="b")
    one, two = (Predictions(p.truth, p.predicted, 3, name=p.name) for p in (a, b))
    exact = mcnemar(a.truth, a.predicted[0], b.predicted[0]).p_exact
    found = compare(one, two, "accuracy", Options(n_resamples=50_000)).p_swap
    assert 0.001 < exact < 0.5
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 50_000))


def test_a_coin_of_a_swap_is_fair():
    coins = draw_swaps(0, np.arange(500), 40)
    assert set(np.unique(coins)) == {0.0, 1.0}
    assert coins.mean() == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize(
    ("only_a", "only_b", "exact", "mid"),
    [
        (
            1,
            7,
            0.0703125,
            0.0390625,
        ),  # Fagerland et al. 2013, table 1 (Bentur et al.): 0.0703, 0.0391
        (0, 5, 0.0625, 0.03125),  # 2 / 2**5, and minus 1 / 2**5
        (3, 3, 1.0, 1 - 20 / 64 / 2),
        (0, 0, 1.0, 1.0),
    ],
)
def test_mcnemar_gives_the_published_and_hand_worked_values(only_a, only_b, exact, mid):
    truth = np.zeros(20, int)
    a, b = truth.copy(), truth.copy()
    b[:only_a] = 1
    a[only_a : only_a + only_b] = 1
    found = mcnemar(truth, a, b)
    assert (found.only_a_right, found.only_b_right, found.n) == (only_a, only_b, 20)
    assert (found.p_exact, found.p_mid) == pytest.approx((exact, mid), abs=1e-12)


def test_mcnemars_exact_p_is_scipys_binomial_test():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, 300)
    for _ in range(5):
        a, b = rng.integers(0, 2, (2, 300))
        found = mcnemar(truth, a, b)
        k, n = found.only_a_right, found.only_a_right + found.only_b_right
        assert found.p_exact == pytest.approx(scipy.stats.binomtest(k, n).pvalue, rel=1e-9)
        assert found.p_mid < found.p_exact


def test_the_mean_of_values_has_the_interval_of_a_loop_over_patients():
    values = np.array([0.9, 0.8, np.nan, 0.5, 0.7, 0.95, 0.6])
    groups = ["a", "a", "a", "b", "b", "c", "d"]
    options = Options(n_resamples=300, method="percentile", seed=2)
    found = interval_of_mean(values, groups, options)
    members = [np.array([0.9, 0.8]), np.array([0.5, 0.7]), np.array([0.95]), np.array([0.6])]
    counts = draw_counts(2, np.arange(300), np.arange(4), 4).astype(int)
    means = [
        np.mean(np.concatenate([np.tile(m, t) for m, t in zip(members, c, strict=True)]))
        for c in counts
    ]
    assert (found.low, found.high) == pytest.approx(
        tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12
    )
    assert found.estimate == pytest.approx(np.nanmean(values))
    assert (found.n, found.n_groups) == (6, 4)


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_any_statistic_of_rows_has_the_interval_that_its_sums_would_give(method):
    values = np.random.default_rng(3).gamma(2, size=40)
    groups = [f"g{i % 11}" for i in range(40)]
    options = Options(n_resamples=200, method=method)
    direct = interval_of(lambda rows: float(values[rows].mean()), 40, groups, options)
    by_sums = interval_of_mean(values, groups, options)
    assert (direct.low, direct.high, direct.se) == pytest.approx(
        (by_sums.low, by_sums.high, by_sums.se)
    )


def test_an_interval_for_auroc_leaves_out_resamples_of_one_class():
    truth = np.array([0] * 9 + [1] * 3)
    values = np.random.default_rng(0).random(12) + 0.5 * truth

    def auroc(rows):
        one_class = len(set(truth[rows])) < 2
        return float("nan") if one_class else float(sk.roc_auc_score(truth[rows], values[rows]))

    found = interval_of(auroc, 12, options=Options(n_resamples=300))
    assert 0 < found.undefined < 15
    assert found.low < found.estimate == pytest.approx(sk.roc_auc_score(truth, values))


def test_where_no_sample_was_wrong_the_interval_says_that_it_says_nothing():
    truth = np.array([0, 1] * 10)
    found = score(Predictions(truth, truth, 2), options=QUICK).interval
    assert (found.low, found.high, found.method) == (1.0, 1.0, "percentile")
    assert "says nothing" in found.caveats[0]


def test_few_groups_and_rare_classes_are_told():
    truth = np.array([0, 0, 1, 1, 0, 1, 2, 2])
    groups = ["a", "b", "a", "b", "c", "c", "d", "d"]
    p = Predictions(truth, [0, 1, 1, 0, 0, 1, 2, 0], 3, groups)
    assert p.groups_of_rarest_class == 1
    told = " ".join(score(p, options=QUICK).interval.caveats)
    assert "4 groups" in told
    assert "1 group(s) only" in told


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Predictions([0, 1], [[0, 1, 1]], 2), "(runs, samples)"),
        (lambda: Predictions([0, 2], [0, 1], 2), "true classes 0 to 2, wanted 0 to 1"),
        (lambda: Predictions([0, 1], [0, -2], 2), "predicted classes -2 to 0, wanted -1 to 1"),
        (lambda: Predictions([0, 1], [0.0, 1.0], 2), "whole class numbers, got float64"),
        (lambda: Predictions([0, 1], [[0, 1], [-1, -1]], 2), "run 1 judged no sample"),
        (lambda: Predictions([], [], 2), "whole class numbers"),
        (lambda: Predictions([0, 1], [0, 1], 2, ["a"]), "1 groups for 2 samples"),
        (
            lambda: score(Predictions([0, 1], [0, 1], 2, ["a", "a"])),
            "is of 1 patient or slide, and",
        ),
        (lambda: score(judged(), "f7"), "no metric 'f7'; there are balanced_accuracy"),
        (lambda: compare(judged(), judged(n=60)), "unpaired comparison of a and a"),
        (lambda: compare(judged(), judged(runs=3, name="b")), "2 and 3 runs"),
        (
            lambda: compare(judged(), Predictions(judged().truth, judged().predicted, 3)),
            "other groups",
        ),
        (lambda: mcnemar([0, 1], [0, 1], [0]), "unpaired comparison"),
        (lambda: interval_of_mean([1.0, np.inf]), "1 of 2 values are infinite"),
        (lambda: interval_of_mean([np.nan, np.nan]), "is of 0 patients or slides, and"),
        (lambda: interval_of(lambda rows: float("nan"), 5), "no value in 2,000 of 2,000"),
        (lambda: interval_of(len, 5, ["a"]), "1 groups for 5 samples"),
    ],
)
def test_what_does_not_belong_together_is_refused_in_a_line(make, says):
    with pytest.raises(PathfmError) as error:
        make()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_runs_that_judged_other_samples_cannot_be_compared():
    a = Predictions([0, 1, 0], [0, 1, -1], 2)
    b = Predictions([0, 1, 0], [0, -1, 1], 2, name="b")
    with pytest.raises(PathfmError, match="their runs judged other samples"):
        compare(a, b)


@pytest.mark.slow
def test_intervals_over_patients_hold_the_truth_as_often_as_they_say_and_those_over_patches_do_not():
    """400 worlds of 40 patients with 20 patches each, whose accuracy differs by patient (mean 0.8)."""
    options = Options(n_resamples=400)
    held = np.zeros(2)
    worlds = 400
    for world in range(worlds):
        rng = np.random.default_rng(world)
        skill = rng.beta(4, 1, 40)  # mean 0.8
        right = rng.random((40, 20)) < skill[:, None]
        truth = np.zeros(800, int)
        predicted = np.where(right.ravel(), 0, 1)
        groups = [f"{patient}" for patient in range(40) for _ in range(20)]
        for place, names in enumerate((groups, [])):
            made = score(Predictions(truth, predicted, 2, names), "accuracy", options).interval
            held[place] += made.low <= 0.8 <= made.high
    assert 0.91 <= held[0] / worlds <= 0.985
    assert held[1] / worlds < 0.75


@pytest.mark.slow
def test_two_equal_models_are_called_different_as_rarely_as_p_says():
    options = Options(n_resamples=400, method="percentile")
    p_values = []
    for world in range(300):
        rng = np.random.default_rng(world)
        skill = rng.beta(4, 1, (30, 1))
        a, b = (np.where(rng.random((30, 10)) < skill, 0, 1).ravel() for _ in range(2))
        groups = [f"{patient}" for patient in range(30) for _ in range(10)]
        truth = np.zeros(300, int)
        one, two = (Predictions(truth, p, 2, groups) for p in (a, b))
        p_values.append(compare(one, two, "accuracy", options).p_swap)
    assert 0.02 <= np.mean(np.array(p_values) <= 0.05) <= 0.085


def test_replicates_come_in_the_order_of_their_numbers():
    few = replicate(lambda c: c[:, 0], np.arange(5), 5, 50, seed=1)
    many = replicate(lambda c: c[:, 0], np.arange(5), 5, 100, seed=1)
    assert np.array_equal(few, many[:50])
