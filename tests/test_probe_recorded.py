"""What MLflow holds of a probing: the verb's run, backbones below it, repeats below these; pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathfm.embeddings import Embeddings
from pathfm.probe import ProbeConfig, run
from pathfm.probing import recording
from pathfm.probing.matrices import draw_matrices
from pathfm.probing.scoring import Scores
from pathfm.tracking import TrackingConfig, make_client, read_runs
from tests.mlflow_store import new_store
from tests.test_probe import made_up
from tests.test_probe_protocols import SHORT, with_splits


def scores_with(confusion: np.ndarray) -> Scores:
    return Scores([0.5, 0.7], 0.6, 0.1, [0.5], confusion.tolist(), [])


@pytest.mark.slow
def test_repeats_are_runs_below_their_backbone_with_curves_scores_and_the_features(
    tmp_path: Path,
) -> None:
    data = with_splits("train", "val")
    data.save(tmp_path / "e" / "init.safetensors")
    store = new_store(tmp_path / "store")
    tracking = TrackingConfig(uri=store)
    options = {"also": ("eva", "few-shot"), "shots": (1, 4), "resamples": 3, "eva": SHORT}
    result = run(
        ProbeConfig(embeddings=[tmp_path / "e"], out=tmp_path / "p", tracking=tracking, **options)
    )
    records = {record.name: record for record in read_runs(store, "pathfm")}
    assert set(records) == {"probe", "probe init", *(f"probe init, run {i}" for i in range(3))}
    key = Embeddings.load(tmp_path / "e" / "init.safetensors").info.key
    assert records["probe"].tags["embeddings.init.key"] == key
    child = records["probe init"]
    assert child.parent_id == records["probe"].run_id
    assert {
        "eva.mean",
        "eva.low",
        "eva.high",
        "eva.ece",
        "few-shot.simpleshot",
        "eva.run2.val",
    } <= set(child.metrics)
    assert child.params["eva.n_steps"] == "60"
    assert child.tags["embeddings.path"] == str(tmp_path / "e" / "init.safetensors")
    listed = [item.path for item in make_client(store).list_artifacts(child.run_id, "pictures")]
    assert listed == ["pictures/init.png"]
    scores = result.backbones[0].probes["eva"]
    for repeat in range(3):
        one = records[f"probe init, run {repeat}"]
        assert one.parent_id == child.run_id
        assert one.tags["embeddings.key"] == key
        assert one.metrics["eva.balanced_accuracy"] == pytest.approx(scores.values[repeat])
        assert one.metrics["eva.ece"] == pytest.approx(scores.ece[repeat])
        assert {"eva.loss", "eva.val", "eva.MulticlassAUROC"} <= set(one.metrics)
        assert float(one.params["eva.learning_rate"]) == scores.learning_rate
    # without splits of its own the plain probes have one repeat here, which is run 0
    assert "logistic.c" in records["probe init, run 0"].params
    assert "logistic.c" not in records["probe init, run 1"].params


def test_seeds_are_recorded_apart_without_eva_s_heads_and_only_so_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MOST_RUNS", 2)
    made_up().save(tmp_path / "init.safetensors")
    options = {"n_seeds": 3, "tracking": TrackingConfig(enabled=False)}
    result = run(
        ProbeConfig(embeddings=[tmp_path / "init.safetensors"], out=tmp_path / "p", **options)
    )
    folder = tmp_path / "p" / "tracking" / "init"
    assert sorted(path.name for path in folder.glob("run-*")) == ["run-0", "run-1"]
    tasks = [
        json.loads(line)
        for line in (folder / "run-1/tracking_tasks.jsonl").read_text().splitlines()
    ]
    told = {k: v for task in tasks if task["do"] == "summary" for k, v in task["metrics"].items()}
    knn = result.backbones[0].probes["knn"]
    assert told["knn.balanced_accuracy"] == knn.values[1]
    assert told["knn.ece"] == knn.ece[1]


def test_below_a_run_that_no_store_has_answered_for_nobody_is_waited_for() -> None:
    class Parent:
        run_id = "pending-1234"

    below = recording._below(TrackingConfig(uri="http://127.0.0.1:9"), Parent(), "child")  # type: ignore[arg-type]
    assert not below.enabled
    assert (below.run_name, below.parent_run_id) == ("child", "pending-1234")


@pytest.mark.parametrize("n", [3, 30])
def test_matrices_are_drawn_for_few_and_for_many_classes(tmp_path: Path, n: int) -> None:
    rng = np.random.default_rng(0)
    table = rng.integers(0, 60, (n, n)) + 900 * np.eye(n, dtype=int)
    table[0] = 0  # a class that does not occur
    names = [f"class with a $long$ name {i}" for i in range(n)]
    made = scores_with(table)
    path = draw_matrices("mine", {"logistic": made, "knn": made}, names, tmp_path / "a.png")
    with Image.open(path) as picture:
        width, height = picture.size
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert 300 < height < 1400
    assert width > 1.2 * height
    blue = (pixels[..., 2] - pixels[..., 0] > 60).mean()
    assert 0.005 < blue < 0.5  # diagonals are dark, the rest is not
