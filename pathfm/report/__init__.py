"""Verb `report`: one self-contained page of what a folder's stages have made.

    stage_files.py  what the stages wrote, as it lies in the folder
    page.py         collect(): those files as what the page shows
    slides.py       its part on slides: thumbnails with boxes, patches by slide
    training.py     its part on pretraining: curves and pictures
    scores.py       its part on the probe: every seed in one plot
    ../templates    the page itself

Reads stage files only (corpus/, runs/, probe/), so it can be made again at any time, and of a run
that is still going on; a stage without files is named as missing. No script, no outside asset:
pictures are data URIs, text from files is escaped (slide names come from strangers).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from online_patching.stores.local import atomic_write_text
from pathfm.report.page import collect, difference, score, signed
from pathfm.templates import render

__all__ = ["ReportConfig", "ReportResult", "build_report", "collect", "run"]


class ReportConfig(BaseModel, frozen=True, extra="forbid"):
    """Which folder to report on."""

    folder: Path = Field(description="output folder of a demo: holds corpus/, runs/, probe/")


@dataclass(frozen=True)
class ReportResult:
    """Where the page is."""

    path: Path


def run(config: ReportConfig) -> ReportResult:
    """Writes `<folder>/report.html` and says where it is."""
    path = build_report(config.folder)
    print(f"report: {path.resolve().as_uri()} ({path.stat().st_size / 1e6:.1f} MB)")
    return ReportResult(path)


def build_report(folder: Path) -> Path:
    """Makes `<folder>/report.html` out of the stage files and returns its path.

    Raises `PathfmError` if the folder holds no stage's files, or a damaged one.
    """
    page = collect(folder)
    filters: dict[str, Callable[[Any], str]] = {
        "signed": signed,
        "score": score,
        "difference": difference,
    }
    path = folder / "report.html"
    atomic_write_text(path, render("report.html.j2", filters, page=page))
    return path
