"""The processes of a distributed run: who we are, how tensors meet, how all stop when one must.

Alone, every function here is the identity, so nothing above asks how many ranks there are. Under
torchrun `open_ranks` joins the process group. Gradients are averaged over ranks by the loop, which
is what `gather_rows` with `grad=True` reckons with. Objects and CPU tensors go through gloo, also on
GPUs: what the ranks agree upon never waits for a device.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.rendezvous import rendezvous

from pathfm.runtime import PathfmError, one_line

TIMEOUT_S = 600.0
"""How long a rank waits for the others before it gives up; PATHFM_RANKS_TIMEOUT_S overrides it."""

FAREWELL_S = 60.0
"""How long the other ranks wait for rank 0 to close its records: what ends first ends the job."""

_LOST = ("gloo/transport/", "gloo/rendezvous/", "NCCL communicator was aborted", "ncclRemoteError")
"""What is in the words of torch's plain errors when another rank is gone; most are `DistError`s."""

_LEFT = "pathfm/first-has-left"


class PeerError(PathfmError):
    """Another rank failed, and says why itself."""


class LostRankError(PathfmError):
    """Another rank is gone, silent, or never came.

    It ends the process with a code of its own, which says "a rank was lost, start me again": above
    127, which Kubernetes takes for passing, and none of 128 + a signal's number.
    """

    exit_code = 175


@dataclass(frozen=True)
class Ranks:
    """This process's number among `world`, and among those of its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one rank that writes, prints and tracks."""
        return self.rank == 0


@contextmanager
def open_ranks(device_type: str) -> Iterator[Ranks]:
    """Joins the process group that torchrun's variables describe; alone without them.

    gloo on a CPU, gloo and NCCL on GPUs, of which each rank takes the one with its local number.
    At a clean end the others wait for rank 0, which has records to bring home, to be done first: at
    most `FAREWELL_S`. Raises ``PathfmError`` for variables that make no sense, and ``LostRankError``
    in place of torch's errors when another rank does not come, is gone or silent for `TIMEOUT_S`.
    """
    if "WORLD_SIZE" not in os.environ:
        yield Ranks()
        return
    ranks = _from_environment()
    backend = "gloo"
    if device_type == "cuda":
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(ranks.local_rank)
    seconds = float(os.environ.get("PATHFM_RANKS_TIMEOUT_S", TIMEOUT_S))
    _meet(ranks, backend, seconds)
    try:
        yield ranks
        if not ranks.first:
            _wait_for_first()
    except RuntimeError as error:
        if not _is_loss(error):
            raise
        raise LostRankError(
            f"rank {ranks.rank} of {ranks.world} lost another rank ({one_line(error)[:160]}). The "
            "error of the rank that ended first says why; start all ranks again: the run goes on "
            "from its newest checkpoint"
        ) from error
    finally:
        if ranks.first:
            with suppress(RuntimeError):
                _get_default_store().set(_LEFT, "yes")
        dist.destroy_process_group()


