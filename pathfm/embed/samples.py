"""Labelled pictures on their way to a model: which, and how each is brought to its size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from online_patching.philox import words
from pathfm.datasets import Benchmark
from pathfm.datasets.benchmark import CutFromSlides
from pathfm.datasets.folder import picture_size
from pathfm.datasets.preparing import Pixels, fit
from pathfm.datasets.sources import PictureFiles
from pathfm.runtime import PathfmError

_STREAM_SUBSET = 401  # that of a labelled folder's own subset
_MAX_UPSCALE = 2.0  # as for slides


@dataclass(frozen=True)
class Rows:
    """What a table says of its rows beside their features."""

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    paths: tuple[str, ...]
    groups: tuple[str, ...]
    splits: tuple[str, ...]
    mpp: NDArray[np.float32] | None = None

    @staticmethod
    def of(samples: Benchmark, mpp: NDArray[np.float32] | None = None) -> Rows:
        """The columns of a data set: unknown groups are each their own, unknown splits are none.

        mpp: µm/px of each row's input where they differ, as `input_mpp` gives them.
        """
        groups, splits = samples.groups, samples.splits
        if not any(groups):
            groups = ()
        return Rows(
            tuple(samples.classes),
            np.asarray(samples.labels, np.int64),
            tuple(samples.paths),
            tuple(g or path for g, path in zip(groups, samples.paths, strict=bool(groups))),
            tuple(splits) if any(splits) else (),
            mpp,
        )


def some_of(samples: Benchmark, per_class: int, seed: int) -> Benchmark:
    """At most `per_class` samples of each class in each split, by Philox(seed, sample number)."""
    keys = words(seed, np.arange(len(samples)), 0, _STREAM_SUBSET, 1)[:, 0]
    cells = [
        f"{split}/{label}" for split, label in zip(samples.splits, samples.labels, strict=True)
    ]
    kept: list[int] = []
    for cell in sorted(set(cells)):
        members = np.flatnonzero(np.asarray(cells) == cell)
        kept += members[np.argsort(keys[members], kind="stable")][:per_class].tolist()
    return samples.subset(np.asarray(sorted(kept), np.int64))


def scales_to(
    samples: Benchmark, mpp: float | None, told: float | None
) -> NDArray[np.float64] | None:
    """How many times as large each picture becomes at `mpp`, (n,); None where none is asked for.

    Raises PathfmError where a picture's own µm/px is not known, or it would be enlarged over twice.
    """
    if mpp is None:
        return None
    own = samples.mpp.copy()
    own[np.isnan(own)] = np.nan if told is None else told
    if len(unknown := np.flatnonzero(np.isnan(own))):
        raise PathfmError(
            f"mpp = {mpp:g}: the µm/px of {len(unknown):,} pictures is not known, first "
            f"{samples.paths[unknown[0]]}. Set data_mpp"
        )
    if (largest := float((own / mpp).max(initial=0))) > _MAX_UPSCALE:
        raise PathfmError(
            f"mpp = {mpp:g} would enlarge pictures of {mpp * largest:g} µm/px {largest:.3g} times; at "
            f"most {_MAX_UPSCALE:g} times is no invention"
        )
    return own / mpp


def input_mpp(samples: Benchmark, input_px: int) -> NDArray[np.float32]:
    """µm/px of each row's input where none is asked for, (n,); NaN where it is not known.

    Patches of slides are cut at theirs. Pictures whose µm/px the table tells one by one have it times
    shorter side / input_px, by their files' headers; of other pictures it is not said: those of a data set
    are of one µm/px, and where their sizes vary their input's would be a number a picture.
    """
    own = samples.mpp
    if isinstance(samples.source, CutFromSlides):
        return own.astype(np.float32)
    if len(np.unique(own[np.isfinite(own)])) < 2 or not isinstance(samples.source, PictureFiles):
        return np.full(len(samples), np.nan, np.float32)
    short = [min(picture_size(samples.root / path)) for path in samples.paths]
    return np.asarray(np.round(own * np.array(short) / input_px, 4), np.float32)


def make_input(samples: Benchmark, i: int, input_px: int, scale: float | None) -> Pixels:
    """Picture i as uint8 (input_px, input_px, 3).

    Without a scale its shorter side is resized to input_px; with one the picture is resized by
    it, whatever its size. Then the centre is cropped. Both bilinear, antialiased.
    """
    pixels = samples.read(i)
    if scale is None:
        return fit(pixels, input_px, samples.paths[i])
    height, width = (round(side * scale) for side in pixels.shape[:2])
    if min(height, width) < input_px:
        raise PathfmError(
            f"{samples.paths[i]}: {width} x {height} px at the µm/px asked for, less than input_px = "
            f"{input_px}. Set input_px to {min(height, width)} or less"
        )
    image = Image.fromarray(pixels)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - input_px) / 2), round((height - input_px) / 2)
    return np.asarray(image.crop((left, top, left + input_px, top + input_px)))
