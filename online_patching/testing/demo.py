"""The demo's slides, with their truth, and patches of known class cut from them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from online_patching.philox import integers, words
from online_patching.testing.drawing import SyntheticSlide
from online_patching.testing.layout import CLASS_NAMES
from online_patching.testing.ome_zarr import write_ome_zarr
from online_patching.testing.writers import write_tiff

TRUTH_MPP = 8.0
_PATCH_STREAM = 7100

# Sizes are no multiples of a tile; shares of wide and tall slides; every container once.
_SIZES_PX0 = ((8190, 6300), (6100, 7650), (9210, 6015), (7300, 7010), (6020, 8450))
_CONTAINERS: tuple[tuple[str, dict[str, Any]], ...] = (
    (".svs", {"associated": True}),
    (".tif", {"flavour": "generic", "tile_px": 512}),
    (".svs", {"photometric": "rgb"}),
    (".zarr", {"version": "0.4"}),
    (".svs", {"downsamples": (3.9995, 15.998)}),
)


@dataclass(frozen=True)
class DemoSlide:
    """One written slide: its drawing, its file, and its truth map at TRUTH_MPP."""

    slide: SyntheticSlide
    path: Path
    truth_path: Path

    @property
    def name(self) -> str:
        """The file's stem: what the index will call the slide."""
        return self.path.stem


def demo_slides(n: int = 5, seed: int = 0) -> list[SyntheticSlide]:
    """The drawings alone: `n` slides at 0.25 µm/px, different in size, stain and content."""
    return [
        SyntheticSlide(seed * 1000 + number, *_SIZES_PX0[number % 5], pen=number % 3 != 1)
        for number in range(n)
    ]


def write_demo_slides(
    folder: Path | str,
    n: int = 5,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> list[DemoSlide]:
    """Writes `n` slides into `folder` and their truth into `folder`/truth; returns both.

    Truth is a PNG of class numbers (`CLASS_NAMES`) at 8 µm/px and truth.json with the facts.
    A slide already there is kept: it appears under its name only when it is whole.
    `progress(number, share)` is called while a slide is drawn.
    """
    folder = Path(folder)
    truth_folder = folder / "truth"
    truth_folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, slide in enumerate(demo_slides(n, seed)):
        suffix, options = _CONTAINERS[number % len(_CONTAINERS)]
        # The seed is in the name: another seed's slides are never taken for these.
        path = folder / f"synthetic-{slide.seed:04d}{suffix}"
        truth_path = truth_folder / f"{path.stem}.png"
        if not path.exists():
            _write_whole(path, slide, options, progress and _told(progress, number))
        Image.fromarray(slide.class_map(TRUTH_MPP)).save(truth_path)
        written.append(DemoSlide(slide, path, truth_path))
    facts = {
        "class_names": CLASS_NAMES,
        "truth_mpp": TRUTH_MPP,
        "slides": {
            d.name: {
                "seed": d.slide.seed,
                "size_px0": [d.slide.width_px0, d.slide.height_px0],
                "mpp": d.slide.mpp,
            }
            for d in written
        },
    }
    (truth_folder / "truth.json").write_text(json.dumps(facts, indent=1) + "\n")
    return written


def _told(progress: Callable[[int, float], None], number: int) -> Callable[[float], None]:
    return lambda share: progress(number, share)


def _write_whole(
    path: Path,
    slide: SyntheticSlide,
    options: dict[str, Any],
    progress: Callable[[float], None] | None,
) -> None:
    """Writes beside `path` and renames: an interrupted slide is never taken for a whole one."""
    draft = path.with_name(f".{path.name}.draft")
    if draft.is_dir():
        shutil.rmtree(draft)
    write = write_ome_zarr if path.suffix == ".zarr" else write_tiff
    write(draft, slide, progress=progress, **options)
    os.replace(draft, path)


def write_labelled_patches(
    folder: Path | str,
    slides: Sequence[SyntheticSlide],
    *,
    per_class: int = 60,
    size_px: int = 224,
    mpp: float = 0.5,
    purity: float = 0.8,
    seed: int = 0,
) -> dict[str, int]:
    """Patches of known class as `folder`/<class>/<slide>_<x>_<y>.png; returns how many of each.

    A patch belongs to a class when at least `purity` of its truth is that class. Places are drawn
    by Philox(seed, try): the same arguments give the same files. Glass is left out.
    """
    folder, counts = Path(folder), {}
    # Without ink and dust: the tissue alone must tell the class.
    slides = [replace(slide, pen=False, dust=0) for slide in slides]
    maps = [slide.class_map(TRUTH_MPP) for slide in slides]
    for number, name in enumerate(CLASS_NAMES[1:], start=1):
        (folder / name).mkdir(parents=True, exist_ok=True)
        made = 0
        for x_px0, y_px0, slide in _places(
            slides, maps, number, size_px * mpp, purity, seed, per_class
        ):
            patch = slide.render(x_px0, y_px0, size_px, size_px, mpp)
            Image.fromarray(patch).save(folder / name / f"{slide.seed:04d}_{x_px0}_{y_px0}.png")
            made += 1
        counts[name] = made
    return counts


def _places(
    slides: Sequence[SyntheticSlide],
    truths: Sequence[NDArray[np.uint8]],
    number: int,
    side_um: float,
    purity: float,
    seed: int,
    wanted: int,
) -> list[tuple[int, int, SyntheticSlide]]:
    """Upper left corners (level-0 px) of patches of one class, taken from the slides in turn."""
    found: list[tuple[int, int, SyntheticSlide]] = []
    maps = [truth == number for truth in truths]
    inside = [np.argwhere(m) for m in maps]
    drawn = words(seed, np.arange(wanted * 20), number, _PATCH_STREAM, 1)[:, 0]
    cells = max(1, round(side_um / TRUTH_MPP))
    for k in range(len(drawn)):
        s = k % len(slides)
        if len(found) == wanted:
            break
        if not len(inside[s]):
            continue
        i, j = inside[s][int(integers(drawn[k : k + 1], len(inside[s]))[0])]
        top, left = i - cells // 2, j - cells // 2
        if top < 0 or left < 0 or top + cells > maps[s].shape[0] or left + cells > maps[s].shape[1]:
            continue
        if maps[s][top : top + cells, left : left + cells].mean() >= purity:
            to_px0 = TRUTH_MPP / slides[s].mpp
            place = round(left * to_px0), round(top * to_px0), slides[s]
            if place not in found:
                found.append(place)
    return found
