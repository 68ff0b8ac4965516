"""What a foreground run tells: a table, and overlays.html to look at."""

from __future__ import annotations

import html
import shlex
from pathlib import Path

from PIL import Image

from pathfm.foreground import ForegroundConfig, SlideForeground
from pathfm.foreground.masking import paths_of
from pathfm.pictures import jpeg_data_uri
from pathfm.runtime import console, counted, titled

MOST_PICTURED = 200
"""Slides on the page: each has its picture in it, of some 50 KB."""
_MOST_SHOWN = 50
"""Rows of the table that are printed."""


def show(config: ForegroundConfig, rows: list[SlideForeground], page: Path) -> None:
    """Print the table of masks, its first rows, and where the page is."""
    out = console()
    reused = sum(row.reused for row in rows)
    again = f", {reused} as they were" if reused else ""
    title = f"{counted(len(rows), 'slide')}, masks by {_method(config)}{again}"
    table = titled(title)
    table.add_column("slide", overflow="fold")
    for name in ("tissue, mm²", "tissue, %", "IoU with " + _other(config), "µm/px"):
        table.add_column(name, justify="right")
    table.add_column("note", overflow="fold")
    for row in rows[:_MOST_SHOWN]:
        table.add_row(
            *(row.slide_id, f"{row.tissue_mm2:.2f}", f"{100 * row.tissue_fraction:.1f}"),
            *(f"{row.baseline_iou:.3f}", f"{row.mask_mpp:.3g}", _note(config, row)),
        )
    out.print(table)
    if len(rows) > _MOST_SHOWN:
        print(f"... and {len(rows) - _MOST_SHOWN:,} more: {config.corpus / 'foreground.csv'}")
    out.print(f"overlays to look at: {page}")
    corpus = shlex.quote(str(config.corpus))
    print(f"next: pathfm pretrain CONFIG.yaml --corpus {corpus} --dry-run")


def _method(config: ForegroundConfig) -> str:
    return "the model" if config.method == "model" else config.method


def _other(config: ForegroundConfig) -> str:
    return "otsu" if config.method == "model" else "the model"


def _note(config: ForegroundConfig, row: SlideForeground) -> str:
    if row.reason:
        return f"left out: {row.reason}"
    if row.source == "drawn":
        return "drawn by hand; IoU with otsu"
    if row.mask_mpp > config.mpp * 1.001:
        return f"coarser than {config.mpp:g} µm/px: a large slide, or level 0 is"
    return ""


_STYLE = """body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1280px;
padding:0 1rem;color:#222;background:#fff}h1{font-size:1.5rem}main{display:grid;gap:1.2rem;
grid-template-columns:repeat(auto-fill,minmax(290px,1fr))}figure{margin:0;border:1px solid #ddd;
border-radius:8px;overflow:hidden}img{display:block;width:100%;height:260px;object-fit:contain;
background:#f4f4f4}figcaption{padding:.6rem .8rem;overflow-wrap:anywhere}small{color:#555}
.bad small{color:#b00020}"""


def page_of(config: ForegroundConfig, rows: list[SlideForeground]) -> str:
    """overlays.html: one self-contained page with the slides' outlines.

    Of many slides those that are worth a look: the ones left out, then those of the lowest IoU.
    """
    worth = sorted(rows, key=lambda row: (not row.reason, row.baseline_iou))[:MOST_PICTURED]
    shown = rows if len(rows) <= MOST_PICTURED else worth
    figures = "\n".join(_figure(config, row) for row in shown)
    which = f" Pictured are the {len(shown)} to look at first." if shown is worth else ""
    found = sum(not row.reason for row in rows)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>Foreground of {counted(len(rows), 'slide')}</title><style>{_STYLE}</style>"
        f"<h1>Foreground: tissue in {found} of {counted(len(rows), 'slide')}</h1>"
        f"<p>The outline is the mask made by <b>{_method(config)}</b> at {config.mpp:g} µm/px; "
        f"IoU is its agreement with {_other(config)}: where it is low, look; it is no verdict.{which}</p>"
        f"<main>\n{figures}\n</main></html>\n"
    )


def _figure(config: ForegroundConfig, row: SlideForeground) -> str:
    path = paths_of(config.corpus, row.slide_id)["overlay"]
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
