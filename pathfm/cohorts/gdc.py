"""A manifest of the Genomic Data Commons -> slides that are read by ranges from its data endpoint.

The portal's manifest is a TSV: id, filename, md5, size, state. A file's id stands for its bytes for good
(a new version gets a new id), so size and id say whether a slide is the same; the endpoint's ETag, which
some answers have and some have not, is not relied on.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from online_patching.stores.http_headers import send_header
from pathfm.cohorts.options import CohortOptions
from pathfm.cohorts.row import CohortRow, Skipped
from pathfm.runtime import PathfmError

_COLUMNS = ("id", "filename", "md5", "size")
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MD5 = re.compile(r"[0-9a-f]{32}")
_SLIDES = (".svs", ".tif", ".tiff", ".ndpi", ".scn", ".bif", ".dcm")
_TOKEN_HEADER = "X-Auth-Token"  # noqa: S105


def is_manifest(head: str) -> bool:
    """Whether a text begins as a GDC manifest does."""
    names = head.split("\n", 1)[0].strip().lstrip("\ufeff").lower().split("\t")
    return set(_COLUMNS) <= set(names)


def read_manifest(name: str, text: str, options: CohortOptions) -> Iterator[CohortRow | Skipped]:
    """The slides of a manifest, and what else it lists (BAM, VCF, reports) as skipped.

    `PathfmError` names the line of an id that is none, or of a size that is no number.
    """
    if options.gdc_token_file is not None:
        send_token(options.gdc_endpoint, options.gdc_token_file)
    lines = csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    lines.fieldnames = [(column or "").strip().lower() for column in lines.fieldnames or ()]
    for record in _each(name, lines):
        cells = {key: (value or "").strip() for key, value in record.items() if key}
        if not any(cells.values()):
            continue
        where = f"{name}, line {lines.line_num}"
        if not _ID.fullmatch(cells["id"].lower()):
            raise PathfmError(f"{where}: {cells['id'][:60]!r} is no file id of the GDC")
        if not cells["size"].isascii() or not cells["size"].isdigit():
            raise PathfmError(f"{where}: {cells['size'][:60]!r} is no size in bytes")
        yield _row(cells, options.gdc_endpoint)


def _each(name: str, lines: csv.DictReader[str]) -> Iterator[dict[str, str]]:
    try:
        yield from lines
    except csv.Error as error:
        raise PathfmError(
            f"{name}, line {lines.reader.line_num}: not a manifest: {error}"
        ) from None


def _row(cells: dict[str, str], endpoint: str) -> CohortRow | Skipped:
    uri = f"{endpoint}/{cells['id'].lower()}"
    filename = re.split(r"[/\\]", cells["filename"])[-1]  # some are keys of a store
    if not filename.lower().endswith(_SLIDES):
        return Skipped(uri, f"{filename[:120]!r} of the GDC manifest is no slide.", "not_a_slide")
    md5 = cells["md5"].lower()
    content = f"md5:{md5}" if _MD5.fullmatch(md5) else f"gdc:{cells['id'].lower()}"
    return CohortRow(uri, name=filename, size_bytes=int(cells["size"]), content=content)


def send_token(endpoint: str, file: Path) -> None:
    """From now on, here and in processes started from here, requests to the endpoint carry the token.

    What is kept is the file's path; the token itself is read when it is needed and never leaves memory.
    """
    if not os.access(file, os.R_OK):
        raise PathfmError(f"{file}: the GDC's token cannot be read there")
    parts = urlsplit(endpoint)
    send_header(f"{parts.scheme}://{parts.netloc}", _TOKEN_HEADER, str(file.absolute()))
