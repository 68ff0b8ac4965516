"""The slide protocol of kaiko-eva 0.4.5 on bags: runs of ABMIL (or mean pooling), best on validation.

AdamW 1e-3, batches of 32 slides, 100 epochs at most, 20 without a better validation score end a run; the
rest as `heads.fit` says. Two classes are one logit with binary cross-entropy, more are softmax with
cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pathfm.heads.fit import Order, Schedule, drawn_head, fit_best, shuffled
from pathfm.metrics import balanced_accuracy
from pathfm.probing.parts import Parts, Rows
from pathfm.slide_probe.abmil import AbMil, MeanPool
from pathfm.slide_probe.bags import Bags

_STREAM_ORDER, _STREAM_INIT = 405, 406
_EPOCH_BITS = 16

Pooling = Literal["abmil", "mean"]


@dataclass(frozen=True, kw_only=True)
class SlideProtocol(Schedule):
    """How one run is fitted; the defaults are kaiko-eva's. batch: slides a step."""

    pooling: Pooling = "abmil"
    lr: float = 1e-3
    batch: int = 32
    max_epochs: int | None = 100
    patience_epochs: int = 20


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
    rows: Rows
    probabilities: NDArray[np.float32]
    losses: tuple[float, ...]


def make_head(protocol: SlideProtocol, dim: int, n_classes: int, seed: int, run: int) -> nn.Module:
    """The untrained head; its weights are a function of (seed, run)."""
    outputs = 1 if n_classes == 2 else n_classes
    kind: type[AbMil] | type[MeanPool] = AbMil if protocol.pooling == "abmil" else MeanPool
    return drawn_head(lambda: kind(dim, outputs), seed, run, _STREAM_INIT)


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
    n_classes, at = len(bags.classes), torch.device(device)
    model = (head or make_head(protocol, bags.dim, n_classes, seed, run)).to(at)

    def loss(rows: Rows) -> Tensor:
        labels = torch.from_numpy(bags.labels[rows]).to(at)
        return loss_of(model(*packed(bags, rows, at)), labels)

    def judged(rows: Rows) -> tuple[NDArray[np.float32], float]:
        found = predict(model, bags, rows, protocol.batch, at)
        return found, balanced_accuracy(bags.labels[rows], found.argmax(1), n_classes)

    def seeded(epoch: int) -> Rows:
        return shuffled(parts.train, seed, run, epoch, _STREAM_ORDER, _EPOCH_BITS)

    fit = fit_best(
        model,
        protocol,
        order or seeded,
        loss,
        lambda: judged(parts.val)[1],
        lambda row: f"slides such as {bags.slides[row]}",
    )
    found, reported = judged(parts.reported)
    test = reported if parts.reported_on == "test" else None
    return SlideRun(fit.best, test, fit.best_epoch, fit.epochs, parts.reported, found, fit.losses)


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
