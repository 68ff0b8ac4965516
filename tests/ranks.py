"""Ranks of a distributed run as threads that meet in a gather."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from online_patching import PatchLoader, PatchSampler

T = TypeVar("T")


class World:
    """`gather(rank)` is what rank `rank` calls; everybody waits for everybody, or fails with them."""

    def __init__(self, size: int) -> None:
        self.size, self.calls = size, 0
        self._given: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=60)

    def gather(self, rank: int) -> Callable[[Any], list[Any]]:
        def call(given: Any) -> list[Any]:
            self._given[rank] = json.loads(json.dumps(given))  # nothing but data crosses
            self._barrier.wait()
            everybody = list(self._given)
            if rank == 0:
                self.calls += 1
            self._barrier.wait()
            return everybody

        return call

    def run(self, work: Callable[[int, Callable[[Any], list[Any]]], T]) -> list[T]:
        """What `work(rank, gather)` returns on each rank; the first error of any."""

        def one(rank: int) -> T:
            try:
                return work(rank, self.gather(rank))
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))


def stream(
    sampler: PatchSampler,
    world_size: int,
    batch_size: int,
    steps: int,
    state: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[np.ndarray, list[Any], dict[str, Any]]:
    """`steps` global steps of so many ranks: pixels and refs in the order of draws, the state after.

    Asserts that every rank ends in the same state, and more is in flight when it is taken.
    """

    def work(rank: int, gather: Callable[[Any], list[Any]]) -> tuple[list[Any], dict[str, Any]]:
        with PatchLoader(
            sampler, batch_size, rank=rank, world_size=world_size, gather=gather, **options
        ) as loader:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
            batches = [loader.next_batch() for _ in range(steps)]
            return batches, loader.state_dict()

    ranks = World(world_size).run(work)
    states = [after for _, after in ranks]
    assert all(after == states[0] for after in states)
    batches = [ranks[r][0][s] for s in range(steps) for r in range(world_size)]
    pixels = np.concatenate([b.pixels for b in batches])
    return pixels, [ref for b in batches for ref in b.refs], states[0]
