"""Pictures as a backbone's input: the shorter side resized, the centre cropped, as eva does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathfm.datasets.folder import read_picture
from pathfm.runtime import PathfmError

_AHEAD = 3  # batches decoded before the backbone asks for them: bounds the pictures in memory


def read_batches(
    files: Sequence[Path], size_px: int, batch_size: int, threads: int
) -> Iterator[NDArray[np.uint8]]:
    """The pictures as uint8 (b, size, size, 3), in order, a few batches decoded ahead.

    A picture that cannot be read ends the iteration with `PathfmError` naming it.
    """
    chunks = [files[at : at + batch_size] for at in range(0, len(files), batch_size)]
    with ThreadPoolExecutor(threads, "pathfm-decode") as pool:
        waiting: list[list[Future[NDArray[np.uint8]]]] = []

        def submit(chunk: Sequence[Path]) -> None:
            waiting.append([pool.submit(prepare, file, size_px) for file in chunk])

        try:
            for chunk in chunks[:_AHEAD]:
                submit(chunk)
            for i in range(len(chunks)):
                batch = np.stack([future.result() for future in waiting.pop(0)])
                if i + _AHEAD < len(chunks):
                    submit(chunks[i + _AHEAD])
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def prepare(file: Path, size_px: int) -> NDArray[np.uint8]:
    """One picture, shorter side resized to `size_px`, centre-cropped: uint8 (size, size, 3)."""
    return _fit(read_picture(file), size_px, str(file))


def fit(pixels: NDArray[np.uint8], size_px: int, name: str = "picture") -> NDArray[np.uint8]:
    """Pixels uint8 (h, w, 3), shorter side resized to `size_px`, centre-cropped, as `prepare` does."""
    if min(pixels.shape[:2]) == 0:
        raise PathfmError(f"{name}: the picture is empty")
    return _fit(Image.fromarray(pixels), size_px, name)


def _fit(image: Image.Image, size_px: int, name: str) -> NDArray[np.uint8]:
    width, height = image.size
    short = min(width, height)
    if short == 0:
        raise PathfmError(f"{name}: the picture is empty")
    if short != size_px:
        # torchvision's Resize(int) truncates the longer side; eva's protocol uses it
        size = (size_px * width // short, size_px * height // short)
        image = image.resize(size, Image.Resampling.BILINEAR)  # PIL antialiases when shrinking
    left, top = round((image.width - size_px) / 2), round((image.height - size_px) / 2)
    return np.asarray(image.crop((left, top, left + size_px, top + size_px)))
