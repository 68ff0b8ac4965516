"""The segmentation protocol of kaiko-eva 0.4.5 on maps of frozen tokens: a head, Dice loss, best on validation.

AdamW 2e-3, weight decay 0.01 (torch's default, which eva leaves), a third of the rate in the first five
epochs (ConstantLR's defaults, likewise), batches of 64 pictures reshuffled every epoch, the last one short;
2,000 steps; validation after every epoch by mean Dice without background; the first best epoch is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from online_patching.philox import words
from pathfm.runtime import PathfmError
from pathfm.segmentation.probe_heads import HeadName, TokenHead, make_head
from pathfm.segmentation.probe_scores import DiceTable, dice_table, eva_dice_loss

_STREAM_ORDER = 408

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class SegmentationProtocol:
    """How one run is fitted; the defaults are kaiko-eva's (patience: CoNSeP 200, MoNuSAC 100)."""

    head: HeadName = "conv"
    lr: float = 2e-3
    weight_decay: float = 0.01
    batch: int = 64
    steps: int = 2000
    patience_epochs: int = 200
    slow_epochs: int = 5

    def __post_init__(self) -> None:
        for name in ("lr", "batch", "steps", "patience_epochs"):
            if not 0 < getattr(self, name) < float("inf"):
                raise PathfmError(f"{name} = {getattr(self, name)}: wants a number above 0")


