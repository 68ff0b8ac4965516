"""The segmentation protocol of kaiko-eva 0.4.5 on maps of frozen tokens: a head, Dice loss, best on validation.

AdamW 2e-3, batches of 64 pictures, 2,000 steps; validation after every whole epoch by mean Dice without
background; the rest as `heads.fit` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from pathfm.heads.fit import Order, Schedule, fit_best, shuffled
from pathfm.probing.parts import Parts, Rows
from pathfm.runtime import PathfmError
from pathfm.segmentation_probe.decoders import HeadName, TokenHead, make_head
from pathfm.segmentation_probe.scores import DiceTable, dice_table, eva_dice_loss

_STREAM_ORDER = 408
_EPOCH_BITS = 20


@dataclass(frozen=True, kw_only=True)
class SegmentationProtocol(Schedule):
    """How one run is fitted; the defaults are kaiko-eva's (patience: CoNSeP 200, MoNuSAC 100)."""

    head: HeadName = "conv"
    lr: float = 2e-3
    batch: int = 64
    steps: int | None = 2000
    patience_epochs: int = 200


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
    """What one run found: Dice tables of validation and of what is reported; losses of each step.

    test: None where there is no test part, and validation is what is reported.
    """

    val: DiceTable
    test: DiceTable | None
    best_epoch: int
    epochs: int
    losses: tuple[float, ...]


def fit_run(
    data: MaskedMaps,
    parts: Parts,
    protocol: SegmentationProtocol,
    *,
    seed: int = 0,
    run: int = 0,
    device: str | torch.device = "cpu",
    head: TokenHead | None = None,
    order: Order | None = None,
    eva_ignore: bool = False,
) -> SegmentationRun:
    """Fits one head on the training pictures, keeps its best epoch on validation, reports the test.

    Without a test part validation chooses and reports. head, order: in place of the seeded ones, to
    compare with another implementation. eva_ignore: see `dice_table`. PathfmError for a loss not finite.
    """
    at = torch.device(device)
    model = head or make_head(protocol.head, data.widths, len(data.classes), seed, run)
    model = model.to(at)

    def loss(rows: Rows) -> torch.Tensor:
        maps, truth = data.batch(rows, at)
        return eva_dice_loss(model(maps, (truth.shape[1], truth.shape[2])), truth, data.ignore)

    def judged(rows: Rows) -> DiceTable:
        return score(model, data, rows, protocol.batch, at, eva_ignore)

    def seeded(epoch: int) -> Rows:
        return shuffled(parts.train, seed, run, epoch, _STREAM_ORDER, _EPOCH_BITS)

    fit = fit_best(model, protocol, order or seeded, loss, lambda: judged(parts.val).mean)
    tested = judged(parts.test) if len(parts.test) else None
    return SegmentationRun(judged(parts.val), tested, fit.best_epoch, fit.epochs, fit.losses)


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
