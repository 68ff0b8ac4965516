"""A ring of equal buffers that several processes see, for batches of pixels.

The memory has no name: it is a file descriptor handed from process to process. So nothing is left in
/dev/shm whoever is killed however, and where the kernel has memfd_create the size of /dev/shm, small in
containers, does not matter.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import LoaderError

_SHM = Path("/dev/shm")  # noqa: S108  # where memory files are, if anywhere
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class Ring:
    """`n_slots` buffers of `shape` uint8 in the memory behind a file descriptor.

    Takes the descriptor over. The memory goes when the last array on it does.
    """

    def __init__(self, descriptor: int, n_slots: int, shape: tuple[int, ...]) -> None:
        self.descriptor, self.n_slots, self.shape = descriptor, n_slots, shape
        self._memory = mmap.mmap(descriptor, ring_bytes(n_slots, shape))

    @classmethod
    def create(cls, n_slots: int, shape: tuple[int, ...]) -> Ring:
        """A new one. LoaderError when the machine has not the memory."""
        size = ring_bytes(n_slots, shape)
        descriptor = anonymous_memory(size)
        try:
            return cls(descriptor, n_slots, shape)
        except OSError as error:
            os.close(descriptor)
            raise _too_little(size, str(error)) from None

    def pixels(self, slot: int, n: int) -> NDArray[np.uint8]:
        """The first `n` patches of a slot, as a view."""
        start = slot * slot_bytes(self.shape)
        return np.ndarray((n, *self.shape[1:]), np.uint8, self._memory, start)

    def close_descriptor(self) -> None:
        """Close the descriptor, once everybody has it; arrays stay good."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


@dataclass(eq=False)
class Slot:
    """One buffer of a ring, free or held by whoever uses its batch."""

    number: int
    free: bool = True

    def release(self) -> None:
        """Let the next batch be written here."""
        self.free = True


def slot_bytes(shape: tuple[int, ...]) -> int:
    """Bytes of one slot: whole pages, so that no two processes write to the same one."""
    return -(-int(np.prod(shape)) // mmap.PAGESIZE) * mmap.PAGESIZE


def ring_bytes(n_slots: int, shape: tuple[int, ...]) -> int:
    """Bytes of a whole ring."""
    return n_slots * slot_bytes(shape)


def anonymous_memory(size: int) -> int:
    """A descriptor of `size` bytes of memory without a name. LoaderError when there is too little.

    Where there is no memfd_create: an unlinked file in /dev/shm, its pages reserved at once, since
    writing to one that does not exist would kill the process.
    """
    if size > (most := memory_bytes()):
        raise _too_little(size, f"the machine has {most / 1e6:,.0f} MB")
    try:
        descriptor = os.memfd_create("patches")
    except (AttributeError, OSError):
        with tempfile.TemporaryFile(dir=_SHM if _SHM.is_dir() else None) as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise _too_little(size, f"{_SHM}: {errno.errorcode[error.errno or 0]}") from None
            return os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


def memory_bytes() -> int:
    """The memory this process may hope for: the machine's, or its container's limit."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return most
    return min(most, int(limit)) if limit.isdigit() else most


def _too_little(size: int, why: str) -> LoaderError:
    return LoaderError(
        f"no room for {size / 1e6:,.0f} MB of buffers ({why}). Use fewer workers, a smaller prefetch or "
        "batch, or give the container more shared memory (docker run --shm-size=2g)."
    )
