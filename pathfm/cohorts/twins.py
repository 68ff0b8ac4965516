"""The same image in several files: an SVS, its copy as TIFF, the DICOM series made from it.

A fingerprint is the mean luma of 16 x 16 equal parts of a slide, computed from its coarsest level. It does
not depend on codec, tiling or pyramid. Slides of the same size whose fingerprints agree are twins: they
must stay on one side of a split, and one of them is enough to train on.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import PatchingError
from online_patching.geometry import Box
from online_patching.plan import ReadPlan, scales_of, tiles_of
from online_patching.slide import Slide
from online_patching.slide_index import Level, SlideIndex
from online_patching.stores import Stores

PARTS = 16
MOST_TILES = 1024
"""Slides whose coarsest level has more tiles get no fingerprint: a pyramid's has a few dozen."""
MOST_RMS = 3.0
"""Grey levels by which the parts of twins differ, root mean square, once their means are equal.

Copies in another codec, tiling or pyramid of the real slides at hand: 0.3 to 1.1.
"""
MOST_OF_CONTRAST = 0.25
"""And at most this part of the slide's own contrast, which a pale section has little of."""
MOST_OFFSET = 4.0
"""Grey levels by which the means of twins differ: coarse levels are rounded; measured up to 1.7."""
FEWEST_CONTRAST = 3.0
"""Standard deviation over the parts, in grey levels, below which a slide is too empty to be recognised."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_BLOCK = 2048
_PIXELS_A_PART = 16  # fewer of them blur the edges of a part


def fingerprint(index: SlideIndex, stores: Stores) -> str:
    """344 characters that are nearly the same for the same image, or "" where that costs too much.

    Reads the coarsest level once (JPEG and JPEG 2000 decoded at 1/8), at most MOST_TILES tiles, never a
    label or macro image. Also "" for a slide that is nearly blank, is read through another library, or
    of which a tile cannot be read.
    """
    number = len(index.levels) - 1
    level = index.levels[number]
    if index.fallback or level.n_tiles * level.parts > MOST_TILES:
        return ""
    try:
        parts = _part_means(Slide(index, stores), number)
    except PatchingError:
        return ""
    if parts.std() < FEWEST_CONTRAST:
        return ""
    return base64.b64encode(np.round(parts).astype(np.uint8).tobytes()).decode()


def find_twins(slides: Iterable[tuple[str, tuple[int, int], str]]) -> dict[str, str]:
    """Of (slide id, (width, height) in level-0 px, fingerprint): id -> id of the first with that image.

    Only slides that have an earlier twin are in it. Links are followed: a twin of a twin is one.
    """
    by_size: dict[tuple[int, int], list[tuple[str, bytes]]] = {}
    for slide_id, size, text in slides:
        print_of_it = _decoded(text)
        if print_of_it:
            by_size.setdefault(size, []).append((slide_id, print_of_it))
    found: dict[str, str] = {}
    for group in by_size.values():
        if len(group) > 1:
            first = _first_alike(np.array([list(data) for _, data in group], np.float32))
            ids = [slide_id for slide_id, _ in group]
            found |= {ids[i]: ids[j] for i, j in enumerate(first) if i != j}
    return found


def _decoded(text: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
    return data if len(data) == PARTS**2 else b""


def _first_alike(prints: NDArray[np.float32]) -> list[int]:
    """For each row the first row that it agrees with, directly or by way of others."""
    from scipy.sparse import coo_array  # late: commands that look for no twins start sooner
    from scipy.sparse.csgraph import connected_components

    unique, place = np.unique(
        prints, axis=0, return_inverse=True
    )  # copies by the thousand are quick
    pairs = np.concatenate(list(_alike(unique)))
    ones = np.ones(len(pairs), bool)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), (len(unique), len(unique)))
    groups = connected_components(graph, directed=False)[1][place.ravel()]
    first = np.unique(groups, return_index=True)[1]
    return [int(first[group]) for group in groups]


def _alike(prints: NDArray[np.float32]) -> Iterator[NDArray[np.intp]]:
    """Pairs (n, 2) of rows that agree, block by block; each with itself too."""
    n, parts = prints.shape
    means = prints.mean(axis=1)
    centred = prints - means[:, None]
    squares = (centred**2).sum(axis=1)
    most = np.minimum(parts * MOST_RMS**2, MOST_OF_CONTRAST**2 * squares)
    for start in range(0, n, _BLOCK):
        block = slice(start, start + _BLOCK)
        for at in range(start, n, _BLOCK):
            other = slice(at, at + _BLOCK)
            apart = squares[block, None] + squares[None, other]
            apart -= 2 * centred[block] @ centred[other].T
            alike = apart <= np.minimum(most[block, None], most[None, other])
            alike &= np.abs(means[block, None] - means[None, other]) <= MOST_OFFSET
            yield np.argwhere(alike) + np.array([start, at])


def _part_means(slide: Slide, number: int) -> NDArray[np.float64]:
    """Mean luma of PARTS x PARTS equal parts of a level, read one row of tiles after another."""
    whole = slide.levels[number]
    scale = _scale(whole)
    level = whole.reduced(scale)
    across = _coverage(whole.width_px, scale)
    down = _coverage(whole.height_px, scale)
    sums = np.zeros((PARTS, PARTS))
    for top in range(0, level.height_px, level.tile_height_px):
        box = Box(0, top, level.width_px, min(level.height_px, top + level.tile_height_px))
        plan = ReadPlan(number, box, tiles_of(level, box), (box.width, box.height), None, scale)
        luma = slide.read_plan(plan).astype(np.float32) @ _LUMA
        sums += down[:, box.top : box.bottom] @ luma @ across.T
    return np.asarray(sums / (down.sum(axis=1)[:, None] * across.sum(axis=1)))


def _scale(level: Level) -> int:
    """How much smaller the level's tiles are decoded: up to 8 times, if their sides allow it."""
    sides = (level.tile_width_px, level.tile_height_px)
    fits = [s for s in scales_of(level.codec) if s <= 8 and not any(side % s for side in sides)]
    enough = PARTS * _PIXELS_A_PART
    return next((s for s in fits if min(level.width_px, level.height_px) >= enough * s), 1)


def _coverage(length_px: int, scale: int) -> NDArray[np.float64]:
    """How much of each pixel of a side lies in each of its PARTS equal parts: (PARTS, pixels).

    The side has `length_px` pixels before it is decoded `scale` times smaller, the last of them partly.
    """
    edges = np.linspace(0, length_px, PARTS + 1)
    starts = np.arange(0, length_px, scale)
    low = np.maximum(edges[:-1, None], starts)
    high = np.minimum(edges[1:, None], np.minimum(starts + scale, length_px))
    return np.asarray(np.clip(high - low, 0, None))
