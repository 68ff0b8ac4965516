"""slides.parquet and skipped.parquet, with the same rows as CSV: for people, and for other programs.

Written row by row into temporary files that take their place when they are whole. Units stand in the
names, and with a description in the metadata of each Parquet column.
"""

from __future__ import annotations

import contextlib
import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from online_patching import SlideIndex
from pathfm.cohorts import CohortRow

_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class Column:
    """A column of a table: its Arrow type, its unit ("" for none) and what it holds."""

    name: str
    kind: Any
    unit: str
    told: str


COHORT_COLUMNS = tuple(
    Column(field.name, pa.string(), "", "as the cohort says; empty where it does not")
    for field in fields(CohortRow)
    if field.name not in ("uri", "mpp", "name", "size_bytes", "content")
)
"""Text, all of it: patient, site, label, ..."""

SLIDE_COLUMNS = (
    Column("slide_id", pa.string(), "", "the slide's name everywhere, and of its files"),
    Column("uri", pa.string(), "", "where its bytes are, without credentials and query"),
    *COHORT_COLUMNS,
    Column("width_px", pa.int64(), "px", "width of level 0"),
    Column("height_px", pa.int64(), "px", "height of level 0"),
    Column("mpp_x", pa.float64(), "µm/px", "of level 0, across"),
    Column("mpp_y", pa.float64(), "µm/px", "of level 0, down"),
    Column("mpp_source", pa.string(), "", "where µm/px come from"),
    Column("container", pa.string(), "", "the form of the file, or the fallback reader"),
    Column("reader", pa.string(), "", "ranges, chunks or fallback: how tiles are read"),
    Column("vendor", pa.string(), "", "who made the file, where it says so"),
    Column("codec", pa.string(), "", "how tiles of level 0 are stored"),
    Column("levels", pa.int64(), "", "resolutions stored"),
    Column("downsamples", pa.string(), "", "of the levels, relative to level 0"),
    Column("tile_width_px", pa.int64(), "px", "of level 0"),
    Column("tile_height_px", pa.int64(), "px", "of level 0"),
    Column("tiles", pa.int64(), "", "tiles of all levels"),
    Column("size_bytes", pa.int64(), "bytes", "of the slide's object; 0 where not known"),
    Column("objects", pa.int64(), "", "objects that the slide lies in"),
    Column("digest", pa.string(), "", "SHA-256 of everything that decides pixels; not the URI"),
)

SKIPPED_COLUMNS = (
    Column("uri", pa.string(), "", "the slide, without credentials and query"),
    Column("code", pa.string(), "", "the kind of reason: docs/indexing.md lists them"),
    Column("reason", pa.string(), "", "why it is not used, and what to do about it"),
)


def facts_of(index: SlideIndex) -> dict[str, Any]:
    """A slide's row, without where it is and what the cohort says of it. JSON types."""
    width_px, height_px = index.dimensions
    first = index.levels[0]
    return {
        "slide_id": index.slide_id,
        "width_px": width_px,
        "height_px": height_px,
        "mpp_x": index.mpp_x,
        "mpp_y": index.mpp_y,
        "mpp_source": index.mpp_source,
        "container": index.container,
        "reader": _reader(index),
        "vendor": index.vendor,
        "codec": index.codec,
        "levels": len(index.levels),
        "downsamples": "/".join(f"{level.downsample_x:.3g}" for level in index.levels),
        "tile_width_px": first.tile_width_px,
        "tile_height_px": first.tile_height_px,
        "tiles": index.n_tiles,
        "size_bytes": index.size_bytes,
        "objects": max(1, len(index.objects)),
        "digest": index.digest,
    }


def told_by_cohort(row: CohortRow) -> dict[str, str]:
    """What the cohort says of a slide, where it says something."""
    told = {column.name: str(getattr(row, column.name)) for column in COHORT_COLUMNS}
    return {name: value for name, value in told.items() if value}


class TableWriter:
    """Writes NAME.parquet and NAME.csv in a folder; both replace the old ones when the block ends well."""

    def __init__(self, folder: Path, name: str, columns: tuple[Column, ...]) -> None:
        self.folder, self.name, self.columns = folder, name, columns
        self._rows: list[dict[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row; what a column wants and the row lacks is empty."""
        self._rows.append({column.name: _clean(row.get(column.name)) for column in self.columns})
        if len(self._rows) >= _ROWS_AT_ONCE:
            self._flush()

    def __enter__(self) -> TableWriter:
        names = {suffix: f".{self.name}.{suffix}.tmp" for suffix in ("parquet", "csv")}
        self._temporary = {suffix: self.folder / name for suffix, name in names.items()}
        self._csv_file = open(self._temporary["csv"], "w", encoding="utf-8", newline="")
        self._csv = csv.writer(self._csv_file, lineterminator="\n")
        self._csv.writerow([column.name for column in self.columns])
        self._parquet = pq.ParquetWriter(
            self._temporary["parquet"], _schema(self.columns), compression="zstd"
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._flush()
            self._parquet.close()
            self._csv_file.close()
            if kind is None:
                for suffix, path in self._temporary.items():
                    _onto_disk(path)
                    os.replace(path, self.folder / f"{self.name}.{suffix}")
        finally:
            for path in self._temporary.values():
                with contextlib.suppress(FileNotFoundError):
                    path.unlink()

    def _flush(self) -> None:
        if self._rows:
            schema = self._parquet.schema
            self._parquet.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=schema))
            self._csv.writerows([_cell(value) for value in row.values()] for row in self._rows)
        self._rows.clear()


def _reader(index: SlideIndex) -> str:
    if index.fallback:
        return "fallback"
    return "chunks" if index.levels[0].rows is None else "ranges"


def _schema(columns: tuple[Column, ...]) -> pa.Schema:
    return pa.schema(
        [
            pa.field(
                column.name,
                column.kind,
                metadata={"unit": column.unit, "description": column.told},
            )
            for column in columns
        ]
    )


def _onto_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _clean(value: Any) -> Any:
    """Names of files may hold bytes that are no text: they are written as escapes."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return value


def _cell(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else "" if value is None else value
