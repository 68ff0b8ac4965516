"""The slides that sources stand for: paths, globs, prefixes, URLs, tables, GDC and IDC manifests."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from online_patching import find_slides
from online_patching.errors import redact
from online_patching.stores import Stores, is_remote, local_path
from online_patching.stores.cloud import CLOUDS
from pathfm.cohorts import gdc, idc
from pathfm.cohorts.columns import read_table
from pathfm.cohorts.listing import has_glob, slides_below
from pathfm.cohorts.names import name_rows, stain_notes
from pathfm.cohorts.options import CohortOptions
from pathfm.cohorts.records import PARQUET, is_table, read_text
from pathfm.cohorts.row import CohortRow, Skipped
from pathfm.cohorts.salting import Salt
from pathfm.cohorts.table import Cohort
from pathfm.runtime import PathfmError

_MANIFESTS = (".txt", ".tsv", ".csv", ".s5cmd", ".manifest")
_HEAD_BYTES = 16 * 2**10


def absent(sources: Sequence[str]) -> list[str]:
    """Of sources that are local and no globs, those that are not there."""
    plain = [each for each in sources if not (is_remote(each) or has_glob(each))]
    return [each for each in plain if not Path(local_path(each)).exists()]


def find_cohort(
    sources: Iterable[str],
    options: CohortOptions | None = None,
    stores: Stores | None = None,
    beside: Path | None = None,
) -> Cohort:
    """The slides that sources stand for, each once, in their order.

    A source is a file, a folder, a glob, a URL, a prefix or glob of a bucket, a CSV, TSV or Parquet table, a
    manifest of the GDC or the IDC. With `beside`, the corpus folder that the cohort is written to, the
    rows hold salted ids (see `salting.py`) and may be printed and stored; without it, what the sources say.
    """
    options = options or CohortOptions()
    own = stores is None
    stores = stores or Stores()
    try:
        rows, skipped = _gather(sources, options, stores)
    finally:
        if own:
            stores.close()
    named, notes = name_rows(list(rows.values()), options)
    if not named:
        raise PathfmError(
            f"no slides found under {', '.join(map(redact, sources))}: wanted .svs, .tif, .ndpi, .dcm, .zarr, or "
            "what else OpenSlide reads"
        )
    notes += stain_notes(named)
    salt = None if beside is None else Salt(options, beside)
    if salt is not None:
        named = salt.hide(named)
    return Cohort(tuple(named), tuple(skipped.values()), tuple(notes), salt)


def _gather(
    sources: Iterable[str], options: CohortOptions, stores: Stores
) -> tuple[dict[str, CohortRow], dict[str, Skipped]]:
    rows: dict[str, CohortRow] = {}
    skipped: dict[str, Skipped] = {}
    for source in sources:
        for item in _items(source, options, stores):
            if isinstance(item, Skipped):
                skipped.setdefault(item.uri, item)
            else:
                rows.setdefault(item.uri, item)
    return rows, skipped


def _items(source: str, options: CohortOptions, stores: Stores) -> Iterator[CohortRow | Skipped]:
    """What one source stands for."""
    if is_remote(source):
        yield from _remote(source, options, stores)
        return
    path = local_path(source)
    if not os.path.exists(path):
        found = sorted(glob.glob(path, recursive=True))
        if not found:
            raise PathfmError(f"{source}: there is no such file or folder. Check the path.")
        for one in found:
            yield from _items(one, options, stores)
    elif os.path.isfile(path) and path.lower().endswith(_MANIFESTS + PARQUET):
        yield from _table(path, options, stores)
    else:
        yield from (CohortRow(uri) for uri in find_slides(path))


def _remote(source: str, options: CohortOptions, stores: Stores) -> Iterator[CohortRow | Skipped]:
    name = redact(source).lower()
    if has_glob(source):
        found = slides_below(source, stores)
        if not found:
            raise PathfmError(f"{redact(source)}: nothing there matches. Check the pattern.")
        yield from map(CohortRow, found)
    elif name.endswith(_MANIFESTS) or is_table(source):
        yield from _table(source, options, stores)
    elif name.startswith(("http://", "https://")) or _is_one(name):
        yield CohortRow(source)
    else:
        yield from map(CohortRow, slides_below(source, stores))


def _is_one(name: str) -> bool:
    """Whether the last part of a URI is a file's name, or a Zarr store's: nothing is to be listed."""
    scheme, _, path = name.partition("://")
    if scheme in CLOUDS and "/" not in path:
        return False  # a bucket's name may have dots
    if name.endswith("/"):
        return name.endswith(".zarr/")
    suffix = os.path.splitext(name)[1]
    return 1 < len(suffix) <= 8 and any(map(str.isalpha, suffix))  # not the 2 of a folder "v1.2"


def _table(source: str, options: CohortOptions, stores: Stores) -> Iterator[CohortRow | Skipped]:
    """The rows of a table or manifest; its beginning tells which. Any other file is itself."""
    if not redact(source).lower().endswith(_MANIFESTS):
        return _checked(source, read_table(source, options, stores))
    text = read_text(source, stores)
    head = text[:_HEAD_BYTES]
    if gdc.is_manifest(head):
        return gdc.read_manifest(redact(source), text, options)
    if idc.is_manifest(head):
        return idc.read_manifest(redact(source), text)
    if is_table(source):
        return _checked(source, read_table(source, options, stores))
    return iter([CohortRow(source)])


def _checked(table: str, rows: Iterator[CohortRow]) -> Iterator[CohortRow]:
    """A table's rows: at least one, each slide once, no patient on two sides."""
    cohort = Cohort(tuple(rows))
    if not cohort.rows:
        raise PathfmError(f"{redact(table)}: the cohort table has no rows")
    return iter(cohort.rows)


def read_cohort(table: Path | str, options: CohortOptions | None = None) -> Cohort:
    """The cohort in a CSV, TSV or Parquet table, as it stands there: `slides.parquet` of a corpus too."""
    stores = Stores()
    try:
        rows = read_table(str(table), options or CohortOptions(), stores)
        return Cohort(tuple(_checked(str(table), rows)))
    finally:
        stores.close()
