"""``pathfm index``: slides in, a corpus folder of tile indexes out. Headers only.

Writes ``slides/<slide_id>.index``, ``slides.csv``, ``skipped.csv`` and ``index.yaml``. A rerun
takes over the index of a slide whose bytes (size, modification time or ETag) and µm/px override
are the same. The folder is what the last run asked for: indexes of other slides are removed.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shlex
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, field_validator
from rich.markup import escape
from rich.table import Table

from online_patching.errors import PatchingError, redact
from online_patching.slide_index import SlideIndex
from pathfm.cohort import Cohort, CohortRow, MppOverrides, write_csv
from pathfm.runtime import (
    PathfmError,
    console,
    make_folder,
    one_line,
    progress,
    save_config,
    without_secrets,
)

_COLUMNS = (
    "slide_id uri patient site label split width_px height_px mpp_x mpp_y mpp_source "
    "container codec levels tiles size_bytes digest"
).split()


class IndexConfig(BaseModel, frozen=True, extra="forbid"):
    """What ``pathfm index`` wants to know."""

    slides: tuple[str, ...] = Field(
        min_length=1,
        description="where the slides are: files, folders, globs, URLs, or one cohort CSV "
        "(columns uri, patient, site, label, split, mpp)",
    )
    out: Path = Field(Path("corpus"), description="the corpus folder to write")
    mpp_overrides: Path | None = Field(
        None,
        description="CSV with the columns file, mpp: µm/px where files carry none or a wrong one",
    )
    threads: int = Field(8, ge=1, le=256, description="slides whose headers are read at a time")

    @field_validator("slides", mode="before")
    @classmethod
    def _one_is_a_list_too(cls, value: Any) -> Any:
        return (str(value),) if isinstance(value, (str, Path)) else value


@dataclass(frozen=True)
class IndexResult:
    """What an index run found: usable slides in order, and (URI, reason) of the others."""

    corpus: Path
    slides: tuple[SlideIndex, ...]
    skipped: tuple[tuple[str, str], ...]
    reused: int
    cohort_digest: str


def run(config: IndexConfig) -> IndexResult:
    """Indexes every slide it can and lists the others with the reason.

    Raises ``PathfmError`` when no slide is usable, or when the one file named is not.
    """
    cohort = find_cohort(config.slides)
    overrides = (
        MppOverrides.read(config.mpp_overrides) if config.mpp_overrides else MppOverrides({})
    )
    folder = make_folder(config.out / "slides")
    known = _known(folder)

    def one(row: CohortRow) -> tuple[SlideIndex | str, bool]:
        mpp = row.mpp if row.mpp is not None else overrides.find(row.uri)
        return _index_one(row.uri, mpp, known)

    slides: list[SlideIndex] = []
    rows: list[CohortRow] = []
    skipped: list[tuple[str, str]] = []
    reused = 0
    with (
        ThreadPoolExecutor(config.threads) as pool,
        progress(len(cohort.rows), "slides", "indexing") as bar,
    ):
        for row, (found, old) in zip(cohort.rows, pool.map(one, cohort.rows), strict=True):
            if isinstance(found, str):
                skipped.append((row.uri, found))
            else:
                slides.append(found)
                rows.append(row)
                reused += old
            bar.advance()
    _refuse_if_useless(config, slides, skipped)
    _refuse_same_ids(slides)
    skipped = [(redact(uri), without_secrets(reason)) for uri, reason in skipped]
    save_config(config, config.out, "index.yaml")
    _save(config.out, slides, rows, skipped)
    _show(slides, skipped, reused, overrides)
    print(f"next: pathfm foreground {shlex.quote(str(config.out))}")
    return IndexResult(config.out, tuple(slides), tuple(skipped), reused, cohort.digest)


def find_cohort(sources: Iterable[str]) -> Cohort:
    """The slides that paths, globs, URLs, folders or cohort tables stand for, each once."""
    rows: dict[str, CohortRow] = {}
    for source in sources:
        for row in _rows_of(source):
            rows.setdefault(row.uri, row)
    if not rows:
        raise PathfmError(f"no slides found under {', '.join(map(redact, sources))}")
    return Cohort(tuple(rows.values()))


def _rows_of(source: str) -> tuple[CohortRow, ...]:
    from online_patching import find_slides

    if source.lower().endswith(".csv") and "://" not in source:
        return Cohort.read(Path(source)).rows
    if "://" not in source and not os.path.exists(source):
        found = sorted(glob.glob(source, recursive=True))
        if not found:
            raise PathfmError(f"{source}: there is no such file or folder. Check the path.")
        return tuple(row for path in found for row in _rows_of(path))
    return Cohort.of(find_slides(source)).rows


def _known(folder: Path) -> dict[str, SlideIndex]:
    """Readable indexes of an earlier run, by URI."""
    return {index.uri: index for _, index in _stored(folder)}


def _stored(folder: Path) -> Iterator[tuple[Path, SlideIndex]]:
    """The readable indexes in a folder; damaged ones, or of another version, are made anew."""
    for path in folder.glob("*.index"):
        with contextlib.suppress(PatchingError):
            yield path, SlideIndex.load(path)


def _index_one(
    uri: str, mpp: float | None, known: dict[str, SlideIndex]
) -> tuple[SlideIndex | str, bool]:
    """A slide's index or why there is none, and whether an earlier run had it."""
    from online_patching import read_slide_index

    try:
        old = known.get(uri)
        if old is not None and _still_valid(old, mpp):
            return old, True
        return read_slide_index(uri, mpp=mpp), False
    except PatchingError as error:
        return one_line(error).removeprefix(f"{getattr(error, 'uri', uri)}: "), False


