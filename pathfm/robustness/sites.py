"""Where pictures come from: a CSV with the columns path, site and, if known, slide."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from pathfm.runtime import PathfmError

_MAX_BYTES = 256 << 20


def read_sites(table: Path, paths: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Site and slide of each path, in order; no slides where the table has no such column.

    Rows of other pictures are allowed. Raises `PathfmError` for a file that cannot be read, lacks a
    column, or does not name every path.
    """
    try:
        if table.stat().st_size > _MAX_BYTES:
            raise PathfmError(f"{table}: {table.stat().st_size:,} bytes are no table of sites")
        text = table.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PathfmError(f"{table}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise PathfmError(f"{table}: not a UTF-8 text file; save it as one") from None
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = set(reader.fieldnames or ())
    if not {"path", "site"} <= columns:
        raise PathfmError(f"{table}: wants a header with the columns path and site (and slide)")
    try:
        rows = {row["path"]: row for row in reader}
    except csv.Error as error:
        raise PathfmError(f"{table}: line {reader.line_num} is no CSV ({error})") from None
    sites = _column(table, rows, paths, "site")
    return sites, _column(table, rows, paths, "slide") if "slide" in columns else ()


def _column(
    table: Path, rows: dict[str, dict[str, str]], paths: Sequence[str], column: str
) -> tuple[str, ...]:
    found = [rows.get(path, {}).get(column) or "" for path in paths]
    if missing := [path for path, text in zip(paths, found, strict=True) if not text]:
        raise PathfmError(
            f"{table}: {len(missing):,} of {len(paths):,} pictures have no {column}, first {missing[0]}"
        )
    return tuple(found)
