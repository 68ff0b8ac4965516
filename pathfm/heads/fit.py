"""A head fitted on frozen features and kept as it was at its best epoch on validation, as kaiko-eva 0.4.5 does.

AdamW with weight decay 0.01 (torch's default, which eva leaves), a third of the rate in the first five epochs
(ConstantLR's defaults, likewise), rows reshuffled every epoch, the last batch short; validation after every
whole epoch; the first best epoch is kept, and so many epochs without a better one end a run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from online_patching.philox import words
from pathfm.probing.parts import Rows
from pathfm.runtime import PathfmError, torch_generator

Order = Callable[[int], Rows]
"""epoch -> the training rows, shuffled"""
Head = TypeVar("Head", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How one head is fitted.

    lr: AdamW's peak rate. weight_decay: decoupled. batch: rows a step. slow_epochs: epochs at a third of
    the rate. max_epochs, steps: what ends a run at the latest; None: not that. patience_epochs: epochs
    without a better validation score that end it before. Raises PathfmError for what is not above 0.
    """

    lr: float
    batch: int
    patience_epochs: int
    weight_decay: float = 0.01
    slow_epochs: int = 5
    max_epochs: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "batch", "patience_epochs", "max_epochs", "steps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise PathfmError(f"{name} = {value}: wants a number above 0")
        if self.max_epochs is None and self.steps is None:
            raise PathfmError("neither max_epochs nor steps is set: a run would not end")

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return self.lr / 3 if epoch < self.slow_epochs else self.lr

    def ends(self, epochs: int, steps: int) -> bool:
        """Whether so many epochs, or steps, are all there are."""
        return epochs == self.max_epochs or steps == self.steps


@dataclass(frozen=True)
class Fit:
    """How a run went: its best validation score and epoch (from 0), its epochs, the loss of each step."""

    best: float
    best_epoch: int
    epochs: int
    losses: tuple[float, ...]


def fit_best(
    head: nn.Module,
    schedule: Schedule,
    order: Order,
    loss_of: Callable[[Rows], Tensor],
    score: Callable[[], float],
    named: Callable[[int], str] | None = None,
) -> Fit:
    """Fits a head in place and leaves it with the weights of its best epoch.

    loss_of: the mean loss of some rows, with its graph. score: of the head as it stands, on validation,
    0..1; NaN never wins, a tie stays with the earlier epoch. An epoch that `steps` cuts short is not
    judged, as in eva, unless it is the only one. named: what to call a row in an error.
    Raises PathfmError for a loss that is not finite.
    """
    solver = torch.optim.AdamW(
        head.parameters(), lr=schedule.lr, weight_decay=schedule.weight_decay
    )
    best, best_epoch, kept = -1.0, 0, copy.deepcopy(head.state_dict())
    losses: list[float] = []
    epoch = whole = 0  # whole: rows of an epoch
    while True:
        for group in solver.param_groups:
            group["lr"] = schedule.rate(epoch)
        rows = order(epoch)
        left = len(rows) if schedule.steps is None else schedule.steps - len(losses)
        allowed = rows[: left * schedule.batch]
        head.train()
        losses += _epoch(solver, allowed, schedule.batch, loss_of, named)
        whole = len(allowed) if epoch == 0 else whole
        if len(allowed) == whole:
            value = score()
            if value > best:
                best, best_epoch, kept = value, epoch, copy.deepcopy(head.state_dict())
        epoch += 1
        idle = epoch - 1 - best_epoch
        if schedule.ends(epoch, len(losses)) or idle >= schedule.patience_epochs:
            break
    head.load_state_dict(kept)
    return Fit(best, best_epoch, epoch, tuple(losses))


def _epoch(
    solver: torch.optim.Optimizer,
    rows: Rows,
    batch: int,
    loss_of: Callable[[Rows], Tensor],
    named: Callable[[int], str] | None,
) -> list[float]:
    """One pass over the rows: the loss of each step."""
    losses = []
    for start in range(0, len(rows), batch):
        chosen = rows[start : start + batch]
        solver.zero_grad(set_to_none=True)
        loss = loss_of(chosen)
        loss.backward()  # type: ignore[no-untyped-call]
        value = float(loss.detach())
        if not np.isfinite(value):
            where = f" on {named(int(chosen[0]))}" if named else ""
            raise PathfmError(
                f"the loss is {value}{where}: give a lower lr, or look for features of enormous size"
            )
        solver.step()
        losses.append(value)
    return losses


def shuffled(rows: Rows, seed: int, run: int, epoch: int, stream: int, epoch_bits: int) -> Rows:
    """The rows in the order of an epoch, a function of (seed, run, epoch).

    stream: of the Philox words. epoch_bits: of the counter's 32; the others number the runs.
    """
    run_bits = 32 - epoch_bits
    if run >= 1 << run_bits or epoch >= 1 << epoch_bits:
        raise PathfmError(
            f"run {run:,}, epoch {epoch:,}: want to be below {1 << run_bits:,} and {1 << epoch_bits:,}"
        )
    keys = words(seed, np.arange(len(rows)), run << epoch_bits | epoch, stream, 1)[:, 0]
    return rows[np.argsort(keys, kind="stable")]


def drawn_head(make: Callable[[], Head], seed: int, run: int, stream: int) -> Head:
    """An untrained head whose weights are a function of (seed, run); torch's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_generator(seed, run, stream).initial_seed())
        return make()
