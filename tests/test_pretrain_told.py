"""What a run tells of its speed, its waits, its rates and its end is true, also of one that stops."""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from pathfm.backbone import load_backbone
from pathfm.methods.dino import Dino
from pathfm.pretrain import run
from pathfm.pretrain.bookends import _without_nan
from pathfm.pretrain.trainer import Progressed
from pathfm.pretrain.waiting import DataWait
from pathfm.pretrain.watching import Watch
from pathfm.runtime import PathfmError
from pathfm.tracking import read_metrics, read_runs
from tests.mlflow_store import new_store
from tests.pretraining import TINY, config, losses
from tests.test_tracking import quiet_mlflow


def test_a_wall_clock_holds_what_lies_between_steps(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_after_step = Watch.after_step

    def slow(self: Watch, *given: Any) -> dict[str, float]:
        time.sleep(0.1)
        return true_after_step(self, *given)

    monkeypatch.setattr(Watch, "after_step", slow)
    run(config(small_corpus, tmp_path, stop_after_steps=4))
    run(config(small_corpus, tmp_path))  # what came before counts too
    summary = json.loads((tmp_path / "summary.json").read_text())
    in_steps_s, wall_s = (24 / summary[f"patches_per_s{end}"] for end in ("", "_wall"))
    assert wall_s - in_steps_s >= 6 * 0.1


def test_a_summary_says_null_for_what_is_not_finite() -> None:
    given = {"a": math.nan, "b": {"c": -math.inf, "d": 1}, "e": 0.5, "f": "nan"}
    cleaned = _without_nan(given)
    assert json.dumps(cleaned, allow_nan=False) == json.dumps(
        {"a": None, "b": {"c": None, "d": 1}, "e": 0.5, "f": "nan"}
    )
    assert math.isnan(Progressed().loss_last)  # what such a number can come from


def test_the_lowest_rate_is_logged_where_layers_differ(small_corpus: Path, tmp_path: Path) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    rates = {"warmup_steps": 2, "lr": 1e-3}
    run(config(small_corpus, one, stop_after_steps=2, optim=rates | {"patch_embed_lr": 1.0}))
    lowered = rates | {"layer_decay": 0.5, "patch_embed_lr": 0.25}
    dino = TINY["dino"] | {"freeze_patch_embed": False}
    run(config(small_corpus, many, stop_after_steps=2, optim=lowered, dino=dino))
    assert all("lr_lowest" not in row for row in read_metrics(one))
    # blocks n, ..., 1 and the stem below them: n + 1 halvings, a quarter on top
    factor = 0.5 ** (load_backbone("test_vit", "random").n_layers + 1) * 0.25
    for row in read_metrics(many):
        assert row["lr_lowest"] == pytest.approx(row["lr"] * factor)


def test_the_rows_of_a_checkpoint_are_on_disk_before_it_and_lost_ones_are_told(
    small_corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    order: list[str] = []
    true_fsync = os.fsync

    def fsync(handle: int) -> None:
        order.append(os.readlink(f"/proc/self/fd/{handle}"))
        true_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    run(config(small_corpus, tmp_path, stop_after_steps=4))
    monkeypatch.undo()
    first = next(i for i, name in enumerate(order) if "/checkpoints" in name)
    assert any(name.endswith("metrics.jsonl") for name in order[:first])
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:2]))
    assert run(config(small_corpus, tmp_path)).finished
    assert "metrics.jsonl ends before step 2, the checkpoint was made after step 4" in (
        capsys.readouterr().out
    )
    assert [step for step, _ in losses(tmp_path)] == [0, 1, 4, 5]


def test_a_batch_that_safetensors_cannot_keep_is_told_in_a_line(
    small_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(Dino, "loss", lambda self, micro: micro.views[0].sum() * math.nan)
    monkeypatch.setattr("pathfm.pretrain.stopping.save_file", refuse)
    monkeypatch.setattr(
        "pathfm.pretrain.loop.device_numbers", lambda _: {"loss": math.nan, "grad_norm": 1.0}
    )
    monkeypatch.setattr(torch.Tensor, "backward", lambda self: None)
    with pytest.raises(PathfmError, match=r"step 0 is not finite, and .*No space left"):
        run(config(small_corpus, tmp_path))


def test_settings_of_another_method_are_said_to_do_nothing(
    small_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = config(small_corpus, tmp_path / "a", stop_after_steps=1, dinov2={"out_dim": 64})
    run(mine)
    told = capsys.readouterr().out
    assert "dinov2.* is set and has no effect: the method is dino\n" in told
    assert told.count("has no effect") == 1


@quiet_mlflow
def test_a_stopped_run_and_its_probe_are_killed_in_mlflow_until_they_have_finished(
    small_corpus: Path, tmp_path: Path
) -> None:
    for name in "ab":
        (tmp_path / "labelled" / name).mkdir(parents=True)
        for i in range(14):
            pixels = np.full((32, 32, 3), 9 * i + (100 if name == "a" else 0), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "labelled" / name / f"{i}.png")
    uri = new_store(tmp_path)
    watch = {
        "curves": False,
        "probe_folder": tmp_path / "labelled",
        "probe_every_steps": 4,
        "probe_px": 32,
    }
    settings: dict[str, Any] = {"watch": watch, "tracking": {"uri": uri}}
    out = tmp_path / "run"
    assert not run(config(small_corpus, out, stop_after_steps=2, **settings)).finished
    assert [found.status for found in read_runs(uri, "pathfm")] == ["KILLED", "KILLED"]
    assert run(config(small_corpus, out, **settings)).finished
    assert [found.status for found in read_runs(uri, "pathfm")] == ["FINISHED", "FINISHED"]


@dataclass
class Clocked:
    """An event of a device that is at `at_ms` when it is reached."""

    at_ms: float

    def record(self, stream: object) -> None:
        pass

    def elapsed_time(self, end_event: Clocked) -> float:
        return end_event.at_ms - self.at_ms


@dataclass
class Batch:
    began_s: float
    wait_s: float


@pytest.mark.parametrize(
    ("device_ms", "began_s", "wait_s", "idle_s"),
    [
        (500.0, 10.1, 0.3, 0.0),  # hidden behind the device's half second
        (500.0, 10.1, 0.9, 0.5),  # it ran dry at 10.5, the batch came at 11.0
        (500.0, 10.8, 0.2, 0.2),  # dry before the wait began: all of it counts
    ],
)
def test_on_a_gpu_a_wait_counts_only_beyond_the_devices_own_time(
    monkeypatch: pytest.MonkeyPatch, device_ms: float, began_s: float, wait_s: float, idle_s: float
) -> None:
    monkeypatch.setattr("pathfm.pretrain.waiting.time.perf_counter", lambda: 10.0)
    events = iter((Clocked(3.0), Clocked(3.0 + device_ms)))
    waits = DataWait(torch.device("cuda"), lambda enable_timing: next(events))
    waits.begins()
    waits.queued()
    ahead = Batch(began_s, wait_s)
    read_before = Batch(8.0, 1.5)  # beside the step before: counted there
    assert waits.of_step(9.5, read_before, ahead) == pytest.approx(idle_s)
    read_first = Batch(9.5, 0.25)  # nothing was queued: the device stood still
    assert waits.of_step(9.5, read_first, ahead) == pytest.approx(0.25 + idle_s)


def test_on_a_cpu_every_wait_counts() -> None:
    waits = DataWait(torch.device("cpu"))
    waits.begins()
    waits.queued()
    assert waits.of_step(9.5, Batch(8.0, 1.5), Batch(10.0, 7.0)) == 1.5
