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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pathfm.checkpoint import load_newest
from pathfm.pretrain import PretrainConfig, run
from pathfm.pretrain.trainer import split_batch
from pathfm.ranks import Ranks
from pathfm.runtime import PathfmError, save_config
from tests.lives import Nursery
from tests.pretraining import TINY, assert_same_run, config, losses

pytestmark = pytest.mark.usefixtures("no_curves")

GLOBALS = {"global_1": {"size_px": 32}, "global_2": {"size_px": 32}}
SMALL_HEAD = {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16}
METHODS: dict[str, dict[str, Any]] = {
    "dino": {},
    "dinov2": {"method": "dinov2", "dinov2": SMALL_HEAD},
    "simclr": {"method": "simclr", "views": GLOBALS},
    "supcon": {"method": "supcon", "views": GLOBALS},
    "supervised": {"method": "supervised", "views": {"global_1": {"size_px": 32}}},
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
