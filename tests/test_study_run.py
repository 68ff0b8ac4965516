"""A whole study on synthetic slides: to its page, killed on the way, and by two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from online_patching.testing import demo_slides, write_demo_slides, write_labelled_patches
from pathfm.cli import main
from pathfm.study.metrics import check_metric
from pathfm.study.plan import load_study
from pathfm.tracking import read_runs

pytestmark = pytest.mark.slow

VIEWS = {
    "global_1": {"size_px": 32}, "global_2": {"size_px": 32}, "local": {"size_px": 16}, "n_local": 1,
}  # fmt: skip
STUDY: dict[str, Any] = {
    "title": "Tiny", "question": "Is anything better?", "published": "nothing", "seeds": 1,
    "data": {"weights": "random:3"},
    "pretrain": {
        "backbone": "test_vit", "patch_px": 64, "mpp": [1.0, 2.0], "min_foreground": 0.0, "steps": 6,
        "batch_size": 4, "checkpoint_every_steps": 1, "monitor_patches": 8, "precision": "fp32",
        "optim": {"warmup_steps": 1}, "dino": {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8},
        "views": VIEWS, "watch": {"curves": False},
    },
    "views": [{"name": "48", "embed": {"input_px": 48}}], "probe": {"n_seeds": 2},
    "arms": [{"name": "online"}, {"name": "offline", "reads": "offline"}],
    "offline": {"per_slide_and_mpp": 6}, "equal": ["patches_seen", "optimizer_steps"],
    "criterion": {"metric": "probe/48/knn", "contrasts": [{"arm": "online", "against": "offline"}]},
    "rates": {"patches_per_s": 2, "pictures_per_s": 5, "measured": "a test"},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides, labelled patches and studies; `out` is shared, so that slides are masked once."""
    root = tmp_path_factory.mktemp("studies")
    write_demo_slides(root / "slides", 1)
    write_labelled_patches(root / "patches", demo_slides(2, 500), per_class=12, size_px=64)
    for name in ("quiet", "killed", "twofold"):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(STUDY))
    return root


def words(place: Path, name: str, *more: str) -> list[str]:
    data = ["--slides", str(place / "slides"), "--patches", str(place / "patches")]
    return ["study", name, "--studies", str(place), "--out", str(place / "out"), *data, *more]


def results(place: Path, name: str) -> dict[str, dict[str, Any]]:
    """What finished cells found, by the cell's name, without what a clock said."""
    found = {}
    for path in sorted((place / "out" / name / "cells").glob("*/result.json")):
        facts = json.loads(path.read_text())
        metrics = facts["metrics"].items()
        found[facts["cell"]] = {
            k: v for k, v in metrics if not k.startswith("cost/") and not k.endswith("_per_s")
        }
    return found


@pytest.fixture(scope="module")
def quiet(place: Path) -> Path:
    """A study that nobody disturbed."""
    assert main(words(place, "quiet")) == 0
    return place / "out" / "quiet"


def test_a_study_ends_in_a_page_a_tree_of_runs_and_costs(quiet: Path, place: Path) -> None:
    assert set(results(place, "quiet")) == {"start", "online-s0", "offline-s0"}
    page = (quiet / "study.html").read_text()
    assert "What cutting beforehand costs" in page
    runs = read_runs(f"sqlite:///{quiet / 'mlflow.db'}", "pathfm")
    (parent,) = [run for run in runs if run.name == "quiet"]
    cells = [run for run in runs if run.parent_id == parent.run_id]
    assert {run.name for run in cells} == set(results(place, "quiet"))
    trained = {run.parent_id for run in runs if run.name == "pretrain"}
    assert trained == {run.run_id for run in cells if run.name != "start"}
    assert {run.status for run in runs} == {"FINISHED"}
    (cost,) = (place / "out" / "shared").glob("offline-*/cost.json")
    told = json.loads(cost.read_text())
    written = list(cost.parent.glob("*/*/*.png"))
    assert told["patches"] == len(written) == 12  # 2 µm/px x 6
    assert told["bytes"] == sum(path.stat().st_size for path in written)
    assert told["grid_patches"] > 12


