"""The same step in one process and in two that a real process group (gloo) and DDP join."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from tests.test_contrastive import SETTINGS, assert_same_step, method, micros, pictures, take_step

COUNTS = (1, 2)


def _rank(rank: int, world: int, port: int, folder: str) -> None:
    """One rank of all methods' steps, under DDP as the loop has it; rank 0 writes what it got."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    try:
        found = {}
        for name in SETTINGS:
            for count in COUNTS:
                found[f"{name}/{count}"] = _step(method(name), name, rank, world, count)
        if rank == 0:
            torch.save(found, Path(folder) / "steps.pt")
    finally:
        dist.destroy_process_group()


def _step(made, name, rank, world, count):
    crops = pictures()
    size = len(crops[0]) // world
    parts = micros(crops, slice(rank * size, (rank + 1) * size), count)
    wrapped = torch.nn.parallel.DistributedDataParallel(made)
    for micro in parts:
        made.look(micro)
    made.settle(3)
    total = torch.zeros(())
    for micro in parts:
        # gradients of all micro-batches are averaged together, with the last
        wrapped.require_backward_grad_sync = micro is parts[-1]
        loss = wrapped(micro)
        loss.backward()
        total += loss.detach()
    made.before_update(3)
    made.after_update(3)
    dist.all_reduce(total)
    return {
        "loss": float(total) / world,
        "gradients": {key: p.grad for key, p in made.named_parameters()},
        "told": {key: float(value) for key, value in made.diagnostics().items()},
    }


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_rank, args=(2, port, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "steps.pt", weights_only=True)
    assert len(found) == len(SETTINGS) * len(COUNTS)
    for key, step in found.items():
        want = take_step(method(key.split("/")[0]), micros(pictures(), slice(None), 1))
        got = type(want)(**step)
        assert_same_step(got, want)
