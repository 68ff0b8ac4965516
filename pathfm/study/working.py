"""Working through a grid: one process takes cell after cell; several share it by their locks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_patching.errors import PatchingError
from pathfm.runtime import (
    PathfmError,
    as_dict,
    make_folder,
    one_line,
    provenance,
    told_time,
)
from pathfm.study.cell import digest_of_cell, interrupting, run_cell, told_params
from pathfm.study.claims import WORDS, Place, aside, in_turn
from pathfm.study.plan import Cell, Study, cells_of
from pathfm.study.preparing import Prepared
from pathfm.tracking import Run, TrackingConfig, open_run
from pathfm.tracking.journal import read_state

_RANKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
"""Of torchrun: a rank that works alone must not look for the others."""


@dataclass(frozen=True)
class Grid:
    """A study with its cells' places."""

    study: Study
    folder: Path
    prepared: Prepared
    tracking: TrackingConfig

    @property
    def places(self) -> dict[str, tuple[Cell, Place]]:
        """Cell and place by the cell's name, in the order of work."""
        found = {}
        for cell in cells_of(self.study):
            digest = digest_of_cell(self.study, cell, self.prepared)
            folder = self.folder / "cells" / f"{cell.name}-{digest[:8]}"
            found[cell.name] = (cell, Place(folder, digest))
        return found


@dataclass(frozen=True)
class Share:
    """Worker k of n (k from 0): where in the grid it begins."""

    k: int = 0
    n: int = 1

    def order(self, cells: Sequence[str]) -> list[str]:
        """All cells, its own first, in the grid's order; then those that others may not get to."""
        return sorted(cells, key=lambda name: list(cells).index(name) % self.n != self.k)


def share_of(worker: str | None) -> Share:
    """What `--worker k/n` says, or torchrun's variables; those are taken away, for each rank works alone."""
    if worker is not None:
        k, _, n = worker.partition("/")
        if not (k.isdecimal() and n.isdecimal() and 0 <= int(k) < int(n)):
            raise PathfmError(f"worker {worker!r} should be K/N with 0 <= K < N, such as 0/2")
        return Share(int(k), int(n))
    if "WORLD_SIZE" not in os.environ:
        return Share()
    try:
        share = Share(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        local = int(os.environ.get("LOCAL_RANK", "0"))
    except (KeyError, ValueError) as error:
        raise PathfmError(
            f"WORLD_SIZE is set, and RANK and LOCAL_RANK do not go with it ({error}): start with torchrun, or unset it"
        ) from None
    if gpus := _gpus():  # each rank sees its own alone
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[local % len(gpus)]
    for name in _RANKS:
        os.environ.pop(name, None)
    return share


def work(grid: Grid, share: Share, look: Callable[[], None]) -> None:
    """Does every cell that is not done and that nobody else works on; twice, for some are let go meanwhile.

    `look` is called after each. A cell that fails, whatever of, is told and kept for the next time; Stopped
    and Ctrl-C end the work.
    """
    began_s, places = time.time(), grid.places
    parent = parent_run(grid)
    with interrupting():
        for _ in range(2):
            for name in share.order(list(places)):
                cell, place = places[name]
                if place.result() is not None or place.failed_since(began_s):
                    continue
                with place.claimed() as ours:
                    if not ours or place.result() is not None:
                        continue
                    _one(grid, cell, place, parent)
                look()


def _one(grid: Grid, cell: Cell, place: Place, parent: str) -> None:
    words = place.folder / WORDS
    print(f"{grid.study.name}: {cell.name}, its words in {words}", flush=True)
    began_s = time.monotonic()
    try:
        with aside(words), _tracked(grid, cell, place, parent) as (run, tracking):
            facts = run_cell(grid.study, cell, grid.prepared, place.folder, run, tracking)
        about = {k: v for k, v in provenance().items() if k != "command"}
        place.finish({**facts, "provenance": about})
    except Exception as error:  # full disks, memory, bugs: the other cells can go on
        known = isinstance(error, (PathfmError, PatchingError))
        why = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
        place.fail(why)
        if not known:
            traceback.print_exc()
        print(f"study {grid.study.name}: {cell.name} failed: {why}", file=sys.stderr)
        return
    print(f"{cell.name}: done in {told_time(time.monotonic() - began_s)}", flush=True)


@contextmanager
def _tracked(
    grid: Grid, cell: Cell, place: Place, parent: str
) -> Iterator[tuple[Run, TrackingConfig]]:
    """The cell's run, a child of the study's, and the settings of runs that are children of it."""
    of_parent = {"run_name": cell.name, "parent_run_id": parent or None}
    own = grid.tracking.model_copy(update=of_parent)
    with _gone_on(own, place.folder / "tracking", told_params(grid.study, cell), "cell") as run:
        yield run, grid.tracking.model_copy(update={"parent_run_id": run.run_id})


@contextmanager
def _gone_on(
    config: TrackingConfig, folder: Path, params: dict[str, Any], what: str
) -> Iterator[Run]:
    """A tracked run that goes on where an earlier process left it."""
    state = read_state(folder)
    run_id = (state.run_id or f"pending-{state.key}") if state else None
    with open_run(config, folder, params, provenance() | {"stage": what}, run_id) as run:
        yield run


def parent_run(grid: Grid) -> str:
    """MLflow's id of the study's run, made by whichever process comes first."""
    folder = grid.folder / "tracking"
    with in_turn(folder):
        state = read_state(folder)
        if state is not None and state.run_id:
            return state.run_id
        named = grid.tracking.model_copy(update={"run_name": grid.study.name})
        with _gone_on(named, folder, as_dict(grid.study), "study") as run:
            run.stopped = True  # it has cells to go: KILLED until the page is made
            return run.run_id


def tell_parent(grid: Grid, summary: dict[str, float], files: Sequence[Path]) -> None:
    """The verdict's figures and the page, for MLflow: the study's run has come to its end."""
    folder = grid.folder / "tracking"
    named = grid.tracking.model_copy(update={"run_name": grid.study.name})
    with in_turn(folder), _gone_on(named, folder, {}, "study") as run:
        run.summary(**summary)
        for path in files:
            run.artifact(path)


@contextmanager
def processes(
    n: int, words: Sequence[str], folder: Path
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """n processes of `pathfm study` on one grid, each with its share of the cores, or a GPU; ended with us.

    Their words go to `<folder>/worker_K.log`.
    """
    started: list[subprocess.Popen[bytes]] = []
    cores = max(1, (os.cpu_count() or 1) // n)
    try:
        for k in range(n):
            command = [sys.executable, "-m", "pathfm", "study", *words, "--worker", f"{k}/{n}"]
            given = {"OMP_NUM_THREADS": str(cores), **os.environ}
            if gpus := _gpus():
                given["CUDA_VISIBLE_DEVICES"] = gpus[k % len(gpus)]
            with (make_folder(folder) / f"worker_{k}.log").open("ab") as log:
                started.append(
                    subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=given)
                )
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        for process in started:
            process.wait()


def _gpus() -> list[str]:
    """The names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def n_gpus() -> int:
    """How many GPUs this process may use."""
    return len(_gpus())
