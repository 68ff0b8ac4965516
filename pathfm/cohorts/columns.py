"""A table of slides -> rows: which column is what, and where its paths lie."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from online_patching.errors import redact
from online_patching.stores import Stores, is_remote
from pathfm.cohorts.options import CohortOptions
from pathfm.cohorts.overrides import mpp_of
from pathfm.cohorts.records import Record, read_records
from pathfm.cohorts.row import CohortRow
from pathfm.runtime import PathfmError

COLUMNS = {
    "uri": ("uri", "url", "file", "path", "slide", "filename", "file_path", "slide_path", "image",
            "series_aws_url"),
    "patient": ("patient", "patient_id", "patientid", "case_submitter_id", "subject", "subject_id"),
    "case": ("case", "case_id", "block", "block_id"),
    "stain": ("stain", "staining"),
    "site": ("site", "centre", "center", "hospital", "institution"),
    "label": ("label", "class", "diagnosis"),
    "split": ("split", "subset"),
    "name": ("slide_id",),
    "twin_of": ("twin_of",),
}  # fmt: skip
"""What people call a column, in the order in which it is looked for; `--cohort.columns` goes before."""

_TEXT = ("patient", "case", "stain", "site", "label", "split", "name", "twin_of")


def read_table(uri: str, options: CohortOptions, stores: Stores) -> Iterator[CohortRow]:
    """The rows of a CSV, TSV or Parquet table of slides; relative paths are taken from its own folder.

    Other columns than COLUMNS and mpp (or mpp_x, mpp_y) are ignored. `PathfmError` names the line of a
    bad value.
    """
    return rows_of(uri, read_records(uri, stores), options)


def rows_of(table: str, records: Iterable[Record], options: CohortOptions) -> Iterator[CohortRow]:
    """The rows of a table's records."""
    chosen = dict(item.split("=", 1) for item in options.columns)
    names = COLUMNS | {role: (column.strip().lower(),) for role, column in chosen.items()}
    unit = {role: names.get(role, (role,))[0] for role in ("mpp", "mpp_x", "mpp_y")}
    for line, record in records:
        where = f"{redact(table)}, line {line}"
        _check_chosen(where, chosen, names, record)
        uri = _first(record, names["uri"])
        if not uri:
            raise PathfmError(
                f"{where}: no slide named (in columns {', '.join(names['uri'])}). Another column: "
                "--cohort.columns uri=NAME"
            )
        told: dict[str, Any] = {role: _first(record, names[role]) for role in _TEXT}
        cells = {role: record.get(column, "") for role, column in unit.items()}
        yield CohortRow(_resolved(table, uri, where), mpp=mpp_of(cells, where), **told)


def _check_chosen(
    where: str, chosen: dict[str, str], names: dict[str, tuple[str, ...]], record: dict[str, str]
) -> None:
    for role in chosen:
        if names[role][0] not in record:
            found = ", ".join(sorted(record))
            raise PathfmError(f"{where}: no column {chosen[role]!r} (for {role}); found: {found}")


def _first(record: dict[str, str], columns: tuple[str, ...]) -> str:
    return next((record[name] for name in columns if record.get(name)), "")


def _resolved(table: str, uri: str, where: str) -> str:
    """A cell as a URI; `s3://bucket/series/*`, as the IDC writes it, is the series' folder."""
    if uri.endswith("/*"):
        uri = uri[:-1]
    if "://" in uri:
        return uri
    if not is_remote(table):
        return str(Path(table.removeprefix("file://")).parent / uri)
    if uri.startswith("/") or ".." in uri.split("/"):
        raise PathfmError(f"{where}: {uri[:80]!r} leads out of the table's own folder")
    return posixpath.join(table.partition("?")[0].rpartition("/")[0], uri)
