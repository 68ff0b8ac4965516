"""Run a notebook and save the plots of its marked cells: what the pages in docs/ show.

    python tools/notebook_pictures.py notebooks/02_masks_and_losses.ipynb

A cell whose first line is a comment like ``# docs/pictures/losses_imbalance.png`` has its plot written
there, as a PNG of 128 colours at most; plots need no more, and stay small.
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


def save_pictures(notebook: Path) -> list[Path]:
    """The files written, in the notebook's order; a marked cell without a plot is an error."""
    pages = nbformat.read(notebook, as_version=4)
    NotebookClient(pages, timeout=300, kernel_name="python3").execute()
    written = []
    for cell in pages.cells:
        first = cell.source.partition("\n")[0]
        if cell.cell_type != "code" or not first.startswith("# docs/pictures/"):
            continue
        pngs = [o["data"]["image/png"] for o in cell.outputs if "image/png" in o.get("data", {})]
        if not pngs:
            raise SystemExit(f"{notebook.name}: the cell of {first[2:]} has no plot")
        picture = Image.open(io.BytesIO(base64.b64decode(pngs[0]))).convert("RGB")
        path = ROOT / first[2:].strip()
        picture.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
        written.append(path)
    return written


if __name__ == "__main__":
    for name in sys.argv[1:]:
        for path in save_pictures(Path(name)):
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KB")
