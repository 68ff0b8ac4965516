"""The next batch, on its way to the device while the last one is worked on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from online_patching.errors import PatchingError
from pathfm.pretrain.feed import Feed, FeedBatch
from pathfm.pretrain.trainer import Trainer
from pathfm.ranks import together


@dataclass(frozen=True)
class Taken:
    """A batch on its way to the device, and how long it was waited for."""

    batch: FeedBatch
    pixels: Tensor
    labels: Tensor | None
    wait_s: float
    began_s: float = 0.0


def take(trainer: Trainer, feed: Feed) -> Taken:
    """This rank's part of the next batch. What fails on one rank fails on all."""
    began_s = time.perf_counter()
    with together():
        batch = feed.next_batch()
    wait_s = time.perf_counter() - began_s
    return Taken(
        batch,
        _on_its_way(batch.pixels, trainer.device),
        None if batch.labels is None else _on_its_way(batch.labels, trainer.device),
        wait_s,
        began_s,
    )


def take_or_fail(trainer: Trainer, feed: Feed) -> tuple[Taken | None, PatchingError | None]:
    """The next batch, or why there is none: then the step under way is finished and saved first.

    Of several ranks some have got theirs, so that their streams stand at different draws: there the
    error is raised at once, and the last checkpoint holds.
    """
    try:
        return take(trainer, feed), None
    except PatchingError as error:
        if trainer.ranks.world > 1:
            raise
        return None, error


def _on_its_way(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device; the copy to a GPU runs beside what it works on."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
