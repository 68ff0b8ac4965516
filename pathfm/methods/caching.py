"""A loss that couples all rows of a step, from rows that come in micro-batches: gradient caching.

Gao et al. 2021 (arXiv 2101.06983): embed every micro-batch without gradient; put them together, and
find the loss and its gradient for each row once; embed again, now with gradient, and send each row's
known gradient back. The step's gradient is that of the whole batch at once, for one more forward
pass and the memory of one micro-batch. With a single micro-batch the loss is taken directly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pathfm.methods.protocol import MicroBatch

Embed = Callable[[MicroBatch], Tensor]


class JointLoss:
    """A loss over the rows of all micro-batches (and ranks) of a step.

    share: from this rank's rows of the step, micro-batches one below the other (n, ...), its scalar
    share of the loss, so that the mean over ranks is the loss; it gathers with gradient by itself
    (`ranks.gather_rows(rows, grad=True)`) and is called once a step. `look`, `settle` and `loss`
    belong into the method's own. A forward pass must be a function of its micro-batch (stochastic
    depth by keys, no BatchNorm): `loss` has to meet the rows that `look` saw.
    """

    def __init__(self, share: Callable[[Tensor], Tensor]) -> None:
        self._share = share
        self._rows: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
        self._value: Tensor | None = None

    @torch.no_grad()
    def look(self, micro: MicroBatch, embed: Embed) -> None:
        """Embeds a micro-batch without gradient, (b, ...); nothing when it is the only one."""
        if micro.count > 1:
            self._rows[micro.index] = embed(micro)

    def settle(self) -> None:
        """The loss of what was seen, and its gradient for every row."""
        if not self._rows:
            return
        order = sorted(self._rows)
        parts = [self._rows[index].detach() for index in order]
        rows = torch.cat(parts).requires_grad_()
        with torch.enable_grad():
            value = self._share(rows)
            (gradient,) = torch.autograd.grad(value, rows)
        self._value = value.detach()
        cut = torch.split(gradient, [len(part) for part in parts])
        self._gradients = dict(zip(order, cut, strict=True))
        self._rows = {}

    def loss(self, micro: MicroBatch, rows: Tensor) -> Tensor:
        """This micro-batch's share, 1 / count of the rank's value, with the gradient of the whole.

        rows: (b, ...) of `micro`, with gradient. The gradients of all micro-batches add up to the
        rank's; averaged over ranks they are the loss's.
        """
        if micro.count == 1:
            return self._share(rows)
        assert self._value is not None, "loss before settle"
        carrier = (rows * self._gradients.pop(micro.index)).sum()
        # the carrier's gradient is right, its value means nothing: replace the value alone
        return carrier + (self._value / micro.count - carrier).detach()
