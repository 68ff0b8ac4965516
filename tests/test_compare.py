"""Runs side by side: children under parents, only what differs, and no store made by looking."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pathfm.compare import CompareConfig, as_tree, by_stage, differing_params, find_store, run
from pathfm.compare.runs import listed, told_apart
from pathfm.runtime import PathfmError
from pathfm.tracking import RunRecord, TrackingConfig, open_run
from tests.mlflow_store import new_store

quiet_mlflow = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def record(run_id: str, parent: str | None = None, **more: dict[str, object]) -> RunRecord:
    return RunRecord(
        run_id=run_id,
        name=run_id,
        parent_id=parent,
        status="FINISHED",
        start_ms=0,
        params=more.get("params", {}),  # type: ignore[arg-type]
        metrics=more.get("metrics", {}),  # type: ignore[arg-type]
        tags=more.get("tags", {}),  # type: ignore[arg-type]
    )


def test_children_stand_under_their_parents_and_orphans_at_the_top() -> None:
    runs = [record("a"), record("orphan", "gone"), record("b", "a"), record("c", "b")]
    assert [(d, r.run_id) for d, r in as_tree(runs)] == [
        (0, "a"),
        (1, "b"),
        (2, "c"),
        (0, "orphan"),
    ]


def test_single_repeats_of_a_probe_are_not_listed() -> None:
    stages = {
        "a": "probe",
        "b": "probe of a backbone",
        "c": "probe, one run",
        "d": "probe, one run",
    }
    runs = [record(run_id, tags={"stage": stage}) for run_id, stage in stages.items()]
    assert [r.run_id for r in listed([*runs, record("e")])] == ["a", "b", "e"]


def test_only_params_that_differ_are_shown() -> None:
    runs = [
        record("a", params={"lr": "1", "seed": "0", "tracking.uri": "x"}),
        record("b", params={"lr": "2", "seed": "0", "tracking.uri": "y", "new": "1"}),
    ]
    assert differing_params(runs) == ["lr", "new"]


def test_the_newest_runs_of_a_stage_are_compared() -> None:
    runs = [record(f"r{i}", tags={"stage": "probe"}, metrics={"m": float(i)}) for i in range(9)] + [
        record("index", tags={"stage": "index"})
    ]
    (part,) = by_stage(runs, CompareConfig(newest=3))
    assert [r.run_id for r in part.runs] == ["r6", "r7", "r8"]
    assert part.metrics == ["m"]


def test_runs_of_one_name_are_told_apart_by_their_parents() -> None:
    cells = [record("a-s0"), record("b-s0")]
    trained = [replace(record(f"t{cell.name}", cell.run_id), name="pretrain") for cell in cells]
    other = record("own", "gone")
    found = told_apart([*trained, other], [*cells, *trained, other])
    assert found == ["a-s0/pretrain", "b-s0/pretrain", "own"]
    orphans = [replace(run, parent_id="gone") for run in trained]
    assert told_apart(orphans, orphans) == ["pretrain", "pretrain"]


def test_a_store_is_found_nearby_and_its_absence_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(PathfmError, match=r"no mlflow\.db in"):
        find_store(None, tmp_path)
    (tmp_path / "demo_out").mkdir()
    (tmp_path / "demo_out" / "mlflow.db").touch()
    assert find_store(None, tmp_path) == f"sqlite:///{tmp_path}/demo_out/mlflow.db"
    study = tmp_path / "runs" / "studies" / "initialisation"
    study.mkdir(parents=True)
    (study / "mlflow.db").touch()
    os.utime(study / "mlflow.db", (2e9, 2e9))
    assert find_store(None, tmp_path) == f"sqlite:///{study}/mlflow.db"
    assert find_store("x/y.db") == f"sqlite:///{Path.cwd()}/x/y.db"
    with pytest.raises(PathfmError, match="no MLflow store at"):
        run(CompareConfig(uri=str(tmp_path / "none.db")))
    assert not (tmp_path / "none.db").exists()


@pytest.mark.slow
@quiet_mlflow
def test_two_runs_are_printed_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = new_store(tmp_path)
    with open_run(TrackingConfig(uri=uri), tmp_path / "demo", {}) as parent:
        for lr in (0.25, 0.125):
            config = TrackingConfig(uri=uri, parent_run_id=parent.run_id, run_name=f"lr [{lr}]")
            tags = {"stage": "pretrain"}
            with open_run(config, tmp_path / str(lr), {"lr": lr, "same": 1}, tags) as child:
                child.log(0, loss=lr * 2)
    result = run(CompareConfig(uri=uri))
    assert [depth for depth, _ in result.tree] == [0, 1, 1]
    out = capsys.readouterr().out
    assert "└ lr [0.25]" in out  # not taken for rich markup
    assert "same" not in out
    assert f"mlflow ui --backend-store-uri {uri}" in out
    with pytest.raises(PathfmError, match="it has: pathfm"):
        run(CompareConfig(uri=uri, experiment="typo"))
