"""Features while they are made: files of 1,024 rows, each there whole or not at all.

A killed run goes on with the rows whose part is missing; ranks make parts side by side and need
not tell each other, nor be as many as before.
"""

from __future__ import annotations

import io
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from online_patching.stores.local import atomic_write_bytes
from pathfm.embeddings.container import to_bf16
from pathfm.embeddings.info import Storage
from pathfm.runtime import PathfmError

ROWS = 1024


class Parts:
    """The parts of a table of `n` rows in a folder, numbered from 0."""

    def __init__(self, folder: Path, n: int, storage: Storage) -> None:
        self.folder, self.n = folder, n
        self._half = storage == "bf16"
        self._dtype = np.dtype(np.uint16 if self._half else np.float32)

    def __len__(self) -> int:
        return math.ceil(self.n / ROWS)

    def rows(self, number: int) -> range:
        """The rows of the table that a part holds."""
        return range(number * ROWS, min((number + 1) * ROWS, self.n))

    def path(self, number: int) -> Path:
        """A part's file."""
        return self.folder / f"part-{number:06d}.npy"

    def missing(self) -> list[int]:
        """Parts that are not there, or not whole."""
        return [number for number in range(len(self)) if self._width(number) is None]

    def write(self, number: int, features: NDArray[np.float32]) -> None:
        """Writes a part, float32 (rows, d), as it will be stored."""
        buffer = io.BytesIO()
        np.save(buffer, to_bf16(features) if self._half else features, allow_pickle=False)
        atomic_write_bytes(self.path(number), buffer.getvalue())

    def shape(self) -> tuple[int, int]:
        """(n, d) of the whole; PathfmError unless every part is there and they are of one width."""
        widths = {self._width(number) for number in range(len(self))}
        if None in widths or len(widths) != 1:
            found = sorted(str(width) for width in widths)
            raise PathfmError(
                f"{self.folder}: parts of widths {', '.join(found)} do not make a table; delete the "
                "folder and embed again"
            )
        return self.n, int(widths.pop() or 0)

    def blocks(self) -> Iterator[NDArray[np.float32] | NDArray[np.uint16]]:
        """The rows of the whole, part by part, as they are stored."""
        for number in range(len(self)):
            yield np.load(self.path(number), allow_pickle=False)

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _width(self, number: int) -> int | None:
        """Columns of a part that is whole; None otherwise. Reads its header only."""
        try:
            found = np.load(self.path(number), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return None
        fits = found.ndim == 2 and len(found) == len(self.rows(number))
        return found.shape[1] if fits and found.dtype == self._dtype else None
