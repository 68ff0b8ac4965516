"""What the training loop asks of a method, and what it hands over: one optimizer step's contract.

A step is a function of the *global batch* (all ranks, all micro-batches). How that batch is split
is a matter of memory and machines and changes the result by rounding only:

    for micro in micros: method.look(micro)          no gradient: teachers, embeddings
    method.settle(step)                              what couples samples, over micros and ranks
    for micro in micros: method.loss(micro).backward()
    method.before_update(step); optimizer; method.after_update(step)

The mean over ranks of the sum over micro-batches of `loss` is the step's loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from pathfm.backbone import Backbone


@dataclass(frozen=True)
class MicroBatch:
    """A part of a step's batch on its device: b samples in v views.

    views: v tensors (b, 3, s, s), normalised, the first `n_global` of one size, the rest of
    another. draws: (b,) int64, the samples' numbers in the stream, from which everything random
    about them follows with `seed`. labels: (b,) int64 classes, None where the run has none. index,
    count: which of the step's micro-batches this is on its rank. step: optimizer steps done before.
    """

    views: Sequence[Tensor]
    n_global: int
    draws: NDArray[np.int64]
    labels: Tensor | None
    seed: int
    step: int
    index: int = 0
    count: int = 1

    def __len__(self) -> int:
        return len(self.draws)


class Method(Protocol):
    """A self-supervised or supervised objective around a backbone; a torch module.

    All that must survive a restart is in `state_dict` or a function of the step.
    """

    @property
    def exported(self) -> Backbone:
        """The backbone to keep and to measure (DINO: the teacher's)."""

    def look(self, micro: MicroBatch) -> None:
        """First pass over a micro-batch, without gradient; called for all of them in order."""

    def settle(self, step: int) -> None:
        """Joins what `look` saw over micro-batches and ranks: centres, assignments, neighbours."""

    def loss(self, micro: MicroBatch) -> Tensor:
        """Scalar fp32: this micro-batch's share of the step's loss, already divided by `count`."""

    def forward(self, micro: MicroBatch) -> Tensor:
        """`loss`, as DistributedDataParallel calls it."""

    def before_update(self, step: int) -> None:
        """Change gradients between backward and the optimizer's step."""

    def after_update(self, step: int) -> None:
        """Change weights that the optimizer does not own (DINO: the teacher)."""

    def diagnostics(self) -> Mapping[str, Tensor]:
        """Scalars about the step just done, the same on every rank, logged beside its loss."""

    def trained(self) -> nn.Module:
        """The module whose parameters the optimizer owns."""

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor a restart needs, the loss's buffers among them."""

    def to(self, device: torch.device) -> Any:
        """Move to a device, in place."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Any:
        """Take over what `state_dict` gave."""
