"""The verb `robustness` against a slow way to the same figures; what is reused; what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from torch import Tensor, nn

from pathfm import robustness
from pathfm.cli import main
from pathfm.compare.reading_robustness import read_robustness
from pathfm.compare.records import Source
from pathfm.config import load_config
from pathfm.corruptions import corrupt, picture_numbers
from pathfm.datasets import open_dataset
from pathfm.datasets.patch_camelyon import FACTS_10SHOT
from pathfm.datasets.sources import assemble
from pathfm.embeddings import Embeddings
from pathfm.measures import balanced_rows, neighbours, site_index
from pathfm.metrics import Standardiser
from pathfm.models import Embedder
from pathfm.probing.orders import draw_shots
from pathfm.robustness import RobustnessConfig, run
from pathfm.robustness.folds import Fold, known_groups, make_folds, open_samples
from pathfm.robustness.judging import Judged, fit_head, flipped, judge
from pathfm.robustness.sites import read_sites
from pathfm.robustness.summing import _errors_of, _group_sums, pooled_errors, summed
from pathfm.runtime import PathfmError
from pathfm.tracking import TrackingConfig
from pathfm.uncertainty import Options
from tests.datasets_mini import MAKERS

QUIET = TrackingConfig(enabled=False)
CASES = [("jpeg", 1), ("jpeg", 5), ("mark", 1), ("mark", 5), ("stain", 1), ("stain", 5)]
_FEW = Options(n_resamples=100)


class Cells(nn.Module):
    """Mean colours of g x g cells: features that tell the made-up classes apart, not too well."""

    def __init__(self, g: int) -> None:
        super().__init__()
        self.g = g

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(x, self.g).flatten(1)


def cells(g: int) -> Embedder:
    network = Cells(g)
    return Embedder(
        network,
        lambda x, _: (network(x), None),
        name=f"cells{g}",
        weights_note="made up",
        digest=f"{g:064}",
        mean=(0.5, 0.4, 0.5),
        std=(0.2, 0.2, 0.2),
    )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Models by number instead of weights; lists how often each made features."""
    asked: list[str] = []

    def load(weights: str, backbone: str, input_px: int) -> Embedder:
        model, real = cells(int(weights)), Embedder.embed_pixels

        def counted(*args: object, **options: object) -> np.ndarray:
            asked.append(weights)
            return real(model, *args, **options)

        model.embed_pixels = counted  # type: ignore[method-assign,assignment]
        return model

    monkeypatch.setattr("pathfm.models.load_model", load)
    return asked


