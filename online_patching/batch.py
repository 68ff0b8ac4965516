"""What a loader and its engines share: options, a batch, and what an engine does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from online_patching.geometry import PatchRef
from online_patching.stores import RetryPolicy


@dataclass(frozen=True)
class LoaderOptions:
    """How a loader reads; none of it changes what it delivers.

    `bytes_in_flight` bounds what remote reads hold, per process; `gap_bytes` joins remote ranges
    this close (0: exactly the tiles touched).
    """

    threads: int = 2
    prefetch: int = 2
    bytes_in_flight: int = 64 * 2**20
    gap_bytes: int = 16 * 2**10
    retry: RetryPolicy = field(default_factory=RetryPolicy)


@dataclass(frozen=True)
class PatchBatch:
    """`pixels` uint8 (batch, size, size, 3) RGB; `refs` say what each is; `failures` lists the
    (draw, attempt, reason) replaced on the way. With `copy=False` the pixels are a view of shared
    memory: call `release()` when done with them.
    """

    pixels: NDArray[np.uint8]
    refs: list[PatchRef]
    failures: list[tuple[int, int, str]]
    slot: Any = None

    @property
    def draws(self) -> NDArray[np.int64]:
        """Sample numbers, (batch,)."""
        return np.asarray([ref.draw for ref in self.refs], np.int64)

    def release(self) -> None:
        """Give the shared memory back to the loader; the pixels must not be used afterwards."""
        if self.slot is not None:
            self.slot.release()


class Engine(Protocol):
    """Makes batches: `request` starts one, `take` waits for the oldest requested."""

    def request(self, draws: NDArray[np.int64]) -> None:
        """Start making a batch of these draws."""

    def take(self) -> PatchBatch:
        """Wait for the oldest requested batch."""

    def close(self) -> None:
        """Stop everything."""
