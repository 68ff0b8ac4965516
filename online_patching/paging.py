"""Mapped files read here and there: pages asked for together, before they are needed.

A page fault waits for its page, one at a time and with the GIL: 300 µs, and 60 µs of CPU, on the
disk we measured. Asked for by madvise, a batch of pages takes 15 µs and 6 µs of CPU a page. But
asking for what is in memory already costs a microsecond too, so `Paging` watches whether it pays:
while look-ups wait for no page it stays silent, and now and then it holds back to find out.

Pages that were read stay in the page cache, for every process, but also mapped into this one, which
then looks as large as what it ever drew from. So while new pages keep coming, old ones are unmapped.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CAN_ASK = hasattr(mmap, "MADV_WILLNEED")
if _CAN_ASK:  # a Unix
    import resource

_PROBE_EVERY = 64
_FEW_FAULTS = 4
_MEASURE_EVERY = 4

MAX_MAPPED_BYTES = 128 * 2**20
"""How much of a corpus stays mapped into a process that keeps meeting new pages."""

Ints = NDArray[np.int64]


class Paging:
    """Whether asking for pages pays at present, for all files of a corpus; and how many stay mapped."""

    def __init__(self, files: Iterable[MappedFile]) -> None:
        self._files = tuple(files)
        self.cold = _CAN_ASK
        self._calls, self._faults = 0, _major_faults()
        self._mapped_before = _mapped_bytes()

    def pays(self) -> bool:
        """Whether to ask this time: called once before every look-up."""
        if not self._files or not _CAN_ASK:
            return False
        now = _major_faults()
        waited, self._faults = now - self._faults >= _FEW_FAULTS, now
        self._calls += 1
        turn = self._calls % _PROBE_EVERY
        if not self.cold or turn == 1:  # nothing was asked for before this call
            self.cold = waited or self._calls == 1
        if self.cold and turn % _MEASURE_EVERY == 0:
            self._unmap()
        return self.cold and turn != 0

    def _unmap(self) -> None:
        if _mapped_bytes() - self._mapped_before > MAX_MAPPED_BYTES:
            for file in self._files:
                file.unmap_pages()


class MappedFile:
    """A file mapped as an array; ValueError when it is not of `n_bytes`.

    `grain_bytes` is the least that is fetched at a time; 0: the system reads ahead as it likes.
    """

    def __init__(self, path: Path, kind: np.dtype[Any], n_bytes: int, grain_bytes: int) -> None:
        self._mapped: mmap.mmap | None = None
        self._grain = grain_bytes
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != n_bytes or n_bytes % kind.itemsize:
                raise ValueError(f"{path.name} is not as large as corpus.json says")
            if not n_bytes:  # an empty file cannot be mapped
                self.array: NDArray[Any] = np.empty(0, kind)
                return
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # A draw wants a few bytes here and there: reading ahead would fetch 30 times as much.
        if grain_bytes and hasattr(mmap, "MADV_RANDOM"):
            self._mapped.madvise(mmap.MADV_RANDOM)
        self.array = np.frombuffer(self._mapped, kind)

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

    def unmap_pages(self) -> None:
        """Drop this process's view of the pages, not the pages: the next look maps them again."""
        if self._mapped is not None:
            self._mapped.madvise(mmap.MADV_DONTNEED)


def _major_faults() -> int:
    """How often this process has waited for a page of a file."""
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_majflt) if _CAN_ASK else 0


def _mapped_bytes() -> int:
    """Bytes of file pages mapped into this process; 0 where Linux's statm is not."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[2]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return 0
