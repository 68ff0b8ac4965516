"""``pathfm foreground``: a corpus folder's tile indexes in, a tissue mask for each slide out.

Writes ``masks/<slide_id>.png`` with ``.json`` beside it (what it was made from),
``contours/<slide_id>.geojson`` for QuPath, ``thumbnails/<slide_id>.jpg``,
``overlays/<slide_id>.jpg``, ``foreground.csv`` and ``overlays.html`` to look at, then packs the
corpus. Mask cell, thumbnail pixel and overlay pixel (row, column) are one place on the slide. A
rerun skips slides whose mask was made from the same index, weights, drawing and settings.

    pipeline.py   reads thumbnails ahead, masks them in batches, writes behind
    masking.py    one slide's thumbnail, masks and files      drawings.py   masks drawn by hand
    telling.py    the table and overlays.html
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from online_patching.stores.local import atomic_write_text
from pathfm.cohorts import write_csv
from pathfm.runtime import INDEX_UNFINISHED, PathfmError, make_folder, progress, save_config


class ForegroundConfig(BaseModel, frozen=True, extra="forbid"):
    """What ``pathfm foreground`` wants to know."""

    corpus: Path = Field(Path("corpus"), description="the corpus folder `pathfm index` wrote")
    method: Literal["model", "otsu"] = Field(
        "model", description="what makes the mask; the other is computed beside it and compared"
    )
    drawn: Path | None = Field(
        None,
        description="folder of <slide_id>.geojson drawn by hand in level-0 px, taken instead; "
        "slides without one get a mask by the method",
    )
    mpp: float = Field(8.0, ge=1.0, le=64.0, description="µm/px of thumbnails and masks")
    max_side_px: int = Field(
        4096, ge=64, le=16384, description="longer thumbnails are made at a coarser µm/px"
    )
    threshold: float = Field(
        0.5, gt=0.0, lt=1.0, description="tissue where the model's probability is above this"
    )
    smallest_mm2: float = Field(
        0.02,  # a patch of 256 px at 0.5 µm/px is 0.016: less than that never makes up 40 % of one
        ge=0.0,
        le=10.0,
        description="pieces of tissue and holes in it smaller than this (mm²) are dropped",
    )
    smallest_share: float = Field(
        0.001,
        ge=0.0,
        lt=0.5,
        description="pieces smaller than this share of the slide's tissue are dropped as dirt",
    )
    weights: Path | None = Field(
        None, description="weights of any foreground model (.safetensors); none: the shipped ones"
    )
    contour_tolerance_px: float = Field(
        0.0,
        ge=0.0,
        le=64.0,
        description="contours drop vertices nearer than this many mask pixels; 0: the exact mask",
    )
    device: str = Field("auto", description="torch device of the model: auto, cpu, cuda, cuda:1")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="bf16 is 1.2 to 1.7 times as fast on CPUs made for it, and moves a few edge pixels",
    )
    threads: int = Field(
        2, ge=1, le=64, description="threads that read thumbnails ahead and write masks behind"
    )


@dataclass(frozen=True)
class SlideForeground:
    """One slide's outcome. ``reason`` says why it cannot be sampled; empty when it can."""

    slide_id: str
    tissue_mm2: float
    tissue_fraction: float
    baseline_iou: float
    """Agreement of the mask with the other method's (a drawn one's with Otsu + saturation), both
    tidied: intersection over union. No measure of quality."""
    mask_mpp: float
    source: str = ""
    """What made the mask: model, otsu or drawn; empty when there is none."""
    reason: str = ""
    made_from: str = ""
    mask_digest: str = ""
    reused: bool = False


@dataclass(frozen=True)
class ForegroundResult:
    """What a foreground run made."""

    corpus: Path
    slides: tuple[SlideForeground, ...]
    page: Path

    @property
    def usable(self) -> tuple[SlideForeground, ...]:
        """The slides that have tissue."""
        return tuple(slide for slide in self.slides if not slide.reason)


def run(config: ForegroundConfig) -> ForegroundResult:
    """Masks every slide of the corpus folder and packs the corpus.

    A slide that cannot be read or shows no tissue, or whose index or drawing is damaged, is listed
    with the reason and the others go on. Raises ``PathfmError`` when the folder holds no indexes,
    the drawings' folder or the weights cannot be used, or no slide has tissue.
    """
    from online_patching import Corpus
    from pathfm.foreground.drawings import drawings_of
    from pathfm.foreground.masking import FOLDERS, Worker
    from pathfm.foreground.pipeline import masked
    from pathfm.foreground.telling import page_of, show

    indexes = _index_files(config.corpus)
    drawings = drawings_of(config, {path.stem for path in indexes})
    worker = Worker(config, drawings)
    # while masks are made there is no corpus to train on; an interrupted run leaves none either
    (config.corpus / "corpus.json").unlink(missing_ok=True)
    for name in FOLDERS:
        make_folder(config.corpus / name)
    rows = []
    with progress(len(indexes), "slides", "masking") as bar:
        for row in masked(worker, indexes):
            rows.append(row)
            bar.advance(slide=row.slide_id)
    save_config(config, config.corpus, "foreground.yaml")
    write_csv(config.corpus / "foreground.csv", COLUMNS, [_columns(row) for row in rows])
    page = config.corpus / "overlays.html"
    atomic_write_text(page, page_of(config, rows))
    show(config, rows, page)
    result = ForegroundResult(config.corpus, tuple(rows), page)
    if not result.usable:
        first = rows[0]
        raise PathfmError(
            f"none of {len(rows)} slides in {config.corpus} has tissue (first: {first.slide_id}: "
            f"{first.reason}). Look at {page}; try --method otsu or a lower --threshold."
        )
    Corpus.build(config.corpus)
    return result


COLUMNS = (
    "slide_id", "tissue_mm2", "tissue_fraction", "baseline_iou", "mask_mpp", "source", "reason",
)  # fmt: skip
"""Of foreground.csv, a row a slide, in the order of the slides' names."""


def _columns(row: SlideForeground) -> list[object]:
    return [getattr(row, name) for name in COLUMNS]


def _index_files(corpus: Path) -> list[Path]:
    """The .index files of a corpus folder, by name; PathfmError for one that is not finished."""
    if (corpus / INDEX_UNFINISHED).exists():
        raise PathfmError(
            f"{corpus}: `pathfm index` is still writing there, or was stopped. Run the same command "
            "again: it goes on where it was"
        )
    paths = sorted((corpus / "slides").glob("*.index"))
    if not paths:
        raise PathfmError(
            f"{corpus}: no slide indexes in {corpus / 'slides'}. "
            f"Run `pathfm index SLIDES --out {corpus}` first."
        )
    return paths
