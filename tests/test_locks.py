"""What one process holds: a run's folder, a store while its tables are made; nobody's once that process is gone."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pathfm import cli
from pathfm.locks import LOCK, HeldError, is_locked, locked
from pathfm.pretrain.loop import only_run
from pathfm.ranks import Ranks
from pathfm.runtime import PathfmError, save_config
from pathfm.tracking import make_client
from tests.pretraining import config

HOLDER = """
import os, sys, time
from pathlib import Path
from pathfm.pretrain.loop import only_run
from pathfm.ranks import Ranks

with only_run(Path(sys.argv[1]), Ranks()):
    child = os.fork()  # as a loader's process, which may outlive the run for a moment
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A process that runs in tmp_path / "run", and its child."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    os.kill(child, signal.SIGKILL)
    process.communicate()


@pytest.mark.slow
def test_a_second_run_in_the_folder_is_told_so_and_touches_nothing(
    small_corpus: Path,
    tmp_path: Path,
    holder: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    process, child = holder
    out = tmp_path / "run"
    yaml = save_config(config(small_corpus, out), tmp_path, "given.yaml")
    assert cli.main(["pretrain", str(yaml)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {out}: another `pathfm pretrain` is running there.")
    assert [path.name for path in out.iterdir()] == [LOCK]
    there = Path.exists  # both started at once: neither saw a folder
    with monkeypatch.context() as started:
        started.setattr(Path, "exists", lambda path: path != out and there(path))
        assert cli.main(["pretrain", str(yaml)]) == 2
    assert [path.name for path in out.iterdir()] == [LOCK]
    process.kill()
    process.wait()
    os.kill(child, 0)  # it is there still, and holds nothing
    assert cli.main(["pretrain", str(yaml), "--stop_after_steps", "1"]) == 0


def test_the_lock_is_taken_again_after_a_run_and_only_by_rank_0(tmp_path: Path) -> None:
    with only_run(tmp_path / "a", Ranks(1, 2)):
        assert not (tmp_path / "a").exists()
    for _ in range(2):
        with only_run(tmp_path / "a", Ranks()):
            assert (tmp_path / "a" / LOCK).stat().st_size == 0
        assert list((tmp_path / "a").iterdir()) == []


def test_a_lock_file_that_went_with_the_run_before_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened while that run still ran, locked when it had ended: a third run would see no file."""
    true_lockf, asked = fcntl.lockf, []

    def lockf(file: int, how: int) -> None:
        if not asked:
            (tmp_path / LOCK).unlink()
        asked.append(file)
        true_lockf(file, how)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with only_run(tmp_path, Ranks()):
        assert len(asked) == 2
        assert (tmp_path / LOCK).exists()


@pytest.mark.parametrize(
    ("number", "refused"), [(errno.EAGAIN, True), (errno.EACCES, True), (errno.ENOLCK, False)]
)
def test_only_a_lock_that_is_taken_keeps_a_run_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, refused: bool
) -> None:
    def lockf(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    if refused:
        with pytest.raises(PathfmError, match="is running there"), only_run(tmp_path, Ranks()):
            pass
    else:
        with only_run(tmp_path, Ranks()):
            pass


HOLDS = """
import sys, time
from pathlib import Path
from pathfm.locks import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
    time.sleep(0.3)
"""


def test_who_waits_gets_it_when_it_is_free_and_who_does_not_is_told(tmp_path: Path) -> None:
    path, pipe = tmp_path / LOCK, subprocess.PIPE
    command = [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "held\n"
        assert is_locked(path)
        with pytest.raises(HeldError, match="another process holds it"), locked(path):
            pass
        with pytest.raises(HeldError, match=r"^busy$"), locked(path, wait_s=0.2, told="busy"):
            pass
        other.stdin.write("\n")
        other.stdin.flush()
        with locked(path, wait_s=60):
            assert path.exists()
    assert not is_locked(path) and not path.exists()


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PathfmError, match="cannot be written"), locked(tmp_path / LOCK):
        pass
    assert not (tmp_path / "elsewhere").exists()


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


@pytest.mark.slow
def test_a_store_in_a_folder_that_takes_no_lock_file_is_opened_without(tmp_path: Path) -> None:
    (tmp_path / ".mlflow.db.lock").mkdir()  # as a read-only folder: it cannot be opened to write
    make_client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert (tmp_path / ".mlflow.db.lock").is_dir()
