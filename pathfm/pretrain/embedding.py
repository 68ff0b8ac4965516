"""Features of fixed pictures by the backbone in training, the work divided among the ranks.

A sharded backbone (FSDP) answers only when every rank asks. So every rank embeds an equal share,
the last ones padded, in an equal number of forward passes, and all get all features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathfm import ranks as among_ranks
from pathfm.ranks import Ranks
from pathfm.runtime import Precision, autocast
from pathfm.views import ViewSpec
from pathfm.views.render import make_views

Pixels = NDArray[np.uint8]


class Patches(Protocol):
    """Patches with what their views follow from; batches of the feed are such."""

    @property
    def pixels(self) -> Pixels:
        """uint8 (n, S, S, 3)."""

    @property
    def draws(self) -> NDArray[np.int64]:
        """int64 (n,), numbers in the stream."""

    @property
    def refs(self) -> Sequence[Any]:
        """Where each was cut: slide_id, mpp."""


class Watched(Protocol):
    """What a run shows of itself; `Trainer` is one."""

    @property
    def config(self) -> Any:
        """PretrainConfig: seed, steps, views, method and optim are looked at."""

    @property
    def device(self) -> torch.device:
        """Where the backbone is."""

    @property
    def precision(self) -> Precision:
        """Of forward passes."""

    @property
    def method(self) -> Any:
        """Its `exported` backbone is what is measured."""

    @property
    def done(self) -> Any:
        """Its `step`: optimizer steps done."""


def share_of(n: int, ranks: Ranks) -> NDArray[np.int64]:
    """Rows of n that a rank embeds: ceil(n / world) of them, the last row again where they end."""
    each = -(-n // ranks.world)
    return np.minimum(np.arange(ranks.rank * each, (ranks.rank + 1) * each), n - 1)


def embed_shared(
    trainer: Watched,
    n: int,
    ranks: Ranks,
    views_of: Callable[[slice], Tensor],
    batch_size: int,
) -> NDArray[np.float32]:
    """Features (n, D), float32, of n pictures, `share_of` them from this rank; call it on all.

    views_of gives rows of this rank's share as normalised input (b, 3, s, s) on the device. The
    backbone is in eval mode meanwhile, without gradient and uncompiled; afterwards as it was.
    """
    backbone = trainer.method.exported
    own = len(share_of(n, ranks))
    parts = []
    with torch.no_grad(), evaluating(backbone), uncompiled(backbone):
        for start in range(0, own, batch_size):
            view = views_of(slice(start, min(start + batch_size, own)))
            with autocast(trainer.device, trainer.precision):
                parts.append(backbone.embed(view).float())
    rows = among_ranks.gather_rows(torch.cat(parts))
    return np.asarray(rows[:n].cpu().numpy())


def embed_patches(
    trainer: Watched, batch: Patches, ranks: Ranks, batch_size: int
) -> NDArray[np.float32]:
    """Features (n, D) of whole patches, shrunk to the global views' size; every rank has them all."""
    backbone = trainer.method.exported
    size_px = trainer.config.views.specs[0].size_px
    own = share_of(len(batch.pixels), ranks)

    def views_of(rows: slice) -> Tensor:
        chosen = own[rows]
        pixels = torch.from_numpy(batch.pixels[chosen]).to(trainer.device)
        return make_views(
            pixels,
            batch.draws[chosen],
            [whole_patch(size_px)],
            seed=0,
            mean=backbone.mean,
            std=backbone.std,
        )[0]

    return embed_shared(trainer, len(batch.pixels), ranks, views_of, batch_size)


def normalised(pixels: Pixels, trainer: Watched) -> Tensor:
    """Pictures uint8 (n, s, s, 3) as the backbone wants them: float32 (n, 3, s, s) on its device."""
    backbone, device = trainer.method.exported, trainer.device
    mean = torch.as_tensor(backbone.mean, device=device).view(1, 3, 1, 1)
    std = torch.as_tensor(backbone.std, device=device).view(1, 3, 1, 1)
    x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div_(255.0)
    return (x - mean) / std


def whole_patch(size_px: int) -> ViewSpec:
    """A view that only shrinks: nothing cropped, nothing drawn."""
    return ViewSpec(
        size_px=size_px,
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        **dict.fromkeys(("flip", "turn", "jitter", "gray", "blur"), 0.0),
    )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every submodule's own flag is put back, whatever it was."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Its parts as they are written for a while: batches of other sizes are not compiled for.

    Each size would be compiled anew, and take from the number of forms that torch keeps at all.
    """
    parts = [part for part in module.modules() if "forward" in part.__dict__]
    compiled = [(part, part.__dict__.pop("forward")) for part in parts]
    try:
        yield
    finally:
        for part, forward in compiled:
            part.forward = forward
