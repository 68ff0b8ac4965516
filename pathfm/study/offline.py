"""The offline arm: a fixed grid cut to disk beforehand, with what that costs, and what online costs.

<folder>/<µm/px>/<slide>/<place>.png        lossless, so that both arms see the same kind of pixels
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from online_patching import Corpus, GridSampler, PatchLoader
from online_patching.philox import words
from pathfm.embed.slide_tasks import OfOneSlide as Chosen  # of one or of many: it never asks
from pathfm.labels import LabelsConfig
from pathfm.labels.picture_feed import PictureFeed
from pathfm.labels.pictures import PictureSampler, open_patches
from pathfm.pretrain import PretrainConfig
from pathfm.pretrain.sampler import sampler_of
from pathfm.runtime import make_folder, progress

_THIN_STREAM = 472
JPEG_QUALITY = 90
_BATCH = 32
_TIMED_BATCHES = 16


def cut_grid(
    config: PretrainConfig, corpus_folder: Path, most: int | None, folder: Path
) -> dict[str, float]:
    """Writes the patches, and returns the costs, all measured here and now.

    patches, bytes, seconds, cpu_s: of what was cut (bytes as the files' own, not the disk's blocks;
    jpeg_bytes: what they would be as JPEG, which most pipelines keep; its encoding is in the seconds).
    grid_patches, grid_bytes: of the whole grid (bytes by the mean patch). read_*: CPU milliseconds of one
    thread for a patch out of the slides, and out of this folder, read alike in batches.
    """
    corpus = Corpus.open(corpus_folder)
    grid = GridSampler(
        corpus, size_px=config.patch_px, mpp=config.mpp, min_foreground=config.min_foreground
    )
    chosen = thinned(grid, most)
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    written, as_jpeg = _write(grid, chosen, folder)
    cost = {
        "patches": float(len(written)),
        "bytes": float(sum(written)),
        "jpeg_bytes": float(sum(as_jpeg)),
        "seconds": time.perf_counter() - began_s,
        "cpu_s": time.process_time() - began_cpu_s,
        "grid_patches": float(len(grid)),
    }
    cost["grid_bytes"] = cost["bytes"] / len(written) * len(grid)
    return cost | time_reading(config, corpus, folder)


def thinned(grid: GridSampler, most: int | None) -> NDArray[np.int64]:
    """The grid's draws, at most `most` of each slide and µm/px, by Philox; ascending."""
    draws = np.arange(len(grid))
    if most is None:
        return draws
    places = grid.draw_batch(draws)
    keys = words(0, draws, 0, _THIN_STREAM, 1)[:, 0]
    sheets = np.unique(np.stack([places.slide, places.mpp]), axis=1, return_inverse=True)[1]
    sheets = sheets.reshape(-1)
    order = np.lexsort((keys, sheets))
    first = np.searchsorted(sheets[order], sheets[order], side="left")
    return np.sort(order[np.arange(len(order)) - first < most])


def _write(
    grid: GridSampler, chosen: NDArray[np.int64], folder: Path
) -> tuple[list[int], list[int]]:
    """The bytes of each picture written, and of the same as JPEG; a place whose tiles are damaged is left out."""
    written: list[int] = []
    as_jpeg: list[int] = []
    source = Chosen(grid, chosen)
    loader = PatchLoader(source, _BATCH, threads=1, forgive_lost=True)
    with progress(len(chosen), "patches", "offline grid") as bar, loader:
        for batch in loader:
            for pixels, draw, ref in zip(batch.pixels, batch.draws, batch.refs, strict=True):
                if ref.attempt == 0:
                    below = make_folder(folder / f"{ref.mpp:g}" / ref.slide_id)
                    path = below / f"{int(chosen[int(draw)]):09d}.png"
                    Image.fromarray(pixels).save(path, compress_level=6)
                    written.append(path.stat().st_size)
                    jpeg = io.BytesIO()
                    Image.fromarray(pixels).save(jpeg, "JPEG", quality=JPEG_QUALITY)
                    as_jpeg.append(jpeg.tell())
            bar.advance(len(batch.draws))
    return written, as_jpeg


def time_reading(config: PretrainConfig, corpus: Corpus, folder: Path) -> dict[str, float]:
    """CPU ms a patch, out of the slides and out of the folder: one thread each, after a first batch.

    CPU of the whole process: one batch is read ahead, so a sixteenth may be missing or too many.
    """
    sampler = sampler_of(config, corpus)
    labels = LabelsConfig(patches=folder, balanced=False)
    pictures = PictureSampler(open_patches(labels, with_classes=False), labels, config.seed, False)
    with PatchLoader(sampler, _BATCH, threads=1, prefetch=1, forgive_lost=True) as loader:
        online = _cpu_ms(loader.next_batch)
    feed = PictureFeed(pictures, _BATCH, size_px=config.patch_px, threads=1, prefetch=1)
    try:
        return {"read_online_cpu_ms": online, "read_offline_cpu_ms": _cpu_ms(feed.next_batch)}
    finally:
        feed.close()


def _cpu_ms(read: Callable[[], object]) -> float:
    read()
    began_s = time.process_time()
    for _ in range(_TIMED_BATCHES):
        read()
    return 1000 * (time.process_time() - began_s) / (_TIMED_BATCHES * _BATCH)
