"""Micro-batches bound what a step holds: their views are there only while they are worked on."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pathfm.checkpoint import pack_optimizer
from pathfm.pretrain import PretrainConfig, micro, trainer
from pathfm.pretrain.feed import FeedBatch
from pathfm.pretrain.loop import gradients
from pathfm.pretrain.micro import micro_batches
from pathfm.pretrain.taking import Taken
from pathfm.pretrain.trainer import build_trainer
from pathfm.ranks import Ranks
from pathfm.views.render import make_views
from tests.pretraining import TINY

HEAD = {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16}


def trainer_and_batch(**changes: Any) -> tuple[Any, Taken]:
    given = build_trainer(PretrainConfig(**(TINY | changes)), None)
    pixels = np.random.default_rng(3).integers(0, 256, (4, 64, 64, 3), np.uint8)
    batch = FeedBatch(pixels, np.arange(4) + 9, None, [], [])
    return given, Taken(batch, torch.from_numpy(pixels), None, 0.0)


class Made:
    """`make_views`, counting views made, and the most samples whose views were there at once."""

    def __init__(self) -> None:
        self.alive: list[tuple[weakref.ref[torch.Tensor], tuple[int, ...]]] = []
        self.made, self.most = 0, 0

    def __call__(self, pixels: Any, draws: Any, *args: Any, only: range, **named: Any) -> Any:
        views = make_views(pixels, draws, *args, only=only, **named)
        self.made += len(views) * len(draws)
        self.alive += [(weakref.ref(view), tuple(draws)) for view in views]
        there = {draw for view, of in self.alive if view() is not None for draw in of}
        self.most = max(self.most, len(there))
        return views


@pytest.mark.parametrize("method", ["dino", "dinov2"])
@pytest.mark.parametrize(("size", "looked_at"), [(None, 0), (2, 2), (1, 2)])
def test_views_of_one_micro_batch_are_there_at_a_time(monkeypatch, method, size, looked_at):
    """Of a single one, 4 views a sample once; of more, the 2 global ones again for the loss."""
    made = Made()
    monkeypatch.setattr(micro, "make_views", made)
    changes = {"dinov2": HEAD | {"regulariser_weight": 0.0}} if method == "dinov2" else {}
    given, taken = trainer_and_batch(method=method, micro_batch_size=size, **changes)
    gradients(given, taken)
    assert made.made == 4 * (4 + looked_at)
    assert made.most == (size or 4)


def test_views_made_when_asked_for_are_those_made_at_once():
    given, taken = trainer_and_batch(micro_batch_size=2)
    backbone, specs = given.method.exported, given.config.views.specs
    for index, one in enumerate(micro_batches(given, taken)):
        rows = slice(2 * index, 2 * index + 2)
        whole = make_views(
            taken.pixels[rows], one.draws, specs, seed=0, mean=backbone.mean, std=backbone.std
        )
        assert (len(one.views), one.views[-1].shape) == (4, (2, 3, 16, 16))
        for ours, theirs in zip(one.views, whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        again = one.views[1]
        assert isinstance(one.views, micro.Views)
        one.views.forget()
        assert one.views[1] is not again
        assert torch.equal(one.views[1], again)
        with pytest.raises(IndexError):
            one.views[4]


@pytest.mark.parametrize(
    ("device", "compiled", "engine"),
    [("cuda", True, "compiled"), ("cuda", False, "auto"), ("cpu", True, "auto")],
)
def test_a_run_that_compiles_makes_its_views_compiled_on_a_gpu(
    monkeypatch, device, compiled, engine
):
    asked = []

    def note(*args: Any, only: range, engine: str, **named: Any) -> range:
        asked.append(engine)
        return only

    monkeypatch.setattr(micro, "make_views", note)
    plain, taken = trainer_and_batch()
    config = plain.config.model_copy(update={"compile": compiled})
    given = replace(plain, config=config, device=SimpleNamespace(type=device))
    assert micro_batches(given, taken)[0].views[0] == 0
    assert asked == [engine]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_rank_that_writes_alone_keeps_a_checkpoints_tensors(monkeypatch, tmp_path, rank):
    given, taken = trainer_and_batch(out=tmp_path)
    gradients(given, taken)
    given.optimizer.step()
    packed: list[int] = []

    def pack(*args: Any, **named: Any) -> Any:
        found = pack_optimizer(*args, **named)
        packed.append(len(found[0]))
        return found

    monkeypatch.setattr(trainer, "pack_optimizer", pack)
    monkeypatch.setattr(trainer, "together", nullcontext)
    feed = SimpleNamespace(state_dict=dict)
    records = SimpleNamespace(
        run_id=None,
        state={},
        checkpoint=lambda path, digest: None,
        save_seen=lambda folder, draws: None,
    )
    trainer.save(replace(given, ranks=Ranks(rank, 2)), feed, records, {})  # type: ignore[arg-type]
    assert (packed[0] > 0) == (rank == 0)
    assert (tmp_path / "checkpoints").exists() == (rank == 0)
