"""Pictures as a backbone's input: the shorter side resized, the centre cropped, as eva does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathfm.datasets.folder import DamagedPictureError, read_picture
from pathfm.runtime import PathfmError

Pixels = NDArray[np.uint8]

_AHEAD = 3  # batches decoded before the backbone asks for them: bounds the pictures in memory
_LOOK_ON = 10_000  # pictures still looked at after one that cannot be read
_NAMED = 3


def read_batches(
    files: Sequence[Path], size_px: int, batch_size: int, threads: int
) -> Iterator[NDArray[np.uint8]]:
    """The pictures as uint8 (b, size, size, 3), in order, a few batches decoded ahead.

    Pictures that cannot be read end the iteration, as `in_batches` says.
    """
    numbers = [
        range(at, min(at + batch_size, len(files))) for at in range(0, len(files), batch_size)
    ]
    return in_batches(lambda i: prepare(files[i], size_px), numbers, threads)


def in_batches(
    make: Callable[[int], Pixels], batches: Sequence[Sequence[int]], threads: int
) -> Iterator[Pixels]:
    """`make(i)` of every number, stacked batch by batch, in order, made in threads a few ahead.

    Where one raises PathfmError, up to 10,000 numbers that follow are tried as well, and the error that
    ends the iteration counts all that fail and names three.
    """
    with ThreadPoolExecutor(threads, "pathfm-decode") as pool:
        waiting: list[list[Future[Pixels]]] = []
        try:
            for at in range(len(batches) + _AHEAD):
                if at < len(batches):
                    waiting.append([pool.submit(make, i) for i in batches[at]])
                if at >= _AHEAD:
                    yield np.stack([future.result() for future in waiting.pop(0)])
        except PathfmError as error:
            rest = [i for batch in batches[max(0, at - _AHEAD) :] for i in batch]
            raise _all_failures(pool, make, rest[:_LOOK_ON], error) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _all_failures(
    pool: ThreadPoolExecutor, make: Callable[[int], Any], rest: Sequence[int], first: PathfmError
) -> PathfmError:
    """One error for all of `rest` that fail (of damage where the first is); the first where it is the only one."""

    def reason(i: int) -> str:
        try:
            make(i)
        except PathfmError as error:
            return str(error)
        return ""

    found = [text for text in pool.map(reason, rest) if text]
    if len(found) < 2:
        return first
    named = " | ".join(found[:_NAMED])
    more = f" | and {len(found) - _NAMED:,} more" if len(found) > _NAMED else ""
    kind = DamagedPictureError if isinstance(first, DamagedPictureError) else PathfmError
    return kind(f"{len(found):,} of {len(rest):,} pictures looked at fail: {named}{more}")


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
