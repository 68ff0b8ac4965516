"""Why a run stops before its end: a signal, or a step that is not finite. Both on all ranks alike."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from pathfm.pretrain.feed import FeedBatch
from pathfm.ranks import PeerError, Ranks, agree, rank
from pathfm.runtime import PathfmError, make_folder

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""What Slurm (`--signal=USR1@...`), Kubernetes and spot machines send some time before they kill,
and Ctrl-C."""
_ONE_PRESS_S = 1.0
"""A Ctrl-C reaches ranks twice, from the terminal and passed on by torchrun; a person is slower."""


@dataclass
class Told:
    """The signal this process was sent, 0 while there was none."""

    number: int = 0
    interrupted_s: float | None = None

    def all_ranks(self) -> int:
        """The signal that any rank was sent; all must ask at the same point, and act upon it."""
        return agree([self.number])[0]

    def hear(self, number: int, frame: FrameType | None) -> None:
        """The handler. A second Ctrl-C raises KeyboardInterrupt at once."""
        if number == signal.SIGINT:
            now_s = time.monotonic()
            if self.interrupted_s is None:
                self.interrupted_s = now_s
                if rank() == 0:  # not print: it may be what was interrupted
                    os.write(
                        2, b"pretrain: ends its step and saves; Ctrl-C again ends it at once\n"
                    )
            elif now_s - self.interrupted_s > _ONE_PRESS_S:
                raise KeyboardInterrupt
        self.number = number


@contextmanager
def listening() -> Iterator[Told]:
    """What SIGTERM, SIGUSR1 and a first Ctrl-C tell: the loop ends its step, saves and leaves.

    Only the main thread may catch signals; elsewhere nothing is ever told.
    """
    told = Told()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = {number: signal.signal(number, told.hear) for number in SIGNALS}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse_nonfinite(
    numbers: Mapping[str, float], step: int, batch: FeedBatch, out: Path, ranks: Ranks, seed: int
) -> None:
    """Raises PathfmError, on every rank, when the loss or the gradient's norm is not finite.

    numbers: what all ranks have in common. Each rank keeps its part of the batch for inspection.
    """
    wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(numbers[name])]
    if not wrong:
        return
    folder = _keep(numbers, step, batch, out, ranks, seed)
    if not ranks.first:
        raise PeerError(f"step {step:,} is not finite")
    words = " and ".join(f"the {name.replace('_', ' ')} is {numbers[name]}" for name in wrong)
    raise PathfmError(
        f"step {step:,}: {words}; the weights were not touched. Its patches are kept in {folder}. "
        "Lower optim.lr, lengthen optim.warmup_steps or use precision fp32"
    )


def _keep(
    numbers: Mapping[str, float], step: int, batch: FeedBatch, out: Path, ranks: Ranks, seed: int
) -> Path:
    """nonfinite_step_N/rank_R.safetensors (pixels, draws, labels) and .json (numbers, places)."""
    folder = make_folder(out / f"nonfinite_step_{step}")
    arrays: dict[str, NDArray[Any]] = {"pixels": batch.pixels, "draws": batch.draws}
    if batch.labels is not None:
        arrays["labels"] = batch.labels
    facts = {
        "step": step,
        "seed": seed,
        **{name: repr(value) for name, value in numbers.items()},
        "batch": [{"draw": r.draw, "slide_id": r.slide_id, "mpp": r.mpp} for r in batch.refs],
    }
    try:
        save_file(arrays, folder / f"rank_{ranks.rank}.safetensors")
        (folder / f"rank_{ranks.rank}.json").write_text(json.dumps(facts, indent=1))
    except (OSError, SafetensorError) as error:
        raise PathfmError(f"step {step:,} is not finite, and {folder}: {error}") from error
    return folder


def device_numbers(values: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Scalars on a device as floats: the one moment of a step that waits for it."""
    device = next(iter(values.values())).device
    scalars = [value.detach().to(device, torch.float32).reshape(()) for value in values.values()]
    stacked = torch.stack(scalars)
    return dict(zip(values, stacked.tolist(), strict=True))