@dataclass(frozen=True, eq=False)
class MaskedMaps:
    """Token maps of n pictures and their masks.

    maps: one float array (n, C, h, w) a layer. masks: integers (n, H, W), 0 the background. classes: names,
    background first. ignore: a number in the masks that is no class. Memory-mapped arrays will do.
    Raises PathfmError for parts that do not belong together.
    """

    maps: Sequence[NDArray[np.floating]]
    masks: NDArray[np.integer]
    classes: tuple[str, ...]
    ignore: int | None = None

    def __post_init__(self) -> None:
        n = len(self.masks)
        if not self.maps or any(m.ndim != 4 or len(m) != n for m in self.maps) or not n:
            raise PathfmError(
                f"maps {[m.shape for m in self.maps]} and masks {self.masks.shape}: wants (n, C, h, w) "
                "each and (n, H, W) of as many pictures"
            )
        if self.masks.ndim != 3 or self.masks.dtype.kind not in "iu":
            raise PathfmError(
                f"masks {self.masks.shape} {self.masks.dtype}: want integers (n, H, W)"
            )
        found = {*np.unique(self.masks).tolist()} - {*range(len(self.classes)), self.ignore}
        if found:
            raise PathfmError(
                f"masks hold {min(found)}, which is none of {len(self.classes)} classes: map it to "
                "one, or tell it as the number to be ignored"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each layer's map."""
        return tuple(int(m.shape[1]) for m in self.maps)

    def batch(self, rows: Rows, at: torch.device) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(maps, masks) of some pictures, float32 and int64."""
        maps = [torch.from_numpy(np.asarray(m[rows], np.float32)).to(at) for m in self.maps]
        return maps, torch.from_numpy(np.asarray(self.masks[rows], np.int64)).to(at)


@dataclass(frozen=True, eq=False)
class SegmentationRun:
    """What one run found: Dice tables of validation and, if there is one, test; losses of each step."""

    val: DiceTable
    test: DiceTable | None
    best_epoch: int
    epochs: int
    losses: tuple[float, ...]


def shuffled(rows: Rows, seed: int, run: int, epoch: int) -> Rows:
    """The rows in the order of an epoch, a function of (seed, run, epoch)."""
    if run >= 1 << 12 or epoch >= 1 << 20:
        raise PathfmError(f"run {run}, epoch {epoch}: want to be below {1 << 12} and {1 << 20}")
    keys = words(seed, np.arange(len(rows)), run << 20 | epoch, _STREAM_ORDER, 1)[:, 0]
    return rows[np.argsort(keys, kind="stable")]


def fit_run(
    data: MaskedMaps,
    train: Rows,
    val: Rows,
    test: Rows,
    protocol: SegmentationProtocol,
    *,
    seed: int = 0,
    run: int = 0,
    device: str | torch.device = "cpu",
    head: TokenHead | None = None,
    order: Callable[[int], Rows] | None = None,
    eva_ignore: bool = False,
) -> SegmentationRun:
    """Fits one head on the training pictures, keeps its best epoch on validation, reports the test.

    test: may be empty; then validation chooses and reports. head, order: in place of the seeded ones,
    to compare with another implementation. eva_ignore: see `dice_table`.
    Raises PathfmError for parts that overlap or are empty, and for a loss that is not finite.
    """
    _check_parts(train, val, test)
    at = torch.device(device)
    head = (head or make_head(protocol.head, data.widths, len(data.classes), seed, run)).to(at)
    order = order or (lambda epoch: shuffled(train, seed, run, epoch))
    solver = torch.optim.AdamW(
        head.parameters(), lr=protocol.lr, weight_decay=protocol.weight_decay
    )
    best, best_epoch, kept = -1.0, 0, copy.deepcopy(head.state_dict())
    losses: list[float] = []
    epoch = 0
    while len(losses) < protocol.steps:
        for group in solver.param_groups:
            group["lr"] = protocol.lr / 3 if epoch < protocol.slow_epochs else protocol.lr
        left = protocol.steps - len(losses)
        losses += _epoch(head, solver, data, order(epoch), protocol.batch, left, at)
        epoch += 1
        if len(losses) == protocol.steps and left < -(-len(train) // protocol.batch) and epoch > 1:
            break  # a last epoch cut short is not judged, as in eva
        value = score(head, data, val, protocol.batch, at, eva_ignore).mean
        if value > best:  # a tie stays with the earlier epoch; NaN never wins
            best, best_epoch, kept = value, epoch - 1, copy.deepcopy(head.state_dict())
        if epoch - 1 - best_epoch >= protocol.patience_epochs:
            break
    head.load_state_dict(kept)
    chosen = score(head, data, val, protocol.batch, at, eva_ignore)
    tested = score(head, data, test, protocol.batch, at, eva_ignore) if len(test) else None
    return SegmentationRun(chosen, tested, best_epoch, epoch, tuple(losses))


def _epoch(
    head: TokenHead,
    solver: torch.optim.Optimizer,
    data: MaskedMaps,
    rows: Rows,
    batch: int,
    most_steps: int,
    at: torch.device,
) -> list[float]:
    """One pass over the training pictures, or `most_steps` of it: the loss of each step."""
    head.train()
    losses = []
    for start in range(0, min(len(rows), most_steps * batch), batch):
        maps, truth = data.batch(rows[start : start + batch], at)
        solver.zero_grad(set_to_none=True)
        loss = eva_dice_loss(head(maps, (truth.shape[1], truth.shape[2])), truth, data.ignore)
        loss.backward()  # type: ignore[no-untyped-call]
        value = float(loss.detach())
        if not np.isfinite(value):
            raise PathfmError(
                f"the loss is {value}: give a lower lr, or look for tokens of enormous size"
            )
        solver.step()
        losses.append(value)
    return losses


@torch.inference_mode()
def predict(
    head: TokenHead, data: MaskedMaps, rows: Rows, batch: int = 64, at: str | torch.device = "cpu"
) -> NDArray[np.uint8]:
    """The class of every pixel, (n, H, W) uint8."""
    head.eval()
    device, found = torch.device(at), []
    for start in range(0, len(rows), batch):
        maps, truth = data.batch(rows[start : start + batch], device)
        logits = head(maps, (truth.shape[1], truth.shape[2]))
        found.append(logits.argmax(1).to(torch.uint8).cpu().numpy())
    return np.concatenate(found)


def score(
    head: TokenHead,
    data: MaskedMaps,
    rows: Rows,
    batch: int = 64,
    at: str | torch.device = "cpu",
    eva_ignore: bool = False,
) -> DiceTable:
    """The Dice of each picture and class."""
    predicted = predict(head, data, rows, batch, at)
    return dice_table(predicted, data.masks[rows], data.classes, data.ignore, eva_ignore)


def _check_parts(train: Rows, val: Rows, test: Rows) -> None:
    if not len(train) or not len(val):
        raise PathfmError(
            f"{len(train)} training and {len(val)} validation pictures: wants some of both"
        )
    for a, b, names in (
        (train, val, "train and val"),
        (train, test, "train and test"),
        (val, test, "val and test"),
    ):
        both = np.intersect1d(a, b)
        if len(both):
            raise PathfmError(
                f"{len(both)} pictures are in {names}, the first is row {both[0]}: split again"
            )
