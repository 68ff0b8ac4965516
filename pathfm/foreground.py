"""``pathfm foreground``: a corpus folder's tile indexes in, a tissue mask for each slide out.

Writes ``masks/<slide_id>.png`` with ``.json`` beside it (what it was made from),
``thumbnails/<slide_id>.jpg``, ``overlays/<slide_id>.jpg``, ``foreground.csv`` and
``overlays.html`` to look at, then packs the corpus. Mask cell, thumbnail pixel and overlay pixel
(row, column) are one place on the slide. A rerun skips slides whose mask was made from the same
index, weights and settings.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field
from rich.table import Table

from online_patching.errors import PatchingError
from online_patching.mask import ForegroundMask
from online_patching.slide_index import SlideIndex
from online_patching.stores.local import atomic_write_bytes, atomic_write_text
from pathfm.cohorts import write_csv
from pathfm.pictures import jpeg_data_uri, outline
from pathfm.runtime import PathfmError, console, make_folder, one_line, progress, save_config

if TYPE_CHECKING:
    from pathfm.segmentation.unet import ThumbnailUNet

_RULES = 1  # raised when the way from thumbnail to mask changes: older masks are made anew


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

    indexes = _load_indexes(config.corpus)
    # while masks are made there is no corpus to train on; an interrupted run leaves none either
    (config.corpus / "corpus.json").unlink(missing_ok=True)
    for name in ("masks", "thumbnails", "overlays"):
        make_folder(config.corpus / name)
    worker = _Worker(config)
    rows = []
    with progress(len(indexes), "slides", "masking") as bar:
        for index in indexes:
            rows.append(worker.one(index))
            bar.advance(slide=index.slide_id)
    save_config(config, config.corpus, "foreground.yaml")
    columns = ("slide_id", "tissue_mm2", "tissue_fraction", "baseline_iou", "mask_mpp", "reason")
    write_csv(
        config.corpus / "foreground.csv", columns, [list(asdict(r).values())[:6] for r in rows]
    )
    page = config.corpus / "overlays.html"
    atomic_write_text(page, _page(config, rows))
    _show(config, rows, page)
    result = ForegroundResult(config.corpus, tuple(rows), page)
    if not result.usable:
        first = rows[0]
        raise PathfmError(
            f"none of {len(rows)} slides in {config.corpus} has tissue (first: {first.slide_id}: "
            f"{first.reason}). Look at {page}; try --method otsu or a lower --threshold."
        )
    Corpus.build(config.corpus)
    return result


def _load_indexes(corpus: Path) -> list[SlideIndex]:
    paths = sorted((corpus / "slides").glob("*.index"))
    if not paths:
        raise PathfmError(
            f"{corpus}: no slide indexes in {corpus / 'slides'}. "
            f"Run `pathfm index SLIDES --out {corpus}` first."
        )
    return [SlideIndex.load(path) for path in paths]


class _Worker:
    """Masks one slide after the other; the network is loaded when the first slide needs it."""

    def __init__(self, config: ForegroundConfig) -> None:
        from pathfm.segmentation.unet import SHIPPED_WEIGHTS

        self.config = config
        self.weights = config.weights or SHIPPED_WEIGHTS
        try:
            self.weights_digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()
        except OSError as error:
            raise PathfmError(f"weights {self.weights}: {error.strerror}") from None
        self._model: ThumbnailUNet | None = None

    def one(self, index: SlideIndex) -> SlideForeground:
        """The slide's outcome, from an earlier run where that is still true."""
        made_from = self._made_from(index)
        earlier = _read_earlier(self.config.corpus, index, made_from)
        if earlier is not None:
            return earlier
        # From here on nothing old may be taken for this slide's mask, also after a kill -9.
        for path in _paths(self.config.corpus, index.slide_id).values():
            path.unlink(missing_ok=True)
        try:
            return self._make(index, made_from)
        except PatchingError as error:
            reason = one_line(error).removeprefix(f"{index.uri}: ")
            return SlideForeground(index.slide_id, 0.0, 0.0, 0.0, self.config.mpp, reason)

    def _made_from(self, index: SlideIndex) -> str:
        """SHA-256 of everything that decides the mask: slide, settings, weights, rules."""
        c = self.config
        parts = (
            index.digest, index.token, c.method, c.mpp, c.max_side_px, c.threshold,
            c.smallest_mm2, c.smallest_share, self.weights_digest, _RULES,
        )  # fmt: skip
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _make(self, index: SlideIndex, made_from: str) -> SlideForeground:
        from online_patching import open_slide
        from pathfm.segmentation.tidy import mask_iou

        mpp = mask_mpp(index, self.config)
        with open_slide(index) as slide:
            thumbnail = slide.thumbnail(mpp=mpp)
        masks = self._masks(thumbnail, mpp)
        tissue = masks[self.config.method]
        size_mpp = (index.mpp_x, index.mpp_y)
        mask = ForegroundMask.from_array(tissue, index.dimensions, size_mpp)
        row = SlideForeground(
            slide_id=index.slide_id,
            tissue_mm2=mask.tissue_area_um2 / 1e6,
            tissue_fraction=mask.tissue_fraction,
            baseline_iou=mask_iou(masks["unet"], masks["otsu"]),
            mask_mpp=mpp,
            reason="" if tissue.any() else self._why_empty(masks),
            made_from=made_from,
            mask_digest=mask.digest,
        )
        paths = _paths(self.config.corpus, index.slide_id)
        atomic_write_bytes(paths["thumbnail"], _jpeg(Image.fromarray(thumbnail)))
        line_px = max(2, max(thumbnail.shape) // 400)  # seen when the page shrinks the picture
        overlay = outline(thumbnail, tissue, width_px=line_px)
        atomic_write_bytes(paths["overlay"], _jpeg(overlay))
        mask.save(paths["mask"])
        atomic_write_text(
            paths["facts"], json.dumps(asdict(row), indent=1) + "\n"
        )  # last: it vouches
        return row

    def _masks(self, thumbnail: NDArray[np.uint8], mpp: float) -> dict[str, NDArray[np.bool_]]:
        """Both methods' tidied masks, of the thumbnail's shape."""
        from pathfm.segmentation.otsu import otsu_mask
        from pathfm.segmentation.tidy import tidy
        from pathfm.segmentation.unet import tissue_probability

        smallest_px = self.config.smallest_mm2 * 1e6 / mpp**2
        probability = tissue_probability(self._network(), thumbnail, self._device())
        raw = {"unet": probability > self.config.threshold, "otsu": otsu_mask(thumbnail)}
        return {
            name: tidy(mask, smallest_px, self.config.smallest_share) for name, mask in raw.items()
        }

    def _why_empty(self, masks: dict[str, NDArray[np.bool_]]) -> str:
        other = "otsu" if self.config.method == "unet" else "unet"
        share = float(masks[other].mean())
        return f"no tissue found by {self.config.method} ({other} finds {share:.1%})"

    def _network(self) -> ThumbnailUNet:
        from pathfm.segmentation.unet import load_unet

        if self._model is None:
            try:
                self._model = load_unet(self.weights)
            except ValueError as error:
                raise PathfmError(f"weights {one_line(error)}") from None
        return self._model

    def _device(self) -> str:
        from pathfm.runtime import pick_device

        return str(pick_device(self.config.device))


def mask_mpp(index: SlideIndex, config: ForegroundConfig) -> float:
    """µm/px of a slide's thumbnail and mask: as asked, never finer than level 0, and coarser where
    the longer side would pass ``max_side_px``."""
    width_px0, height_px0 = index.dimensions
    longer_um = max(width_px0 * index.mpp_x, height_px0 * index.mpp_y)
    return max(config.mpp, index.mpp, longer_um / config.max_side_px)


def _paths(corpus: Path, slide_id: str) -> dict[str, Path]:
    """Where a slide's files are; the facts come first, so that they are deleted first."""
    return {
        "facts": corpus / "masks" / f"{slide_id}.json",
        "mask": corpus / "masks" / f"{slide_id}.png",
        "thumbnail": corpus / "thumbnails" / f"{slide_id}.jpg",
        "overlay": corpus / "overlays" / f"{slide_id}.jpg",
    }


def _read_earlier(corpus: Path, index: SlideIndex, made_from: str) -> SlideForeground | None:
    """What an earlier run made of the very same things, if all of it is still there and whole."""
    paths = _paths(corpus, index.slide_id)
    try:
        facts = SlideForeground(**json.loads(paths["facts"].read_text()))
        mask = ForegroundMask.load(paths["mask"])
    except (OSError, ValueError, TypeError, PatchingError):
        return None
    whole = facts.made_from == made_from and facts.mask_digest == mask.digest
    if not whole or not all(path.exists() for path in paths.values()):
        return None
    return replace(facts, reused=True)


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _show(config: ForegroundConfig, rows: list[SlideForeground], page: Path) -> None:
    out = console()
    reused = sum(row.reused for row in rows)
    again = f", {reused} as they were" if reused else ""
    table = Table(
        title=f"{len(rows)} slides, masks by {config.method}{again}", title_justify="left"
    )
    table.add_column("slide", overflow="fold")
    for name in ("tissue, mm²", "tissue, %", "IoU with " + _other(config), "µm/px"):
        table.add_column(name, justify="right")
    table.add_column("note", overflow="fold")
    for row in rows:
        table.add_row(
            *(row.slide_id, f"{row.tissue_mm2:.2f}", f"{100 * row.tissue_fraction:.1f}"),
            *(f"{row.baseline_iou:.3f}", f"{row.mask_mpp:.3g}", _note(config, row)),
        )
    out.print(table)
    out.print(f"overlays to look at: {page}")


def _other(config: ForegroundConfig) -> str:
    return "otsu" if config.method == "unet" else "unet"


def _note(config: ForegroundConfig, row: SlideForeground) -> str:
    if row.reason:
        return f"left out: {row.reason}"
    if row.mask_mpp > config.mpp * 1.001:
        return f"coarser than {config.mpp:g} µm/px: a large slide, or level 0 is"
    return ""


_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1280px;
padding:0 1rem;color:#222;background:#fff}h1{font-size:1.5rem}main{display:grid;gap:1.2rem;
grid-template-columns:repeat(auto-fill,minmax(290px,1fr))}figure{margin:0;border:1px solid #ddd;
border-radius:8px;overflow:hidden}img{display:block;width:100%;height:260px;object-fit:contain;
background:#f4f4f4}figcaption{padding:.6rem .8rem;overflow-wrap:anywhere}small{color:#555}
.bad small{color:#b00020}"""


def _page(config: ForegroundConfig, rows: list[SlideForeground]) -> str:
    """overlays.html: one self-contained page with every slide's outline."""
    figures = "\n".join(_figure(config, row) for row in rows)
    found = sum(not row.reason for row in rows)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Foreground of {len(rows)} slides</title><style>{_STYLE}</style>"
        f"<h1>Foreground: {found} of {len(rows)} slides have tissue</h1>"
        f"<p>The outline is the mask made by <b>{config.method}</b> at {config.mpp:g} µm/px; "
        f"IoU is its agreement with {_other(config)}: where it is low, look; it is no verdict.</p>"
        f"<main>\n{figures}\n</main></html>\n"
    )


def _figure(config: ForegroundConfig, row: SlideForeground) -> str:
    path = _paths(config.corpus, row.slide_id)["overlay"]
    picture = ""
    if path.exists():
        with Image.open(path) as opened:
            uri = jpeg_data_uri(opened.convert("RGB"), quality=82, max_px=900)
        name = html.escape(row.slide_id, quote=True)
        picture = f'<img alt="outline of the tissue on {name}" src="{uri}">'
    said = html.escape(_note(config, row))
    return (
        f"<figure{' class=bad' if row.reason else ''}>{picture}<figcaption>"
        f"<b>{html.escape(row.slide_id)}</b><br>{row.tissue_mm2:.2f} mm² tissue, "
        f"{100 * row.tissue_fraction:.1f} %, IoU {row.baseline_iou:.3f}<br><small>{said}</small>"
        "</figcaption></figure>"
    )
