"""Several ranks: the same draws, batches and views, and the same first gradient, as one process."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pathfm.backbone import load_backbone
from pathfm.checkpoint import load_newest
from pathfm.methods import build_method
from pathfm.methods.settings import DinoSettings
from pathfm.pretrain import PretrainConfig, run
from pathfm.pretrain.parallel import spread
from pathfm.pretrain.trainer import split_batch
from pathfm.ranks import LostRankError, Ranks
from pathfm.runtime import PathfmError, save_config
from tests.lives import Nursery
from tests.pretraining import TINY, assert_same_run, config, losses

GLOBALS = {"global_1": {"size_px": 32}, "global_2": {"size_px": 32}}
SMALL_HEAD = {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16}
METHODS: dict[str, dict[str, Any]] = {
    "dino": {},
    "dinov2": {"method": "dinov2", "dinov2": SMALL_HEAD},
    "simclr": {"method": "simclr", "views": GLOBALS},
    "supcon": {"method": "supcon", "views": GLOBALS},
    "supervised": {"method": "supervised", "views": {"global_1": {"size_px": 32}}},
}
RESNET: dict[str, Any] = {
    "backbone": "test_resnet",
    "views": TINY["views"] | {"local": {"size_px": 32}},
}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


class Lives:
    """Runs of one recipe on different numbers of ranks, and the first gradient of each."""

    def __init__(self, nursery: Nursery, corpus: Path, folder: Path, **changes: Any) -> None:
        self.nursery, self.corpus, self.folder, self.changes = nursery, corpus, folder, changes

    def run(self, out: str, world: int, **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
        """The run's folder and the gradients of this life's first step; it must end well."""
        given = config(self.corpus, self.folder / out, **(self.changes | changes))
        name = f"{out}_{world}_{len(list(self.folder.iterdir()))}"
        yaml = save_config(given, self.folder, f"{name}.yaml")
        grads = self.folder / f"{name}.safetensors"
        wanted = {"PATHFM_TEST_GRADIENTS": str(grads)}
        logs = [self.folder / f"{name}.rank{r}.log" for r in range(world)]
        if world == 1:
            pids = [self.nursery.start(yaml, logs[0], wanted)]
        else:
            pids = self.nursery.start_ranks(yaml, logs, **wanted)
        for pid, log in zip(pids, logs, strict=True):
            assert self.nursery.ended(pid) == 0, log.read_text()
        for log in logs[1:]:
            assert "pretrain:" not in log.read_text()  # rank 0 alone prints
        return given.out, load_file(grads)


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Equal to rtol 1e-4, by the norm of each tensor; what is all rounding, by the whole gradient's."""
    assert ours.keys() == theirs.keys()
    whole = torch.sqrt(sum((t.double().square().sum() for t in theirs.values()), torch.zeros(())))
    assert whole > 0
    for name, theirs_one in theirs.items():
        off = (ours[name] - theirs_one).double().norm()
        assert off <= 1e-4 * theirs_one.double().norm() + 1e-6 * whole, name


