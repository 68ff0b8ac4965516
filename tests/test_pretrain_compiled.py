"""Compiled blocks: every step of a run uses them, and nothing that is measured adds to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pathfm.pretrain import loop, run
from tests.pretraining import TINY, config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # torch's own tracing
]
HEAD = {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16}
CONVNET = {
    "backbone": "test_convnext",
    "views": {
        "global_1": {"size_px": 64},
        "global_2": {"size_px": 64},
        "local": {"size_px": 32},
        "n_local": 2,
    },
}


class Counter:
    """A backend that compiles nothing, and counts graphs made and graphs run."""

    def __init__(self) -> None:
        self.made = self.ran = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.made += 1

        def run_graph(*args: Any) -> Any:
            self.ran += 1
            return graph.forward(*args)

        return run_graph


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """What every `torch.compile` of the test compiles with; torch's limits are put back."""
    counter = Counter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield counter
    torch._dynamo.reset()


@pytest.fixture
def probe_folder(tmp_path: Path) -> Path:
    for kind in range(2):
        for number in range(9):
            path = tmp_path / "probe" / f"class{kind}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number + 10 * kind).integers(0, 255, (64, 64, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "probe"


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 3),
        ({"method": "dinov2", "dinov2": HEAD, "micro_batch_size": 2}, 8),
        (CONVNET, 3),
    ],
    ids=["vit", "vit_dinov2_in_two_parts", "convnet"],
)
def test_every_pass_of_every_step_runs_compiled_blocks(
    small_corpus, tmp_path, monkeypatch, counter, probe_folder, changes, passes
):
    """passes: forward passes of a backbone in a step (teacher; student by size; looked at, learnt).

    With stochastic depth, and with measures in two batch sizes and two sizes of picture each step.
    """
    watch = TINY["watch"] | {
        "every_steps": 1,
        "probe_every_steps": 1,
        "probe_folder": probe_folder,
        "probe_px": 64,
        "batch_size": 3,
    }
    made, blocks = [], []
    true_gradients = loop.gradients

    def gradients(trainer: Any, given: Any) -> Any:
        blocks.append(len(trainer.method.exported.blocks))
        before = counter.ran
        loss = true_gradients(trainer, given)
        assert counter.ran - before == passes * blocks[0]
        made.append(counter.made)
        return loss

    monkeypatch.setattr(loop, "gradients", gradients)
    given = {"steps": 3, "compile": True, "drop_path": 0.2, "watch": watch} | changes
    assert run(config(small_corpus, tmp_path / "run", **given)).finished
    assert made[0] == made[-1] == counter.made <= passes * blocks[0]
    assert counter.ran == 3 * passes * blocks[0]  # none but the steps' own
