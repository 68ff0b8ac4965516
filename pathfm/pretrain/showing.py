"""Pictures of one step: the patches of its batch, and the views of a few as the network got them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from online_patching.stores.local import atomic_write_bytes
from pathfm.pictures import jpeg_bytes, mosaic
from pathfm.pretrain.embedding import Patches
from pathfm.runtime import make_folder
from pathfm.views import ViewSpec
from pathfm.views.render import make_views

_COLUMNS = 8


def save_batch(path: Path, batch: Patches, n: int = 40) -> None:
    """The batch's first n patches in the order of their draws, µm/px and slide below each."""
    refs = batch.refs[:n]
    captions = [f"{ref.mpp:g} µm/px\n{ref.slide_id}" if ref.mpp else ref.slide_id for ref in refs]
    picture = mosaic(list(batch.pixels[:n]), captions, _COLUMNS)
    make_folder(path.parent)
    atomic_write_bytes(path, jpeg_bytes(picture))


def save_classes(path: Path, batch: Patches, rows: int = 40) -> None:
    """A row for each first folder among the refs (a class), with the first pictures of each; white: none."""
    classes: dict[str, list[int]] = {}
    for i, ref in enumerate(batch.refs):
        classes.setdefault(ref.slide_id.partition("/")[0], []).append(i)
    blank = np.full_like(batch.pixels[0], 255)
    pictures, captions = [], []
    for name in sorted(classes)[:rows]:
        row = classes[name][:_COLUMNS]
        pictures += [batch.pixels[i] for i in row] + [blank] * (_COLUMNS - len(row))
        captions += [f"{name}\n{batch.refs[i].slide_id.rpartition('/')[2]}" for i in row]
        captions += [""] * (_COLUMNS - len(row))
    title = f"of the first {len(batch.refs):,} draws of the stream"
    make_folder(path.parent)
    atomic_write_bytes(path, jpeg_bytes(mosaic(pictures, captions, _COLUMNS, title=title)))


def save_view_rows(
    path: Path, batch: Patches, specs: Sequence[ViewSpec], seed: int, n: int = 4
) -> None:
    """A row for each of the batch's first n patches: itself, then its views by (seed, draw, view)."""
    n = min(n, len(batch.pixels))
    pixels = torch.from_numpy(np.ascontiguousarray(batch.pixels[:n]))
    views = make_views(pixels, batch.draws[:n], specs, seed=seed, mean=(0.0,) * 3, std=(1.0,) * 3)
    shown = [(view.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy() for view in views]
    pictures: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    for row in range(n):
        pictures += [batch.pixels[row], *(view[row] for view in shown)]
        captions += [f"draw {int(batch.draws[row]):,}"]
        captions += [f"view {number}, {view.shape[1]} px" for number, view in enumerate(shown)]
    make_folder(path.parent)
    sheet = mosaic(pictures, captions, columns=1 + len(shown))
    atomic_write_bytes(path, jpeg_bytes(sheet, quality=92))