def test_every_figure_of_a_cell_may_be_asked_for(quiet: Path, place: Path) -> None:
    study = load_study(place, "quiet")
    figures = {name for cell in results(place, "quiet").values() for name in cell}
    asked = {name for name in figures if not name.startswith("run/share_at_")}  # tables tell them
    assert asked >= {"run/slides_seen", "watch/rankme_end", "probe/48/knn", "probe/48/rankme"}
    assert [line for name in sorted(asked) if (line := check_metric(study, name))] == []


def test_the_same_command_again_does_nothing_but_the_page(quiet: Path, place: Path) -> None:
    kept = {path: path.stat().st_mtime_ns for path in quiet.glob("cells/*/result.json")}
    assert main(words(place, "quiet")) == 0
    assert {path: path.stat().st_mtime_ns for path in quiet.glob("cells/*/result.json")} == kept


def test_another_setting_is_another_cell(quiet: Path, place: Path, capsys: Any) -> None:
    more = ["--set", "pretrain.optim.lr=1e-3", "--status"]
    assert main(words(place, "quiet", *more)) == 0
    assert "1 of 3 cells done" in capsys.readouterr().out  # the start trains nothing
    assert len(list(quiet.glob("cells/*"))) == 3


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that a test starts, gone when it ends."""
    every: list[subprocess.Popen[bytes]] = []
    yield every
    for process in every:
        process.kill()
        process.wait()


def test_a_study_killed_in_a_training_goes_on_and_finds_the_very_same(
    quiet: Path, place: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    command = [sys.executable, "-m", "pathfm", *words(place, "killed", "--tracking.no-enabled")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
    started.append(process)
    cells = place / "out" / "killed" / "cells"
    until_s = time.monotonic() + 200
    while not list(cells.glob("offline-s0-*/pretrain/checkpoints/step_*")):
        assert process.poll() is None
        assert time.monotonic() < until_s
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in cells.glob("*/result.json")}
    assert len(before) < 3
    assert main(words(place, "killed", "--tracking.no-enabled")) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert results(place, "killed") == results(place, "quiet")


def test_two_processes_share_a_grid_and_nothing_is_done_twice(quiet: Path, place: Path) -> None:
    assert main(words(place, "twofold", "--processes", "2")) == 0
    assert results(place, "twofold") == results(place, "quiet")
    logs = [(place / "out" / "twofold" / f"worker_{k}.log").read_text() for k in range(2)]
    done = [log.count(": done in ") for log in logs]
    assert sum(done) == 3
    assert min(done) >= 1


def test_sigterm_to_a_parent_stops_its_processes_with_a_checkpoint(
    quiet: Path, place: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    (place / "ended.yaml").write_text(yaml.safe_dump(STUDY))
    given = words(place, "ended", "--tracking.no-enabled", "--processes", "2")
    process = subprocess.Popen([sys.executable, "-m", "pathfm", *given], stdout=subprocess.DEVNULL)
    started.append(process)
    cells = place / "out" / "ended" / "cells"
    until_s = time.monotonic() + 200
    while not list(cells.glob("*/pretrain/checkpoints/step_*")):
        assert process.poll() is None
        assert time.monotonic() < until_s
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    process.terminate()
    assert process.wait(timeout=120) == 143
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert main(words(place, "ended", "--tracking.no-enabled")) == 0
    assert results(place, "ended") == results(place, "quiet")


def test_a_cell_that_fails_is_told_and_tried_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--tracking.no-enabled"]
    wrong = words(place, "killed", *more, "--set", "pretrain.backbone=swin_tiny_patch4_window7_224")
    for _ in range(2):
        assert main(wrong) == 2
        told = capsys.readouterr().err
        assert "3 cell(s) failed, first start: " in told
        assert told.count("online-s0 failed: ") == 1