def labelled(corpus: Path) -> dict[str, Any]:
    """Classes of the three slides, in a table beside the corpus."""
    table = corpus.parent / "classes.csv"
    table.write_text("slide_id,label\nycbcr,a\nrgb,b\nthird,a\n")
    return {"labels": {"table": str(table)}}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_and_two_micro_batches_equal_one_process(small_corpus, tmp_path, nursery, method):
    changes = METHODS[method] | {"steps": 2, "drop_path": 0.2}
    if method in ("supcon", "supervised"):
        changes |= labelled(small_corpus)
    lives = Lives(nursery, small_corpus, tmp_path, **changes)
    alone, gradient = lives.run("alone", 1)
    for name, world, how in (
        ("micros", 1, {"micro_batch_size": 2}),
        ("ddp", 2, {}),
        ("ddp_micros", 2, {"micro_batch_size": 1}),
        ("fsdp", 2, {"parallel": "fsdp"}),
        ("fsdp_micros", 2, {"parallel": "fsdp", "micro_batch_size": 1}),
    ):
        out, other = lives.run(name, world, **how)
        assert_close(other, gradient)
        for file in ("sampled.jsonl", "failures.jsonl"):
            assert (out / file).read_bytes() == (alone / file).read_bytes()
        for (step, ours), (_, theirs) in zip(losses(out), losses(alone), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4 if step == 0 else 1e-2), (name, step)
        saved, theirs_saved = load_newest(out / "checkpoints"), load_newest(alone / "checkpoints")
        assert saved is not None
        assert theirs_saved is not None
        assert saved.tensors.keys() == theirs_saved.tensors.keys()
        assert {n: t.shape for n, t in saved.tensors.items()} == {
            n: t.shape for n, t in theirs_saved.tensors.items()
        }


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_with_another_number_of_ranks(small_corpus, tmp_path, nursery, before, after):
    """The stream goes on, and the first step's gradient is that of the ranks there were."""
    lives = Lives(nursery, small_corpus, tmp_path, steps=6, drop_path=0.2)
    for out in ("same", "other"):
        lives.run(out, before, stop_after_steps=3)
    same, gradient = lives.run("same", before)
    for name, how in (("ddp", {}), ("fsdp", {"parallel": "fsdp"})):
        shutil.copytree(tmp_path / "other", tmp_path / name)
        other, ours = lives.run(name, after, **how)
        assert_close(ours, gradient)
        assert (other / "sampled.jsonl").read_bytes() == (same / "sampled.jsonl").read_bytes()
        assert losses(other)[:3] == losses(same)[:3]
        assert losses(other)[3][1] == pytest.approx(losses(same)[3][1], rel=1e-4)
        (log,) = tmp_path.glob(f"{name}_{after}_*.rank0.log")
        assert f"not bit for bit: ranks {before}, now {after}" in log.read_text()


@pytest.mark.slow
def test_batchnorm_sees_the_batch_of_all_ranks(small_corpus, tmp_path, nursery):
    """Gradients and running statistics of a ConvNet, two ranks against one process."""
    changes = METHODS["simclr"] | {"backbone": "test_resnet", "steps": 2}
    lives = Lives(nursery, small_corpus, tmp_path, **changes)
    alone, gradient = lives.run("alone", 1)
    out, ours = lives.run("ddp", 2)
    assert_close(ours, gradient)
    one, two = (load_newest(folder / "checkpoints") for folder in (alone, out))
    assert one is not None
    assert two is not None
    running = [name for name in one.tensors if "running_" in name]
    assert len(running) > 4
    for name in running:
        torch.testing.assert_close(two.tensors[name], one.tensors[name], rtol=1e-3, atol=1e-5)
    with pytest.raises(PathfmError, match=r"BatchNorm \(\d+ layers\) needs the whole batch"):
        run(config(small_corpus, tmp_path / "no", **changes, micro_batch_size=2))


