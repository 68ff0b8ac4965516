"""A folder of slide bags (HDF5) and a CSV of labels -> `Bags`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pathfm.embeddings.bags import Bag, find_bags, read_bag
from pathfm.runtime import PathfmError
from pathfm.slide_probe.bags import Bags

_LARGEST_TABLE_BYTES = 64 << 20
_SLIDE = ("slide", "slide_id", "wsi_id")


def read_bags(folder: Path, labels: Path) -> Bags:
    """Bags of a folder's `<slide>.h5` (ours, CLAM's or TRIDENT's) with the labels of a CSV.

    The CSV has columns `slide` (or slide_id), `label`, and if known `patient` (or case_id) and `split`
    (train, val, test; empty everywhere: none). A slide may be written with `.h5` or without. Classes are
    sorted by name, numbers as numbers. Bags without a row are left out.
    Raises PathfmError for a slide without its bag, and as `Bags` does.
    """
    rows = _rows(labels)
    slides = [row["slide"].removesuffix(".h5") for row in rows]
    names = sorted({row["label"] for row in rows}, key=_natural)
    splits = tuple(row["split"] for row in rows)
    if any(splits) and not all(splits):
        bare = slides[splits.index("")]
        raise PathfmError(f"{labels}: slide {bare!r} has no split and others do: fill all or none")
    numbers = np.array([names.index(row["label"]) for row in rows], np.int64)
    patients = tuple(row["patient"] for row in rows)
    return bags_of_samples(folder, str(labels), slides, numbers, names, patients, splits)


def bags_of_samples(
    folder: Path,
    table: str,
    slides: Sequence[str],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    patients: Sequence[str],
    splits: Sequence[str],
) -> Bags:
    """Bags of a folder for slides named by a table. Raises PathfmError for a slide without its bag."""
    files = find_bags(folder)
    missing = [slide for slide in slides if slide not in files]
    if missing:
        raise PathfmError(
            f"{table}: {len(missing)} of {len(slides)} slides have no bag in {folder}, the first is "
            f"{missing[0]!r}: embed them, or take them out of the table"
        )
    ids = tuple(slides)

    def read(i: int) -> Bag:
        return read_bag(files[ids[i]])

    first = read(0)
    encoder = first.facts.encoder_digest if first.facts else ""

    def source(i: int) -> NDArray[np.float32]:
        bag = read(i)
        if bag.facts and bag.facts.encoder_digest != encoder:
            raise PathfmError(
                f"{files[ids[i]]} was made by another model than {files[ids[0]]}: embed one of them again"
            )
        return bag.features

    return Bags(
        slides=ids,
        labels=labels,
        classes=tuple(classes),
        dim=int(first.features.shape[1]),
        source=source,
        patients=tuple(patients),
        splits=tuple(splits) if all(splits) else (),
        encoder_digest=encoder,
    )


def _rows(path: Path) -> list[dict[str, str]]:
    """The table's rows under our column names; PathfmError for what is missing."""
    try:
        if path.stat().st_size > _LARGEST_TABLE_BYTES:
            raise PathfmError(
                f"{path}: more than {_LARGEST_TABLE_BYTES >> 20} MiB: no table of slides"
            )
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise PathfmError(
            f"{path}: cannot be read ({why}): give a CSV with slide and label"
        ) from None
    table = csv.DictReader(lines, strict=True)
    try:
        return _named_rows(path, table)
    except csv.Error as error:
        raise PathfmError(f"{path}, line {table.line_num}: no CSV ({error})") from None


def _named_rows(path: Path, table: csv.DictReader[str]) -> list[dict[str, str]]:
    columns = {name.strip().lower(): name for name in table.fieldnames or ()}
    slide = next((columns[name] for name in _SLIDE if name in columns), None)
    if slide is None or "label" not in columns:
        raise PathfmError(
            f"{path}: columns {list(columns)}, wants slide and label, and perhaps patient and split"
        )
    patient = columns.get("patient") or columns.get("case_id") or ""
    found = []
    for number, row in enumerate(table, start=2):
        wanted = {"slide": slide, "label": columns["label"], "patient": patient}
        named = {k: (row.get(v) or "").strip() for k, v in wanted.items()}
        named["split"] = (row.get(columns.get("split", "")) or "").strip().lower()
        if not named["slide"] or not named["label"]:
            raise PathfmError(f"{path}, line {number}: no slide or no label")
        found.append(named)
    if not found:
        raise PathfmError(f"{path}: no rows")
    return found


def _natural(name: str) -> tuple[float, str]:
    try:
        return float(name), name
    except ValueError:
        return float("inf"), name
