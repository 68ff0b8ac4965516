"""Which slides a run is to index, under which ids, and which rows of the corpus stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from online_patching.errors import redact
from online_patching.stores import is_remote, local_path
from pathfm.cohorts import Cohort, CohortRow, MppOverrides
from pathfm.index.folder import Folder
from pathfm.index.journal import Journal, Record
from pathfm.index.naming import slide_ids
from pathfm.index.tables import COHORT_COLUMNS

_DUPLICATE = "another slide of the cohort has the same address once queries are left out: it counts"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A slide to be indexed: its row of the cohort, where it is for tables, its id, its told µm/px."""

    row: CohortRow
    address: str
    slide_id: str
    told: tuple[float, float] | None


@dataclass(frozen=True)
class WantedSlides:
    """What a run is about: the `slides` asked for, and the addresses that it leaves as they are (`kept`).

    `already` of the slides asked for are among those kept. `skipped` are rows of the table of what is
    not used: what sources name besides slides.
    """

    slides: list[Wanted]
    kept: list[str]
    already: int
    skipped: list[Record]

    def addresses(self) -> Iterator[tuple[str, CohortRow | None]]:
        """Every slide that the corpus is to be of, in order, with its row where the run has one."""
        for address in self.kept:
            yield address, None
        for slide in self.slides:
            yield slide.address, slide.row


def address_of(uri: str) -> str:
    """What a slide is known by: its absolute path, or its URI without credentials and query."""
    return redact(uri) if is_remote(uri) else local_path(uri)


def wanted_of(
    cohort: Cohort, overrides: MppOverrides, folder: Folder, journal: Journal, append: bool
) -> WantedSlides:
    """A cohort's slides, each address once, with ids that depend on nothing but the cohort.

    With `append`, usable slides of the corpus are kept, with their ids, and so are refusals that are not
    asked for again. A kept slide whose .index file is gone is wanted, from its own row.
    """
    skipped: list[Record] = [
        {"uri": redact(one.uri), "code": one.code, "reason": one.reason} for one in cohort.skipped
    ]
    rows: dict[str, CohortRow] = {}
    for row in cohort.rows:
        address = address_of(row.uri)
        if address in rows:
            skipped.append({"uri": address, "code": "duplicate", "reason": _DUPLICATE})
        else:
            rows[address] = row
    asked = len(rows)
    kept = _kept(rows, folder, journal) if append else []
    taken = {journal.known[address].slide_id for address in kept}
    titles = [row.name or address for address, row in rows.items()]
    ids = slide_ids(list(rows), titles, taken)
    slides = [
        Wanted(row, address, slide_id, _told(row, overrides))
        for (address, row), slide_id in zip(rows.items(), ids, strict=True)
    ]
    return WantedSlides(slides, kept, asked - len(rows), skipped)


def _kept(rows: dict[str, CohortRow], folder: Folder, journal: Journal) -> list[str]:
    """Addresses that an appending run leaves as they are; takes them out of `rows`."""
    kept = []
    for address in journal.committed:
        known = journal.known.get(address)
        if known is not None and known.slide_id and folder.has(known):
            rows.pop(address, None)
            kept.append(address)
        elif known is not None and not known.slide_id and address not in rows:
            kept.append(address)
        elif address not in rows:
            rows[address] = _row_again(address, journal.read(address))
    return kept


def _row_again(address: str, record: Record) -> CohortRow:
    """The row of a slide whose .index file is gone: what the journal says of it."""
    told = record.get("told")
    texts = {column.name: str(record.get(column.name, "")) for column in COHORT_COLUMNS}
    return CohortRow(uri=address, mpp=tuple(told) if told else None, **texts)  # type: ignore[arg-type]


def _told(row: CohortRow, overrides: MppOverrides) -> tuple[float, float] | None:
    mpp = row.mpp
    for title in (row.name, row.uri):  # a manifest's name, or the file's own where a table has ids
        mpp = overrides.find(title) if mpp is None and title else mpp
    if mpp is None:
        return None
    return (mpp[0], mpp[1]) if isinstance(mpp, tuple) else (mpp, mpp)
