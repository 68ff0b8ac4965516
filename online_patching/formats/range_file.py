"""A remote object as a file, for readers that only know files: ranges through our own stores.

Every request names the version that was indexed, so that an object put in its place is an error and old
and new are never mixed; retries, deadlines and credentials are those of every other read. What is kept
and what one request of the parent process may cost are bounded.
"""

from __future__ import annotations

import io
from collections import OrderedDict

from online_patching.errors import PatchingError
from online_patching.stores import Stores

BLOCK_BYTES = 256 * 2**10
KEPT_BLOCKS = 64
"""Blocks kept of each open object: 16 MiB."""


class RangeFile(io.RawIOBase):
    """Bytes of one version of an object. `error` is the first that a read met, `left` what may be read.

    Libraries swallow what a file raises, or dress it up: whoever uses one asks for `error` afterwards.
    """

    def __init__(self, stores: Stores, uri: str, token: str, size_bytes: int) -> None:
        super().__init__()
        self.error: PatchingError | None = None
        self.left = 0
        self.name = uri.rpartition("/")[2]
        self._stores, self._uri, self._token, self._size = stores, uri, token, size_bytes
        self._at = 0
        self._blocks: OrderedDict[int, bytes] = OrderedDict()

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go somewhere; past the end reads give nothing."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: object) -> int:
        """Fill a buffer; fewer bytes only at the end. OSError when they cannot be had (see `error`)."""
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        stop = min(self._at + len(view), self._size)
        count = max(0, stop - self._at)
        view[:count] = self._bytes(self._at, self._at + count)
        self._at += count
        return count

    def _bytes(self, start: int, stop: int) -> bytes:
        if start >= stop:
            return b""
        first, last = start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
        numbers = range(first, last + 1)
        blocks = {n: self._blocks[n] for n in numbers if n in self._blocks}
        missing = [n for n in numbers if n not in blocks]
        if missing:  # in one request, from the first to the last
            blocks |= self._fetch(missing[0], missing[-1])
        for number in numbers:
            self._blocks[number] = blocks[number]
            self._blocks.move_to_end(number)
        while len(self._blocks) > KEPT_BLOCKS:
            self._blocks.popitem(last=False)
        joined = b"".join(blocks[n] for n in numbers)
        return joined[start - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]

    def _fetch(self, first: int, last: int) -> dict[int, bytes]:
        start, stop = first * BLOCK_BYTES, min(self._size, (last + 1) * BLOCK_BYTES)
        self.left -= stop - start
        if self.left < 0:
            raise OSError("reading this over a network would take too much; copy it to disk")
        try:
            data = self._stores.read(self._uri, start, stop, self._token)
        except PatchingError as error:
            self.error = self.error or error
            raise OSError("its store failed") from None
        return {
            n: data[(n - first) * BLOCK_BYTES : (n + 1 - first) * BLOCK_BYTES]
            for n in range(first, last + 1)
        }
