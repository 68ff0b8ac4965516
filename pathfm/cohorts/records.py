"""Tables as people keep them: CSV, TSV and Parquet, local or in a bucket, read and written."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from online_patching.errors import redact
from online_patching.stores import Stores, is_remote, local_path
from online_patching.stores.local import atomic_write_text
from pathfm.runtime import PathfmError

Record = tuple[int, dict[str, str]]
"""Line (of a CSV) or row (of a Parquet table, counted from 1), and its cells by lower-case column name."""

PARQUET = (".parquet", ".pq")
TEXT = (".csv", ".tsv")
MOST_TABLE_BYTES = 256 * 2**20
"""A table of 100,000 slides has about 30 MB; a larger file is not one."""
_BATCH_ROWS = 8192


def is_table(uri: str) -> bool:
    """Whether a URI names a table by its suffix."""
    return redact(uri).lower().endswith(PARQUET + TEXT)


def read_records(uri: str, stores: Stores) -> Iterator[Record]:
    """The rows of a CSV, TSV or Parquet table, local or remote; cells as stripped text.

    `PathfmError` for what is no such table.
    """
    if redact(uri).lower().endswith(PARQUET):
        return _parquet(uri, stores)
    tabs = redact(uri).lower().endswith(".tsv")
    return _csv_records(redact(uri), read_text(uri, stores), "\t" if tabs else ",")


def read_text(uri: str, stores: Stores) -> str:
    """All of a UTF-8 text file, local or remote, of at most 256 MiB."""
    return _decoded(redact(uri), _read_bytes(uri, stores))


def read_csv(path: Path, required: Iterable[str] = ()) -> list[Record]:
    """(line number, record) of a local CSV with a header; names in lower case, cells stripped."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PathfmError(f"{path}: {error.strerror}") from error
    return list(_csv_records(str(path), _decoded(str(path), data), ",", required))


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Writes a CSV atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(list(header))
    writer.writerows([list(row) for row in rows])
    atomic_write_text(path, text.getvalue())


def _read_bytes(uri: str, stores: Stores) -> bytes:
    where = uri if is_remote(uri) else local_path(uri)
    size, token = stores.version(where)
    if size > MOST_TABLE_BYTES:
        raise PathfmError(
            f"{redact(uri)}: a table of {size:,} bytes; at most {MOST_TABLE_BYTES:,} are read"
        )
    return stores.read(where, 0, size, token) if size else b""


def _decoded(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")  # spreadsheets put a mark in front
    except UnicodeDecodeError as error:
        raise PathfmError(f"{name}: not a UTF-8 text file") from error


def _csv_records(
    name: str, text: str, delimiter: str, required: Iterable[str] = ()
) -> Iterator[Record]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        names = {(column or "").strip().lower() for column in reader.fieldnames or ()}
        missing = [column for column in required if column not in names]
        if missing:
            found = ", ".join(sorted(names))
            raise PathfmError(f"{name}: no column {missing[0]!r}; found: {found}")
        for cells in reader:
            record = {k.strip().lower(): (v or "").strip() for k, v in cells.items() if k}
            yield reader.line_num, record
    except csv.Error as error:
        raise PathfmError(f"{name}, line {reader.reader.line_num}: not a CSV: {error}") from None


def _parquet(uri: str, stores: Stores) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(_read_bytes(uri, stores)))
        flat = [field.name for field in file.schema_arrow if not pa.types.is_nested(field.type)]
        number = 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=flat):
            columns = {name.strip().lower(): batch.column(name).to_pylist() for name in flat}
            for row in range(batch.num_rows):
                number += 1
                yield number, {name: _cell(values[row]) for name, values in columns.items()}
    except (pa.ArrowException, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise PathfmError(f"{redact(uri)}: not a readable Parquet table ({why})") from None


def _cell(value: Any) -> str:
    if value is None or value != value:  # NaN, which pandas writes for an empty cell
        return ""
    if isinstance(value, bytes):
        return value.decode(errors="replace").strip()
    return str(value).strip()