@pytest.mark.slow
def test_a_sharded_teacher_averages_running_statistics_too(small_corpus, tmp_path, nursery):
    """DINO with BatchNorm under FSDP, against whole weights: teacher, student and their buffers."""
    lives = Lives(nursery, small_corpus, tmp_path, **RESNET, steps=2)
    whole, gradient = lives.run("ddp", 2)
    out, ours = lives.run("fsdp", 2, parallel="fsdp")
    assert_close(ours, gradient)
    one, two = (load_newest(folder / "checkpoints") for folder in (whole, out))
    assert one is not None
    assert two is not None
    means = [n for n in one.tensors if n.startswith("method.teacher") and "running_" in n]
    assert len(means) > 4
    for name in one.tensors:
        if name.startswith("method."):
            torch.testing.assert_close(two.tensors[name], one.tensors[name], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("network", [{}, RESNET], ids=["test_vit", "test_resnet"])
def test_a_sharded_run_trains_in_bf16(small_corpus, tmp_path, nursery, network):
    """Two processes on a CPU: losses as with whole weights, within what eight bits leave."""
    lives = Lives(nursery, small_corpus, tmp_path, **network, steps=2, precision="bf16")
    whole, _ = lives.run("ddp", 2)
    out, _ = lives.run("fsdp", 2, parallel="fsdp")
    for (_, ours), (_, theirs) in zip(losses(out), losses(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2)


def started(nursery: Nursery, given: PretrainConfig, folder: Path, name: str, **env: str) -> Any:
    yaml = save_config(given, folder, f"{name}.yaml")
    logs = [folder / f"{name}.rank{r}.log" for r in range(2)]
    return nursery.start_ranks(yaml, logs, **env), logs


def wait_for_rows(out: Path, rows: int, timeout_s: float = 120) -> None:
    deadline_s = time.monotonic() + timeout_s
    path = out / "metrics.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < rows:
        assert time.monotonic() < deadline_s, "the run does not get on"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_that_dies_ends_the_others_in_a_line_and_nothing_is_lost(
    small_corpus, tmp_path, nursery, dying
):
    changes: dict[str, Any] = {"steps": 30, "checkpoint_every_steps": 4}
    whole, out = tmp_path / "whole", tmp_path / "run"
    pids, logs = started(nursery, config(small_corpus, whole, **changes), tmp_path, "whole")
    assert [nursery.ended(pid) for pid in pids] == [0, 0], logs[0].read_text()
    given = config(small_corpus, out, **changes)
    pids, logs = started(nursery, given, tmp_path, "dying")
    wait_for_rows(out, 6)
    os.kill(pids[dying], signal.SIGKILL)
    assert nursery.ended(pids[1 - dying], 60) == LostRankError.exit_code == 175
    (line,) = [row for row in logs[1 - dying].read_text().splitlines() if row.startswith("error:")]
    assert re.search(rf"rank {1 - dying} of 2 lost another rank .* start all ranks again", line)
    pids, logs = started(nursery, given, tmp_path, "again")
    assert [nursery.ended(pid) for pid in pids] == [0, 0], logs[0].read_text()
    assert_same_run(out, whole)


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up_after_a_while(small_corpus, tmp_path, nursery):
    given = config(small_corpus, tmp_path / "run", steps=1000)
    pids, logs = started(nursery, given, tmp_path, "run", PATHFM_RANKS_TIMEOUT_S="3")
    wait_for_rows(given.out, 2)
    os.kill(pids[1], signal.SIGSTOP)
    assert nursery.ended(pids[0], 60) == 175
    assert "lost another rank" in logs[0].read_text()
    os.kill(pids[1], signal.SIGKILL)
    nursery.ended(pids[1])


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(small_corpus, tmp_path, nursery):
    given = config(small_corpus, tmp_path / "run", steps=1000, checkpoint_every_steps=1000)
    pids, logs = started(nursery, given, tmp_path, "run")
    wait_for_rows(given.out, 3)
    os.kill(pids[1], signal.SIGUSR1)
    assert [nursery.ended(pid) for pid in pids] == [128 + signal.SIGUSR1] * 2
    saved = load_newest(given.out / "checkpoints")
    assert saved is not None
    assert saved.step == len(losses(given.out)) >= 3
    assert "goes on" in logs[0].read_text()


def ranks_of(torchrun: subprocess.Popen[Any]) -> list[int]:
    """The process ids of the ranks that torchrun runs."""
    found = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, check=False)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.slow
def test_torchrun_starts_all_ranks_again_when_one_is_killed(small_corpus, tmp_path):
    given = config(small_corpus, tmp_path / "run", steps=10_000, checkpoint_every_steps=2)
    yaml = save_config(given, tmp_path, "given.yaml")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    log = tmp_path / "log"
    words = ["--standalone", "--max-restarts", "1", "-m", "pathfm", "pretrain", str(yaml)]
    with log.open("w") as said:
        process = subprocess.Popen(
            [*torchrun, *words],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=said,
            stdout=subprocess.DEVNULL,
        )
    try:
        wait_for_rows(given.out, 3, 200)
        killed = ranks_of(process)
        os.kill(killed[-1], signal.SIGKILL)
        deadline_s = time.monotonic() + 90
        while len(now := ranks_of(process)) < 2 or set(now) & set(killed):
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.1)
        wait_for_rows(given.out, len(losses(given.out)) + 3, 200)  # and they get on
        os.kill(now[-1], signal.SIGKILL)
        process.wait(timeout=90)
    finally:
        process.terminate()  # it ends its ranks
        process.wait()
    assert process.returncode != 0, log.read_text()
    saved = load_newest(given.out / "checkpoints")
    assert saved is not None
    assert saved.step >= 2