def _still_valid(old: SlideIndex, mpp: float | None) -> bool:
    """Whether an old index is of the same bytes, under the same override."""
    from online_patching.stores import Stores

    told = old.mpp_source == "override table"
    if told != (mpp is not None) or (mpp is not None and old.mpp != mpp) or not old.token:
        return False
    stores = Stores()
    try:
        return stores.version(old.uri)[1] == old.token
    finally:
        stores.close()


def _refuse_if_useless(
    config: IndexConfig, slides: list[SlideIndex], skipped: list[tuple[str, str]]
) -> None:
    if slides:
        return
    if len(skipped) == 1:
        raise PathfmError(f"{redact(skipped[0][0])}: {skipped[0][1]}")
    reasons = "; ".join(f"{Path(redact(uri)).name}: {reason}" for uri, reason in skipped[:3])
    raise PathfmError(
        f"none of {len(skipped)} files under {', '.join(map(redact, config.slides))} is a usable slide "
        f"({reasons}{'; ...' if len(skipped) > 3 else ''})"
    )


def _refuse_same_ids(slides: list[SlideIndex]) -> None:
    seen: dict[str, str] = {}
    for index in slides:
        other = seen.setdefault(index.slide_id, index.uri)
        if other != index.uri:
            raise PathfmError(
                f"two slides have the id {index.slide_id!r}: {redact(other)} and "
                f"{redact(index.uri)}. Rename one."
            )


def _save(
    out: Path,
    slides: list[SlideIndex],
    rows: list[CohortRow],
    skipped: list[tuple[str, str]],
) -> None:
    folder = out / "slides"
    before = {path.name: index.digest for path, index in _stored(folder)}
    if before != {f"{index.slide_id}.index": index.digest for index in slides}:
        (out / "corpus.json").unlink(missing_ok=True)  # it packs other slides: not to be trained on
    for index in slides:
        index.save(folder / f"{index.slide_id}.index")
    kept = {f"{index.slide_id}.index" for index in slides}
    for path in folder.glob("*.index"):
        if path.name not in kept:
            path.unlink()
    table = [_record(index, row) for index, row in zip(slides, rows, strict=True)]
    write_csv(out / "slides.csv", _COLUMNS, table)
    write_csv(out / "skipped.csv", ("uri", "reason"), skipped)


def _record(index: SlideIndex, row: CohortRow) -> list[object]:
    return [
        *(index.slide_id, redact(index.uri), row.patient, row.site, row.label, row.split),
        *(*index.dimensions, f"{index.mpp_x:.6g}", f"{index.mpp_y:.6g}", index.mpp_source),
        *(index.container, index.codec, len(index.levels), index.n_tiles, index.size_bytes),
        index.digest,
    ]


def _show(
    slides: list[SlideIndex],
    skipped: list[tuple[str, str]],
    reused: int,
    overrides: MppOverrides,
) -> None:
    out = console()
    again = f", {reused} unchanged since the last run" if reused else ""
    table = Table(title=f"{len(slides)} slides{again}", title_justify="left")
    for name in ("slide", "size, px", "µm/px", "from", "levels", "container", "codec", "tiles"):
        right = name in ("size, px", "µm/px", "tiles")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    for index in slides:
        width_px, height_px = index.dimensions
        levels = "/".join(f"{level.downsample_x:.3g}" for level in index.levels)
        table.add_row(
            *(
                escape(index.slide_id),
                f"{width_px} x {height_px}",
                f"{index.mpp:.4g}",
                index.mpp_source,
            ),
            *(levels, index.container, index.codec, f"{index.n_tiles:,}"),
        )
    out.print(table)
    if skipped:
        table = Table(title=f"{len(skipped)} not used", title_justify="left")
        table.add_column("file", overflow="fold")
        table.add_column("why", overflow="fold")
        for uri, reason in skipped:
            table.add_row(escape(Path(uri).name), escape(reason))
        out.print(table)
    if overrides.unmatched:
        names = ", ".join(overrides.unmatched)
        text = f"note: {overrides.source} gives µm/px for what is not among the slides: {names}"
        out.print(text, markup=False, highlight=False)
