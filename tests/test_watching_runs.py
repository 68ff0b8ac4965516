"""Whole runs that are watched: one that collapses by its settings, one with a probe in MLflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pathfm.pretrain import run
from pathfm.tracking import read_metrics, read_runs
from tests.mlflow_store import new_store
from tests.pretraining import config
from tests.test_tracking import history, quiet_mlflow

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# no centre worth the name and a sharp teacher that follows at once: one prototype takes all
ONE_TARGET: dict[str, Any] = {
    "center_momentum": 0.9999,
    "teacher_temp": 0.02,
    "warmup_teacher_temp": 0.02,
    "ema": [0.9, 0.9],
}
# a teacher as flat as can be: every target uniform
FLAT: dict[str, Any] = {"teacher_temp": 1.0, "warmup_teacher_temp": 1.0, "ema": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("settings", "rules"),
    [
        (ONE_TARGET, {"one_target", "no_information"}),
        (FLAT, {"flat_target", "no_information"}),
    ],
)
def test_a_run_that_collapses_says_so_while_it_goes_on(
    small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings, rules
) -> None:
    heads = {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16}
    watch = {"every_steps": 10, "curves": False, "collapse": {"patience_steps": 10}}
    wanted = config(
        small_corpus,
        tmp_path,
        steps=50,
        batch_size=8,
        checkpoint_every_steps=1000,
        dino=heads | settings,
        optim={"warmup_steps": 2, "lr": 3e-3},
        watch=watch,
    )
    assert run(wanted).finished  # said, not stopped
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 10 <= summary["collapsed_at_step"] < 50
    lines = [line for line in capsys.readouterr().out.splitlines() if "WARNING collapse" in line]
    said = {line.split("(")[1].split(")")[0] for line in lines}
    assert rules <= said
    assert len(lines) == len(said)  # each once
    tasks = (tmp_path / "tracking_tasks.jsonl").read_text()
    assert all(f"collapse.{rule}" in tasks for rule in rules)
    assert "collapsed_at_step" in tasks


@quiet_mlflow
def test_in_mlflow_a_run_is_the_parent_of_its_probe_and_both_hold_every_step_once(
    small_corpus: Path, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    for number, name in enumerate("ab"):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        for i in range(14):
            pixels = rng.integers(90 * number, 90 * number + 90, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "labelled" / name / f"{i}.png")
    uri = new_store(tmp_path)
    watch = {
        "every_steps": 2,
        "probe_folder": tmp_path / "labelled",
        "probe_every_steps": 3,
        "probe_px": 32,
    }
    out = tmp_path / "run"
    settings = {"watch": watch, "tracking": {"uri": uri, "run_name": "mine"}}
    assert not run(config(small_corpus, out, stop_after_steps=4, **settings)).finished
    assert run(config(small_corpus, out, **settings)).finished
    runs = {found.name: found for found in read_runs(uri, "pathfm")}
    parent, child = runs["mine"], runs["mine probe"]
    assert len(runs) == 2
    assert child.parent_id == parent.run_id
    assert (parent.status, child.status) == ("FINISHED", "FINISHED")
    assert sorted(step for step, _ in history(uri, parent.run_id, "loss")) == list(range(6))
    assert sorted(step for step, _ in history(uri, parent.run_id, "rankme")) == [1, 3, 5]
    assert sorted(step for step, _ in history(uri, child.run_id, "probe_knn")) == [0, 3, 6]
    assert child.params["probe_k"] == "20"
    assert child.tags["cohort.evaluation"] == "labelled"
    assert [row["step"] for row in read_metrics(out / "probe")] == [0, 3, 6]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["probe_logistic_end"] == child.metrics["probe_logistic"]
    assert (out / "pictures" / "curves.png").stat().st_size > 1000
