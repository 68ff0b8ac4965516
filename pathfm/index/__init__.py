"""``pathfm index``: slides in, a corpus folder of tile indexes out. Headers only.

    naming.py    what a slide is called         journal.py   what is known of every slide, appended
    reading.py   many slides at a time          tables.py    slides.parquet, skipped.parquet, and as CSV
    finishing.py the end of a run, and what is told of it

Writes ``slides/<slide_id>.index``, the tables, ``index.yaml`` and ``index.journal``. A run that was
stopped, or killed, goes on where it was with the same command; a rerun takes over every slide whose bytes
(size and modification time, or ETag) and told µm/px are the same. The folder is what the last run asked
for: indexes of other slides are removed. With ``--append`` they stay as they are, and slides are added.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, field_validator

from pathfm.cohorts import CohortOptions
from pathfm.runtime import PathfmError, make_folder, save_config

if TYPE_CHECKING:
    from online_patching.stores import Stores
    from pathfm.cohorts import Salt
    from pathfm.index.journal import Journal
    from pathfm.index.wanted import WantedSlides


_DROPPED_TOLD = 3


class IndexConfig(BaseModel, frozen=True, extra="forbid"):
    """What ``pathfm index`` wants to know."""

    slides: tuple[str, ...] = Field(
        min_length=1,
        description="where the slides are: files, folders, globs, URLs, bucket prefixes, or cohort "
        "tables (columns uri, patient, site, label, split, mpp or mpp_x and mpp_y)",
    )
    out: Path = Field(Path("corpus"), description="the corpus folder to write")
    append: bool = Field(
        False,
        description="add slides to the corpus folder; those in it are neither read nor changed",
    )
    mpp_overrides: Path | None = Field(
        None,
        description="CSV with the columns file, and mpp or mpp_x and mpp_y: µm/px where files carry "
        "none or a wrong one",
    )
    cohort: CohortOptions = Field(CohortOptions(), description="how sources become slides")
    threads: int | None = Field(
        None,
        ge=1,
        le=256,
        description="slides whose headers are read at a time; unset: 8, or 64 where most are remote",
    )
    anew: bool = Field(False, description="read every slide again, whatever is known of it")
    show: int = Field(20, ge=0, le=100_000, description="rows printed of each table")

    @field_validator("slides", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return (str(value),) if isinstance(value, (str, Path)) else value


@dataclass(frozen=True)
class IndexResult:
    """What the corpus folder holds after a run. Its tables name every slide.

    `reused` of the `slides` were known before; `skipped` counts refusals by code.
    """

    corpus: Path
    slides: int
    tiles: int
    skipped: Mapping[str, int]
    reused: int
    cohort_digest: str


def run(config: IndexConfig) -> IndexResult:
    """Indexes every slide it can and lists the others with the reason.

    Raises ``PathfmError`` when no slide is usable, or when the one file named is not; then nothing in
    the folder has changed.
    """
    from online_patching.stores import Stores

    stores = Stores()
    try:
        return _index(config, stores)
    finally:
        stores.close()


def _dropped(slides: Set[str]) -> list[str]:
    """A note on slides that the corpus had before and has no more; the table of what is refused says why."""
    if not slides:
        return []
    some = ", ".join(sorted(slides)[:_DROPPED_TOLD]) + (
        ", ..." if len(slides) > _DROPPED_TOLD else ""
    )
    told = (
        f"{len(slides):,} of the slides that this corpus had are not in it any more ({some}): if that is not meant, "
        "give the options of the earlier run again (--mpp_overrides, --cohort.exclude, ...)"
    )
    return [told]


def _index(config: IndexConfig, stores: Stores) -> IndexResult:
    from pathfm.cohorts import MppOverrides, find_cohort
    from pathfm.index.finishing import Done, finish, refuse_if_useless
    from pathfm.index.folder import Folder
    from pathfm.index.journal import opened
    from pathfm.index.reading import Reader, default_threads
    from pathfm.index.wanted import wanted_of

    cohort = find_cohort(config.slides, config.cohort, stores, config.out)
    table = config.mpp_overrides
    hidden = config.cohort.salt_names
    overrides = MppOverrides.read(table, hidden) if table else MppOverrides({})
    told = cohort.salt.sources(config.slides) if cohort.salt else config.slides
    make_folder(config.out / "slides")
    with opened(config.out) as journal:
        folder = Folder(config.out)
        before = set(folder.sizes)
        if config.append:
            _refuse_to_append_to_a_damaged_journal(config.out, journal)
        wanted = wanted_of(cohort, overrides, folder, journal, config.append)
        if config.append:
            ids = {slide.slide_id for slide in wanted.slides}
            _refuse_to_drop(folder.sizes.keys() - ids, config.out, journal)
            _refuse_other_ids(cohort.salt, wanted, config.out, journal)
        threads = config.threads or default_threads(slide.row.uri for slide in wanted.slides)
        reader = Reader(folder, journal, stores, threads, config.cohort, cohort)
        reader.bring_up_to_date(wanted.slides, config.anew)
        refuse_if_useless(told, wanted, journal)
        if config.cohort.fingerprints:
            reader.fingerprint_same_sizes(address for address, _ in wanted.addresses())
        done = Done(config.out, reader.reused, config.show)
        finish(wanted, folder, journal, done, config.cohort.fingerprints, cohort.salt)
        save_config(config.model_copy(update={"slides": told}), config.out, "index.yaml")
    done.show([*cohort.notes, *_dropped(before - set(folder.sizes))], overrides)
    print(f"next: pathfm foreground {shlex.quote(str(config.out))}")
    return IndexResult(
        config.out, done.slides, done.tiles, dict(done.codes), reader.reused, cohort.digest
    )


def _refuse_to_append_to_a_damaged_journal(out: Path, journal: Journal) -> None:
    if journal.damaged:
        journal.roll_back()
        raise PathfmError(
            f"{out}: its journal has lost {journal.damaged:,} lines: slides would be lost with them. "
            "Index all of its slides again, without --append"
        )


def _refuse_to_drop(slide_ids: Set[str], out: Path, journal: Journal) -> None:
    if slide_ids and not journal.committed:  # none: a run that appended to nothing was killed
        journal.roll_back()
        raise PathfmError(
            f"{out}: holds {len(slide_ids):,} indexes of other slides, of a run that has not finished. "
            "Finish it first, without --append"
        )


def _refuse_other_ids(salt: Salt | None, wanted: WantedSlides, out: Path, journal: Journal) -> None:
    marks = {journal.known[address].salt for address in wanted.kept} - {""}
    if salt is not None and marks - {salt.mark if marks else ""}:
        journal.roll_back()
        raise PathfmError(
            f"{out}: its patients' ids were made otherwise (another salt, or --cohort.ids): one patient "
            "would have two. Give the same salt, or index all of its slides again, without --append"
        )
