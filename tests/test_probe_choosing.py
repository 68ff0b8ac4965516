"""Who chooses, who reports, and what the table says of both: no test row ever chooses anything."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.neighbors import NearestNeighbors

from pathfm import metrics
from pathfm import probe as verb
from pathfm.cli import main
from pathfm.embeddings import Embeddings
from pathfm.metrics import knn_shares
from pathfm.probe import ProbeConfig, run
from pathfm.probing.files import read_predictions
from pathfm.runtime import PathfmError
from tests.test_metrics import blobs
from tests.test_probe import QUIET, made_up
from tests.test_probe_protocols import with_splits


def config(*files: Path, **changes: object) -> ProbeConfig:
    return ProbeConfig(embeddings=list(files), **{"tracking": QUIET, "n_seeds": 2, **changes})


def test_a_test_without_validation_reports_and_never_chooses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_splits("train", "train", "test", noise=3.0)
    groups = tuple(f"p{i // 6}" for i in range(240))
    data = replace(data, groups=groups)
    turned, test = data.labels.copy(), np.array(data.splits) == "test"
    turned[test] = (turned[test] + 1) % 3
    found = []
    for name, labels in (("a", data.labels), ("b", turned)):
        replace(data, labels=labels).save(tmp_path / name / "init.safetensors")
        found.append(run(config(tmp_path / name, out=tmp_path / name / "p")))
    assert (found[0].reported_on, found[0].carved, found[0].n_test) == ("test", True, 80)
    assert found[0].selected_on == "train"
    assert found[0].n_train + found[0].n_val == 160
    assert found[0].sizes == [[160, 80]]  # chosen on a fifth, then fitted on both
    assert found[0].backbones[0].probes["logistic"].c == found[1].backbones[0].probes["logistic"].c
    made = [read_predictions(tmp_path / n / "p/predictions/init.safetensors") for n in "ab"]
    for probe in ("logistic", "knn"):
        np.testing.assert_array_equal(made[0][probe].predicted, made[1][probe].predicted)
    out = capsys.readouterr().out
    assert "val (chooses; cut out of its train, as it has none) / 80 test (reported)" in out
    assert "validation chose" not in out


def test_more_neighbours_than_training_pictures_are_refused_with_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up(n=100).save(tmp_path / "init.safetensors")
    words = [str(tmp_path / "init.safetensors"), "--tracking.enabled", "False", "--n_seeds", "2"]
    words += ["--c_values", "0.1", "--out", str(tmp_path / "p")]
    train = 100 - run(config(tmp_path / "init.safetensors", out=tmp_path / "q")).n_test
    assert main(["probe", "--embeddings", *words, "--k", "500"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: kNN of k = 500 neighbours, but only ")
    assert f"only {train} training pictures" in told
    assert "--k 20" in told
    assert told.count("\n") == 1
    assert main(["probe", "--embeddings", *words, "--k", str(train + 1)]) == 2
    assert not (tmp_path / "p").exists()
    assert main(["probe", "--embeddings", *words, "--k", str(train)]) == 0
    own = with_splits("train", "val", "test")
    own.save(tmp_path / "own.safetensors")  # there validation does not vote
    voting = own.splits.count("train")
    with pytest.raises(PathfmError, match=f"only {voting} training pictures"):
        run(config(tmp_path / "own.safetensors", out=tmp_path / "r", k=voting + 1))


def test_a_default_k_beyond_the_training_pictures_is_told(tmp_path: Path) -> None:
    made_up(n=24).save(tmp_path / "init.safetensors")
    result = run(config(tmp_path / "init.safetensors", out=tmp_path / "p", c_values=(0.1,)))
    told = f"k = 20 neighbours, but only {24 - result.n_test} training pictures"
    assert len([caveat for caveat in result.caveats if told in caveat]) == 1


def test_sizes_that_differ_by_split_are_told_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [3, 5, 8, 13, 21, 34, 40, 30, 20, 16, 27, 23]
    groups = tuple(f"p{i:02}" for i, n in enumerate(sizes) for _ in range(n))
    replace(made_up(), groups=groups).save(tmp_path / "init.safetensors")
    result = run(config(tmp_path / "init.safetensors", out=tmp_path / "p", n_seeds=5))
    made = read_predictions(tmp_path / "p" / "predictions" / "init.safetensors")["knn"]
    tested = (made.predicted >= 0).sum(axis=1).tolist()
    assert [size[1] for size in result.sizes] == tested
    assert [sum(size) for size in result.sizes] == [240] * 5
    assert len(set(tested)) > 1
    out = capsys.readouterr().out
    assert f"/ {min(tested)} to {max(tested)} test (reported)" in out
    assert f"[95 % interval over {made.n_groups} patients or slides]" in " ".join(out.split())


def test_of_pictures_without_groups_the_table_says_that_each_is_taken_as_a_patient(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_splits("train", "val", "test").save(tmp_path / "init.safetensors")
    run(config(tmp_path / "init.safetensors", out=tmp_path / "p"))
    told = " ".join(capsys.readouterr().out.split())
    assert "mean, [95 % interval over 80 pictures, each taken as a patient]" in told


def test_one_repeat_is_judged_by_its_interval_and_by_mcnemar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_splits("train", "val", "test").save(tmp_path / "e" / "init.safetensors")
    with_splits("train", "val", "test", name="worse", noise=9.0).save(
        tmp_path / "e" / "w.safetensors"
    )
    with_splits("train", "val", "test", name="near", noise=2.1).save(
        tmp_path / "e" / "x.safetensors"
    )
    result = run(config(tmp_path / "e", out=tmp_path / "p"))
    pairs = {(p.other, p.probe): p for p in result.paired}
    assert not pairs["worse", "knn"].no_worse
    near = pairs["near", "knn"]
    assert near.no_worse == (near.interval is not None and near.interval[1] >= 0)
    a, b = (
        read_predictions(tmp_path / "p" / "predictions" / f"{n}.safetensors")["knn"]
        for n in ("init", "worse")
    )
    rows = a.predicted[0] >= 0
    right = [(m.predicted[0] == m.truth)[rows] for m in (a, b)]
    only_a, only_b = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    expected = 2 * binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)
    assert pairs["worse", "knn"].mcnemar_p == pytest.approx(expected)
    out = capsys.readouterr().out
    assert "worse no worse than init (knn): NO" in out
    assert "McNemar's exact p" in out
    grouped = tuple(f"p{i // 4}" for i in range(240))
    for path in (tmp_path / "e").glob("*"):
        replace(Embeddings.load(path), groups=grouped).save(path)
    again = run(config(tmp_path / "e", out=tmp_path / "q"))
    assert all(p.mcnemar_p is None for p in again.paired)  # of patches it would say too much


def test_a_class_that_is_not_reported_has_no_recall_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_splits("train", "val", "test")
    splits = np.array(data.splits)
    splits[(splits == "test") & (data.labels == 1)] = ""
    replace(data, splits=tuple(splits.tolist())).save(tmp_path / "init.safetensors")
    result = run(config(tmp_path / "init.safetensors", out=tmp_path / "p"))
    assert result.backbones[0].probes["knn"].recall[1] is None
    assert (
        "No picture of b is reported: balanced accuracy is over the other classes."
        in result.caveats
    )
    assert " - │" in capsys.readouterr().out.split("recall of each class")[1]


def test_a_rerun_takes_nothing_for_done_whose_files_are_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up().save(tmp_path / "init.safetensors")
    options = config(tmp_path / "init.safetensors", out=tmp_path / "p")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(verb, "record_backbone", killed)
        with pytest.raises(KeyboardInterrupt):
            run(options)
    assert not (tmp_path / "p" / "probe.json").exists()  # it is a sign that all else is there
    first = run(options)
    (tmp_path / "p" / "predictions" / "init.safetensors").unlink()
    capsys.readouterr()
    assert run(options) == first
    assert "up to date" not in capsys.readouterr().out
    assert (tmp_path / "p" / "predictions" / "init.safetensors").exists()


@pytest.mark.parametrize("cosines", [1, 50, 1 << 23])
def test_of_equally_near_neighbours_the_first_count_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, cosines: int
) -> None:
    monkeypatch.setattr(metrics, "_BLOCK_COSINES", cosines)
    train = np.repeat(np.eye(3), 20, axis=0)  # rows 0..19 alike, and so on
    labels = np.array([0] * 4 + [1] * 16 + [2] * 40)
    got = knn_shares(train, labels, np.eye(3)[:1], 5, 3)
    np.testing.assert_allclose(got, [[0.8, 0.2, 0]])  # rows 0 to 4
    some = np.array([[1.0, 1.0]] * 6 + [[1.0, 0.0]] * 2)  # two are nearest, six alike after them
    got = knn_shares(some, np.array([0, 0, 1, 1, 1, 1, 2, 2]), np.array([[1.0, 0.0]]), 4, 3)
    np.testing.assert_allclose(got, [[0.5, 0, 0.5]])
    x, y = blobs(200, 8, 3, seed=2)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    near = NearestNeighbors(n_neighbors=9).fit(unit[:150]).kneighbors(unit[150:])[1]
    expected = np.stack([(y[near] == c).mean(axis=1) for c in range(3)], axis=1)
    np.testing.assert_allclose(knn_shares(x[:150], y[:150], x[150:], 9, 3), expected, atol=1e-6)


def test_rankme_of_many_rows_is_that_of_evenly_spaced_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(100, 6))
    assert metrics.rankme_of_some(x) == metrics.rankme(x)
    monkeypatch.setattr(metrics, "RANKED_ROWS", 34)
    assert metrics.rankme_of_some(x) == metrics.rankme(x[::3])
