"""MLflow holds every step once: answers lost, servers killed, processes killed, databases locked."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pathfm.tracking import TrackingConfig, open_run, read_metrics, read_runs
from pathfm.tracking.journal import read_state
from tests.mlflow_server import LossyProxy, free_port, kill, start_server
from tests.mlflow_store import new_store
from tests.test_tracking import history, quiet_mlflow

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), quiet_mlflow]

LIVES = """
import json, os, signal, sys, time
from pathlib import Path
from mlflow.tracking import MlflowClient  # once, not in every life
import pathfm.tracking as tracking
from pathfm.tracking.journal import Journal
from pathfm.tracking.shipper import Shipper

uri, folder = sys.argv[1:]
Shipper.interval_s = 0.02
tracking._MAX_METRICS = 7  # of one request: many requests, each of which may be the last


def killing(function, nth):
    seen = [0]

    def call(*arguments):
        done = function(*arguments)
        seen[0] += 1
        if seen[0] == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return done

    return call


def life(where, nth, first, last, run_id):
    if where == "sent":  # the store has the rows, the cursor does not know
        tracking.MlflowStore.send_metrics = killing(tracking.MlflowStore.send_metrics, nth)
    elif where == "moved":  # the cursor does
        Journal.advance = killing(Journal.advance, nth)
    elif where == "cut":  # going on after a checkpoint, the journal cut, nothing done again yet
        Journal.truncate = killing(Journal.truncate, nth)
    config = tracking.TrackingConfig(uri=uri)
    run = tracking.open_run(config, Path(folder), {"a": 1}, run_id=run_id, connect_s=60)
    run.truncate(first - 1)
    for step in range(first, last):
        run.log(step, loss=float(step), **({"rankme": 2.0 * step} if step % 3 == 0 else {}))
        time.sleep(0.02)
    run.summary(loss=1.0, best=3.0)
    run.close(flush_s=100)


for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if not child:
        life(*asked)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_training_process_killed_at_any_point_of_shipping_doubles_and_drops_nothing(
    tmp_path: Path,
) -> None:
    uri, folder = new_store(tmp_path), tmp_path / "r"
    deaths = [("sent", 1), ("sent", 3), ("moved", 2), ("cut", 1), ("sent", 2)]
    words = [sys.executable, "-W", "ignore", "-c", LIVES, uri, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as lives:
        assert lives.stdin is not None
        assert lives.stdout is not None
        for where, nth in [*deaths, ("never", 0)]:
            state = read_state(folder)
            first = max(0, len(read_metrics(folder)) - 4)  # the checkpoint lies four steps back
            run_id = (state.run_id or f"pending-{state.key}") if state else None
            last = 40 if where == "never" else 30
            lives.stdin.write(json.dumps([where, nth, first, last, run_id]) + "\n")
            lives.stdin.flush()
            ended = int(lives.stdout.readline())
            assert ended == (0 if where == "never" else -signal.SIGKILL), where
    (got,) = read_runs(uri, "pathfm")
    assert sorted(history(uri, got.run_id, "loss")) == [(s, float(s)) for s in range(40)]
    rankme = sorted(history(uri, got.run_id, "rankme"))
    assert rankme == [(s, 2.0 * s) for s in range(0, 40, 3)]
    assert got.metrics["best"] == 3.0
    assert [row["step"] for row in read_metrics(folder)] == list(range(40))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The URI of a store, and that of a server over it."""
    folder = tmp_path_factory.mktemp("server")
    uri, port = new_store(folder), free_port()
    process = start_server(uri, port, folder)
    yield uri, f"http://127.0.0.1:{port}"
    kill(process)


@pytest.mark.parametrize("cut", [True, False], ids=["connection closed", "timed out"])
def test_writes_that_landed_unheard_are_sent_once(
    tmp_path: Path, server: tuple[str, str], monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10" if cut else "3")
    uri, experiment = server[0], f"landed {cut}"
    with LossyProxy(server[1], "/log-batch", 3, cut=cut) as proxy:
        config = TrackingConfig(uri=proxy.uri, experiment=experiment)
        run = open_run(config, tmp_path / "r", {"a": 1}, connect_s=60)
        for step in range(40):
            run.log(step, loss=float(step), lr=0.1)
            if step == 20:
                time.sleep(2)
                run.truncate(15)
                for again in range(16, 21):
                    run.log(again, loss=100.0 + again, lr=0.1)
        run.summary(rankme=7.0)
        run.close(flush_s=120)
        sent, lost = proxy.sent, proxy.lost
    assert lost >= 2
    assert {count for pair, count in sent.items() if pair[0] in ("loss", "lr")} == {1}
    (got,) = read_runs(uri, experiment)
    assert [step for step, _ in sorted(history(uri, got.run_id, "loss"))] == list(range(40))
    assert history(uri, got.run_id, "rankme") == [(0, 7.0)]
    assert got.status == "FINISHED"


def test_a_run_made_unheard_is_found_not_made_twice(
    tmp_path: Path, server: tuple[str, str]
) -> None:
    with LossyProxy(server[1], "/runs/create", 100, cut=True) as proxy:
        config = TrackingConfig(uri=proxy.uri, experiment="unheard")
        run = open_run(config, tmp_path / "r", {}, connect_s=60)
        run.log(0, loss=1.0)
        run.close(flush_s=60)
        assert proxy.lost == 1
    (got,) = read_runs(server[0], "unheard")
    assert history(server[0], got.run_id, "loss") == [(0, 1.0)]


def test_a_locked_database_delays_rows_and_neither_drops_nor_doubles_them(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    run = open_run(TrackingConfig(uri=uri), tmp_path / "r", {"a": 1}, connect_s=60)
    run.log(0, loss=0.0)
    time.sleep(2)
    locker = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    locker.execute("BEGIN EXCLUSIVE")
    slowest_s = 0.0
    for step in range(1, 60):
        began_s = time.monotonic()
        run.log(step, loss=float(step))
        slowest_s = max(slowest_s, time.monotonic() - began_s)
        time.sleep(0.13)  # longer in all than SQLite waits for a lock
    locker.execute("ROLLBACK")
    locker.close()
    run.close(flush_s=60)
    assert slowest_s < 2.0
    (got,) = read_runs(uri, "pathfm")
    assert sorted(history(uri, got.run_id, "loss")) == [(s, float(s)) for s in range(60)]


def test_a_value_the_store_refuses_takes_no_other_with_it(tmp_path: Path) -> None:
    uri = new_store(tmp_path)
    run = open_run(TrackingConfig(uri=uri), tmp_path / "r", {}, connect_s=60)
    for step in range(5):
        # a Windows path of a class: MLflow refuses keys that are no normal paths
        run.log(step, loss=float(step), **{"recall/../x": 1.0})
    run.close(flush_s=60)
    (got,) = read_runs(uri, "pathfm")
    assert sorted(history(uri, got.run_id, "loss")) == [(s, float(s)) for s in range(5)]


def test_outages_leave_no_thread_and_no_connection_behind(tmp_path: Path) -> None:
    dead = TrackingConfig(uri=f"http://127.0.0.1:{free_port()}")
    before = threading.active_count()
    run = open_run(dead, tmp_path / "r", {}, connect_s=0.2)
    run.log(0, loss=1.0)
    run.close(flush_s=0.5)
    deadline_s = time.monotonic() + 30
    while threading.active_count() > before and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert threading.active_count() <= before
    assert os.path.getsize(tmp_path / "r" / "metrics.jsonl") > 0
