"""DINO's and DINOv2's step in one process and in two that gloo and DDP join."""

from __future__ import annotations

import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from pathfm.methods.dinov2 import hide
from tests import test_dino, test_dinov2
from tests.test_dinov2 import KDE, SHARED, SOFTMAX, micros, pictures

CHANGES = {
    "sinkhorn koleo": {},
    "softmax kde shared": SOFTMAX | SHARED | KDE,
    "one rank masks nothing": {"mask_probability": 0.03},
    "dino": None,
}
COUNTS = {
    "sinkhorn koleo": (1, 2),
    "softmax kde shared": (2,),
    "one rank masks nothing": (1,),
    "dino": (2,),
}
"""Micro-batches a rank that each is tried with."""


def built(name):
    if CHANGES[name] is None:
        return test_dino.method()
    return test_dinov2.moved(test_dinov2.method(drop_path=0.3, **CHANGES[name]))


def centres_of(made):
    if hasattr(made, "criterion"):
        return {"cls": made.criterion.center.clone()}
    return {name: centre.center.clone() for name, centre in made.centres.items()}


def take(made, parts, forward, last_only=lambda now: None):
    """Everything that a step of this rank leaves behind, after its update."""
    for micro in parts:
        made.look(micro)
    made.settle(1)
    total = torch.zeros(())
    for micro in parts:
        last_only(micro is parts[-1])
        loss = forward(micro)
        loss.backward()
        total += loss.detach()
    made.before_update(1)
    gradients = {key: p.grad for key, p in made.named_parameters() if p.requires_grad}
    made.after_update(1)
    told = {key: float(value) for key, value in made.diagnostics().items()}
    return {"loss": total, "gradients": gradients, "told": told, "centres": centres_of(made)}


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    """One rank of all methods' steps, under DDP as the loop has it; each writes what it got."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    try:
        found = {}
        crops = pictures(batch=8)
        part = slice(rank * 4, (rank + 1) * 4)
        for name in CHANGES:
            for count in COUNTS[name]:
                made = built(name)
                wrapped = torch.nn.parallel.DistributedDataParallel(made)

                def sync(now, wrapped=wrapped):
                    wrapped.require_backward_grad_sync = now

                step = take(made, micros(crops, part, count), wrapped, sync)
                dist.all_reduce(step["loss"])
                step["loss"] = float(step["loss"]) / world
                found[f"{name}/{count}"] = step
        torch.save(found, Path(folder) / f"steps{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_rank, args=(2, port, str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"steps{r}.pt", weights_only=True) for r in range(2)]
    wants = {}
    for name in CHANGES:
        made = built(name)
        want = take(made, micros(pictures(batch=8)), made)
        wants[name] = SimpleNamespace(**want | {"loss": float(want["loss"])})
    for found in ranks:
        assert len(found) == 5
        for key, step in found.items():
            test_dinov2.assert_same_step(SimpleNamespace(**step), wants[key.split("/")[0]])


def test_the_case_where_one_rank_masks_nothing_is_one():
    made = built("one rank masks nothing")
    parts = [micros(pictures(batch=8), slice(r * 4, (r + 1) * 4))[0] for r in range(2)]
    shares = [float(hide(p, made.exported, made.settings).masks.sum()) for p in parts]
    assert min(shares) == 0 < max(shares)
