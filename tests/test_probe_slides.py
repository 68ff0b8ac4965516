"""The verb `probe-slides`: what it prints, writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pathfm import cli
from pathfm.probe_slides import ProbeSlidesConfig, run
from pathfm.slide_probe import Bags
from pathfm.slide_probe.abmil import AbMil
from pathfm.slide_probe.fit import SlideProtocol
from pathfm.slide_probe.runs import probe_bags
from pathfm.tracking import TrackingConfig
from tests.test_slide_probe import some_bags, write_bags

OFF = TrackingConfig(enabled=False)


def config(folder: Path, **changes: object) -> ProbeSlidesConfig:
    given = {
        "bags": [folder / "vit"],
        "labels": str(folder / "vit" / "slides.csv"),
        "out": folder / "out",
        "n_runs": 2,
        "max_epochs": 2,
        "tracking": OFF,
        "device": "cpu",
    }
    return ProbeSlidesConfig(**given | changes)  # type: ignore[arg-type]


def test_own_splits_are_reported_on_test_with_both_poolings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bags(tmp_path / "vit", some_bags(48, 2))
    result = run(config(tmp_path))
    said = capsys.readouterr().out
    assert "48 slides, 2 classes, 12 reported: test (val chose the epoch)" in said
    assert [(m.name, m.protocol, len(m.values)) for m in result.models] == [
        ("vit", "abmil", 2),
        ("vit", "mean", 2),
    ]
    held = json.loads((tmp_path / "out" / "slide_probe.json").read_text())
    assert held["models"][0]["values"] == result.models[0].values
    eva = json.loads((tmp_path / "out" / "vit.abmil.results.json").read_text())["metrics"]
    stated = eva["test"][0]["test/BinaryBalancedAccuracy"]
    assert stated["values"] == result.models[0].values
    assert stated["stdev"] == pytest.approx(np.std(stated["values"], ddof=1))
    with np.load(tmp_path / "out" / "vit.abmil.predictions.npz", allow_pickle=False) as found:
        judged = found["predicted"][0] >= 0
        right = found["predicted"][0, judged] == found["truth"][judged]
        recall = [right[found["truth"][judged] == c].mean() for c in (0, 1)]
        truth, judged = found["truth"], found["predicted"] >= 0
        both = [
            np.mean(
                [
                    (p[j & (truth == c)] == c).mean()
                    for p, j in zip(found["predicted"], judged, strict=True)
                ]
            )
            for c in (0, 1)
        ]
    assert np.mean(recall) == pytest.approx(result.models[0].values[0])
    assert list(result.models[0].per_class.values()) == pytest.approx(both)
    assert result.models[0].backbone_digest == "digest"
    assert result.models[0].parameters == sum(p.numel() for p in AbMil(12, 1).parameters())
    run(config(tmp_path))
    assert "is up to date" in capsys.readouterr().out
    run(config(tmp_path, seed=1))
    assert "is up to date" not in capsys.readouterr().out


def test_folds_report_every_slide_once_a_run_and_keep_patients_together(tmp_path: Path) -> None:
    bags = some_bags(36, 2)
    found = probe_bags(bags, SlideProtocol(max_epochs=2), n_runs=2, n_folds=3)
    assert found.n == 36
    assert (found.predicted >= 0).all()
    assert found.interval.n_groups == 18
    assert found.told.startswith("3 folds by patient")
    assert found.interval.low <= found.mean <= found.interval.high


def test_mean_pooling_of_bags_is_mean_pooling_of_their_means() -> None:
    bags = some_bags(36, 3)
    reads: list[int] = []

    def source(i: int) -> np.ndarray:
        reads.append(i)
        return bags.read(i)

    told = Bags(bags.slides, bags.labels, bags.classes, bags.dim, source, bags.patients)
    found = probe_bags(told, SlideProtocol(pooling="mean", max_epochs=3, lr=0.1), 1, n_folds=3)
    assert reads == list(range(36))  # each bag is read once, not once an epoch
    assert found.n == 36


def test_two_models_on_the_same_slides_stand_in_one_table(tmp_path: Path) -> None:
    bags = some_bags(48, 2)
    write_bags(tmp_path / "vit", bags)
    write_bags(tmp_path / "other", bags)
    folders = [tmp_path / "vit", tmp_path / "other" / "h5_files"]
    result = run(config(tmp_path, bags=folders, poolings=("mean",)))
    assert [m.name for m in result.models] == ["vit", "other"]
    assert result.models[0].values == result.models[1].values
    assert result.paired[0].told.startswith("other minus vit, mean: +0.0 [0.0, 0.0] points, p 1")
    one = write_bags(tmp_path / "noise", some_bags(48, 2, signal=0.0))
    result = run(config(tmp_path, bags=[tmp_path / "vit", one.parent], poolings=("mean",), lr=0.1))
    (pair,) = result.paired
    assert pair.mean == pytest.approx(result.models[1].mean - result.models[0].mean)
    assert pair.interval[0] <= pair.mean <= pair.interval[1]


def test_mistakes_are_one_line_and_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_bags(tmp_path / "vit", some_bags(8, 2))

    def told(*words: str) -> str:
        given = ["probe-slides", "--bags", str(tmp_path / "vit"), "--labels", str(table)]
        code = cli.main(
            [*given, "--out", str(tmp_path / "o"), *words, "--tracking.enabled", "false"]
        )
        error = capsys.readouterr().err.strip()
        assert code == 2
        assert "\n" not in error
        return error

    assert "n_folds = 9 with 4 patients" in told("--n_folds", "9", "--n_runs", "1")
    text = table.read_text()
    table.write_text(text.replace(",train", ",").replace(",val", ",").replace(",test", ","))
    assert "has no splits: add a column split, or give --n_folds" in told()
    table.write_text(text)
    assert "no bags (*.h5)" in told("--bags", str(tmp_path))
    assert "two folders of bags have one name" in told(
        "--bags", str(tmp_path / "vit"), str(tmp_path / "vit" / "h5_files")
    )
    assert "pooling" in told("--poolings", "max")
