"""Labelled pictures on their way to a model: opened, brought to its size, a few batches ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from online_patching.philox import words
from pathfm.datasets import Benchmark
from pathfm.datasets.benchmark import CutFromSlides
from pathfm.datasets.folder import picture_size
from pathfm.datasets.preparing import fit
from pathfm.datasets.sources import PictureFiles
from pathfm.runtime import PathfmError

Pixels = NDArray[np.uint8]

_AHEAD = 3  # batches decoded before the model asks for them: bounds the pictures in memory
_LOOK_ON = 10_000  # pictures still looked at after one that cannot be read
_NAMED = 3
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
    """One error for all of `rest` that fail; the first where it is the only one."""

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
    return PathfmError(f"{len(found):,} of {len(rest):,} pictures looked at fail: {named}{more}")
