"""Processes that open one new sqlite store at the same time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pathfm.tracking.turns import own_turn

# both have imported MLflow, which takes seconds, before either opens the store
OPENS = """
import sys
from mlflow.tracking import MlflowClient
from pathfm.tracking import make_client
print("ready", flush=True)
sys.stdin.readline()
make_client(sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_that_open_a_new_store_at_once_both_get_it(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", OPENS, f"sqlite:///{tmp_path / 'mlflow.db'}"]
    pipe = subprocess.PIPE
    both = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)
    ]
    for one in both:
        assert one.stdout is not None and one.stdout.readline() == "ready\n"
    for one in both:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    told = [one.communicate(timeout=120)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], told
    assert not any("already exists" in text or "duplicate" in text for text in told), told
    assert [path.name for path in tmp_path.iterdir()] == ["mlflow.db"]


def test_a_folder_that_takes_no_lock_file_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / ".mlflow.db.lock").mkdir()  # as a read-only folder: it cannot be opened to write
    with own_turn(tmp_path / "mlflow.db"):
        pass
    assert (tmp_path / ".mlflow.db.lock").is_dir()
