"""Checkpoints: one folder a step, whole or not there, found again after any crash.

    checkpoints/
      last                      text: the name of the newest folder
      step_00000120/
        tensors.safetensors     weights, buffers, optimizer moments, under dotted names
        state.json              everything that is no tensor
        backbone/               the backbone in timm's local-dir form (where the caller writes it)
        checksums.json          size and sha256 of every file above

A folder is written under another name, synced and renamed. `load_newest` trusts checksums, not
names: what is truncated or changed is skipped with a warning, and the one before it is taken.
No pickles anywhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from online_patching.errors import StoreError
from online_patching.stores.local import atomic_write_text
from pathfm.runtime import PathfmError, make_folder

_log = logging.getLogger(__name__)
Placed = Callable[[Tensor, Tensor], Tensor]

TENSORS, STATE, CHECKSUMS, LAST = "tensors.safetensors", "state.json", "checksums.json", "last"
_PREFIX, _UNFINISHED = "step_", ".unfinished-"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved: tensors on the CPU, JSON state, the number of optimizer steps done."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    root: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep_last: int,
    write_more: Callable[[Path], None] | None = None,
) -> Path:
    """Writes root/step_NNNNNNNN, points `last` at it, keeps it and the newest others, whole ones
    only, `keep_last` in all.

    write_more gets the unfinished folder and may add files. After a crash at any instruction the
    folder is whole or not there. Raises PathfmError when the disk refuses.
    """
    target = make_folder(root) / f"{_PREFIX}{step:08d}"
    _sweep(root)
    work = root / f"{_UNFINISHED}{target.name}"
    try:
        work.mkdir()
        cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(cpu, work / TENSORS)
        (work / STATE).write_text(json.dumps({"step": step, **state}, indent=1))
        if write_more is not None:
            write_more(work)
        _write_checksums(work)
        if target.exists():  # a damaged one of the same step, from before a crash
            target.rename(root / f"{_UNFINISHED}old-{target.name}")
        work.rename(target)
        _sync(root)
        atomic_write_text(root / LAST, target.name + "\n")
    except (OSError, SafetensorError, StoreError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise PathfmError(
            f"checkpoint {target} cannot be written: {error}. Free space; the run resumes from "
            "the newest whole one"
        ) from error
    others = (old for old in _folders(root) if old != target and not _damage(old))
    kept = {target, *islice(others, keep_last - 1)}
    for old in set(_folders(root)) - kept:
        # renamed first: a deletion cut short leaves nothing that looks like a checkpoint
        old.rename(root / f"{_UNFINISHED}old-{old.name}")
    _sweep(root)
    return target


def load_newest(
    root: Path, of_run: Callable[[Mapping[str, Any]], bool] = lambda state: True
) -> Checkpoint | None:
    """The newest checkpoint whose every file is as it was written, or None where there is none.

    `of_run` is asked of each one's state: a folder may still hold those of an earlier run.
    """
    for folder in _folders(root):
        try:
            found = load_checkpoint(folder)
        except PathfmError as error:
            _log.warning("skipped a checkpoint: %s", error)
            continue
        if of_run(found.state):
            return found
    return None


def load_checkpoint(folder: Path) -> Checkpoint:
    """One checkpoint, verified; PathfmError says which file is damaged and how."""
    damage = _damage(folder)
    if damage:
        raise PathfmError(f"checkpoint {folder} is damaged: {damage}. Use an earlier one")
    state = json.loads((folder / STATE).read_text())
    return Checkpoint(folder, int(state["step"]), load_file(folder / TENSORS), state)


def digest_of(folder: Path) -> str:
    """sha256 of a checkpoint's checksums: one name for all its bytes."""
    return hashlib.sha256((folder / CHECKSUMS).read_bytes()).hexdigest()


def pack_optimizer(
    optimizer: torch.optim.Optimizer,
    whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    *,
    keep: bool = True,
) -> tuple[dict[str, Tensor], list[Any]]:
    """An optimizer's state as ("optimizer.<parameter>.<name>" -> tensor, JSON param groups).

    `whole` makes plain tensors of what lies in shards; it is called in the same order on every rank.
    keep: False on ranks that only take part in it; they get no tensors, and copy none to the CPU.
    """
    state, tensors = optimizer.state_dict(), {}
    for index, values in state["state"].items():
        for name, value in values.items():
            one = whole(torch.as_tensor(value))
            if keep:
                tensors[f"optimizer.{index}.{name}"] = one.detach().cpu()
    return tensors, state["param_groups"]


def unpack_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    groups: list[Any],
    placed: Placed = lambda value, parameter: value,
) -> None:
    """Give an optimizer over the same parameters what `pack_optimizer` took.

    `placed` lays a tensor out as the parameter it belongs to.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, key = rest.partition(".")
            value = placed(tensor, parameters[int(index)])
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})


@dataclass(frozen=True)
class Computing:
    """What decides the last bit of a sum: processor, torch build, threads, device, ranks."""

    cpu: str
    build: str
    threads: int
    device: str
    ranks: int

    @classmethod
    def here(cls, ranks: int, device: torch.device) -> Computing:
        """What this process computes with now."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        build = f"{torch.__version__} ({(torch.version.git_version or '')[:12]})"
        return cls(cpu_type(), build, torch.get_num_threads(), name, ranks)

    def restore(self, ranks: int, device: torch.device) -> list[str]:
        """Sets the thread count this was saved with; says what else differs, in words."""
        if self.ranks == ranks:
            torch.set_num_threads(self.threads)
        now = Computing.here(ranks, device)
        pairs = [(name, getattr(self, name), getattr(now, name)) for name in vars(self)]
        return [f"{name} {old}, now {new}" for name, old, new in pairs if old != new]


def cpu_type() -> str:
    """The processor's name and the widest instructions torch uses of it."""
    name = platform.processor() or platform.machine()
    try:
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
        name = found[1].strip() if found else name
    except OSError:
        pass
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def _folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted((p for p in root.glob(f"{_PREFIX}*") if p.is_dir()), reverse=True)


def _sweep(root: Path) -> None:
    """Removes what an interrupted save or deletion left."""
    for stale in root.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(stale, ignore_errors=True)


def _write_checksums(folder: Path) -> None:
    """checksums.json over all files, everything synced to disk."""
    sums = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        _sync(path)
        sums[path.relative_to(folder).as_posix()] = [path.stat().st_size, file_sha256(path)]
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1))
    for path in (folder / CHECKSUMS, folder):
        _sync(path)


def _damage(folder: Path) -> str:
    """What is wrong with a folder's files, or ""."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        for name, (size_bytes, digest) in sums.items():
            path = folder / name
            if path.stat().st_size != size_bytes:
                return f"{name} has {path.stat().st_size:,} of {size_bytes:,} bytes"
            if file_sha256(path) != digest:
                return f"{name} has other bytes than were written"
        if not {TENSORS, STATE} <= set(sums):
            return f"{CHECKSUMS} lists no {TENSORS}"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read ({error})"
    return ""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex; raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