def test_what_is_not_finite_on_one_rank_stops_both_and_is_kept(small_corpus, tmp_path, monkeypatch):
    """Alone here: the numbers that decide are those of all ranks, so the rule is one."""
    import numpy as np

    from pathfm.pretrain.feed import FeedBatch
    from pathfm.pretrain.stopping import refuse_nonfinite
    from pathfm.ranks import PeerError

    batch = FeedBatch(
        np.full((2, 8, 8, 3), 7, np.uint8), np.array([4, 5]), np.array([1, -1]), [], []
    )
    numbers = {"loss": 1.0, "grad_norm": float("inf"), "teacher_entropy": float("nan")}
    with pytest.raises(PathfmError, match="step 9: the grad norm is inf; the weights were not"):
        refuse_nonfinite(numbers, 9, batch, tmp_path, Ranks(0, 2), seed=3)
    with pytest.raises(PeerError):
        refuse_nonfinite(numbers, 9, batch, tmp_path, Ranks(1, 2), seed=3)
    refuse_nonfinite(numbers | {"grad_norm": 1.0}, 9, batch, tmp_path, Ranks(), seed=3)
    for rank in (0, 1):
        kept = load_file(tmp_path / "nonfinite_step_9" / f"rank_{rank}.safetensors")
        assert kept["pixels"].shape == (2, 8, 8, 3)
        assert (kept["draws"].tolist(), kept["labels"].tolist()) == ([4, 5], [1, -1])
        facts = json.loads((tmp_path / "nonfinite_step_9" / f"rank_{rank}.json").read_text())
        assert (facts["step"], facts["seed"], facts["grad_norm"]) == (9, 3, "inf")


@pytest.mark.parametrize(
    ("changes", "world", "micro", "count"),
    [({}, 1, 12, 1), ({}, 4, 3, 1), ({"micro_batch_size": 2}, 2, 2, 3), ({}, 12, 1, 1)],
)
def test_a_batch_is_split_among_ranks_and_micro_batches(changes, world, micro, count):
    given = PretrainConfig(**(TINY | {"batch_size": 12} | changes))
    assert split_batch(given, Ranks(0, world)) == (micro, count)


@pytest.mark.parametrize(
    ("batch", "changes", "world", "words"),
    [
        (12, {}, 5, r"batch_size 12 does not divide among 5 ranks: give 10, or start 4 ranks"),
        (4, {}, 7, r"batch_size 4 .* give 7, or start 4 ranks"),
        (256, {}, 3, r"give 255, or start 2 ranks"),
        (12, {"micro_batch_size": 4}, 2, r"micro_batch_size 4 .* rank's 6 patches .* give 3"),
        (64, {"micro_batch_size": 30}, 1, r"micro_batch_size 30 .* rank's 64 .* give 32"),
    ],
)
def test_a_batch_that_does_not_come_out_even_is_refused_with_what_would(
    batch, changes, world, words
):
    given = PretrainConfig(**(TINY | {"batch_size": batch} | changes))
    with pytest.raises(PathfmError, match=words):
        split_batch(given, Ranks(0, world))


def test_wrapping_for_several_ranks_warns_of_nothing_and_leaves_buffers_alone(tmp_path):
    method = build_method("dino", load_backbone("test_vit", "random:1"), DinoSettings(), 10, 0)
    meeting = f"file://{tmp_path}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            spread_out = spread(method, "ddp", Ranks(world=2))
    finally:
        torch.distributed.destroy_process_group()
    assert not spread_out.broadcast_buffers