def _meet(ranks: Ranks, backend: str, timeout_s: float) -> None:
    """Joins the process group; every rank is there when this returns."""
    timeout = timedelta(seconds=timeout_s)
    try:
        store, rank, world = next(rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        store = _of_this_life(store, rank, world, timeout_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    except ValueError as error:
        raise PathfmError(
            f"rank {ranks.rank} of {ranks.world} cannot look for the others: {one_line(error)}"
        ) from error
    except RuntimeError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LostRankError(
            f"rank {ranks.rank} of {ranks.world} did not meet the others at {where} within "
            f"{timeout_s:g} s ({one_line(error)[:160]}). Start all ranks again"
        ) from error


def _of_this_life(store: Store, rank: int, world: int, timeout_s: float) -> Store:
    """A room in the store that only these ranks know.

    torchrun keeps its store when it starts ranks again, and the addresses of the dead are still in
    it: whoever reads one waits for it in vain. No number that torchrun gives tells one life from the
    next on all machines, so each rank calls rank 0 by a name of its own, and rank 0 answers every
    name that it finds with the room's until as many have come as there are ranks. An answer to a
    dead rank's name is read by nobody. Raises ``DistStoreError`` after `timeout_s`.
    """
    if rank > 0:
        name = secrets.token_hex(8)
        store.set(f"pathfm/name/{rank}", name)
        room = store.get(f"pathfm/room/{name}").decode()
        store.add(f"{room}-came", 1)
        return PrefixStore(room, store)
    room = f"pathfm/{secrets.token_hex(8)}"
    deadline_s = time.monotonic() + timeout_s
    while (came := store.add(f"{room}-came", 0)) < world - 1:
        for key in (f"pathfm/name/{r}" for r in range(1, world)):
            if store.check([key]):
                store.set(f"pathfm/room/{store.get(key).decode()}", room)
        if time.monotonic() > deadline_s:
            raise dist.DistStoreError(f"{came} of {world - 1} other ranks came")
        time.sleep(0.01)
    return PrefixStore(room, store)


def _wait_for_first() -> None:
    """Returns when rank 0 has left the body of `open_ranks`, is gone, or takes too long."""
    with suppress(RuntimeError):
        _get_default_store().wait([_LEFT], timedelta(seconds=FAREWELL_S))


def _is_loss(error: RuntimeError) -> bool:
    """Whether torch says that another rank does not answer."""
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


def _from_environment() -> Ranks:
    values = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ.get(name, "")
        if not text.isdigit():
            raise PathfmError(
                f"{name} is {text!r}: torchrun sets RANK, WORLD_SIZE and LOCAL_RANK, all or none. "
                "Start with torchrun, or unset WORLD_SIZE"
            )
        values[name] = int(text)
    if not values["RANK"] < values["WORLD_SIZE"]:
        raise PathfmError(f"RANK {values['RANK']} is not below WORLD_SIZE {values['WORLD_SIZE']}")
    return Ranks(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"])


def world_size() -> int:
    """How many ranks there are; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Our number among them."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather_objects(given: Any) -> list[Any]:
    """What each rank gave, in the order of ranks."""
    if world_size() == 1:
        return [given]
    everybody: list[Any] = [None] * world_size()
    dist.all_gather_object(everybody, given)
    return everybody


def agree(numbers: Sequence[int]) -> list[int]:
    """The largest of the ranks' numbers, place by place; all ranks must ask at the same point."""
    if world_size() == 1:
        return list(numbers)
    largest = torch.tensor(list(numbers), dtype=torch.int64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return cast(list[int], largest.tolist())


@contextmanager
def together() -> Iterator[None]:
    """What fails on one rank inside this context fails on all of them, at its end.

    The rank that failed raises its own error, the others a ``PeerError`` with its words. Inside it
    nothing may wait for other ranks.
    """
    try:
        yield
    except Exception as error:
        with suppress(RuntimeError):  # whoever is gone need not be told
            gather_objects(one_line(error))
        raise
    for number, words in enumerate(gather_objects(None)):
        if words is not None:
            raise PeerError(f"rank {number} failed: {words}")


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of the ranks' tensors (equal shapes), without gradient; a new tensor."""
    total = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_rows(rows: Tensor, *, grad: bool = False) -> Tensor:
    """All ranks' rows (n_r, ...) one below the other in the order of ranks; n_r may differ.

    With `grad` (equal n_r only) the gradient of our rows is the sum over ranks of what each says
    about them: divided by the number of ranks, as averaging gradients over ranks does, it is the
    gradient of the mean of the ranks' losses.
    """
    if world_size() == 1:
        return rows if grad else rows.detach()
    if grad:
        return cast(Tensor, _GatherWithGradient.apply(rows))
    counts = [int(n) for n in gather_objects(len(rows))]
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


class _GatherWithGradient(torch.autograd.Function):
    """All-gather whose backward is a sum over ranks, each then taking its own rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.n = len(rows)
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[rank() * ctx.n : (rank() + 1) * ctx.n]
