"""The slide protocol of kaiko-eva 0.4.5 on bags: runs of ABMIL (or mean pooling), best on validation.

AdamW 1e-3, weight decay 0.01 (torch's default, which eva leaves), a third of the rate in the first five
epochs (ConstantLR's defaults, likewise), batches of 32 slides reshuffled every epoch, the last one short;
100 epochs at most, 20 without a better validation score end a run; the first best epoch is kept.
Two classes are one logit with binary cross-entropy, more are softmax with cross-entropy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from online_patching.philox import words
from pathfm.metrics import balanced_accuracy
from pathfm.runtime import PathfmError, torch_generator
from pathfm.slide_probe.abmil import AbMil, MeanPool
from pathfm.slide_probe.bags import Bags
from pathfm.slide_probe.folds import Parts

_STREAM_ORDER, _STREAM_INIT = 405, 406

Pooling = Literal["abmil", "mean"]
Order = Callable[[int], NDArray[np.int64]]  # epoch -> the training rows, shuffled


@dataclass(frozen=True)
class SlideProtocol:
    """How one run is fitted; the defaults are kaiko-eva's.

    lr: peak learning rate. weight_decay: AdamW's, decoupled. batch_slides: slides a step.
    max_epochs, patience_epochs: when a run ends. slow_epochs: epochs at a third of the rate.
    """

    pooling: Pooling = "abmil"
    lr: float = 1e-3
    weight_decay: float = 0.01
    batch_slides: int = 32
    max_epochs: int = 100
    patience_epochs: int = 20
    slow_epochs: int = 5

    def __post_init__(self) -> None:
        for name in ("lr", "batch_slides", "max_epochs", "patience_epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                raise PathfmError(f"{name} = {getattr(self, name)}: wants a number above 0")

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return self.lr / 3 if epoch < self.slow_epochs else self.lr


@dataclass(frozen=True, eq=False)
class SlideRun:
    """What one run found. Probabilities of the reported slides, (n, classes), in the order of `rows`.

    val, test: balanced accuracy 0..1; test None where there are no test slides. best_epoch: from 0.
    losses: mean training loss of each step.
    """

    val: float
    test: float | None
    best_epoch: int
    epochs: int
    rows: NDArray[np.int64]
    probabilities: NDArray[np.float32]
    losses: tuple[float, ...]


def make_head(protocol: SlideProtocol, dim: int, n_classes: int, seed: int, run: int) -> nn.Module:
    """The untrained head; its weights are a function of (seed, run)."""
    outputs = 1 if n_classes == 2 else n_classes
    generator = torch_generator(seed, run, _STREAM_INIT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        return AbMil(dim, outputs) if protocol.pooling == "abmil" else MeanPool(dim, outputs)


def shuffled(rows: NDArray[np.int64], seed: int, run: int, epoch: int) -> NDArray[np.int64]:
    """The rows in the order of an epoch, a function of (seed, run, epoch)."""
    if run >= 1 << 16 or epoch >= 1 << 16:
        raise PathfmError(f"run {run}, epoch {epoch}: both want to be below {1 << 16}")
    keys = words(seed, np.arange(len(rows)), run << 16 | epoch, _STREAM_ORDER, 1)[:, 0]
    return rows[np.argsort(keys, kind="stable")]


def fit_run(
    bags: Bags,
    parts: Parts,
    protocol: SlideProtocol,
    *,
    seed: int = 0,
    run: int = 0,
    device: str | torch.device = "cpu",
    head: nn.Module | None = None,
    order: Order | None = None,
) -> SlideRun:
    """Fits one head on the training slides, keeps its best epoch on validation, reports the test.

    Validation alone chooses; the test slides are read once, after the last epoch. head, order: in
    place of the seeded initial weights and shuffling, to compare with another implementation.
    Raises PathfmError for a loss that is not finite, and as `Bags.read` does.
    """
    n_classes = len(bags.classes)
    at = torch.device(device)
    head = (head or make_head(protocol, bags.dim, n_classes, seed, run)).to(at)
    order = order or (lambda epoch: shuffled(parts.train, seed, run, epoch))
    solver = torch.optim.AdamW(
        head.parameters(), lr=protocol.lr, weight_decay=protocol.weight_decay
    )
    best, best_epoch, kept, losses = -1.0, 0, copy.deepcopy(head.state_dict()), []
    for epoch in range(protocol.max_epochs):
        for group in solver.param_groups:
            group["lr"] = protocol.rate(epoch)
        losses += _epoch(head, solver, bags, order(epoch), protocol.batch_slides, at)
        found = predict(head, bags, parts.val, protocol.batch_slides, at)
        value = balanced_accuracy(bags.labels[parts.val], found.argmax(1), n_classes)
        if value > best:  # a tie stays with the earlier epoch
            best, best_epoch, kept = value, epoch, copy.deepcopy(head.state_dict())
        if epoch - best_epoch >= protocol.patience_epochs:
            break
    head.load_state_dict(kept)
    rows = parts.val if parts.val_reports else parts.test
    found = predict(head, bags, rows, protocol.batch_slides, at)
    score = balanced_accuracy(bags.labels[rows], found.argmax(1), n_classes)
    test = None if parts.val_reports else score
    return SlideRun(best, test, best_epoch, epoch + 1, rows, found, tuple(losses))


def _epoch(
    head: nn.Module,
    solver: torch.optim.Optimizer,
    bags: Bags,
    rows: NDArray[np.int64],
    batch: int,
    at: torch.device,
) -> list[float]:
    """One pass over the training slides: the loss of each step."""
    head.train()
    losses = []
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        solver.zero_grad(set_to_none=True)
        loss = loss_of(
            head(*packed(bags, chosen, at)), torch.from_numpy(bags.labels[chosen]).to(at)
        )
        loss.backward()  # type: ignore[no-untyped-call]
        value = float(loss.detach())
        if not np.isfinite(value):
            raise PathfmError(
                f"the loss is {value} on slides such as {bags.slides[chosen[0]]}: give a lower lr, or "
                "look for features of enormous size"
            )
        solver.step()
        losses.append(value)
    return losses


def packed(
    bags: Bags, rows: Sequence[int] | NDArray[np.int64], at: torch.device
) -> tuple[Tensor, list[int]]:
    """The features of some slides one behind the other, and how many each has."""
    read = [torch.from_numpy(np.ascontiguousarray(bags.read(int(i)))) for i in rows]
    return torch.cat(read).to(at, non_blocking=True), [len(part) for part in read]


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy: (B, 1) logits are binary, (B, C) are softmax's."""
    if logits.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(logits[:, 0], labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


@torch.inference_mode()
def predict(
    head: nn.Module,
    bags: Bags,
    rows: NDArray[np.int64],
    batch: int = 32,
    at: str | torch.device = "cpu",
) -> NDArray[np.float32]:
    """Class probabilities (n, classes) of some slides."""
    head.eval()
    device = torch.device(at)
    found = []
    for start in range(0, len(rows), batch):
        logits = head(*packed(bags, rows[start : start + batch], device)).float()
        if logits.shape[1] == 1:
            positive = logits.sigmoid()
            found.append(torch.cat([1 - positive, positive], 1).cpu())
        else:
            found.append(logits.softmax(1).cpu())
    return np.asarray(torch.cat(found).numpy())
