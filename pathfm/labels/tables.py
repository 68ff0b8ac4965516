"""A class a slide: out of a column of the corpus's own table, or of a table beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from online_patching import Corpus
from online_patching.errors import PatchingError, redact
from online_patching.stores import Stores
from pathfm.cohorts.records import is_table, read_records
from pathfm.labels import LabelsConfig
from pathfm.labels.rows import LabelledRows, chosen_classes, numbered
from pathfm.runtime import PathfmError, one_line

SLIDES_TABLE = "slides.parquet"
_KEY = "slide_id"


def slide_labels(config: LabelsConfig, corpus: Corpus, folder: Path) -> LabelledRows:
    """Every slide of the corpus with its class by the table, or -1: without a row, without a value, of
    another class, or of another split.

    `folder` is where the corpus's slides.parquet lies. A row of `config.table` is found by slide_id;
    where it has a split column, that and the corpus's own must both allow the slide. PathfmError for a
    table that cannot be read, lacks a column, names a slide twice with two labels, or names none here.
    """
    column = (config.column or "label").lower()
    uri = str(config.table or folder / SLIDES_TABLE)
    ids = corpus.slide_ids
    cells = _cells(uri, ids, column)
    where = f"column {column!r} of {redact(uri)}"
    told = [cells.get(name, ("", ""))[0] for name in ids]
    usable = drawable(config, corpus, folder)
    if config.table is not None:
        usable &= _allowed([cells.get(name, ("", ""))[1] for name in ids], config.splits, uri)
    in_split = [name for name, yes in zip(told, usable.tolist(), strict=True) if yes]
    classes = chosen_classes(config, in_split, where)
    labels = np.where(usable, numbered(told, classes), -1)
    return LabelledRows(
        corpus, labels, usable, classes, (_summary(labels, usable, classes, where),)
    )


def drawable(config: LabelsConfig, corpus: Corpus, folder: Path) -> NDArray[np.bool_]:
    """Which slides may be drawn: those of `config.splits`, by the corpus's own table; all of them where
    no slide has a split or the folder has no table. PathfmError when none may."""
    path = folder / SLIDES_TABLE
    ids = corpus.slide_ids
    if not path.is_file():
        return np.ones(len(ids), bool)
    splits = _cells(str(path), ids, "split", needed=False)
    return _allowed([splits.get(name, ("", ""))[1] for name in ids], config.splits, str(path))


def _allowed(splits: Sequence[str], wanted: Sequence[str], where: str) -> NDArray[np.bool_]:
    if not any(splits):
        return np.ones(len(splits), bool)
    allowed = np.asarray([split in wanted for split in splits])
    if not allowed.any():
        found = ", ".join(sorted(set(filter(None, splits))))
        raise PathfmError(
            f"{redact(where)}: no slide of the corpus is in the split {' or '.join(wanted) or '(none)'}; there: "
            f"{found}. Set labels.splits"
        )
    return allowed


def _cells(
    uri: str, ids: Sequence[str], column: str, *, needed: bool = True
) -> dict[str, tuple[str, str]]:
    """slide_id -> (cell of the column, cell of split), of the slides asked for."""
    if not is_table(uri):
        raise PathfmError(f"labels.table {redact(uri)}: no .csv, .tsv or .parquet")
    wanted, found, rows = set(ids), dict[str, tuple[str, str]](), 0
    try:
        with closing(Stores()) as stores:
            for line, record in read_records(uri, stores):
                rows += 1
                missing = [name for name in (_KEY, column) if name not in record]
                if missing and (needed or missing[0] == _KEY):
                    there = ", ".join(sorted(record))
                    raise PathfmError(f"{redact(uri)}: no column {missing[0]!r}; found: {there}")
                name, cells = record[_KEY], (record.get(column, ""), record.get("split", ""))
                if found.get(name, cells) != cells:
                    raise PathfmError(
                        f"{redact(uri)}, row {line}: slide {name} is there before as {found[name][0]!r}, now as "
                        f"{cells[0]!r}. Leave one out"
                    )
                if name in wanted:
                    found[name] = cells
    except (PatchingError, OSError) as error:
        raise PathfmError(f"{redact(uri)}: {one_line(error)}") from None
    if not found:
        raise PathfmError(
            f"{redact(uri)}: none of its {rows:,} rows is of a slide of the corpus ({len(ids):,} slides, "
            f"such as {ids[0]!r}). Its column slide_id must hold the corpus's slide_id"
        )
    return found


def _summary(
    labels: NDArray[np.int64], usable: NDArray[np.bool_], classes: Sequence[str], where: str
) -> str:
    counts = Counter(labels.tolist())
    each = ", ".join(f"{name} {counts[k]:,}" for k, name in enumerate(classes))
    text = f"labels of {where}: {each} slides"
    if rest := int((usable & (labels < 0)).sum()):
        text += f"; {rest:,} without a class"
    if kept_out := int((~usable).sum()):
        text += f"; {kept_out:,} of other splits"
    return text
