"""Ranks as threads: `pathfm.ranks` replaced by collectives over a barrier, gradients included.

Good for what asks `ranks.NAME(...)` through the module. A process group is one a process; threads
cost milliseconds where processes cost seconds. The gloo tests marked slow check the real thing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from pathfm import ranks

T = TypeVar("T")


class _Meeting:
    """Everybody gives something and gets the list of all, in the order of ranks."""

    def __init__(self, world: int) -> None:
        self.world, self.local = world, threading.local()
        self._given: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=60)

    @property
    def rank(self) -> int:
        return int(self.local.rank)

    def gather(self, given: Any) -> list[Any]:
        self._given[self.rank] = given
        self.barrier.wait()
        everybody = list(self._given)
        self.barrier.wait()
        return everybody


def run_ranks(monkeypatch: pytest.MonkeyPatch, world: int, work: Callable[[int], T]) -> list[T]:
    """What `work(rank)` returns on each of `world` ranks; the first error of any."""
    meeting = _Meeting(world)

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Tensor) -> Tensor:
            ctx.n = len(rows)
            return torch.cat(meeting.gather(rows.detach()))

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            # the CPU's backward runs in the thread that called it, so we know our rank here
            total = torch.stack(meeting.gather(grads[0])).sum(0)
            return total[meeting.rank * ctx.n : (meeting.rank + 1) * ctx.n]

    def gather_rows(rows: Tensor, *, grad: bool = False) -> Tensor:
        if grad:
            return Gather.apply(rows)
        return torch.cat(meeting.gather(rows.detach()))

    def sum_over_ranks(values: Tensor) -> Tensor:
        return torch.stack(meeting.gather(values.detach().clone())).sum(0)

    def one(rank: int) -> T:
        meeting.local.rank = rank
        try:
            return work(rank)
        except BaseException:
            meeting.barrier.abort()
            raise

    with monkeypatch.context() as patch, ThreadPoolExecutor(world) as pool:
        patch.setattr(ranks, "world_size", lambda: world)
        patch.setattr(ranks, "rank", lambda: meeting.rank)
        patch.setattr(ranks, "gather_objects", meeting.gather)
        patch.setattr(ranks, "gather_rows", gather_rows)
        patch.setattr(ranks, "sum_over_ranks", sum_over_ranks)
        futures = [pool.submit(one, r) for r in range(world)]
        errors = [e for f in futures if (e := f.exception()) is not None]
        real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
        for error in (*real, *errors):
            raise error
        return [future.result() for future in futures]
