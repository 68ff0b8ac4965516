"""The table of corruptions, and a batch of patches through one of them."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.philox import uniform, words
from pathfm.corruptions import coding, colour, objects, optics, staining
from pathfm.corruptions.rounding import Rgb
from pathfm.runtime import PathfmError

SEVERITIES = (1, 2, 3, 4, 5)
LEAST_SIDE_PX = 32
_DRAWN = 6
_STREAM_BASE = 411  # up to 420; 401 to 403 are splits and heads


@dataclass(frozen=True)
class Corruption:
    """One kind: what it does, how strong at each severity, its stream of random numbers."""

    name: str
    levels: tuple[Any, ...]  # five, mildest first
    unit: str  # what a level is
    do: Callable[[Rgb, Any, NDArray[np.float64]], Rgb]
    stream: int


def _table(*rows: tuple[str, tuple[Any, ...], str, Callable[..., Rgb]]) -> dict[str, Corruption]:
    return {
        name: Corruption(name, levels, unit, do, _STREAM_BASE + number)
        for number, (name, levels, unit, do) in enumerate(rows)
    }


_STEPS = (0.05, 0.1, 0.15, 0.2, 0.25)
_DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))
_MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))

# The order gives the streams of random numbers: append only.
CORRUPTIONS = MappingProxyType(
    _table(
        ("jpeg", (25, 18, 15, 10, 7), "quality", coding.jpeg),
        ("pixelate", (0.6, 0.5, 0.4, 0.3, 0.25), "share of the pixels a side", coding.pixelate),
        ("defocus", _DEFOCUS, "radius, softening (px of 224)", optics.defocus),
        ("motion", _MOTION, "radius, sd (px of 224)", optics.motion),
        ("brightness", _STEPS, "added to V", colour.brightness),
        ("saturation", _STEPS, "added to S", colour.saturation),
        ("hue", (0.02, 0.04, 0.06, 0.08, 0.1), "turns added to H", colour.hue),
        ("mark", (0.05, 0.1, 0.15, 0.2, 0.3), "width, share of the side", objects.mark),
        ("bubble", (0.1, 0.3, 0.5, 0.7, 0.9), "opacity", objects.bubble),
        ("stain", _STEPS, "largest change of an amount", staining.stain),
    )
)
"""Every corruption by name. Levels of the first nine as published, but for `mark`'s widths."""


def corrupt(
    pixels: Rgb,
    name: str,
    severity: int,
    pictures: ArrayLike,
    seed: int = 0,
    threads: int = 1,
) -> Rgb:
    """The patches (n, h, w, 3) uint8 under a corruption, a new array of the same shape.

    severity: 1 to 5. pictures: (n,) numbers that tell patches apart, `picture_numbers` makes them;
    the same number always gets the same stroke, bubble, angle or stain, in any batch. threads: patches
    in work at a time. Raises `PathfmError` for an unknown name or severity, patches that are not uint8
    RGB or below 32 px a side, or another count of numbers.
    """
    kind = find_corruption(name)
    if severity not in SEVERITIES:
        raise PathfmError(f"corruption {name}: severity {severity} is none of 1, 2, 3, 4, 5")
    numbers = np.atleast_1d(np.asarray(pictures, np.uint64))
    _check(pixels, len(numbers))
    drawn = uniform(words(seed, numbers, severity, kind.stream, _DRAWN))
    level, out = kind.levels[severity - 1], np.empty_like(pixels)

    def one(i: int) -> None:
        out[i] = kind.do(pixels[i], level, drawn[i])

    if threads == 1:
        for i in range(len(out)):
            one(i)
    else:
        with ThreadPoolExecutor(threads, "pathfm-corrupt") as pool:
            list(pool.map(one, range(len(out))))
    return out


def find_corruption(name: str) -> Corruption:
    """The corruption of that name; `PathfmError` names the nearest one or all."""
    if name in CORRUPTIONS:
        return CORRUPTIONS[name]
    near = difflib.get_close_matches(name, CORRUPTIONS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(CORRUPTIONS)}"
    raise PathfmError(f"unknown corruption {name!r}: {hint}")


def picture_numbers(names: Sequence[str]) -> NDArray[np.uint64]:
    """A number for each name (a path relative to its data set), (n,): 64 bits of its SHA-256.

    So what happens to a picture does not depend on which others are looked at.
    """
    digests = (hashlib.sha256(name.encode()).digest() for name in names)
    return np.array([int.from_bytes(digest[:8], "little") for digest in digests], np.uint64)


def _check(pixels: Rgb, n: int) -> None:
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
        raise PathfmError(
            f"patches to corrupt are {pixels.dtype} {pixels.shape}; wanted uint8 (n, h, w, 3)"
        )
    if min(pixels.shape[1:3]) < LEAST_SIDE_PX:
        raise PathfmError(
            f"patches to corrupt are {pixels.shape[2]} x {pixels.shape[1]} px: below "
            f"{LEAST_SIDE_PX} px a side most corruptions do nothing. Read larger ones"
        )
    if len(pixels) != n:
        raise PathfmError(f"{len(pixels):,} patches to corrupt but {n:,} picture numbers")
