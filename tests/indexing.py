"""What the tests of indexing share: small slides to index, and a look at what came out."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from online_patching.testing import SyntheticSlide, write_tiff
from pathfm.cohorts import CohortRow, index_row
from pathfm.index import IndexConfig, IndexResult, run

N = 12


def small_slide(folder: Path) -> Path:
    """One of a few tiles."""
    return write_tiff(folder / "x.svs", SyntheticSlide(1, 400, 300, mpp=0.2531))


def many_slides(source: Path, folder: Path) -> Path:
    """s00.svs to s11.svs, and two that are no use."""
    folder.mkdir()
    for number in range(N):
        shutil.copy(source, folder / f"s{number:02d}.svs")
    (folder / "cut.svs").write_bytes(source.read_bytes()[:2000])
    (folder / "text.svs").write_text("no slide")
    return folder


def count_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the headers of each slide are read from now on, by name."""
    seen: Counter[str] = Counter()

    def one(row: CohortRow, *more: Any, **others: Any) -> Any:
        seen[Path(row.uri).name] += 1
        return index_row(row, *more, **others)

    monkeypatch.setattr("pathfm.index.reading.index_row", one)
    return seen


def index(source: Path | str, out: Path, **more: Any) -> IndexResult:
    """Index without comparing pictures."""
    return run(
        IndexConfig(slides=(str(source),), out=out, **{"cohort": {"fingerprints": False}, **more})
    )


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV."""
    return list(csv.DictReader(path.read_text().splitlines()))


def content(out: Path) -> dict[str, bytes]:
    """Everything that a corpus folder holds, but when it was made and the config's comment."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "index.yaml"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}
