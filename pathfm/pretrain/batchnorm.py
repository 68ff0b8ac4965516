"""BatchNorm over the batch of all ranks: what one process with the whole batch computes.

On GPUs torch's own kernels (SyncBatchNorm), which know no CPU; there the same in plain torch.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from pathfm import ranks


def over_ranks(module: nn.Module, device: torch.device) -> None:
    """Gives every BatchNorm in a module the statistics of all ranks, in place; names stay."""
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, _converted(child, device))
        else:
            over_ranks(child, device)


class RanksBatchNorm(_BatchNorm):
    """BatchNorm whose mean and variance are those of all ranks' rows, with gradient through both.

    Ioffe & Szegedy 2015, algorithm 1, over the joined batch; every rank holds as many values.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions: rows, channels, the rest."""

    def forward(self, input: Tensor) -> Tensor:
        """The normalised input; in eval mode by the running statistics, without other ranks."""
        if not (self.training and self.track_running_stats and ranks.world_size() > 1):
            return self._after(super().forward(input))
        x = input.float()
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        world = ranks.world_size()
        n = world * x.numel() // x.shape[1]
        mean = cast(Tensor, _SumOverRanks.apply(x.sum(dims))) / n
        centred = x - mean.view(shape)
        variance = cast(Tensor, _SumOverRanks.apply(centred.square().sum(dims))) / n
        self._move_running(mean.detach(), variance.detach() * n / max(1, n - 1))
        out = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return self._after(out.to(input.dtype))

    def _move_running(self, mean: Tensor, variance: Tensor) -> None:
        counted = cast(Tensor, self.num_batches_tracked).add_(1)
        share = 1.0 / float(counted) if self.momentum is None else self.momentum
        cast(Tensor, self.running_mean).lerp_(mean, share)
        cast(Tensor, self.running_var).lerp_(variance, share)

    def _after(self, x: Tensor) -> Tensor:
        """timm's layers that join BatchNorm, dropout and activation go on with the latter two."""
        for name in ("drop", "act"):
            then = getattr(self, name, None)
            x = x if then is None else then(x)
        return x


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks; the gradient of what each rank makes of it is summed likewise."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return ranks.sum_over_ranks(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ranks.sum_over_ranks(grads[0])


def _converted(norm: _BatchNorm, device: torch.device) -> nn.Module:
    after = {name: part for name in ("drop", "act") if (part := getattr(norm, name, None))}
    if device.type == "cuda" and not after:
        return cast(nn.Module, nn.SyncBatchNorm.convert_sync_batchnorm(norm))  # type: ignore[no-untyped-call]
    own = RanksBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    own.train(norm.training)
    own.to(norm.running_mean.device if norm.running_mean is not None else device)
    own.load_state_dict(norm.state_dict(), strict=False)
    for parameter, old in zip(own.parameters(), norm.parameters(), strict=True):
        parameter.requires_grad_(old.requires_grad)
    for name, part in after.items():
        own.add_module(name, part)
    return own
