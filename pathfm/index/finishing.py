"""The end of an index run: the folder is made to hold what was asked for, tables are written, and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from online_patching.errors import redact
from pathfm.cohorts import MppOverrides, Salt, find_twins
from pathfm.index.folder import Folder
from pathfm.index.journal import Journal, Record
from pathfm.index.tables import (
    COHORT_COLUMNS,
    SKIPPED_COLUMNS,
    SLIDE_COLUMNS,
    TableWriter,
    told_by_cohort,
)
from pathfm.index.wanted import WantedSlides
from pathfm.runtime import PathfmError, console, counted, titled


def refuse_if_useless(sources: Sequence[str], wanted: WantedSlides, journal: Journal) -> None:
    """PathfmError when nothing of what was asked for can be used; the journal is as it was then."""
    if wanted.already or any(journal.known[slide.address].slide_id for slide in wanted.slides):
        return
    refused = [journal.read(slide.address) for slide in wanted.slides[:3]] + wanted.skipped[:3]
    count = len(wanted.slides) + len(wanted.skipped)
    journal.roll_back()
    if count == 1:
        raise PathfmError(f"{refused[0]['uri']}: {refused[0]['reason']}")
    reasons = "; ".join(f"{Path(one['uri']).name}: {one['reason']}" for one in refused[:3])
    raise PathfmError(
        f"none of {count:,} files under {', '.join(map(redact, sources))} is a usable slide "
        f"({reasons}{'; ...' if count > 3 else ''})"
    )


@dataclass
class Done:
    """What a corpus folder holds, as far as it is told: the first `most` rows of each table are printed."""

    corpus: Path
    reused: int
    most: int
    slides: int = 0
    tiles: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    first: list[Record] = field(default_factory=list)
    refused: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def count(self, record: Record) -> None:
        """Count a slide, or a refusal."""
        if "slide_id" in record:
            self.slides += 1
            self.tiles += record["tiles"]
            shown = self.first
        else:
            self.codes[record["code"]] += 1
            shown = self.refused
        if len(shown) < self.most:
            shown.append(record)

    def show(self, notes: Iterable[str], overrides: MppOverrides) -> None:
        """Print it."""
        out, most = console(), self.most
        again = f", {self.reused:,} unchanged since the last run" if self.reused else ""
        out.print(self._slides(counted(self.slides, "slide") + again))
        self._rest(self.slides - most, "slides")
        if self.codes:
            skipped = sum(self.codes.values())
            by_code = ", ".join(f"{code} {n:,}" for code, n in self.codes.most_common())
            out.print(self._refused(f"{skipped:,} not used: {by_code}"))
            self._rest(skipped - most, "skipped")
        notes = [*notes, *self.notes]
        if overrides.unmatched:
            names = ", ".join(overrides.unmatched[:most])
            more = len(overrides.unmatched) - most
            names += f" ... and {more:,} more" if more > 0 else ""
            notes.append(
                f"{overrides.source} gives µm/px for what is not among the slides: {names}"
            )
        for note in notes:
            out.print(f"note: {note}", markup=False, highlight=False)

    def _rest(self, more: int, name: str) -> None:
        if more > 0:
            print(f"... and {more:,} more: {self.corpus / name}.parquet (or .csv)")

    def _slides(self, title: str) -> Table:
        table = titled(title)
        for name in ("slide", "size, px", "µm/px", "from", "levels", "container", "codec", "tiles"):
            right = name in ("size, px", "µm/px", "tiles")
            table.add_column(name, justify="right" if right else "left", overflow="fold")
        for r in self.first:
            table.add_row(
                *(escape(r["slide_id"]), f"{r['width_px']} x {r['height_px']}"),
                *(f"{(r['mpp_x'] + r['mpp_y']) / 2:.4g}", r["mpp_source"], r["downsamples"]),
                *(r["container"], r["codec"], f"{r['tiles']:,}"),
            )
        return table

    def _refused(self, title: str) -> Table:
        table = titled(title)
        for name in ("file", "code", "why"):
            table.add_column(name, overflow="fold")
        for r in self.refused:
            table.add_row(escape(Path(r["uri"]).name), r["code"], escape(r["reason"]))
        return table


_TWINS_TOLD = 3


def finish(
    wanted: WantedSlides,
    folder: Folder,
    journal: Journal,
    done: Done,
    fingerprints: bool,
    salt: Salt | None,
) -> None:
    """Make the folder, its tables and its journal those of the slides wanted, and count them in `done`.

    A run that is killed on the way finds everything known the next time, and does this again.
    """
    known = (journal.known[address].slide_id for address, _ in wanted.addresses())
    folder.keep_only({slide_id for slide_id in known if slide_id})
    twins = _twins(wanted, journal) if fingerprints else {}
    with (
        TableWriter(folder.corpus, "slides", SLIDE_COLUMNS) as slides,
        TableWriter(folder.corpus, "skipped", SKIPPED_COLUMNS) as skipped,
    ):

        def tabled(record: Record) -> Record:
            (slides if "slide_id" in record else skipped).add(record)
            done.count(record)
            return record

        for record in wanted.skipped:
            tabled(record)
        records = (tabled(record) for record in _records(wanted, journal, twins, salt))
        journal.commit(records, len(wanted.kept) + len(wanted.slides))
    if twins:
        pairs = [f"{slide} that of {twin}" for slide, twin in sorted(twins.items())[:_TWINS_TOLD]]
        some = "; ".join(pairs) + ("; ..." if len(twins) > _TWINS_TOLD else "")
        done.notes.append(
            f"{len(twins):,} of the slides show the image of another one ({some}): leave them out with "
            "--cohort.exclude, or they are drawn twice as often (column twin_of of slides.parquet)"
        )


def _records(
    wanted: WantedSlides, journal: Journal, twins: dict[str, str], salt: Salt | None
) -> Iterator[Record]:
    """The journal's records in the order of the corpus, with what the cohort says of them now."""
    for address, row in wanted.addresses():
        record = journal.read(address)
        if row is not None:
            for column in COHORT_COLUMNS:
                record.pop(column.name, None)
            record |= record.get("found", {}) | told_by_cohort(row)
            if salt is not None and (record.get("found") or salt.mark_of(row)):
                record["salt"] = salt.mark
            else:
                record.pop("salt", None)
        twin = twins.get(record.get("slide_id", ""))
        yield record if twin is None else record | {"twin_of": twin}


def _twins(wanted: WantedSlides, journal: Journal) -> dict[str, str]:
    """Slides that show the image of an earlier one in another file, each with that one's id."""
    prints = []
    for address, _ in wanted.addresses():
        record = journal.read(address)
        if record.get("fingerprint"):
            size_px = (record["width_px"], record["height_px"])
            prints.append((record["slide_id"], size_px, record["fingerprint"]))
    return find_twins(prints)