def paint(root: Path, per_class: int = 16, folders: tuple[str, ...] = ("",), px: int = 40) -> Path:
    """Three classes of tinted noise, not square, larger than the input."""
    rng = np.random.default_rng(0)
    for folder in folders:
        for c, tint in enumerate(((20, 0, 20), (0, 0, 0), (0, 20, -20))):
            place = root / folder / "abc"[c]
            place.mkdir(parents=True)
            for i in range(per_class):
                level = 150 + np.array(tint) + rng.normal(0, 18, 3)
                pixels = rng.normal(level, 40, (px, px + 9, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(place / f"{i:02}.png")
    return root


def config(data: Path, out: Path, *models: str, **changes: object) -> RobustnessConfig:
    return RobustnessConfig(
        **{
            "data": str(data),
            "out": out,
            "models": list(models or ("ref=1", "other=2")),
            "corruptions": ["jpeg", "mark", "stain"],
            "severities": [1, 5],
            "input_px": 32,
            "n_splits": 2,
            "threads": 2,
            "batch_size": 7,
            "intervals": _FEW,
            "c_values": (0.01, 1.0),
            "noise_shares": [0.4],
            "tracking": QUIET,
        }
        | changes
    )


def slow_features(data: Path, g: int, case: tuple[str, int] | None) -> np.ndarray:
    """One picture at a time: PIL's resize, the corruption, means of cells in numpy."""
    rows = []
    for path in open_dataset(data).paths:
        stored = Image.open(data / path)
        width = 32 * stored.width // stored.height
        image = stored.resize((width, 32), Image.Resampling.BILINEAR)
        left = round((width - 32) / 2)
        pixels = np.asarray(image)[:, left : left + 32]
        if case is not None:
            pixels = corrupt(pixels[None], *case, picture_numbers([path]), 0)[0]
        x = (pixels / 255 - (0.5, 0.4, 0.5)) / 0.2
        parts = x.reshape(g, 32 // g, g, 32 // g, 3).mean(axis=(1, 3))
        rows.append(parts.transpose(2, 0, 1).ravel())
    return np.array(rows)


def test_errors_are_those_of_scikit_learn_on_pictures_read_one_by_one(
    tmp_path: Path, made: list[str]
) -> None:
    data = paint(tmp_path / "d")
    options = config(data, tmp_path / "out", c_values=(0.1,), noise_shares=[])
    result = run(options)
    folds = make_folds(open_samples(options), options).folds
    labels = open_dataset(data).labels
    for model, g in zip(result.models, (1, 2), strict=True):
        clean = slow_features(data, g, None)
        errors: dict[object, list[float]] = {}
        for case in (None, *CASES):
            shown = slow_features(data, g, case)
            for fold in folds:
                scale = Standardiser.of(clean[fold.final].astype(np.float32))
                head = LogisticRegression(C=0.1, tol=1e-8, max_iter=2000)
                head.fit(scale(clean[fold.final]), labels[fold.final])
                told = head.predict(scale(shown[fold.test]))
                score = balanced_accuracy_score(labels[fold.test], told)
                errors.setdefault(case, []).append(1 - score)
        assert model.clean_error.value == pytest.approx(np.mean(errors[None]), abs=0.04)
        got = np.array([each.errors for each in model.corruptions]).ravel()
        expected = np.array([np.mean(errors[case]) for case in CASES])
        # a picture on the border of two classes is 1/30 of an error in one split
        np.testing.assert_allclose(got, expected, atol=0.04)
        assert np.abs(got - expected).mean() < 0.01
    assert result.models[0].clean_error.value < 0.5


def test_the_file_holds_what_the_papers_formulas_make_of_its_errors(
    tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(paint(tmp_path / "d"), tmp_path / "out", noise_shares=[0.1, 0.2, 0.3, 0.4]))
    saved = json.loads((tmp_path / "out" / "robustness.json").read_text())
    ref, other = saved["models"]
    ce = []
    for ours, theirs in zip(other["corruptions"], ref["corruptions"], strict=True):
        ce.append(100 * sum(ours["errors"]) / sum(theirs["errors"]))
        assert ours["ce"] == pytest.approx(ce[-1])
        rise = sum(theirs["errors"]) - 2 * ref["clean_error"]["value"]
        if rise / 2 >= 0.01:
            grown = sum(ours["errors"]) - 2 * other["clean_error"]["value"]
            assert ours["relative_ce"] == pytest.approx(100 * grown / rise)
        else:
            assert ours["relative_ce"] is None
    assert other["mce"]["value"] == pytest.approx(np.mean(ce))
    assert other["mce"]["low"] < other["mce"]["value"] < other["mce"]["high"]
    assert (ref["mce"]["value"], ref["mce"]["low"], ref["mce"]["high"]) == pytest.approx((100,) * 3)
    every = [error for each in other["corruptions"] for error in each["errors"]]
    assert other["mean_corrupted_error"]["value"] == pytest.approx(np.mean(every))
    assert [noisy["share"] for noisy in other["noisy_labels"]] == [0.1, 0.2, 0.3, 0.4]
    with Image.open(tmp_path / "out" / "robustness.png") as picture:
        assert picture.width > 500
    told = capsys.readouterr().out
    for text in ("reference: ref", "mCE", "0 %", "40 %", "No slide or patient ids"):
        assert text in told


def test_features_are_made_once_and_only_those_that_lack(tmp_path: Path, made: list[str]) -> None:
    data, out = paint(tmp_path / "d", 6), tmp_path / "out"
    first = run(config(data, out))
    assert len(list(out.glob("features/*/*.safetensors"))) == 2 * 7
    made.clear()
    assert run(config(data, out)) == first
    assert made == []
    (out / "features" / "other" / "mark-5.safetensors").unlink()
    assert run(config(data, out)) == first
    assert set(made) == {"2"}
    made.clear()
    again = run(config(data, out, "ref=1", "other=3"))  # another model of that name
    assert set(made) == {"3"}
    assert again.models[0].corruptions == first.models[0].corruptions
    made.clear()
    run(config(data, out, seed=1))  # other strokes, other splits
    assert len(made) > 14


def test_batches_and_threads_change_nothing(tmp_path: Path, made: list[str]) -> None:
    data = paint(tmp_path / "d", per_class=6)
    one = run(config(data, tmp_path / "a", "m=2", batch_size=1, threads=1, noise_shares=[]))
    many = run(config(data, tmp_path / "b", "m=2", batch_size=64, threads=4, noise_shares=[]))
    assert one == many


def test_a_probe_never_looks_at_what_it_is_tested_on(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    features = (rng.normal(size=(90, 5)) + np.eye(5)[labels]).astype(np.float32)
    options = config(tmp_path, tmp_path)
    fold = Fold(np.arange(40), np.arange(40, 60), np.arange(60), np.arange(60, 90))
    spoiled, wrong = features.copy(), labels.copy()
    spoiled[60:], wrong[60:] = 1e6, 0
    a = fit_head(features, labels, fold, 3, options, 0)
    b = fit_head(spoiled, wrong, fold, 3, options, 0)
    np.testing.assert_array_equal(a.weights, b.weights)
    assert a.c == b.c
    np.testing.assert_allclose(a.probabilities(features).sum(axis=1), 1)
    scale = Standardiser.of(features[:60])
    theirs = LogisticRegression(C=a.c, tol=1e-8, max_iter=2000)
    expected = theirs.fit(scale(features[:60]), labels[:60]).predict_proba(scale(features[60:]))
    np.testing.assert_allclose(a.probabilities(features[60:]), expected, atol=2e-3)


def test_wrong_labels_are_for_training_and_choosing_only() -> None:
    labels = np.arange(90) % 3
    fold = Fold(np.arange(40), np.arange(40, 60), np.arange(60), np.arange(60, 90))
    noisy = flipped(labels, fold, 0.3, 3, seed=2, repeat=0)
    assert (noisy[:60] != labels[:60]).sum() == 18
    np.testing.assert_array_equal(noisy[60:], labels[60:])


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
def test_the_share_of_wrong_labels_is_the_share_of_those_fitted_on_and_of_those_that_choose(
    share: float,
) -> None:
    labels, rows = np.arange(120) % 3, np.arange(120)
    for seed in range(10):
        drawn = Fold(rows[:60], rows[60:80], rows[:80], rows[80:])
        wrong = flipped(labels, drawn, share, 3, seed, 0) != labels
        assert wrong[:60].sum() == round(share * 60)
        assert wrong[60:80].sum() == round(share * 20)
        reports = Fold(
            rows[:60], rows[60:], rows[:60], rows[60:]
        )  # validation reports, and chooses
        wrong = flipped(labels, reports, share, 3, seed, 0) != labels
        assert (wrong[:60].sum(), wrong[60:].sum()) == (round(share * 60), 0)


def test_more_wrong_labels_make_more_errors_and_clean_ones_fewest(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    labels = np.arange(600) % 3
    features = (rng.normal(size=(600, 8)) + 1.2 * np.eye(8)[labels]).astype(np.float32)
    options = config(tmp_path, tmp_path, noise_shares=[0.4, 0.6])
    rows = np.arange(600)
    fold = Fold(rows[:240], rows[240:300], rows[:300], rows[300:])
    got = judge(features, [features[300:] * 0], rows[300:], labels, 3, [fold] * 3, options)
    some, more = got.noisy.mean(axis=0)  # over three draws of the wrong labels
    assert got.error[0, 0] < some < more
    assert got.error[0, 1] == pytest.approx(2 / 3)  # one class is told of every blank picture
    np.testing.assert_array_equal(got.times, 3)


# --- sums and intervals -----------------------------------------------------------------------------


def some_judged(seed: int, m: int = 60, cases: int = 7) -> Judged:
    rng = np.random.default_rng(seed)
    times = np.random.default_rng(0).integers(1, 4, m)
    right = rng.binomial(times[:, None], rng.uniform(0.3, 0.9, cases), (m, cases))
    none = np.zeros((1, 0))
    return Judged(right, times, none, none, none, ())


def test_a_resample_is_the_errors_of_its_groups_repeated() -> None:
    labels = np.arange(60) % 3
    groups = [f"patient {i % 11}" for i in range(60)]
    a, b = some_judged(1), some_judged(2)
    sums = _group_sums(a, b, labels, groups, 3, 3)
    counts = np.random.default_rng(5).multinomial(11, np.full(11, 1 / 11), 4).astype(float)
    got = _errors_of(counts @ sums.sums, 3, 3)
    names = sorted(set(groups))
    for i, row in enumerate(counts):
        rows = [
            j
            for g, n in zip(names, row, strict=True)
            for _ in range(int(n))
            for j in range(60)
            if groups[j] == g
        ]
        for each, judged in zip(got, (a, b), strict=True):
            whole = pooled_errors(judged.right[rows], judged.times[rows], labels[rows], 3)
            expected = [whole[0], *whole[1:].reshape(3, 2).mean(axis=1)]
            np.testing.assert_allclose(each[0, i], expected)


def test_intervals_are_about_the_figures_told_and_widen_with_larger_groups() -> None:
    labels = np.arange(60) % 3
    a, b = some_judged(1), some_judged(2)
    alone = summed(a, b, labels, 3, (), 3, Options())
    assert alone.mce_interval is not None
    assert alone.clean_interval is not None
    assert alone.unnormalised_interval is not None
    assert alone.mce_interval.estimate == pytest.approx(alone.ce.mce)
    assert alone.clean_interval.estimate == pytest.approx(alone.clean)
    assert alone.unnormalised_interval.estimate == pytest.approx(alone.ce.unnormalised)
    if alone.relative_interval is not None:
        assert alone.relative_interval.estimate == pytest.approx(alone.ce.relative_mce)
    twice = [np.repeat(x, 9, axis=0) for x in (a.right, a.times, b.right, b.times, labels)]
    many = [replace(a, right=twice[0], times=twice[1]), replace(b, right=twice[2], times=twice[3])]
    groups = tuple(str(i // 9) for i in range(540))
    grouped = summed(many[0], many[1], twice[4], 3, groups, 3, Options())
    assert grouped.mce_interval is not None
    # nine copies of a picture in one group are worth one picture
    assert grouped.mce_interval.se == pytest.approx(alone.mce_interval.se, rel=0.1)


def test_a_ratio_whose_denominator_can_vanish_has_no_interval_and_says_so() -> None:
    labels = np.arange(60) % 3
    a, b = some_judged(1), some_judged(2)
    right = b.right.copy()
    right[:, 1:] = right[:, :1]  # damage does nothing to the reference ...
    right[np.flatnonzero(right[:, 0])[:4], 1:] = 0  # ... but for four pictures
    got = summed(a, replace(b, right=right), labels, 3, (), 3, Options())
    assert got.ce.relative_used.all()
    assert got.relative_interval is None
    assert got.mce_interval is not None
    assert [why.partition(":")[0] for why in got.no_interval] == ["relative mCE"]


def test_a_reference_that_never_errs_leaves_no_mce_and_says_so(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = paint(tmp_path / "d", per_class=8)
    real = judge

    def perfect(*args: object, **options: object) -> Judged:
        judged = real(*args, **options)
        return replace(judged, right=np.repeat(judged.times[:, None], 7, axis=1))

    monkeypatch.setattr(robustness, "judge", perfect)
    result = run(config(data, tmp_path / "out", noise_shares=[]))
    assert result.models[1].mce is None
    assert any(note.startswith("mCE leaves out jpeg, mark, stain") for note in result.caveats)


# --- splits, groups and sites -----------------------------------------------------------------------


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, in one line."""
    return " ".join(capsys.readouterr().out.split())


def test_a_folder_with_splits_is_fitted_on_train_and_reports_test(
    tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = paint(tmp_path / "d", 5, ("train", "val", "test"))
    options = config(data, tmp_path / "out", "m=2", noise_shares=[])
    samples = open_samples(options)
    plan = make_folds(samples, options)
    (fold,) = plan.folds
    assert (plan.selected_on, plan.reported_on) == ("val", "test")
    for rows, name in (
        (fold.fit, "train"),
        (fold.final, "train"),
        (fold.choose, "val"),
        (fold.test, "test"),
    ):
        assert {samples.splits[row] for row in rows} == {name}
    result = run(options)
    assert (result.n_splits, result.sizes) == (1, [[15, 15]])
    shown = told(capsys)
    assert "15 train, val chose C / 15 test (reported), its own split" in shown
    assert "95 % intervals over 15 pictures, each taken as a patient" in shown
    assert result.models[0].clean_error.sd is None


def test_a_set_without_a_test_split_says_that_validation_reports(
    tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = paint(tmp_path / "d", 5, ("train", "val"))
    result = run(config(data, tmp_path / "out", "m=2", noise_shares=[]))
    assert "no test split" in result.caveats[0]
    saved = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert (saved["selected_on"], saved["reported_on"]) == ("val", "val")
    assert "15 train / 15 val (chose C and reports), its own split" in told(capsys)
    assert "validation selects and reports" in compared(tmp_path / "out" / "robustness.json")


def test_splits_of_unequal_groups_tell_the_range_of_their_sizes_and_who_was_drawn(
    tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = paint(tmp_path / "d", 16)
    cuts = np.searchsorted([1, 3, 7, 12], np.arange(16), side="right")  # five patients of 1 to 5
    lines = [f"{path},{path[0]} {cuts[i % 16]}" for i, path in enumerate(open_dataset(data).paths)]
    (data / "groups.csv").write_text("\n".join(["path,group", *lines]) + "\n")
    options = config(data, tmp_path / "out", "m=2", noise_shares=[], n_splits=5)
    result = run(options)
    folds = make_folds(open_samples(options), options).folds
    assert result.sizes == [[len(fold.final), len(fold.test)] for fold in folds]
    tested = [size[1] for size in result.sizes]
    assert min(tested) < max(tested)
    shown = told(capsys)
    assert f"/ {min(tested)} to {max(tested)} test (reported)" in shown
    assert "a part of it chose C" in shown
    assert f"95 % intervals over {result.n_groups} patients or slides" in shown


def compared(path: Path) -> str:
    """What `compare` says above the table of a result."""
    source = Source("robustness.json", path.read_bytes(), "a run")
    (one,) = read_robustness(source).robustness
    return one.told


def test_a_set_without_a_val_split_chooses_on_a_part_of_train_and_never_on_test(
    tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = paint(tmp_path / "d", 10, ("train", "test"))
    options = config(data, tmp_path / "out", "m=2", noise_shares=[])
    samples = open_samples(options)
    (fold,) = make_folds(samples, options).folds
    assert {samples.splits[row] for row in fold.test} == {"test"}
    assert {samples.splits[row] for row in fold.choose} == {"train"}
    assert not set(fold.choose.tolist()) & set(fold.fit.tolist())
    assert fold.final.tolist() == samples.rows("train").tolist()
    result = run(options)
    assert (result.selected_on, result.reported_on) == ("train", "test")
    assert "a part of it chose C, as it has no val / 30 test (reported)" in told(capsys)
    assert "a part of train selects, test reports" in compared(tmp_path / "out" / "robustness.json")


def test_what_cannot_be_fitted_or_judged_is_refused_before_a_feature_is_made(
    tmp_path: Path, made: list[str]
) -> None:
    """A class without training pictures; one class to choose by; one class to report."""
    names = [f"{'abc'[i % 3]}/{i}.png" for i in range(30)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((40, 40, 3), len(name), np.uint8)).save(tmp_path / name)
    for lacking, split, message in (
        ("c", "train", "class 2 of 3 has no sample in train"),
        ("bc", "val", "val has samples of one class"),
        ("ab", "test", "test has samples of one class"),
    ):
        splits = ["train" if i < 15 else "val" if i < 24 else "test" for i in range(30)]
        rows = zip(names, splits, strict=True)
        kept = [f"{n},{n[0]},{s}" for n, s in rows if not (s == split and n[0] in lacking)]
        table = tmp_path / f"{split}.csv"
        table.write_text("\n".join(["path,label,split", *kept]) + "\n")
        with pytest.raises(PathfmError, match=message):
            run(config(table, tmp_path / "out", "m=2"))
    assert made == []
    assert not (tmp_path / "out").exists()


def test_a_set_trained_on_few_shots_is_fitted_on_those_that_probe_draws(tmp_path: Path) -> None:
    n = 120
    splits = ["train"] * 60 + ["val"] * 30 + ["test"] * 30
    labels = np.arange(n) % 2
    names = [str(i) for i in range(n)]
    samples = assemble(FACTS_10SHOT, tmp_path, names, labels.tolist(), splits, [""] * n)
    plan = make_folds(samples, config(tmp_path, tmp_path, n_splits=3))
    assert (len(plan.folds), plan.shots, plan.selected_on) == (3, 10, "val")
    for repeat, fold in enumerate(plan.folds):
        drawn = draw_shots(samples.rows("train"), labels, 10, 0, repeat)
        assert fold.fit.tolist() == fold.final.tolist() == sorted(drawn.tolist())
        assert np.bincount(labels[fold.fit]).tolist() == [10, 10]
        assert fold.choose.tolist() == list(range(60, 90))
        assert fold.test.tolist() == list(range(90, 120))
    few = samples.subset(np.r_[0:14, 60:120])
    with pytest.raises(PathfmError, match="fewer than the 10"):
        make_folds(few, config(tmp_path, tmp_path))


def test_few_pictures_of_each_class_are_the_same_few_in_any_company(tmp_path: Path) -> None:
    data = paint(tmp_path / "d", 9)
    few = open_samples(config(data, tmp_path, per_class=4))
    assert np.bincount(few.labels).tolist() == [4, 4, 4]
    assert few.paths == open_samples(config(data, tmp_path, per_class=4)).paths
    assert few.paths != open_samples(config(data, tmp_path, per_class=4, seed=1)).paths
    assert known_groups(few) == ()
    some = replace(few, groups=("p", "", "", *few.groups[3:]))
    assert len(set(known_groups(some))) == 12


def test_the_site_index_is_of_the_features_on_disk(
    tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    data = paint(tmp_path / "d", 8)
    paths = open_dataset(data).paths
    rows = [f"{path},hospital {i % 2},slide {i % 6}" for i, path in enumerate(paths)]
    table = tmp_path / "sites.csv"
    table.write_text("\n".join(["path,site,slide", *rows]) + "\n")
    result = run(config(data, tmp_path / "out", sites=table, k=3, noise_shares=[]))
    saved = Embeddings.load(tmp_path / "out" / "features" / "other" / "clean.safetensors")
    nearest = neighbours(saved.features, [f"slide {i % 6}" for i in range(24)])
    expected = site_index(nearest, saved.labels, [f"hospital {i % 2}" for i in range(24)], 3)
    site = result.models[1].site
    assert site is not None
    assert (site.index, site.k) == (expected.index, 3)
    assert 0 < site.index < 1
    assert site.n == 24
    assert "site index: 24 pictures" in capsys.readouterr().out


def test_the_site_index_is_of_as_many_pictures_of_each_class_from_each_site(
    tmp_path: Path, made: list[str]
) -> None:
    data = paint(tmp_path / "d", 8)
    paths = open_dataset(data).paths
    sites = [
        f"hospital {i % 8 // 6}" for i in range(24)
    ]  # six of each class from one, two from the other
    table = tmp_path / "sites.csv"
    table.write_text(
        "\n".join(["path,site", *map(",".join, zip(paths, sites, strict=True))]) + "\n"
    )
    result = run(config(data, tmp_path / "out", "m=2", sites=table, k=3, noise_shares=[]))
    saved = Embeddings.load(tmp_path / "out" / "features" / "m" / "clean.safetensors")
    kept = balanced_rows(saved.labels, sites, 0)
    near = neighbours(saved.features[kept])
    expected = site_index(near, saved.labels[kept], [sites[i] for i in kept], 3)
    site = result.models[0].site
    assert site is not None
    assert (site.n, site.index) == (12, expected.index)
    assert site.chance == pytest.approx(1 / 3)
    table.write_text(
        table.read_text()
        .replace("c/06.png,hospital 1", "c/06.png,hospital 0")
        .replace("c/07.png,hospital 1", "c/07.png,hospital 0")
    )
    with pytest.raises(PathfmError, match="class 2 has no picture from hospital 1"):
        run(config(data, tmp_path / "refused", "m=2", sites=table, noise_shares=[]))
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("path,where\n", "columns path and site"),
        ("path,site\na/0.png,x\n", r"1 of 2 pictures have no site, first a/1\.png"),
        ("path,site,slide\na/0.png,x,\na/1.png,x,s\n", "no slide"),
        (b"path,site\n\xff,x\n", "UTF-8"),
        ("path,site\na/0.png," + "x" * 200_000 + "\n", "is no CSV"),
    ],
)
def test_a_table_of_sites_that_does_not_fit_is_told(tmp_path: Path, text, message: str) -> None:
    table = tmp_path / "sites.csv"
    if text is not None:
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PathfmError, match=message) as caught:
        read_sites(table, ["a/0.png", "a/1.png"])
    assert "\n" not in str(caught.value)


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "imagenet"], "NAME=WEIGHTS"),
        (["--models", "a/b=imagenet"], "NAME=WEIGHTS"),
        (["--models", "a=random", "a=imagenet"], "two are called 'a'"),
        (["--models", "a=random", "--corruptions", "jpg"], "did you mean 'jpeg'"),
        (["--models", "a=random", "--corruptions", "jpeg", "jpeg"], "one twice"),
        (["--models", "a=random", "--severities", "0"], "0 is none of"),
        (["--models", "a=random", "--noise_shares", "1.5"], "between 0 and 1"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["robustness", "--data", "nowhere", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_slides_and_masks_are_not_corrupted(tmp_path: Path) -> None:
    root = MAKERS["consep"](tmp_path / "consep")
    options = config(tmp_path, tmp_path / "out").model_copy(update={"data": f"consep={root}"})
    with pytest.raises(PathfmError, match=r"consep|CoNSeP"):
        open_samples(options)


def test_features_that_are_not_finite_stop_the_run_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = paint(tmp_path / "d", 4), cells(2)
    model.embed_pixels = lambda x, **_: np.full((len(x), 3), np.nan, np.float32)  # type: ignore[method-assign,assignment]
    monkeypatch.setattr("pathfm.models.load_model", lambda *_: model)
    with pytest.raises(PathfmError, match=r"'m'.*not finite"):
        run(config(data, tmp_path / "out", "m=2"))


def test_damaged_pictures_are_counted_and_named(tmp_path: Path, made: list[str]) -> None:
    data = paint(tmp_path / "d", 5)
    for name in ("a/04", "b/02", "c/00"):
        (data / f"{name}.png").write_bytes(b"no picture")
    with pytest.raises(PathfmError, match=r"3 of 1\d pictures .*a/04\.png.*b/02\.png.*c/00\.png"):
        run(config(data, tmp_path / "out", "m=2", batch_size=4))


def test_the_saved_config_repeats_the_run(tmp_path: Path, made: list[str]) -> None:
    options = config(paint(tmp_path / "d", 6), tmp_path / "out", "m=2")
    run(options)
    assert load_config(RobustnessConfig, tmp_path / "out" / "robustness.yaml") == options


def test_a_run_is_recorded_with_its_errors_by_severity(tmp_path: Path, made: list[str]) -> None:
    options = config(paint(tmp_path / "d", 6), tmp_path / "out", "m=2")
    result = run(options)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    found = {row["step"]: row["m/error/mark"] for row in rows if "m/error/mark" in row}
    assert found == dict(zip([1, 5], result.models[0].corruptions[1].errors, strict=True))


@pytest.mark.slow
def test_a_vision_transformer_of_timm_goes_all_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(1)
    data = paint(tmp_path / "d", 5)
    words = ["--models", "ref=random", "same=random", "--backbone", "vit_tiny_patch16_224"]
    words += [
        "--input_px",
        "32",
        "--c_values",
        "0.1",
        "--corruptions",
        "jpeg",
        "bubble",
        "--n_splits",
        "1",
    ]
    words += ["--out", str(tmp_path / "out"), "--tracking.enabled", "false"]
    assert main(["robustness", "--data", str(data), *words]) == 0
    saved = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert saved["models"][1]["mce"]["value"] == pytest.approx(100)  # the same weights twice
    assert "compare mCE within this table only" in capsys.readouterr().out
