"""plan.py for a whole batch at once: which tiles, which bytes, pasted and cut where, as arrays. Pure.

For every slide whose tiles are stored: byte ranges of one object or of several, or chunks. The rules are
plan.py's (the level, the scale, the box, the window) and the tests compare the two, draw by draw; here they
are written as array arithmetic because a batch in a Python loop costs as much as its decoding.

A plan is four tables, in the layout that the native decoder reads (tables.py): canvases (a box of one
level's decoded pixels), the pieces of tiles each is pasted from, the patches cut out of each, and the
objects that pieces lie in (pieces.py). Patches of one read neighbourhood share a canvas, so that a tile
they share is decoded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching.batch_plan.chunk_spec import native_spec
from online_patching.batch_plan.pieces import FALLBACK, Pieces, locate
from online_patching.batch_plan.tables import (
    CANVAS,
    CHUNK,
    COLOURS,
    FILE,
    HEADLESS,
    JPEG,
    OUTPUT,
    PIXELS,
    TILE,
    WHOLE,
)
from online_patching.corpus import Corpus
from online_patching.plan import EXACT_WITHIN_PX, HALF, LEVEL_TOLERANCE, phase_px, scales_of
from online_patching.sampling.levels import choose_levels
from online_patching.sampling.sampler import Draws
from online_patching.slide_index import Codec

__all__ = [
    "CANVAS",
    "FILE",
    "OUTPUT",
    "TILE",
    "WHOLE",
    "BatchPlan",
    "can_plan",
    "plan_batch",
    "slide_keys",
]

_ONE, _GOLDEN = np.uint64(1), np.uint64(0x9E3779B97F4A7C15)
_SPLITMIX = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)

_SHARE_WITHIN = 4
"""Patches share a canvas while it is at most so many times as large as they are together."""


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """How to read n patches. `slide` and `level` (a row of corpus.levels) are one a canvas, `number`
    (of the tile in its level) one a piece, `row` (which of the n patches) one an output. `keys` and
    `tokens` are the URIs and version tokens of the `files`."""

    canvases: NDArray[np.void]
    tiles: NDArray[np.void]
    outputs: NDArray[np.void]
    files: NDArray[np.void]
    keys: tuple[str, ...]
    tokens: tuple[str, ...]
    slide: NDArray[np.int64]
    level: NDArray[np.int64]
    number: NDArray[np.int64]
    row: NDArray[np.int64]
    codecs: tuple[Codec, ...]

    def __len__(self) -> int:
        return len(self.canvases)

    @cached_property
    def tables(self) -> tuple[bytes, ...]:
        """The JPEG tables, or chunk descriptions, that `canvases["tables"]` counts."""
        return tuple(_tables(codec) for codec in self.codecs)

    def tiles_of(self, canvas: int) -> slice:
        """Where a canvas's pieces are."""
        first = int(self.canvases["first_tile"][canvas])
        return slice(first, first + int(self.canvases["n_tiles"][canvas]))

    def outputs_of(self, canvas: int) -> slice:
        """Where a canvas's patches are."""
        first = int(self.canvases["first_output"][canvas])
        return slice(first, first + int(self.canvases["n_outputs"][canvas]))


