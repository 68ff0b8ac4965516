"""What the stages wrote, as it lies in the folder; a stage that wrote nothing gives nothing."""

from __future__ import annotations

import csv
import json
from collections.abc import Set
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from pathfm.probe import ProbeResult
from pathfm.runtime import PathfmError


def newest_run(folder: Path) -> Path | None:
    """The run folder whose metrics were written last."""
    found = list((folder / "runs").glob("*/metrics.jsonl"))
    return max(found, key=lambda path: path.stat().st_mtime).parent if found else None


def read_probe(folder: Path) -> dict[str, Any] | None:
    """What `probe.json` holds; `PathfmError` if it is damaged."""
    for path in (folder / "probe" / "probe.json", folder / "probe.json"):
        text = read_text(path)
        if text:
            try:
                found: dict[str, Any] = json.loads(text)
                TypeAdapter(ProbeResult).validate_python(found)
            except ValueError:  # a ValidationError is one
                raise PathfmError(f"{path}: damaged; make it again with `pathfm probe`") from None
            return found
    return None


def config_files(folder: Path) -> list[tuple[str, Path]]:
    """(verb, resolved config) of every stage that saved one, in the order of the stages."""
    patterns = (
        ("demo", "demo.yaml"),
        ("index", "corpus/index.yaml"),
        ("foreground", "corpus/foreground.yaml"),
        ("pretrain", "runs/*/config.yaml"),
        ("embed", "embeddings/*.yaml"),
        ("probe", "probe/probe.yaml"),
    )
    return [(verb, path) for verb, pattern in patterns for path in sorted(folder.glob(pattern))]


def read_text(path: Path) -> str:
    """A text file; an empty one where there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def read_csv(path: Path) -> list[dict[str, str]]:
    """Every row of a table; [] where there is none."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_jsonl(path: Path, fields: Set[str]) -> list[dict[str, Any]]:
    """Whole lines only: a run that is going on may be in the middle of one.

    `PathfmError` names a line that is damaged or lacks one of the fields.
    """
    lines = read_text(path).splitlines(keepends=True)
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not fields <= row.keys():
            raise PathfmError(f"{path}, line {number}: damaged; the run writes it anew on resume")
        rows.append(row)
    return rows
