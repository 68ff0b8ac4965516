"""Drop path and dropout whose draws are keyed by (seed, sample, layer): no global random state.

`key_drops` gives every such layer of a model its draws for the next batch. The same sample is then
dropped alike on any rank, in any batch, and after any resume.
"""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from online_patching.philox import uniform, words
from pathfm.runtime import PathfmError

_STREAM = 1 << 18  # and the layers' numbers above it, of which nothing else may be


class KeyedDrop(nn.Module):
    """Zeroes whole branches (`channels` None) or channels of a sample, the rest scaled up.

    In: (B, ...) without `channels`, (B, channels, ...) with. A survivor is divided by 1 - rate, so
    that the mean stays (Huang et al. 2016, stochastic depth; Srivastava et al. 2014, dropout).
    Identity in eval mode and at rate 0. Raises PathfmError in training when `key_drops` gave
    no draws, or for another number of samples; draws are kept until the next (a recomputed forward
    pass must drop alike), so call it before every batch.
    """

    def __init__(self, rate: float, channels: int | None = None) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise PathfmError(f"a drop rate is 0 or more and below 1, not {rate}")
        self.rate, self.channels = rate, channels
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x with the keyed parts zeroed."""
        if not self.training or self.rate == 0:
            return x
        if self.kept is None or len(self.kept) != len(x):
            have = "none" if self.kept is None else str(len(self.kept))
            raise PathfmError(
                f"a drop rate of {self.rate} needs draws for {len(x)} samples, and has {have}: call "
                "key_drops(model, seed, draws) before each training step"
            )
        kept = self.kept.to(x.device, x.dtype)
        kept = kept.reshape(kept.shape + (1,) * (x.dim() - kept.dim()))
        return x * (kept / (1 - self.rate))


def key_drops(model: nn.Module, seed: int, draws: ArrayLike) -> None:
    """Draws what each `KeyedDrop` of a model keeps of the samples numbered `draws`, (B,).

    A function of (seed, draw, place of the layer in the model) alone, by Philox.
    """
    layers = [module for module in model.modules() if isinstance(module, KeyedDrop)]
    for number, layer in enumerate(layers):
        if layer.rate:
            drawn = uniform(words(seed, draws, 0, _STREAM + number, layer.channels or 1))
            kept = torch.from_numpy(drawn >= layer.rate)
            layer.kept = kept if layer.channels else kept[:, 0]
