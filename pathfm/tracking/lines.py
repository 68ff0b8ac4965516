"""Files of JSON lines that a crash or a full disk may have torn: their whole rows, and where they end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Every row of a file, in order; [] where there is none."""
    return [row for _, row in lines_and_rows(path)]


def lines_and_rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Whole lines and their rows; what is no row is left out, and told of."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [(line, row_of(line)) for line in lines if line.endswith(b"\n")]
    pairs = [(line, row) for line, row in whole if row is not None]
    if len(pairs) < len(whole):
        _log.warning("%s: %d lines are no rows and are passed over", path, len(whole) - len(pairs))
    return pairs


def row_of(line: bytes) -> dict[str, Any] | None:
    """The row of a line, None for one that a disk spoilt."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and ("step" in row or "do" in row) else None


def safe_cursor(path: Path, cursor: int) -> int:
    """The cursor, or a safe one where the file was cut without it: past no end, at a line's start.

    A power cut can lose rows that were shipped, and a kill can fall between the two writes of
    `truncate`. Too early a cursor costs time only: what the store holds is not sent.
    """
    size = path.stat().st_size if path.exists() else 0
    if cursor >= size or not cursor:
        return min(cursor, size)
    with path.open("rb") as file:
        file.seek(cursor - 1)
        return cursor if file.read(1) == b"\n" else 0


def drop_torn_line(path: Path) -> None:
    """Cuts off what follows the last newline."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
