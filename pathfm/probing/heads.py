"""Linear heads trained as kaiko-eva trains one, all runs and learning rates at once as one tensor.

A run is a first head and an order of batches; its learning rates share both. A step of all of them is
two batched matrix products: x (runs, batch, d + 1) with a column of ones, the heads (runs, d + 1,
rates * outputs). The gradient of softmax or logistic regression is written out and AdamW as well, so that
no graph is built. Heads never mix: each ends where it would have ended alone.

Runs are shuffled by epoch and validated after every whole epoch; the weights with the best validation
score (the first of equals) are kept, a head that has not improved for `patience` validations changes
its best no more, and training ends when all have stopped. An epoch cut off by `n_steps` is not validated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathfm.probing.orders import Orders, Shuffled, linear_start
from pathfm.probing.parts import Parts, Rows, check_inputs
from pathfm.probing.protocol import HeadProtocol
from pathfm.probing.selecting import Kept, macro_accuracy
from pathfm.runtime import PathfmError

_MAX_LOGITS = 1 << 25  # of validation rows times heads times outputs at once


@dataclass(frozen=True)
class TrainedHeads:
    """Heads of every run and learning rate, as they were when they did best on validation."""

    learning_rates: tuple[float, ...]
    weights: NDArray[np.float32]  # (runs, rates, d + 1, outputs); the last row is the bias
    best_score: NDArray[np.float32]  # (runs, rates), macro accuracy on validation, 0..1
    best_step: NDArray[np.int64]  # (runs, rates), optimizer steps done by then
    stopped_step: NDArray[np.int64]  # (runs, rates), when its patience or the steps ended
    losses: NDArray[np.float32]  # (steps, runs, rates), the mean of each batch
    val_scores: NDArray[np.float32]  # (validations, runs, rates)
    val_steps: NDArray[np.int64]  # (validations,), steps done by then
    n_classes: int

    @property
    def rate(self) -> int:
        """Which learning rate validation chooses: best in the mean over runs, the first of equals."""
        return int(self.best_score.mean(axis=0).argmax())

    def logits(self, features: NDArray[np.float32], rate: int | None = None) -> NDArray[np.float32]:
        """(runs, n, outputs) of every run at one learning rate, the chosen one by default."""
        heads = self.weights[:, self.rate if rate is None else rate]
        return np.asarray(features @ heads[:, :-1] + heads[:, -1:])

    def predict(self, features: NDArray[np.float32], rate: int | None = None) -> NDArray[np.int64]:
        """(runs, n) classes."""
        logits = self.logits(features, rate)
        if self.n_classes == 2:
            return (logits[..., 0] > 0).astype(np.int64)
        return np.asarray(logits.argmax(axis=-1), np.int64)


def train_heads(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    parts: Parts,
    n_classes: int,
    protocol: HeadProtocol = HeadProtocol(),  # noqa: B008 (frozen)
    *,
    orders: Orders | None = None,
    starts: NDArray[np.float32] | None = None,
    device: torch.device | str = "cpu",
    advance: Callable[[int], object] | None = None,
) -> TrainedHeads:
    """Heads fitted on `parts.train`, chosen by `parts.val`; `parts.test` is not looked at.

    features (n, d) float32, labels (n,). `orders` and `starts` (runs, d + 1, outputs) replace what the
    seed draws. Two classes have one output and a logistic loss, as in eva. All features go to the
    device at once: 4 n (d + 1) bytes. `advance` is told the steps done after every epoch.
    Raises `PathfmError` for labels, parts or features that cannot be probed, and for fewer steps than
    one epoch, since then nothing would be validated.
    """
    check_inputs(features, labels, parts, n_classes)
    order = orders or Shuffled(parts.train, protocol.seed)
    if protocol.n_steps < protocol.validate_every * protocol.steps_per_epoch(order.n_train):
        raise PathfmError(
            f"{protocol.n_steps:,} steps of {protocol.batch_size} end before the first validation: "
            f"an epoch has {protocol.steps_per_epoch(order.n_train):,}. Take more steps"
        )
    training = _Training(features, labels, parts.val, n_classes, protocol, order, starts, device)
    with torch.inference_mode():
        return training.run(advance)


class _Training:
    """The state of a training: heads, AdamW's moments, and what did best so far."""

    def __init__(
        self,
        features: NDArray[np.float32],
        labels: NDArray[np.int64],
        val: Rows,
        n_classes: int,
        protocol: HeadProtocol,
        orders: Orders,
        starts: NDArray[np.float32] | None,
        device: torch.device | str,
    ) -> None:
        self.protocol, self.orders, self.n_classes = protocol, orders, n_classes
        self.device = torch.device(device)
        self.runs, self.rates = protocol.n_runs, len(protocol.learning_rates)
        self.outputs = 1 if n_classes == 2 else n_classes
        n, dim = features.shape
        self.x = torch.ones(n, dim + 1, device=self.device)
        self.x[:, :dim] = torch.as_tensor(features)
        self.y = torch.as_tensor(labels, device=self.device)
        self.val = torch.as_tensor(val, device=self.device)
        if starts is None:
            each = [linear_start(dim, self.outputs, protocol.seed, r) for r in range(self.runs)]
            starts = np.stack(each)
        if starts.shape != (self.runs, dim + 1, self.outputs):
            raise PathfmError(
                f"starts {starts.shape}, wanted (runs, d + 1, outputs) = "
                f"{(self.runs, dim + 1, self.outputs)}"
            )
        self.heads = torch.as_tensor(starts, device=self.device).repeat(1, 1, self.rates)
        self.mean, self.square = torch.zeros_like(self.heads), torch.zeros_like(self.heads)
        rates = torch.tensor(protocol.learning_rates, dtype=torch.float64, device=self.device)
        self.rate_of_column = rates.repeat_interleave(self.outputs)
        self.steps = 0

    def run(self, advance: Callable[[int], object] | None) -> TrainedHeads:
        """Trains to the end and returns the best heads."""
        protocol = self.protocol
        per_epoch = protocol.steps_per_epoch(self.orders.n_train)
        losses = torch.zeros(protocol.n_steps, self.runs, self.rates, device=self.device)
        kept = Kept(
            self.heads,
            (self.runs, self.rates),
            protocol.patience_for(self.orders.n_train),
            protocol.min_delta,
        )
        scores, at, epoch = [], [], 0
        while self.steps < protocol.n_steps and not kept.all_stopped:
            began = self.steps
            self._epoch(epoch, losses)
            epoch += 1
            if advance is not None:
                advance(self.steps - began)
            if self.steps - began == per_epoch and epoch % protocol.validate_every == 0:
                scores.append(self._validate())
                at.append(self.steps)
                kept.update(scores[-1], self.heads, self.steps)
        heads = kept.heads.view(self.runs, -1, self.rates, self.outputs).transpose(1, 2)
        still = kept.stopped_step == 0
        return TrainedHeads(
            learning_rates=protocol.learning_rates,
            weights=heads.contiguous().cpu().numpy(),
            best_score=kept.score.cpu().numpy(),
            best_step=kept.step.cpu().numpy(),
            stopped_step=torch.where(still, self.steps, kept.stopped_step).cpu().numpy(),
            losses=losses[: self.steps].cpu().numpy(),
            val_scores=torch.stack(scores).cpu().numpy(),
            val_steps=np.asarray(at, np.int64),
            n_classes=self.n_classes,
        )

    def _epoch(self, epoch: int, losses: Tensor) -> None:
        """One pass over every run's rows, or as much of it as steps are left."""
        protocol = self.protocol
        rows = np.stack([self.orders.rows(run, epoch) for run in range(self.runs)])
        order = torch.as_tensor(rows, device=self.device)
        factor = protocol.warm_factor if epoch < protocol.warm_epochs else 1.0
        rate = self.rate_of_column * factor
        decay = (1 - rate * protocol.weight_decay).float()
        for start in range(0, order.shape[1], protocol.batch_size):
            if self.steps == protocol.n_steps:
                return
            batch = order[:, start : start + protocol.batch_size]
            x = self.x.index_select(0, batch.reshape(-1)).view(*batch.shape, -1)
            losses[self.steps], gradient = self._gradient(x, self.y[batch])
            self.steps += 1
            self._adamw(gradient, rate, decay)

    def _gradient(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of each head (runs, rates) and its gradient in the heads' shape.

        d loss / d logit is softmax - one-hot (sigmoid - label for two classes), over the batch size.
        """
        runs, batch = y.shape
        logits = torch.bmm(x, self.heads).view(runs, batch, self.rates, self.outputs)
        if self.n_classes == 2:
            target = y.view(runs, batch, 1, 1).to(logits.dtype)
            loss = torch.nn.functional.softplus(logits) - logits * target
            slope = torch.sigmoid(logits) - target
        else:
            at = y.view(runs, batch, 1, 1).expand(-1, -1, self.rates, -1)
            logs = torch.log_softmax(logits, dim=-1)
            loss = -logs.gather(-1, at)
            slope = logs.exp_().scatter_add_(-1, at, torch.full_like(loss, -1.0))
        slope = slope.reshape(runs, batch, -1).div_(batch)
        return loss.squeeze(-1).mean(dim=1), torch.bmm(x.transpose(1, 2), slope)

    def _adamw(self, gradient: Tensor, rate: Tensor, decay: Tensor) -> None:
        """Loshchilov and Hutter's AdamW (algorithm 2), as torch orders its operations.

        `rate` (columns,) float64, `decay` 1 - rate * weight decay.
        """
        (beta1, beta2), eps = self.protocol.betas, self.protocol.eps
        self.heads.mul_(decay)
        self.mean.lerp_(gradient, 1 - beta1)
        self.square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = (rate / (1 - beta1**self.steps)).float()
        root = self.square.sqrt().div_((1 - beta2**self.steps) ** 0.5).add_(eps)
        self.heads.sub_(torch.div(self.mean, root).mul_(step))

    def _validate(self) -> Tensor:
        """Macro accuracy of every head on validation, (runs, rates) float32."""
        columns = self.heads.transpose(0, 1).reshape(self.heads.shape[1], -1)
        rows = max(1, _MAX_LOGITS // columns.shape[1])
        found = []
        for part in torch.split(self.val, rows):
            logits = (self.x[part] @ columns).view(len(part), -1, self.outputs)
            found.append(logits[..., 0] > 0 if self.n_classes == 2 else logits.argmax(dim=-1))
        predicted = torch.cat(found).to(torch.int64).T
        return macro_accuracy(self.y[self.val], predicted, self.n_classes).view(self.runs, -1)
