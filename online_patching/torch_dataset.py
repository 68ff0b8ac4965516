"""The loader as a torch dataset. The only file of this package that imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from online_patching.batch import DrawSource
from online_patching.loader import PatchLoader


class PatchDataset(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Whole batches as tensors: pixels uint8 (batch, size, size, 3) and draw numbers int64 (batch,).

    Use it with `DataLoader(dataset, batch_size=None, num_workers=k)`: worker w makes batches w,
    w + k, ..., and the DataLoader hands them over in order, so the stream is the same for any k.
    Options are PatchLoader's.
    """

    def __init__(
        self, sampler: DrawSource, batch_size: int, *, first_draw: int = 0, **options: Any
    ) -> None:
        super().__init__()
        self.sampler, self.batch_size, self.options = sampler, batch_size, options
        self.first_draw = first_draw

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        info = get_worker_info()
        number, count = (info.id, info.num_workers) if info is not None else (0, 1)
        rank, world = self.options.get("rank", 0), self.options.get("world_size", 1)
        # k torch workers of one rank are k ranks of batch_size draws each, seen from the stream.
        options = {**self.options, "rank": number * world + rank, "world_size": count * world}
        with PatchLoader(self.sampler, self.batch_size, **options) as loader:
            state = loader.state_dict()
            loader.load_state_dict({**state, "next_draw": self.first_draw})
            for batch in loader:
                yield torch.from_numpy(batch.pixels), torch.from_numpy(batch.draws)
