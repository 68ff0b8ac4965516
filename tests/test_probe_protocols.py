"""The verb with all protocols: on a data set's own splits and on drawn ones, its files and records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from sklearn.metrics import balanced_accuracy_score

from pathfm.cli import main
from pathfm.embeddings import Embeddings
from pathfm.probe import EvaConfig, ProbeConfig, run
from pathfm.probing.files import read_predictions
from pathfm.runtime import PathfmError
from pathfm.tracking import TrackingConfig
from tests.test_probe import made_up

QUIET = TrackingConfig(enabled=False)
SHORT = EvaConfig(learning_rates=(1e-3, 1e-2), n_runs=3, n_steps=60, batch_size=64)


def with_splits(*names: str, n: int = 240, name: str = "init", noise: float = 2.0) -> Embeddings:
    shares = np.resize(np.array(names), n)
    return replace(made_up(name, noise=noise, n=n), splits=tuple(shares.tolist()))


def config(folder: Path, **changes: object) -> ProbeConfig:
    told = {
        "also": ("eva", "few-shot"),
        "shots": (1, 4),
        "resamples": 3,
        "eva": SHORT,
        "tracking": QUIET,
    }
    return ProbeConfig(embeddings=[folder / "e"], out=folder / "p", **{**told, **changes})


def test_own_splits_are_used_once_and_their_test_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_splits("train", "train", "val", "test")
    data.save(tmp_path / "e" / "init.safetensors")
    result = run(config(tmp_path))
    assert (result.n_train, result.n_val, result.n_test, result.reported_on) == (
        120,
        60,
        60,
        "test",
    )
    probes = result.backbones[0].probes
    assert len(probes["logistic"].values) == len(probes["knn"].values) == 1
    assert len(probes["eva"].values) == 3
    assert probes["eva"].learning_rate in (1e-3, 1e-2)
    assert sum(map(sum, probes["eva"].confusion)) == 3 * 60
    out = capsys.readouterr().out
    assert "120 train / 60 val (chooses) / 60 test (reported), its own split" in out
    assert "few-shot" in out
    assert "optimistic" not in out


def test_test_labels_and_features_change_nothing_that_is_chosen(tmp_path: Path) -> None:
    data = with_splits("train", "train", "val", "test")
    turned = data.labels.copy()
    test = np.array(data.splits) == "test"
    turned[test] = (turned[test] + 1) % 3
    found = []
    for i, labels in enumerate((data.labels, turned)):
        folder = tmp_path / str(i)
        replace(data, labels=labels).save(folder / "e" / "init.safetensors")
        found.append(run(config(folder)).backbones[0])
    for probe in ("logistic", "eva"):
        a, b = (one.probes[probe] for one in found)
        assert (a.c, a.learning_rate) == (b.c, b.learning_rate)
        assert a.values != b.values
    kept = [read_predictions(tmp_path / str(i) / "p/predictions/init.safetensors") for i in (0, 1)]
    for probe in ("logistic", "knn", "eva"):
        np.testing.assert_array_equal(kept[0][probe].predicted, kept[1][probe].predicted)


def test_without_a_test_split_validation_reports_and_the_table_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_splits("train", "val").save(tmp_path / "e" / "init.safetensors")
    result = run(config(tmp_path))
    assert (result.selected_on, result.reported_on) == ("val", "val")
    out = capsys.readouterr().out
    assert "120 val (chooses and reports)" in out
    assert "validation chose" in out


def test_results_json_has_evas_keys_and_the_runs_of_the_chosen_rate(tmp_path: Path) -> None:
    data = with_splits("train", "train", "val", "test")
    data.save(tmp_path / "e" / "init.safetensors")
    result = run(config(tmp_path))
    saved = json.loads((tmp_path / "p/eva/init/results.json").read_text())
    names = ("AUROC", "Accuracy", "F1Score", "Precision", "Recall")
    for stage in ("val", "test"):
        (metrics,) = saved["metrics"][stage]
        assert set(metrics) == {f"{stage}/AverageLoss", *(f"{stage}/Multiclass{n}" for n in names)}
        assert all(set(m) == {"mean", "stdev", "values"} for m in metrics.values())
    own = result.backbones[0].probes["eva"].values
    assert saved["metrics"]["test"][0]["test/MulticlassAccuracy"]["values"] == pytest.approx(own)


def test_every_prediction_is_kept_and_gives_the_scores_again(tmp_path: Path) -> None:
    made_up().save(tmp_path / "e" / "init.safetensors")
    result = run(config(tmp_path, n_seeds=2))
    found = read_predictions(tmp_path / "p/predictions/init.safetensors")
    assert {name: made.runs for name, made in found.items()} == {"logistic": 2, "knn": 2, "eva": 3}
    for name, made in found.items():
        for predicted, value in zip(
            made.predicted, result.backbones[0].probes[name].values, strict=True
        ):
            judged = predicted >= 0
            assert judged.sum() == result.n_test
            again = balanced_accuracy_score(made.truth[judged], predicted[judged])
            assert value == pytest.approx(again)
    with pytest.raises(PathfmError, match="no predictions at"):
        read_predictions(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(PathfmError, match="no predictions of pathfm"):
        read_predictions(tmp_path / "bad.safetensors")


def test_two_backbones_are_paired_in_every_probe_with_an_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for data in (
        with_splits("train", "val", "test"),
        with_splits("train", "val", "test", name="b"),
    ):
        data.save(tmp_path / "e" / f"{data.info.name}.safetensors")
    worse = with_splits("train", "val", "test", name="worse", noise=9.0)
    worse.save(tmp_path / "e" / "worse.safetensors")
    result = run(config(tmp_path, also=("eva",)))
    pairs = {(p.other, p.probe): p for p in result.paired}
    assert set(pairs) == {(o, p) for o in ("b", "worse") for p in ("logistic", "knn", "eva")}
    same, bad = pairs["b", "eva"], pairs["worse", "eva"]
    assert same.differences == [0.0] * 3  # the same heads and batches
    assert same.p == pytest.approx(1.0)
    assert bad.interval[1] < 0
    assert bad.p is not None and bad.p < 0.01
    assert "95 % interval" in capsys.readouterr().out


def test_backbones_with_other_labels_or_splits_are_not_compared(tmp_path: Path) -> None:
    with_splits("train", "val").save(tmp_path / "e" / "a.safetensors")
    with_splits("val", "train", name="b").save(tmp_path / "e" / "b.safetensors")
    with pytest.raises(PathfmError, match="their splits differ"):
        run(config(tmp_path))


@pytest.mark.parametrize(
    ("splits", "change", "message"),
    [
        (("train", "val"), {"shots": (1, 500)}, "fewer than the 500 shots"),
        (
            ("train", "val"),
            {"eva": EvaConfig(n_steps=1, batch_size=2)},
            "before the first validation",
        ),
        (("train",), {}, "no row is in val"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    tmp_path: Path, splits: tuple[str, ...], change: dict, message: str
) -> None:
    with_splits(*splits).save(tmp_path / "e" / "init.safetensors")
    with pytest.raises(PathfmError, match=message):
        run(config(tmp_path, **change))


def test_labels_of_one_class_are_refused(tmp_path: Path) -> None:
    data = with_splits("train", "val")
    replace(data, labels=np.zeros_like(data.labels)).save(tmp_path / "e" / "init.safetensors")
    with pytest.raises(PathfmError, match="class 1, 2 of 3 has no sample in train"):
        run(config(tmp_path))


def test_learning_rates_given_twice_are_refused_where_they_are_read() -> None:
    with pytest.raises(ValidationError, match="each once"):
        ProbeConfig(embeddings=[Path("x")], eva=EvaConfig(learning_rates=(0.1, 0.1)))


def test_default_shots_that_a_class_cannot_give_are_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_splits("train", "val", "test")
    splits = np.array(data.splits)
    ones = np.flatnonzero((splits == "train") & (data.labels == 1))
    splits[ones[11:]] = ""
    data = replace(data, splits=tuple(splits.tolist()), classes=("a", "tumour", "c"))
    data.save(tmp_path / "init.safetensors")
    words = [
        "probe",
        "--embeddings",
        str(tmp_path / "init.safetensors"),
        "--tracking.enabled",
        "False",
    ]
    words += ["--out", str(tmp_path / "p"), "--c_values", "0.1", "--resamples", "2", "--k", "5"]
    words += ["--also", "few-shot"]
    assert main(words) == 0
    told = "Few-shot leaves out 16, 32, 64 samples a class: class tumour has 11 training samples."
    out = capsys.readouterr().out
    assert f"note: {told}" in " ".join(out.split())
    saved = json.loads((tmp_path / "p" / "probe.json").read_text())
    assert saved["caveats"].count(told) == 1
    assert saved["backbones"][0]["few_shot"]["logistic"]["shots"] == [1, 2, 4, 8]
    assert main(["probe", str(tmp_path / "p" / "probe.yaml")]) == 0
    assert "up to date" in capsys.readouterr().out
    assert main([*words, "--shots", "1", "2", "4", "8", "16"]) == 2
    refused = capsys.readouterr().err
    assert refused == (
        "error: class tumour has 11 training samples, fewer than the 16 shots asked for: "
        "use --shots 1 2 4 8\n"
    )
    assert main([*words, "--shots", "1", "2", "4", "8"]) == 0
