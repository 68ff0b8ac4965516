"""A journal on a disk that fills up, that spoils lines, and whose power is cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pathfm.runtime import PathfmError
from pathfm.tracking import Run, Shipper, TrackingConfig, open_run, read_metrics, replay
from pathfm.tracking.journal import METRICS, TASKS, Journal

OFF = TrackingConfig(enabled=False)

# the kernel takes the bytes up to the limit and raises nothing: what a nearly full disk does
FULL = """
import resource, sys
from pathlib import Path
from pathfm.runtime import PathfmError
from pathfm.tracking import Run, TrackingConfig
from pathfm.tracking.journal import METRICS, Journal

folder = Path(sys.argv[1])
run = Run(TrackingConfig(enabled=False), Journal(folder))
for step in range(3):
    run.log(step, loss=1.0)
size = (folder / METRICS).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
for step in range(3, 5):
    try:
        run.log(step, loss=1.0)
    except PathfmError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run.log(5, loss=1.0)
print(run.run_id)
"""


def test_a_line_that_a_full_disk_takes_in_part_is_taken_back_and_refused(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    first, second, run_id = ended.stdout.splitlines()
    assert "No space left on device. Free space" in first
    assert "No space left on device. Free space" in second
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 5]
    with open_run(OFF, tmp_path, {}, run_id=run_id) as resumed:
        resumed.truncate(1)
        resumed.log(2, loss=1.0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]


@pytest.mark.parametrize(
    "spoilt", [b'{"step": 1, "lo{"step": 2, "loss": 2.0}\n', b"\0\0\0\0\n", b"7\n", b"\xff\n"]
)
def test_a_spoilt_line_is_passed_over_with_a_warning_and_costs_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoilt: bytes
) -> None:
    with open_run(OFF, tmp_path, {}) as run:
        run.log(0, loss=1.0)
    for name in (METRICS, TASKS):
        with (tmp_path / name).open("ab") as file:
            file.write(spoilt)
    journal = Journal(tmp_path, run.run_id)
    journal.append_metrics(3, {"loss": 0.5})
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 3]
    assert "1 lines are no rows" in caplog.text
    waits = journal.unshipped(METRICS, 10)
    assert [row["step"] for row in waits.rows] == [0, 3]
    journal.advance(waits, 2)
    assert journal.state.metrics_bytes == (tmp_path / METRICS).stat().st_size
    assert journal.last_shipped() == {"loss": 3}
    journal.truncate(0)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]
    assert all(row["do"] for row in journal.unshipped(TASKS, 10).rows)


def test_sync_waits_for_the_disk_with_every_row_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(OFF, Journal(tmp_path))
    run.log(0, loss=1.0)
    synced: list[str] = []
    true_fsync = os.fsync

    def fsync(handle: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        true_fsync(handle)

    monkeypatch.setattr("pathfm.tracking.journal.os.fsync", fsync)
    run.sync()
    assert synced == [METRICS, tmp_path.name]  # no tasks yet
    assert run.last_step == 0


def test_the_last_step_is_read_from_the_end_of_a_long_journal(tmp_path: Path) -> None:
    run = Run(OFF, Journal(tmp_path))
    assert run.last_step == -1
    for step in range(2000):
        run.log(step, loss=1.0)
    assert (tmp_path / METRICS).stat().st_size > 65_536
    assert run.last_step == 1999


def test_a_replay_that_fails_tells_no_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(OFF, Journal(tmp_path)).log(0, loss=1.0)
    uri = "postgresql://me:hunter2@db.example/mlflow"

    def refuse(self: Shipper) -> None:
        raise RuntimeError(f"cannot connect to {uri}\nafter 3 tries")

    monkeypatch.setattr(Shipper, "ship", refuse)
    with pytest.raises(PathfmError, match="does not answer: cannot connect") as caught:
        replay(tmp_path, uri)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)
