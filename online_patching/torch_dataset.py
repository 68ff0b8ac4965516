"""The loader as a torch dataset. The only file of this package that imports torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from online_patching.errors import LoaderError
from online_patching.loading.batch import DrawSource, n_draws
from online_patching.loading.loader import PatchLoader


class PatchDataset(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Whole batches as tensors: pixels uint8 (batch, size, size, 3) and draw numbers int64 (batch,).

    Use it with `DataLoader(dataset, batch_size=None, num_workers=k)`: worker w makes batches w,
    w + k, ..., and the DataLoader hands them over in order, so the stream is the same for any k and any
    multiprocessing context. Options are PatchLoader's. Iterating begins at `first_draw` again.

    Under torchdata's StatefulDataLoader it resumes exactly: each worker's state is its own loader's, so
    the number of workers must be the same then. To change it, go on with `first_draw` = batches taken
    x batch_size x world_size.

    Slides are quarantined only when `quarantine_after` is given, and then only with num_workers 0 or 1:
    torch workers are ranks of the stream that cannot agree, and the stream must not depend on their number.
    `gather` (of several ranks) works with num_workers 0, and a state is then taken by every rank.
    """

    def __init__(
        self, sampler: DrawSource, batch_size: int, *, first_draw: int = 0, **options: Any
    ) -> None:
        super().__init__()
        self.sampler, self.batch_size, self.options = sampler, batch_size, options
        self.first_draw = first_draw
        self._loader: PatchLoader | None = None
        self._state: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self._loader = self._new_loader()  # now, not at the first batch: state_dict() looks at it
        self._state = None
        return self._batches(self._loader)

    def __len__(self) -> int:
        """Batches from `first_draw` to the end; TypeError when the sampler never ends."""
        end: int = len(self.sampler)  # type: ignore[arg-type]
        step: int = self.batch_size * self.options.get("world_size", 1)
        return (max(0, end - self.first_draw) + step - 1) // step

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration under way stands (in this process): PatchLoader's state."""
        loader = self._new_loader() if self._loader is None else self._loader
        return loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iteration continues there instead of at `first_draw`."""
        self._state, self._loader = state, None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_loader": None}  # a worker makes its own

    def _batches(self, loader: PatchLoader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        ahead = _worker()[0] * self.batch_size * self.options.get("world_size", 1)
        end = n_draws(self.sampler)
        with loader:
            # By the first rank's draw: ranks take the same number of batches, the last one maybe empty.
            while end is None or loader.next_draw + ahead < end:
                batch = loader.next_batch()
                yield torch.from_numpy(batch.pixels), torch.from_numpy(batch.draws)

    def _new_loader(self) -> PatchLoader:
        """A loader of this torch worker's share of the stream, where it has to begin."""
        worker, workers = _worker()
        rank, world_size = self.options.get("rank", 0), self.options.get("world_size", 1)
        options = {"first_draw": self.first_draw, "quarantine_after": None, **self.options}
        if get_worker_info() is not None and options.get("gather") is not None:
            raise LoaderError(
                "gather needs the training process: use num_workers=0 and the loader's own workers=N."
            )
        if workers > 1 and options["quarantine_after"] is not None:
            raise LoaderError(
                f"{workers} torch workers cannot agree on quarantines: leave quarantine_after out, or use "
                "num_workers=0 and the loader's own workers=N."
            )
        # k torch workers of one rank are k ranks of batch_size draws each, seen from the stream.
        share = {"rank": worker * world_size + rank, "world_size": workers * world_size}
        loader = PatchLoader(self.sampler, self.batch_size, **{**options, **share})
        if self._state is not None:
            loader.load_state_dict(self._state)
        return loader


def _worker() -> tuple[int, int]:
    """The number of this torch worker, and how many there are."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info is not None else (0, 1)
