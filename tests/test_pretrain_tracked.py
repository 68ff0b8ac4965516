"""A pretraining run killed again and again, and its MLflow server with it: every step is there once."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pathfm.pretrain import run
from pathfm.runtime import save_config
from pathfm.tracking import read_metrics, read_runs
from tests.lives import Nursery
from tests.mlflow_server import free_port, kill, start_server
from tests.mlflow_store import new_store
from tests.pretraining import assert_same_run, config
from tests.test_tracking import history, quiet_mlflow

KILLS = 20
STEPS = 200  # 2.5 before each kill in the mean, and room for those that come late on a busy machine
SERVER_DEATHS = {4: "between two steps", 9: "between two lives", 15: "between two steps"}


@pytest.mark.slow
@pytest.mark.timeout(600)
@quiet_mlflow
def test_twenty_kills_of_the_run_and_three_of_the_server_leave_every_step_once(
    small_corpus: Path, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {"steps": STEPS, "checkpoint_every_steps": 2, "batch_size": 2}
    whole, out, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    run(config(small_corpus, whole, **changes))
    uri, port = new_store(tmp_path), free_port()
    tracking = {"uri": f"http://127.0.0.1:{port}"}
    given = save_config(
        config(small_corpus, out, tracking=tracking, **changes), tmp_path, "given.yaml"
    )
    times_ms = [row["time_ms"] for row in read_metrics(whole)]
    step_s = (times_ms[-1] - times_ms[0]) / 1000 / len(times_ms)
    chance, kills, server = random.Random(5), 0, start_server(uri, port, tmp_path)
    try:
        with Nursery("mlflow.tracking") as nursery:
            while True:
                done = _rows(out)
                pid = nursery.start(given, log)
                until = done + chance.randint(1, 4) if kills < KILLS else 10**9
                dies, deadline_s = SERVER_DEATHS.get(kills), time.monotonic() + 120
                while _rows(out) < until and not (out / "summary.json").exists():
                    if dies == "between two steps" and _rows(out) > done:
                        kill(server)
                    assert time.monotonic() < deadline_s, log.read_text()
                    time.sleep(0.002)
                if until == 10**9:
                    break
                # anywhere in a step; no longer than a quick one: the whole run's may have been slow
                time.sleep(chance.uniform(0, min(2 * step_s, 0.05)))
                os.kill(pid, signal.SIGKILL)
                assert nursery.ended(pid) == -signal.SIGKILL, log.read_text()
                kills += 1
                if dies is not None:
                    kill(server)
                    server = start_server(uri, port, tmp_path)
            assert nursery.ended(pid) == 0, log.read_text()
    finally:
        kill(server)
    assert kills == KILLS
    assert_same_run(out, whole)
    (got,) = read_runs(uri, "pathfm")
    assert got.status == "FINISHED"
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == list(range(STEPS))
    for key in ("loss", "lr", "grad_norm"):
        told = [(row["step"], row[key]) for row in rows]
        assert sorted(history(uri, got.run_id, key)) == told, key


def _rows(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0
