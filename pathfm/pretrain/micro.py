"""A rank's part of a batch in micro-batches, whose views are there only while they are worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfm.methods import MicroBatch
from pathfm.views.render import make_views

if TYPE_CHECKING:
    from pathfm.pretrain.taking import Taken
    from pathfm.pretrain.trainer import Trainer


def micro_batches(trainer: Trainer, given: Taken) -> list[MicroBatch]:
    """This rank's part of a batch, in `n_micros` equal parts; use each within `while_worked_on`."""
    n, size = trainer.n_micros, trainer.micro_size
    return [
        _micro_batch(trainer, given, slice(index * size, (index + 1) * size), index)
        for index in range(n)
    ]


@contextmanager
def while_worked_on(micro: MicroBatch) -> Iterator[MicroBatch]:
    """The micro-batch; of several, its views are forgotten at the end, and made again if asked for."""
    try:
        yield micro
    finally:
        if micro.count > 1 and isinstance(micro.views, Views):
            micro.views.forget()


class Views(Sequence[Tensor]):
    """The views of some patches, made when they are asked for: global ones together, then the rest.

    They follow from (seed, draw, view), so those made again are the same.
    """

    def __init__(self, trainer: Trainer, pixels: Tensor, draws: NDArray[np.int64]) -> None:
        self._trainer, self._pixels, self._draws = trainer, pixels, draws
        self._specs, self._n_global = trainer.config.views.specs, trainer.config.views.n_global
        self._made: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._specs)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        """One view (b, 3, s, s), or a list of them; IndexError past the last."""
        wanted = range(len(self))[index]
        if isinstance(wanted, int):
            return self._view(wanted)
        return [self._view(number) for number in wanted]

    def forget(self) -> None:
        """Gives their memory back."""
        self._made = {}

    def _view(self, number: int) -> Tensor:
        if number not in self._made:
            globals_, n = range(self._n_global), len(self)
            part = globals_ if number in globals_ else range(self._n_global, n)
            self._made |= dict(zip(part, self._make(part), strict=True))
        return self._made[number]

    def _make(self, part: range) -> list[Tensor]:
        trainer, backbone = self._trainer, self._trainer.method.exported
        compiled = trainer.device.type == "cuda" and trainer.config.compile
        with torch.profiler.record_function("views"):
            return make_views(
                self._pixels,
                self._draws,
                self._specs,
                seed=trainer.config.seed,
                mean=backbone.mean,
                std=backbone.std,
                engine="compiled" if compiled else "auto",
                only=part,
            )


def _micro_batch(trainer: Trainer, given: Taken, rows: slice, index: int) -> MicroBatch:
    draws = given.batch.draws[rows]
    return MicroBatch(
        Views(trainer, given.pixels[rows], draws),
        trainer.config.views.n_global,
        draws,
        None if given.labels is None else given.labels[rows],
        trainer.config.seed,
        trainer.done.step,
        index,
        trainer.n_micros,
    )
