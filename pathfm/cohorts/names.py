"""What a file's name says, by documented rules only: TCGA barcodes, and the pattern that a person gives."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pathfm.cohorts.options import CohortOptions
from pathfm.cohorts.row import CohortRow

_BARCODE = re.compile(r"(TCGA-([A-Z0-9]{2})-[A-Z0-9]{4})(?![A-Z0-9])", re.IGNORECASE)
"""Project, tissue source site, participant: the start of every TCGA barcode."""


def name_rows(
    rows: Sequence[CohortRow], options: CohortOptions
) -> tuple[list[CohortRow], list[str]]:
    """The rows that `include` and `exclude` leave, filled from their names; and notes on what was done.

    What a table says is never overruled. The barcode at the start of a TCGA file's name gives patient
    (TCGA-02-0001) and site (02); the named groups of `case_pattern` give what they are called after.
    """
    kept = [row for row in rows if _wanted(row, options)]
    notes = []
    if len(kept) < len(rows):
        notes.append(
            f"{len(rows) - len(kept):,} of {len(rows):,} slides are left out by include or exclude"
        )
    named = [_from_barcode(row) for row in kept]
    barcodes = sum(old is not new for old, new in zip(kept, named, strict=True))
    if barcodes:
        notes.append(f"patient and site of {barcodes:,} slides are taken from their TCGA barcodes")
    if options.case_pattern:
        pattern = re.compile(options.case_pattern)
        matched = [pattern.search(row.title) for row in named]
        missed = sum(match is None for match in matched)
        if missed:
            notes.append(f"the case pattern does not match {missed:,} of {len(named):,} names")
        named = [_filled(row, m) for row, m in zip(named, matched, strict=True)]
    return named, notes


def _wanted(row: CohortRow, options: CohortOptions) -> bool:
    texts = (row.uri, row.title)
    if options.include and not any(re.search(options.include, text) for text in texts):
        return False
    return not (options.exclude and any(re.search(options.exclude, text) for text in texts))


def barcode_of(title: str) -> str:
    """The participant (TCGA-02-0001) at the start of a TCGA file's name, or ""."""
    match = _BARCODE.match(title)
    return match[1].upper() if match else ""


def _from_barcode(row: CohortRow) -> CohortRow:
    match = _BARCODE.match(row.title)
    if match is None or row.patient:
        return row
    return replace(row, patient=match[1].upper(), site=row.site or match[2].upper())


def _filled(row: CohortRow, match: re.Match[str] | None) -> CohortRow:
    found: dict[str, Any] = match.groupdict() if match else {}
    return replace(row, **{k: v for k, v in found.items() if v and not getattr(row, k)})


def stain_notes(rows: Sequence[CohortRow]) -> list[str]:
    """A note on cases that several stains are cut from."""
    stains: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row.case and row.stain:
            stains.setdefault((row.patient, row.case), set()).add(row.stain)
    several = [found for found in stains.values() if len(found) > 1]
    if not several:
        return []
    names = sorted(set().union(*several))
    told = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return [f"cases of which several stains are there: {len(several):,} ({told})"]