def can_plan(corpus: Corpus, slides: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which corpus rows `plan_batch` can plan: all but those that another library reads."""
    return np.asarray(corpus.records["reader"][slides] != FALLBACK)


def plan_batch(
    corpus: Corpus,
    draws: Draws,
    size_px: int,
    targets: NDArray[np.int64],
    patches_per_read: int = 1,
) -> BatchPlan:
    """The reads of `draws`, patch r going to patch `targets[r]` of a batch.

    Canvases come slide by slide and in the order of their bytes, so that a thread has few files
    open and reads forward. `patches_per_read` draws in a row that look at the same level share one.
    """
    records, levels = corpus.records, corpus.levels
    slide = draws.slide
    level = choose_levels(corpus, slide, draws.mpp)
    used, codec = np.unique(levels["codec"][level], return_inverse=True)
    codecs = tuple(corpus.codecs[int(i)] for i in used)
    sides = np.stack([size_px * draws.mpp / records[name][slide] for name in ("mpp_x", "mpp_y")], 1)
    origin = np.stack([draws.x_px0, draws.y_px0], 1).astype(np.float64)
    downsample = _pair(levels, "downsample_x", "downsample_y", level)
    tile = _pair(levels, "tile_width_px", "tile_height_px", level)
    smallest = np.asarray([max(scales_of(one), default=1) for one in codecs])[codec]
    scale = _scales((sides / downsample / size_px).min(axis=1), tile, smallest)
    downsample, tile = downsample * scale[:, None], tile // scale[:, None]
    limit = -(-_pair(levels, "width_px", "height_px", level) // scale[:, None])
    phase = _phases(codecs, codec, scale)
    box, window, exact = _boxes(origin / downsample, sides / downsample, size_px, phase)

    group = draws.draw // patches_per_read
    order = np.lexsort((np.arange(len(slide)), group, level, slide))
    key = (slide[order], level[order], scale[order], group[order])
    canvas, box_of = _canvases(key, box[order], patches_per_read > 1)
    first = np.flatnonzero(np.diff(canvas, prepend=-1))
    some = order[first]  # one row of each canvas

    tiles, number, counts, pieces = _tiles(
        corpus, slide[some], level[some], box_of, tile[some], limit[some]
    )
    canvases = np.zeros(len(some), CANVAS)
    canvases["key"] = slide_keys(corpus.digest, slide[some])
    canvases["first_tile"], canvases["n_tiles"] = np.cumsum(counts) - counts, counts
    canvases["first_output"], canvases["n_outputs"] = first, np.diff(first, append=len(order))
    canvases["width"], canvases["height"] = (box_of[:, 2:] - box_of[:, :2]).T
    canvases["tile_width"], canvases["tile_height"] = (tile[some] * scale[some, None]).T
    canvases["scale"], canvases["codec"] = scale[some], codec[some]
    _describe(canvases, codecs)

    outputs = np.zeros(len(order), OUTPUT)
    for name, column in zip(("left", "top", "right", "bottom"), window[order].T, strict=True):
        outputs[name] = column
    outputs["x"], outputs["y"] = (box[order, :2] - box_of[canvas, :2]).T
    outputs["box_width"], outputs["box_height"] = (box[order, 2:] - box[order, :2]).T
    outputs["target"] = targets[order] * (3 * size_px * size_px)
    outputs["width"] = outputs["height"] = size_px
    outputs["exact"] = exact[order]
    return BatchPlan(
        canvases, tiles, outputs, pieces.files, pieces.keys, pieces.tokens, slide[some], level[some],
        number, order, codecs,
    )  # fmt: skip


def _describe(canvases: NDArray[np.void], codecs: tuple[Codec, ...]) -> None:
    """Fill in what a canvas's codec says."""
    at = canvases["codec"]
    canvases["packing"] = np.asarray([_packing(codec) for codec in codecs])[at]
    canvases["colour"] = np.asarray([_colour(codec) for codec in codecs])[at]
    canvases["fill"] = np.asarray([codec.fill for codec in codecs])[at]
    canvases["tables"] = np.where(
        np.asarray([bool(_tables(codec)) for codec in codecs])[at], at, -1
    )


def _tables(codec: Codec) -> bytes:
    """What the native decoder wants to know of all tiles of a codec."""
    return codec.tables if codec.kind == "jpeg" else native_spec(codec) or b""


def _packing(codec: Codec) -> int:
    if codec.kind != "jpeg" or codec.fragments:
        return CHUNK if _tables(codec) else PIXELS
    return HEADLESS if codec.headless else JPEG


def slide_keys(digest: str, slides: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A 64-bit name for each row of the corpus with this digest (hexadecimal), never 0.

    SplitMix64's output function (Steele et al., OOPSLA 2014) of the digest plus its increment a row:
    within a corpus no two rows share a name, and two corpora meet by chance alone.
    """
    mixed = np.uint64(int(digest[:16], 16)) + (slides.astype(np.uint64) + _ONE) * _GOLDEN
    for shift, factor in _SPLITMIX:
        mixed = (mixed ^ (mixed >> shift)) * factor
    mixed ^= mixed >> np.uint64(31)
    return np.where(mixed == 0, _ONE, mixed)


def _colour(codec: Codec) -> int:
    """What a three-component stream holds; libjpeg sees by itself that one component is gray."""
    return COLOURS.index(codec.colour) if codec.colour in COLOURS else COLOURS.index("ycbcr")


def _pair(table: NDArray[np.void], x: str, y: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    return np.stack([table[x][rows], table[y][rows]], axis=1)


def _scales(
    reduction: NDArray[np.float64], tile: NDArray[Any], smallest: NDArray[np.int64]
) -> NDArray[np.int64]:
    """plan.choose_scale: `smallest` is the largest of plan.scales_of, which has all powers of 2 up to it."""
    out = np.ones(len(reduction), np.int64)
    for scale in (2**n for n in range(1, int(smallest.max(initial=1)).bit_length())):
        fits = (scale <= reduction * (1 + LEVEL_TOLERANCE)) & (tile % scale == 0).all(axis=1)
        out[fits & (scale <= smallest)] = scale
    return out


def _phases(
    codecs: tuple[Codec, ...], codec: NDArray[np.int64], scale: NDArray[np.int64]
) -> NDArray[np.float64]:
    """plan.phase_px, one a row."""
    if not any(one.reductions for one in codecs):
        return np.zeros(len(codec))
    largest = int(scale.max(initial=1))
    table = np.asarray([[phase_px(one, by) for by in range(1, largest + 1)] for one in codecs])
    return np.asarray(table.reshape(-1, largest)[codec, scale - 1], np.float64)


def _boxes(
    corner: NDArray[np.float64],
    side: NDArray[np.float64],
    size_px: int,
    phase: NDArray[np.float64],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
    """plan.plan_window: (left, top, right, bottom) of what is read, the window in it, whether it is exact."""
    corner = corner + phase[:, None]
    end = corner + side
    exact = np.asarray(
        (np.abs(end - corner - size_px) < EXACT_WITHIN_PX).all(axis=1) & (phase == 0)
    )
    whole = np.floor(corner + HALF)
    margin = np.ceil(np.maximum(1.0, (end - corner) / size_px)) + 1
    loose = np.hstack([np.floor(corner) - margin, np.ceil(end) + margin])
    box = np.where(exact[:, None], np.hstack([whole, whole + size_px]), loose)
    base = box[:, [0, 1, 0, 1]]
    window = np.where(exact[:, None], box - base, np.hstack([corner, end]) - base)
    return box.astype(np.int64), window, exact


def _canvases(
    key: tuple[NDArray[np.int64], ...], box: NDArray[np.int64], share: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(canvas of each ordered patch, box of each canvas). Neighbours in order with one key may share."""
    n = len(box)
    if not share or n < 2:
        return np.arange(n), box
    same = np.logical_and.reduce([column[1:] == column[:-1] for column in key])
    begins = np.flatnonzero(np.concatenate([[True], ~same]))
    canvas = np.repeat(np.arange(len(begins)), np.diff(begins, append=n))
    union = np.hstack(
        [np.minimum.reduceat(box[:, :2], begins), np.maximum.reduceat(box[:, 2:], begins)]
    )
    area = np.prod(box[:, 2:] - box[:, :2], axis=1)
    together = np.add.reduceat(area, begins)
    wasteful = np.prod(union[:, 2:] - union[:, :2], axis=1) > _SHARE_WITHIN * together
    # Far apart after all: each its own.
    alone = wasteful[canvas]
    starts = alone | np.concatenate([[True], ~same])
    numbered = np.cumsum(starts) - 1
    boxes = np.where(alone[starts][:, None], box[starts], union[canvas[starts]])
    return numbered, boxes


def _tiles(
    corpus: Corpus,
    slide: NDArray[np.int64],
    level: NDArray[np.int64],
    box: NDArray[np.int64],
    tile: NDArray[Any],
    limit: NDArray[Any],
) -> tuple[NDArray[np.void], NDArray[np.int64], NDArray[np.int64], Pieces]:
    """Rows of TILE, canvas by canvas, row by row, part by part; the tiles' numbers; how many rows each
    canvas has; where they lie."""
    inside = np.hstack([np.maximum(box[:, :2], 0), np.minimum(box[:, 2:], limit)])
    begin = inside[:, :2] // tile
    grid = -(-inside[:, 2:] // tile) - begin
    grid[(inside[:, 2:] <= inside[:, :2]).any(axis=1)] = 0
    counts = grid.prod(axis=1)
    c = np.repeat(np.arange(len(box)), counts)
    j = np.arange(len(c)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = begin[c] + np.stack([j % grid[c, 0], j // grid[c, 0]], axis=1)
    tile_number = place[:, 1] * corpus.levels["columns"][level[c]] + place[:, 0]
    part = np.zeros(len(c), np.int64)
    parts = corpus.levels["parts"][level].astype(np.int64)
    if (parts > 1).any():
        again = np.repeat(np.arange(len(c)), parts[c])
        part = np.arange(len(again)) - np.repeat(np.cumsum(parts[c]) - parts[c], parts[c])
        c, place, tile_number, counts = c[again], place[again], tile_number[again], counts * parts
    corner = place * tile[c]
    low = np.maximum(corner, inside[c, :2])
    high = np.minimum(corner + tile[c], inside[c, 2:])
    pieces = locate(corpus, slide[c], level[c], tile_number, part)
    out = np.zeros(len(c), TILE)
    out["start"], out["length"], out["file"] = pieces.start, pieces.length, pieces.file
    out["body"], out["channel"] = -1, part
    out["left"], out["top"] = (low - corner).T
    out["width"], out["height"] = (high - low).T
    out["x"], out["y"] = (low - box[c, :2]).T
    return out, tile_number, counts, pieces
