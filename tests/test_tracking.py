"""Runs reach MLflow whole, whatever the store does meanwhile; the journal is the truth."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from pathfm.runtime import PathfmError, without_secrets
from pathfm.tracking import (
    Run,
    Shipper,
    TrackingConfig,
    make_client,
    open_run,
    read_metrics,
    read_runs,
    replay,
    sqlite_file,
    ui_command,
)
from pathfm.tracking.journal import METRICS, Journal, read_state
from tests.mlflow_server import free_port, kill, start_server
from tests.mlflow_store import new_store

quiet_mlflow = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
OFF = TrackingConfig(enabled=False)


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    client = make_client(uri)
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


def test_rows_are_on_disk_at_once_and_need_no_store(tmp_path: Path) -> None:
    with open_run(OFF, tmp_path, {"lr": 1}) as run:
        run.log(0, loss=2.5)
        assert read_metrics(tmp_path)[0]["loss"] == 2.5  # before closing
        run.log(1, loss=2.25, lr=0.5)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1]


def test_a_torn_last_line_is_dropped_and_never_glued_to_the_next(tmp_path: Path) -> None:
    with open_run(OFF, tmp_path, {}) as run:
        run.log(0, loss=1.0)
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b'{"step": 1, "lo')  # what kill -9 leaves
    with open_run(OFF, tmp_path, {}, run_id=run.run_id) as resumed:
        resumed.log(1, loss=0.5)
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(0, 1.0), (1, 0.5)]


def test_truncate_drops_later_rows_and_remade_rows_keep_their_time(tmp_path: Path) -> None:
    run = Run(OFF, Journal(tmp_path))
    for step in range(6):
        run.log(step, loss=float(step))
    before = read_metrics(tmp_path)
    run.truncate(2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    for step in range(3, 6):
        run.log(step, loss=float(step))
    assert read_metrics(tmp_path) == before


def test_truncation_between_reading_and_acknowledging_skips_no_row(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for step in range(5):
        journal.append_metrics(step, {"loss": 0.0})
    on_its_way = journal.unshipped(METRICS, 100)
    journal.truncate(1)
    journal.append_metrics(2, {"loss": 9.0})
    journal.advance(on_its_way, 5)  # the answer comes late
    waiting = journal.unshipped(METRICS, 100).rows
    assert [row["step"] for row in waiting] == [0, 1, 2]


def test_a_new_run_in_an_old_folder_sets_the_old_rows_aside(tmp_path: Path) -> None:
    with open_run(OFF, tmp_path, {}) as first:
        first.log(0, loss=1.0)
    with open_run(OFF, tmp_path, {}) as second:
        second.log(0, loss=2.0)
    assert [row["loss"] for row in read_metrics(tmp_path)] == [2.0]
    (kept,) = (tmp_path / "previous_runs").iterdir()
    assert [row["loss"] for row in read_metrics(kept)] == [1.0]


def test_a_copied_folder_is_a_run_of_its_own_and_a_moved_one_is_not(tmp_path: Path) -> None:
    uri, first, second = new_store(tmp_path), tmp_path / "first", tmp_path / "second"

    def life(folder: Path, run_id: str | None, step: int) -> str:
        with open_run(TrackingConfig(uri=uri), folder, {"a": 1}, run_id=run_id) as run:
            run.log(step, loss=float(step))
        return run.run_id

    original = life(first, None, 0)
    shutil.copytree(first, second)
    copied = life(second, original, 1)  # the checkpoint in it names the first run
    assert copied != original
    assert life(second, original, 2) == copied
    assert life(first, original, 5) == original
    moved = first.rename(tmp_path / "moved")
    assert life(moved, original, 6) == original
    (tmp_path / "link").symlink_to(moved)
    assert life(tmp_path / "link", original, 7) == original
    third = tmp_path / "third"
    shutil.copytree(second, third)
    assert replay(third) == 0  # looks, and goes on with nothing
    assert life(third, original, 9) not in (copied, original)
    assert len(read_runs(uri, "pathfm")) == 3
    assert {step for step, _ in history(uri, original, "loss")} == {0, 5, 6, 7}
    assert {step for step, _ in history(uri, copied, "loss")} == {0, 1, 2}
    names = {run.run_id: run.name for run in read_runs(uri, "pathfm")}
    assert (names[original], names[copied]) == ("moved", "second")


def test_a_copy_that_goes_back_to_its_checkpoint_holds_its_own_values(tmp_path: Path) -> None:
    uri, first, copied = new_store(tmp_path), tmp_path / "first", tmp_path / "copied"
    picture = tmp_path / "a.png"
    picture.write_bytes(b"png")
    with open_run(TrackingConfig(uri=uri), first, {"a": 1}) as run:
        run.picture(picture)
        for step in range(10):
            run.log(step, loss=float(step))
    shutil.copytree(first, copied)
    with open_run(TrackingConfig(uri=uri), copied, {"a": 1}, None, run.run_id, last_step=4) as own:
        for step in range(5, 8):
            own.log(step, loss=100.0 + step)
    assert sorted(history(uri, own.run_id, "loss")) == [
        *((step, float(step)) for step in range(5)),
        *((step, 100.0 + step) for step in range(5, 8)),
    ]
    assert len(history(uri, run.run_id, "loss")) == 10
    assert make_client(uri).list_artifacts(run.run_id)
    assert not make_client(uri).list_artifacts(own.run_id)


@pytest.mark.parametrize("odd", ['{"folder": 3}', '{"copied_from": null}', "[null, 1]", "{}", "x"])
def test_an_odd_state_file_is_none(tmp_path: Path, odd: str) -> None:
    (tmp_path / "tracking.json").write_text(
        odd.replace("{", '{"key": "k", ', 1) if '{"' in odd else odd
    )
    assert read_state(tmp_path) is None
    (tmp_path / "tracking.json").unlink()
    os.mkfifo(tmp_path / "tracking.json")
    assert read_state(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://key:secret@bucket/a?X-Amz-Signature=9", "s3://bucket/a"),
        ("see https://u@h:8/p?t=1#f and gs://b/c", "see https://h:8/p and gs://b/c"),
        ("postgresql://me:p@ss@db/x", "postgresql://db/x"),
        ("a@b.c plain text? yes", "a@b.c plain text? yes"),
    ],
)
def test_secrets_are_cut_out_of_uris(text: str, clean: str) -> None:
    assert without_secrets(text) == clean


def test_nothing_secret_reaches_the_disk(tmp_path: Path) -> None:
    params = {"uri": "https://u:pw1@h/x?sig=pw2", "http": {"token": "pw3"}, "tokens": 196}
    with open_run(OFF, tmp_path, params) as run:
        run.tag("source", "s3://a:pw4@b/c")
    text = "".join(path.read_text() for path in tmp_path.glob("*.json*"))
    assert "pw" not in text.replace("pathfm", "")


def test_bad_stores_and_names_are_refused_clearly(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use sqlite"):
        TrackingConfig(uri="file:///tmp/mlruns")
    with pytest.raises(PathfmError, match="metric name"):
        Run(OFF, Journal(tmp_path)).log(0, **{"a\nb": 1.0})
    with pytest.raises(PathfmError, match="no MLflow store at"):
        read_runs(f"sqlite:///{tmp_path}/none.db", "pathfm")
    assert not (tmp_path / "none.db").exists()
    with pytest.raises(PathfmError, match="not the folder of a run"):
        replay(tmp_path / "nowhere")


@pytest.mark.slow
@quiet_mlflow
def test_parent_and_child_arrive_with_everything_they_were_told(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    picture = tmp_path / "picture.jpg"
    picture.write_bytes(b"jpeg")
    with open_run(
        TrackingConfig(uri=uri, run_name="parent"), tmp_path / "p", {"seed": 0}
    ) as parent:
        config = TrackingConfig(uri=uri, parent_run_id=parent.run_id)
        with open_run(
            config, tmp_path / "c", {"optim": {"lr": 5e-4}}, {"stage": "pretrain"}
        ) as child:
            for step in range(1500):  # more than one log_batch holds
                child.log(step, loss=1 / (1 + step), lr=0.1)
            child.summary(rankme=131.0)
            child.cohort("wsi", "d" * 64)
            child.picture(picture)
            child.artifact(tmp_path / "gone.txt")  # must not block what follows
            child.checkpoint(tmp_path / "checkpoints" / "00010", "abc")
    runs = {run.name: run for run in read_runs(uri, "pathfm")}
    got = runs["c"]
    assert got.parent_id == runs["parent"].run_id
    assert (got.status, runs["parent"].status) == ("FINISHED", "FINISHED")
    assert got.params == {"optim.lr": "0.0005"}
    assert got.metrics["rankme"] == 131.0
    assert got.tags["checkpoint.digest"] == "abc"
    assert got.tags["cohort.training.digest"] == "d" * 64
    assert got.tags["mlflow.source.git.commit"]
    assert [step for step, _ in history(uri, got.run_id, "loss")] == list(range(1500))
    client = make_client(uri)
    inputs = client.get_run(got.run_id).inputs
    assert inputs is not None
    assert inputs.dataset_inputs[0].dataset.digest == "d" * 36
    assert [f.path for f in client.list_artifacts(got.run_id, "pictures")] == [
        "pictures/picture.jpg"
    ]


@pytest.mark.slow
@quiet_mlflow
def test_a_resumed_run_is_the_same_run_without_doubled_points(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    config = TrackingConfig(uri=uri)
    run = open_run(config, tmp_path / "r", {"lr": 1})
    for step in range(8):
        run.log(step, loss=float(step))
    run.__exit__(RuntimeError, RuntimeError("killed"), None)
    assert read_runs(uri, "pathfm")[0].status == "FAILED"
    with open_run(config, tmp_path / "r", {"lr": 2, "new": 3}, run_id=run.run_id) as again:
        again.truncate(4)
        for step in range(5, 10):
            again.log(step, loss=float(step))
    (got,) = read_runs(uri, "pathfm")
    assert got.status == "FINISHED"
    assert got.params == {"lr": "1", "new": "3"}
    assert got.tags["param_changed.lr"] == "2"
    assert sorted(history(uri, got.run_id, "loss")) == [(s, float(s)) for s in range(10)]


@pytest.mark.slow
@quiet_mlflow
def test_an_unreachable_server_costs_bounded_time_and_the_rows_are_replayed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dead = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}")
    began_s = time.monotonic()
    run = open_run(dead, tmp_path / "r", {"a": 1}, connect_s=0.5)
    for step in range(200):
        run.log(step, loss=float(step))
    run.close(flush_s=1.0)
    assert time.monotonic() - began_s < 6
    assert run.run_id.startswith("pending-")
    assert "kept in" in caplog.text
    uri = new_store(tmp_path)
    assert replay(tmp_path / "r", uri) >= 200
    (got,) = read_runs(uri, "pathfm")
    assert len(history(uri, got.run_id, "loss")) == 200
    assert (got.params, got.status) == ({"a": "1"}, "FINISHED")
    assert replay(tmp_path / "r", uri) == 0


@pytest.mark.slow
@quiet_mlflow
def test_a_replay_ships_to_the_place_the_run_was_opened_for(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    with open_run(TrackingConfig(uri=uri, experiment="mine"), tmp_path / "p", {}) as parent:
        pass
    wanted = TrackingConfig(
        uri=uri, experiment="mine", run_name="child", parent_run_id=parent.run_id
    )
    journal = Journal(tmp_path / "c")
    Shipper(wanted, journal)  # and killed before its thread reached the store
    journal.append_metrics(0, {"loss": 1.0})
    assert replay(tmp_path / "c") == 1
    (child,) = [run for run in read_runs(uri, "mine") if run.name == "child"]
    assert (child.parent_id, child.metrics) == (parent.run_id, {"loss": 1.0})


@pytest.mark.slow
@quiet_mlflow
def test_a_replay_leaves_a_run_with_the_status_of_its_own_end(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    folder = tmp_path / "r"
    with open_run(TrackingConfig(uri=uri), folder, {}) as run:
        run.log(0, loss=1.0)
    before = make_client(uri).get_run(run.run_id).info
    assert replay(folder) == 0
    after = make_client(uri).get_run(run.run_id).info
    assert (after.status, after.end_time) == ("FINISHED", before.end_time)
    Journal(folder, run.run_id, goes_on=False).append_metrics(1, {"loss": 0.5})
    assert replay(folder) == 1  # its end had been shipped
    after = make_client(uri).get_run(run.run_id).info
    assert (after.status, after.end_time) == ("FINISHED", before.end_time)
    Journal(folder, run.run_id, goes_on=False).append_task("tags", tags={"a": "b"})
    assert replay(folder) == 1  # resumed, and killed before it ended
    assert make_client(uri).get_run(run.run_id).info.status == "RUNNING"


def test_a_replay_to_nobody_knows_where_is_refused(tmp_path: Path) -> None:
    with open_run(OFF, tmp_path, {}) as run:
        run.log(0, loss=1.0)
    with pytest.raises(PathfmError, match="give --uri"):
        replay(tmp_path)


def test_a_hash_in_a_path_is_part_of_it() -> None:
    assert sqlite_file("sqlite:////a/b#1/c.db") == Path("/a/b#1/c.db")
    assert sqlite_file("http://h/x.db") is None


@pytest.mark.slow
@quiet_mlflow
def test_a_server_killed_in_mid_run_and_restarted_gets_every_row(tmp_path: Path) -> None:
    uri, port = new_store(tmp_path), free_port()
    server = start_server(uri, port, tmp_path)
    try:
        config = TrackingConfig(uri=f"http://127.0.0.1:{port}")
        run = open_run(config, tmp_path / "r", {"a": 1}, connect_s=60)
        assert not run.run_id.startswith("pending-")
        slowest_s = 0.0
        for step in range(900):
            if step == 300:
                kill(server)
            if step == 600:
                server = start_server(uri, port, tmp_path)
            began_s = time.monotonic()
            run.log(step, loss=float(step), bad=float("nan"))
            slowest_s = max(slowest_s, time.monotonic() - began_s)
            time.sleep(0.005)
        run.close(flush_s=60)
    finally:
        kill(server)
    assert slowest_s < 1.0  # training never waits
    (got,) = read_runs(uri, "pathfm")
    assert sorted(history(uri, got.run_id, "loss")) == [(s, float(s)) for s in range(900)]
    assert got.status == "FINISHED"


def test_the_command_for_the_ui_names_the_store_without_secrets() -> None:
    assert ui_command("sqlite:////a/b.db") == "mlflow ui --backend-store-uri sqlite:////a/b.db"
    assert "pw" not in ui_command("https://u:pw@h:5000")


def test_the_state_file_is_small_json(tmp_path: Path) -> None:
    Journal(tmp_path)
    assert json.loads((tmp_path / "tracking.json").read_text())["metrics_bytes"] == 0
