"""``pathfm foreground``: a corpus folder's tile indexes in, a tissue mask for each slide out.

Writes ``masks/<slide_id>.png`` with ``.json`` beside it (what it was made from),
``thumbnails/<slide_id>.jpg``, ``overlays/<slide_id>.jpg``, ``foreground.csv`` and
``overlays.html`` to look at, then packs the corpus. Mask cell, thumbnail pixel and overlay pixel
(row, column) are one place on the slide. A rerun skips slides whose mask was made from the same
index, weights and settings.

    masking.py   one slide's thumbnail, masks and files      telling.py   the table and overlays.html
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from online_patching.slide_index import SlideIndex
from online_patching.stores.local import atomic_write_text
from pathfm.cohorts import write_csv
from pathfm.runtime import INDEX_UNFINISHED, PathfmError, make_folder, progress, save_config


class ForegroundConfig(BaseModel, frozen=True, extra="forbid"):
    """What ``pathfm foreground`` wants to know."""

    corpus: Path = Field(Path("corpus"), description="the corpus folder `pathfm index` wrote")
    method: Literal["unet", "otsu"] = Field(
        "unet", description="what makes the mask; the other is computed beside it and compared"
    )
    mpp: float = Field(8.0, ge=1.0, le=64.0, description="µm/px of thumbnails and masks")
    max_side_px: int = Field(
        4096, ge=64, le=16384, description="longer thumbnails are made at a coarser µm/px"
    )
    threshold: float = Field(
        0.5, gt=0.0, lt=1.0, description="tissue where the U-Net's probability is above this"
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
        None, description="U-Net weights (.safetensors); none: the shipped ones"
    )
    device: str = Field("auto", description="torch device of the U-Net: auto, cpu, cuda, cuda:1")


@dataclass(frozen=True)
class SlideForeground:
    """One slide's outcome. ``reason`` says why it cannot be sampled; empty when it can."""

    slide_id: str
    tissue_mm2: float
    tissue_fraction: float
    baseline_iou: float
    """Agreement of U-Net and Otsu + saturation, after tidying: intersection over union."""
    mask_mpp: float
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

    A slide that cannot be read or shows no tissue is listed with the reason. Raises
    ``PathfmError`` when the folder holds no indexes or no slide has tissue.
    """
    from online_patching import Corpus
    from pathfm.foreground.masking import Worker
    from pathfm.foreground.telling import page_of, show

    indexes = _index_files(config.corpus)
    # while masks are made there is no corpus to train on; an interrupted run leaves none either
    (config.corpus / "corpus.json").unlink(missing_ok=True)
    for name in ("masks", "thumbnails", "overlays"):
        make_folder(config.corpus / name)
    worker = Worker(config)
    rows = []
    with progress(len(indexes), "slides", "masking") as bar:
        for path in indexes:
            index = SlideIndex.load(path)  # one at a time: a large slide's has megabytes
            rows.append(worker.one(index))
            bar.advance(slide=index.slide_id)
    save_config(config, config.corpus, "foreground.yaml")
    columns = ("slide_id", "tissue_mm2", "tissue_fraction", "baseline_iou", "mask_mpp", "reason")
    write_csv(config.corpus / "foreground.csv", columns, [astuple(r)[:6] for r in rows])
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
