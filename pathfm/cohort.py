"""Which slides belong to a study: a table of URI, patient, site, label, split and µm/px.

A cohort comes from a CSV with those columns (only ``uri`` is required) or from a plain list of
URIs. Splits are by patient: no patient is on both sides. The µm/px override table is beside it,
because slides that carry no µm/px are part of the first day.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np

from online_patching.philox import words
from online_patching.slide_index import MPP_SANE_RANGE
from online_patching.stores.local import atomic_write_text
from pathfm.runtime import PathfmError

_URI_COLUMNS = ("uri", "file", "path", "slide")  # what people call it
_TEXT_COLUMNS = ("patient", "site", "label", "split")
_SPLIT_STREAM = 0x5_9117  # a stream of random words of its own


@dataclass(frozen=True)
class CohortRow:
    """One slide of a cohort; an empty string is "not said".

    ``mpp`` overrides the file's own µm/px (level 0); ``split`` is e.g. train, val or test.
    """

    uri: str
    patient: str = ""
    site: str = ""
    label: str = ""
    split: str = ""
    mpp: float | None = None


@dataclass(frozen=True)
class Cohort:
    """Slides in a fixed order, each URI once, each patient in one split."""

    rows: tuple[CohortRow, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        split_of: dict[str, str] = {}
        for row in self.rows:
            if row.uri in seen:
                raise PathfmError(f"cohort: slide {row.uri} is listed twice")
            seen.add(row.uri)
            if row.mpp is not None:
                check_mpp(row.mpp, f"cohort: slide {row.uri}")
            if row.patient and split_of.setdefault(row.patient, row.split) != row.split:
                raise PathfmError(
                    f"cohort: patient {row.patient!r} is in the splits {split_of[row.patient]!r} "
                    f"and {row.split!r}; slides of one patient must stay together"
                )

    @classmethod
    def of(cls, uris: Iterable[str]) -> Cohort:
        """A cohort of bare URIs."""
        return cls(tuple(CohortRow(uri) for uri in uris))

    @classmethod
    def read(cls, path: Path) -> Cohort:
        """The cohort in a CSV; relative URIs are taken from the CSV's own folder.

        Columns: uri (or file, path, slide), and if known patient, site, label, split, mpp.
        Others are ignored. Raises ``PathfmError`` naming the line of a bad value.
        """
        rows = []
        for line, record in read_csv(path):
            uri = next((record[name] for name in _URI_COLUMNS if record.get(name)), "")
            if not uri:
                wanted = ", ".join(_URI_COLUMNS)
                raise PathfmError(f"{path}, line {line}: no slide named (in columns {wanted})")
            mpp_cell = record.get("mpp")
            rows.append(
                CohortRow(
                    uri=uri if "://" in uri else str(path.parent / uri),
                    mpp=_number(mpp_cell, f"{path}, line {line}") if mpp_cell else None,
                    **{name: record.get(name, "") for name in _TEXT_COLUMNS},
                )
            )
        if not rows:
            raise PathfmError(f"{path}: the cohort table has no rows")
        return cls(tuple(rows))

    @property
    def digest(self) -> str:
        """SHA-256 of the rows in their order; two equal cohorts have the same."""
        text = json.dumps([asdict(row) for row in self.rows], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def with_splits(self, shares: Mapping[str, float], seed: int) -> Cohort:
        """The same slides, their patients divided anew among ``shares`` (name -> share, sum 1).

        A slide without a patient counts as a patient of its own. Patients are put in an order
        drawn by Philox from (seed, patient), so the order of the rows does not matter; each split
        gets its share of patients, rounded so that the sizes add up.
        """
        if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) < 0:
            raise PathfmError(f"split shares {dict(shares)} must be >= 0 and add up to 1")
        patients = sorted({row.patient or row.uri for row in self.rows}, key=_lot(seed))
        edges = np.round(np.cumsum(list(shares.values())) * len(patients)).astype(int)
        side = dict(zip(patients, np.repeat(list(shares), np.diff(edges, prepend=0)), strict=True))
        return Cohort(
            tuple(replace(row, split=str(side[row.patient or row.uri])) for row in self.rows)
        )


class MppOverrides:
    """µm/px for slides whose files carry none, or a wrong one: columns file, mpp and maybe source.

    A row is matched by the file's name, or by a longer ending of its path where ``file`` has
    folders in it; the longest match wins.
    """

    def __init__(self, table: Mapping[str, float], source: str = "") -> None:
        self.table, self.source = dict(table), source
        self._used: set[str] = set()

    @classmethod
    def read(cls, path: Path) -> MppOverrides:
        """The table in a CSV; ``PathfmError`` names the line of an absurd or doubled value."""
        table: dict[str, float] = {}
        for line, record in read_csv(path, required=("file", "mpp")):
            where = f"{path}, line {line}"
            name = str(PurePosixPath(record["file"]))
            mpp = _number(record["mpp"], where)
            check_mpp(mpp, where)
            if table.setdefault(name, mpp) != mpp:
                raise PathfmError(
                    f"{where}: {name} has two values, {table[name]:g} and {mpp:g} µm/px"
                )
            table[name] = mpp
        return cls(table, str(path))

    def find(self, uri: str) -> float | None:
        """The µm/px told for a slide, or None."""
        parts = PurePosixPath(uri.partition("?")[0]).parts
        for start in range(len(parts)):
            name = str(PurePosixPath(*parts[start:]))
            if name in self.table:
                self._used.add(name)
                return self.table[name]
        return None

    @property
    def unmatched(self) -> list[str]:
        """Rows that no slide asked for so far: a typo, or a slide that is not there."""
        return [name for name in self.table if name not in self._used]


def check_mpp(mpp: float, where: str) -> None:
    """Raises ``PathfmError`` for µm/px that no scanner makes."""
    low, high = MPP_SANE_RANGE
    if not low <= mpp <= high:
        raise PathfmError(f"{where}: {mpp:g} µm/px is outside {low:g} to {high:g}: not a scan")


def read_csv(path: Path, required: Iterable[str] = ()) -> list[tuple[int, dict[str, str]]]:
    """(line number, record) of a CSV with a header; names in lower case, cells stripped."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark in front
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text file"
        raise PathfmError(f"{path}: {reason}") from error
    reader = csv.DictReader(text.splitlines())
    names = {(name or "").strip().lower() for name in reader.fieldnames or ()}
    missing = [name for name in required if name not in names]
    if missing:
        raise PathfmError(f"{path}: no column {missing[0]!r}; found: {', '.join(sorted(names))}")
    return [
        (reader.line_num, {k.strip().lower(): (v or "").strip() for k, v in record.items() if k})
        for record in reader
    ]


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Writes a CSV atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(list(header))
    writer.writerows([list(row) for row in rows])
    atomic_write_text(path, text.getvalue())


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise PathfmError(f"{where}: {text!r} is not a number of µm/px") from None


def _lot(seed: int) -> Callable[[str], tuple[int, str]]:
    """A sort key that puts patients in an order drawn from (seed, patient)."""

    def key(patient: str) -> tuple[int, str]:
        draw = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:7])
        return int(words(seed, np.array([draw]), 0, _SPLIT_STREAM, 1)[0, 0]), patient

    return key
