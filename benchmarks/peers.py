"""The other readers, each as a careful user would call it, behind one call: corners -> patches.

Everybody reads `side` x `side` pixels of level 0 at each corner; who is asked for fewer resizes with
OpenCV's INTER_AREA, the fastest antialiased filter found (358 -> 224 px: 540 µs; Pillow's BILINEAR 730;
896 -> 224: 640 and 2,900, Pillow's reduce 760). Caches are as each library sets them. A peer that is not
installed is left out, with a word.

wsistream is measured as a whole, over OpenSlide, its faster backend: its own sampler, on the same tissue,
at positions of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from online_patching import ForegroundMask

SIZE_PX = 224
Corners = Sequence[tuple[int, int]]
Read = Callable[[Corners, int], list[NDArray[np.uint8]]]
"""Corners and side at level 0 -> patches of 224 px."""


def shrink(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """To 224 px, antialiased."""
    if pixels.shape[0] == SIZE_PX:
        return np.asarray(pixels, np.uint8)
    try:
        cv2 = import_module("cv2")
    except ImportError:
        return np.asarray(
            Image.fromarray(pixels).resize((SIZE_PX, SIZE_PX), Image.Resampling.BILINEAR)
        )
    return np.asarray(
        cv2.resize(pixels, (SIZE_PX, SIZE_PX), interpolation=cv2.INTER_AREA), np.uint8
    )


def openslide_reader(path: Path) -> Read:
    """OpenSlide's RGBA pictures, without their alpha."""
    import openslide

    slide = openslide.OpenSlide(path)

    def read(corners: Corners, side: int) -> list[NDArray[np.uint8]]:
        pictures = (slide.read_region(corner, 0, (side, side)) for corner in corners)
        return [shrink(np.asarray(picture.convert("RGB"))) for picture in pictures]

    return read


def tiffslide_reader(path: Path) -> Read:
    """TiffSlide, as arrays."""
    import tiffslide

    slide = tiffslide.TiffSlide(path)

    def read(corners: Corners, side: int) -> list[NDArray[np.uint8]]:
        return [shrink(slide.read_region(c, 0, (side, side), as_array=True)) for c in corners]

    return read


def fastslide_reader(path: Path) -> Read:
    """fastslide, as arrays; level 0, where its level coordinates are everybody's."""
    fastslide = import_module("fastslide")

    slide = fastslide.FastSlide.from_file_path(path)

    def read(corners: Corners, side: int) -> list[NDArray[np.uint8]]:
        return [shrink(slide.read_region(c, 0, (side, side)).numpy()) for c in corners]

    return read


def cucim_reader(path: Path) -> Read:
    """cuCIM, one region a call."""
    slide = import_module("cucim").CuImage(str(path))

    def read(corners: Corners, side: int) -> list[NDArray[np.uint8]]:
        return [shrink(np.asarray(slide.read_region(c, (side, side), 0))) for c in corners]

    return read


def cucim_batched_reader(path: Path) -> Read:
    """cuCIM, all regions in one call with one worker."""
    slide = import_module("cucim").CuImage(str(path))

    def read(corners: Corners, side: int) -> list[NDArray[np.uint8]]:
        options = {"batch_size": 32, "num_workers": 1}
        out: list[NDArray[np.uint8]] = []
        for some in slide.read_region(list(corners), (side, side), 0, **options):
            batch = np.array(some).reshape(-1, side, side, 3)  # a copy: its buffer is used again
            out += [shrink(patch) for patch in batch]
        return out[: len(corners)]

    return read


def wsistream_reader(path: Path, mask: ForegroundMask, side: int, output_px: int = SIZE_PX) -> Read:
    """wsistream's whole pipeline. It resizes by itself: bilinear, without antialiasing."""
    base = import_module("wsistream.tissue.base").TissueDetector
    sampler = import_module("wsistream.sampling").RandomSampler(patch_size=side)
    if side != output_px:
        sampler.output_size = (
            output_px  # what its ContinuousMagnificationSampler tells the pipeline
        )

    def detect(_: object, thumbnail: Any, downsample: Any = (1.0, 1.0)) -> NDArray[np.bool_]:
        height, width = thumbnail.shape[:2]
        return np.asarray(Image.fromarray(mask.bits).resize((width, height))) > 0

    pipeline = import_module("wsistream.pipeline").PatchPipeline(
        slide_paths=[str(path)],
        backend=import_module("wsistream.backends").OpenSlideBackend(),
        tissue_detector=type("SameTissue", (base,), {"detect": detect})(),
        sampler=sampler,
        pool_size=1,
        patches_per_slide=10**9,
        seed=1,
    )
    stream: Iterator[Any] = iter(pipeline)

    def read(corners: Corners, side: int) -> list[NDArray[np.uint8]]:
        return [next(stream).image for _ in corners]

    return read


def installed_peers(
    path: Path, mask: ForegroundMask, side: int
) -> tuple[dict[str, Read], dict[str, str]]:
    """Readers by name, and why others are missing."""
    openers: dict[str, Callable[[], Read]] = {
        "OpenSlide": lambda: openslide_reader(path),
        "tiffslide": lambda: tiffslide_reader(path),
        "fastslide": lambda: fastslide_reader(path),
        "cuCIM": lambda: cucim_reader(path),
        "cuCIM, batched": lambda: cucim_batched_reader(path),
        "wsistream": lambda: wsistream_reader(path, mask, side),
    }
    found, missing = {}, {}
    for name, opener in openers.items():
        try:
            found[name] = opener()
        except (
            Exception
        ) as error:  # a peer that cannot open this slide is worth a line, not a crash
            missing[name] = f"{type(error).__name__}: {str(error)[:100]}"
    return found, missing
