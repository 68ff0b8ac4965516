"""Files of JSON lines that go back to a checkpoint: rows in the order of draws, none twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from online_patching.stores.local import atomic_write_bytes
from pathfm.runtime import PathfmError

Rows = list[dict[str, Any]]


class RowsLog:
    """A JSONL file of rows in the order of draws, none of them twice, that ends where a checkpoint
    says; written by rank 0 of what all ranks hand in."""

    def __init__(self, path: Path, rows_done: int) -> None:
        """Opens the log with its first `rows_done` rows; later ones are made again."""
        self.path, self.rows = path, rows_done
        kept = b"".join(_lines(path)[:rows_done])
        if kept.count(b"\n") < rows_done:
            raise PathfmError(
                f"{path} has {kept.count(bytes([10])):,} whole rows, the checkpoint speaks of "
                f"{rows_done:,}. It was cut or replaced: start a new run in another folder"
            )
        try:
            atomic_write_bytes(path, kept)
            self._file = path.open("ab")
        except OSError as error:
            raise self._full(error) from error

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows; on disk when this returns."""
        try:
            self._file.write(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._full(error) from error
        self.rows += len(rows)

    def close(self) -> None:
        """Close the file; what a full disk refused is made again."""
        with suppress(OSError):
            self._file.close()

    def _full(self, error: OSError) -> PathfmError:
        return PathfmError(
            f"{self.path}: rows cannot be written: {error.strerror}. Free space; the run resumes from "
            "its last checkpoint"
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a sampled.jsonl or failures.jsonl."""
    return [json.loads(line) for line in _lines(path)]


def _lines(path: Path) -> list[bytes]:
    """Whole lines of a file; a torn last one is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]
