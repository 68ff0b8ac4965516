"""Mapped files read here and there: pages asked for together, before they are needed.

A page fault waits for its page, one at a time and with the GIL held. Pages that madvise was told of
are read side by side, for a fraction of the time and of the CPU. But to ask for what is in memory
costs something too, so `Paging` watches whether it pays: while look-ups wait for no page it stays
silent, and now and then it holds back to find out.

Every page looked at stays mapped, and where pages lie far apart each also needs a page table of its
own, which no other process shares and the system cannot drop: 5 to 10 KB a draw. So large files are
mapped anew now and then; what was read stays in the page cache, for every process.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CAN_ASK = hasattr(mmap, "MADV_WILLNEED")
if _CAN_ASK:  # a Unix
    import resource

_PROBE_EVERY = 64
_RANGES_A_WAIT = 16

REMAP_AFTER_RANGES = 4096
REMAP_ABOVE_BYTES = 4 * 2**30
"""A smaller file is worth keeping mapped: its page tables take at most 8 MB."""

Ints = NDArray[np.int64]


class Paging:
    """Whether asking for pages pays at present, for all files of a corpus."""

    def __init__(self, files: Iterable[MappedFile]) -> None:
        self._files = tuple(files)
        self.cold = _CAN_ASK
        self._calls, self._ranges, self._faults = 0, 0, _major_faults()

    def pays(self, n: int) -> bool:
        """Whether to ask this time, for `n` ranges: called once before every look-up."""
        if not self._files or not _CAN_ASK:
            return False
        now = _major_faults()
        # A wait costs more than asking 16 times in vain.
        waited = (now - self._faults) * _RANGES_A_WAIT >= max(self._ranges, 1)
        self._faults, self._ranges = now, n
        self._calls += 1
        turn = self._calls % _PROBE_EVERY
        if not self.cold or turn == 1:  # nothing was asked for before this call
            self.cold = waited or self._calls == 1
        return self.cold and turn != 0


class MappedFile:
    """A file mapped as an array; ValueError when it is not of `n_bytes`.

    `array` is mapped once; `view` is for look-ups all over the file. `grain_bytes` is the least that
    is fetched at a time; 0: the system reads ahead as it likes.
    """

    def __init__(self, path: Path, kind: np.dtype[Any], n_bytes: int, grain_bytes: int) -> None:
        self._kind, self._n_bytes, self._grain = kind, n_bytes, grain_bytes
        self._looked = 0
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != n_bytes or n_bytes % kind.itemsize:
                raise ValueError(f"{path.name} is not as large as corpus.json says")
            self._handle = os.dup(file.fileno())  # the path may name another file when we map again
        weakref.finalize(self, os.close, self._handle)
        self._mapped, self.array = self._map()
        self._view = self.array

    def _map(self) -> tuple[mmap.mmap | None, NDArray[Any]]:
        if not self._n_bytes:  # an empty file cannot be mapped
            return None, np.empty(0, self._kind)
        mapped = mmap.mmap(self._handle, self._n_bytes, access=mmap.ACCESS_READ)
        # A draw wants a few bytes here and there: reading ahead would fetch 30 times as much.
        if self._grain and hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        return mapped, np.frombuffer(mapped, self._kind)

    def view(self) -> NDArray[Any]:
        """The array, in a mapping that is let go when many ranges have been looked at."""
        if self._looked > REMAP_AFTER_RANGES and self._n_bytes > REMAP_ABOVE_BYTES:
            self._mapped, self._view = self._map()
            self._looked = 0
        return self._view

    def will_look(self, ranges: int) -> None:
        """Counts ranges that are about to be looked at in `view()`."""
        self._looked += ranges

    def ask(self, start: Ints, n_bytes: Any) -> None:
        """Have the system read these byte ranges, all at once, without waiting for any."""
        if self._mapped is None or not self._grain:
            return
        first = np.maximum(start, 0) // self._grain
        count = -(-(start + n_bytes) // self._grain) - first
        # One number a range, so that equal ones are asked for once.
        for key in np.unique(first << 16 | np.clip(count, 0, 2**16 - 1)).tolist():
            at, length = (key >> 16) * self._grain, (key & 0xFFFF) * self._grain
            if length and 0 <= at < len(self._mapped):
                self._mapped.madvise(mmap.MADV_WILLNEED, at, min(length, len(self._mapped) - at))


def _major_faults() -> int:
    """How often this process has waited for a page of a file."""
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_majflt) if _CAN_ASK else 0
