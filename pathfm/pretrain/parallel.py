"""One method on several ranks: whole on each (DDP) or in shards (FSDP2), its blocks compiled.

`spread` makes the module whose call is the loss and whose gradients are the mean over ranks, be it
one rank or a hundred. Everything else sees plain names and, through `whole`, plain tensors: a
checkpoint is the same file whatever wrote it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from pathfm.backbone import Backbone
from pathfm.methods import Method
from pathfm.pretrain.batchnorm import over_ranks
from pathfm.ranks import Ranks
from pathfm.runtime import PathfmError

How = Literal["ddp", "fsdp"]


def prepare(
    method: Method, how: How, compiled: bool, precision: str, ranks: Ranks, device: torch.device
) -> None:
    """Makes the method's modules what `spread` wants, in place; before the optimizer is made."""
    module = cast(nn.Module, method)
    if ranks.world > 1:
        over_ranks(module, device)
    if compiled:
        _make_room(len(_blocks(module)))
        for block in _blocks(module):
            # not block.compile(): hooks (sharding's among them) then stay outside of the graph
            block.forward = torch.compile(block.forward, dynamic=False)
    if how == "fsdp" and ranks.world > 1:
        _shard(module, precision, ranks, device)


def spread(method: Method, how: How, ranks: Ranks) -> nn.Module:
    """The module to call: `spread(method, ...)(micro)` is the loss of a micro-batch.

    Its backward pass leaves the mean over ranks of the gradients, summed over the micro-batches since
    they were cleared. `prepare` comes first.
    """
    module = cast(nn.Module, method)
    if ranks.world == 1 or how == "fsdp":
        return module
    # buffers follow from the global batch (centres, statistics), so every rank has the same
    takes = inspect.signature(DistributedDataParallel).parameters
    new, old = "forward_sync_buffers", "broadcast_buffers"  # newer torch warns of the old name
    unsynced: dict[str, Any] = {new if new in takes else old: False}
    return DistributedDataParallel(module, gradient_as_bucket_view=True, **unsynced)


@contextmanager
def gradients_meet(module: nn.Module, now: bool) -> Iterator[None]:
    """Around forward and backward of a micro-batch: ranks exchange gradients only if `now`."""
    if isinstance(module, DistributedDataParallel) and not now:
        with module.no_sync():
            yield
        return
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(now, recurse=False)
    yield


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that lies in shards; then every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, placed: Tensor) -> Tensor:
    """A whole tensor laid out as `placed` is: the inverse of `whole`, for tensors of its shape."""
    if not isinstance(placed, DTensor) or value.shape != placed.shape:
        return value
    moved = value.to(placed.device)
    return distribute_tensor(moved, placed.device_mesh, placed.placements)


def refuse_split_batchnorm(method: Method, count: int) -> None:
    """PathfmError when BatchNorm would see one of `count` micro-batches at a time."""
    norms = [m for m in cast(nn.Module, method).modules() if isinstance(m, _BatchNorm)]
    if norms and count > 1:
        raise PathfmError(
            f"BatchNorm ({len(norms)} layers) needs the whole batch at once, micro_batch_size makes "
            f"{count} parts of a rank's: leave it unset, use more ranks, or a backbone with LayerNorm"
        )


def _make_room(n_blocks: int) -> None:
    """Lets torch keep what all blocks compile to: past its limit it runs the rest uncompiled, unsaid.

    It counts by the source of `forward`, which blocks share: each has up to five forms (teacher,
    student on global and on local views, both also without gradient), and a few to spare.
    """
    import torch._dynamo.config as limits

    wanted = 8 * n_blocks
    limits.recompile_limit = max(limits.recompile_limit, wanted)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, wanted)


def _shard(module: nn.Module, precision: str, ranks: Ranks, device: torch.device) -> None:
    """Shards the backbones block by block, and every other part that has weights of its own."""
    mesh = init_device_mesh(device.type, (ranks.world,))
    # the residual stream stays fp32; only the weights of the blocks travel and multiply in bf16.
    # Not on a CPU, whose norms want weights of their input's type, nor with BatchNorm, whose running
    # statistics are fp32: there autocast alone
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    batchnorm = any(isinstance(m, _BatchNorm) for m in module.modules())
    narrow = precision == "bf16" and device.type == "cuda" and not batchnorm
    policy = bf16 if narrow else MixedPrecisionPolicy()
    for block in _blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    for part in _parts(module):
        # True, also at the root: a teacher has no backward pass that would shard it again
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        for name in ("embed", "tokens"):
            if isinstance(part, Backbone):
                register_fsdp_forward_method(part, name)


def _blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks of every backbone in a module: a ViT's layers, a ConvNet's stages."""
    return [b for part in module.modules() if isinstance(part, Backbone) for b in part.blocks]


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that are called as such: backbones, heads; not what only holds them."""
    for child in module.children():
        if isinstance(child, (nn.ModuleDict, nn.ModuleList)):
            yield from _parts(child)
        elif any(True for _ in child.parameters()):
            yield child
