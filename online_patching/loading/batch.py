"""What a loader and its engines share: options, where draws come from, a batch, what an engine does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.corpus import Corpus
from online_patching.geometry import PatchRef
from online_patching.sampling.filters import PixelFilter
from online_patching.sampling.sampler import Draws
from online_patching.stores import RetryPolicy
from online_patching.stores.range_client import DEFAULT_CONNECTIONS

FILTERED = "filter: "
"""How the reason of a patch that a pixel filter refused begins: no failure, but replaced like one."""


@dataclass(frozen=True)
class LoaderOptions:
    """How a loader reads; none of it changes what it delivers.

    `bytes_in_flight` bounds what remote reads hold, per process; `gap_bytes` joins remote ranges
    this close (0: exactly the tiles touched). `remember_bytes` (0: off) bounds what each process
    remembers of JPEG tiles to decode later parts of them sooner (`native.remember`). `disk_cache` is a folder
    that keeps at most `disk_cache_bytes` of tiles of remote slides (`stores.disk_cache`); None: no such.
    `connections` bounds the requests that each process has under way to http(s) and the clouds, all hosts
    together.
    """

    threads: int = 2
    prefetch: int = 2
    bytes_in_flight: int = 64 * 2**20
    gap_bytes: int = 16 * 2**10
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    remember_bytes: int = 0
    connections: int = DEFAULT_CONNECTIONS
    disk_cache: str | Path | None = None
    disk_cache_bytes: int = 16 * 2**30


class DrawSource(Protocol):
    """What a loader asks of a sampler: draw numbers -> patches, the same in every process.

    A source that ends has `len()` draws.
    """

    @property
    def corpus(self) -> Corpus:
        """The slides."""

    @property
    def size_px(self) -> int:
        """Side of a patch."""

    @property
    def context(self) -> tuple[float, ...]:
        """Factors, in a draw's own µm/px, of further views of the same centre."""

    @property
    def patches_per_read(self) -> int:
        """How many consecutive draws share a neighbourhood of tiles."""

    @property
    def filters(self) -> tuple[PixelFilter, ...]:
        """What is asked about the pixels of each draw."""

    @property
    def config(self) -> dict[str, Any]:
        """Everything that decides the stream besides the corpus, as JSON types."""

    @property
    def digest(self) -> str:
        """SHA-256 of `config`."""

    def draw_batch(
        self, draws: ArrayLike, attempt: ArrayLike = 0, barred: Mapping[int, int] | None = None
    ) -> Draws:
        """Columns for many draw numbers; `attempt` is where to start. `barred` maps corpus rows of
        quarantined slides to the first draw that may not use them: it moves to its next attempt."""

    def expand(self, draws: Draws) -> Draws:
        """Each draw followed by its context views."""

    def refs(self, draws: Draws) -> list[PatchRef]:
        """PatchRefs of drawn columns."""


class Failure(NamedTuple):
    """A patch that was replaced: attempt `attempt` of draw `draw`, on slide `slide_id`.

    `reason` begins with the error's type, or with `FILTERED` where a pixel filter refused it.
    """

    draw: int
    attempt: int
    slide_id: str
    reason: str

    @property
    def kind(self) -> str:
        """The reason without its particulars: what failures are counted by."""
        first, _, rest = self.reason.partition(": ")
        return f"{first}: {rest.partition(': ')[0]}" if self.filtered else first

    @property
    def filtered(self) -> bool:
        """Whether a pixel filter refused it: nothing is wrong with the slide."""
        return self.reason.startswith(FILTERED)


def n_draws(source: DrawSource) -> int | None:
    """How many draws a source has; None when it never ends."""
    try:
        return len(source)  # type: ignore[arg-type]
    except TypeError:
        return None


def batch_shape(source: DrawSource, n: int) -> tuple[int, ...]:
    """The shape of `n` patches: (n, size, size, 3), or (n, views, size, size, 3) with context views."""
    size, views = source.size_px, 1 + len(source.context)
    return (n, size, size, 3) if views == 1 else (n, views, size, size, 3)


@dataclass(frozen=True, eq=False)
class PatchBatch:
    """`pixels` uint8 RGB (batch, size, size, 3); with context views (batch, 1 + views, size, size, 3).

    `columns` are what was delivered, draw by draw, and `refs` the same as records, made when first
    asked for. `failures` lists what was replaced on the way. With `copy=False` the pixels are a view
    of shared memory: call `release()` when done with them.
    """

    pixels: NDArray[np.uint8]
    columns: Draws
    sampler: DrawSource
    failures: list[Failure]
    slot: Any = None

    @property
    def draws(self) -> NDArray[np.int64]:
        """Sample numbers, (batch,)."""
        return self.columns.draw

    @cached_property
    def refs(self) -> list[PatchRef]:
        """What each patch is: slide, place, µm/px."""
        return self.sampler.refs(self.columns)

    def release(self) -> None:
        """Give the shared memory back to the loader; the pixels must not be used afterwards.

        Once: its place is another batch's from then on, which a second call must not give away.
        """
        slot, self.__dict__["slot"] = self.slot, None  # frozen for everybody else
        if slot is not None:
            slot.release()


class Engine(Protocol):
    """Makes batches: `request` starts one, `take` waits for the oldest requested."""

    def request(self, draws: NDArray[np.int64], barred: Mapping[int, int] | None = None) -> None:
        """Start making a batch of these draws. `barred` maps corpus rows of quarantined slides to
        the first draw that may not use them; such a draw moves to its next attempt."""

    def take(self) -> PatchBatch:
        """Wait for the oldest requested batch; its first error is raised."""

    def close(self) -> None:
        """Stop everything."""


def no_patches(source: DrawSource) -> PatchBatch:
    """A batch of no patches: what a rank gets of a last step that others fill."""
    columns = source.draw_batch([0]).take(slice(0))
    return PatchBatch(np.empty(batch_shape(source, 0), np.uint8), columns, source, [])
