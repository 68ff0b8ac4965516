"""plan.py for a whole batch at once: which tiles, which bytes, pasted and cut where, as arrays. Pure.

For slides whose tiles are JPEG streams at byte ranges of one object. The rules are plan.py's (the level,
the DCT scale, the box, the window) and the tests compare the two, draw by draw; here they are written
as array arithmetic because a batch in a Python loop costs as much as its decoding.

A plan is three tables, in the layout that the native decoder reads: canvases (a box of one level's
decoded pixels), the tiles each is pasted from, and the patches cut out of each. Patches of one read
neighbourhood share a canvas, so that a tile they share is decoded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching.corpus import Corpus
from online_patching.corpus.records import READERS
from online_patching.plan import DCT_SCALES, EXACT_WITHIN_PX, HALF, LEVEL_TOLERANCE
from online_patching.sampling.levels import choose_levels
from online_patching.sampling.sampler import Draws
from online_patching.slide_index import Codec

CANVAS = np.dtype(
    [
        ("size_bytes", "<i8"), ("mtime_ns", "<i8"), ("key", "<u8"), ("fd", "<i4"),
        ("first_tile", "<i4"), ("n_tiles", "<i4"), ("first_output", "<i4"), ("n_outputs", "<i4"),
        ("width", "<i4"), ("height", "<i4"), ("tile_width", "<i4"), ("tile_height", "<i4"),
        ("scale", "<i4"), ("codec", "<i4"), ("colour", "<i4"), ("tables", "<i4"), ("fill", "<i4"),
        ("status", "<i4"), ("tile", "<i4"), ("message", "S120"),
    ],
    align=True,
)  # fmt: skip
"""A box of one level's decoded pixels. `size_bytes` and `mtime_ns` are of the slide's file as indexed;
`key` names the slide within the process, for what is remembered of its tiles (0: nothing is);
`fd` -1 means that the tiles' bytes are handed over; `codec` counts the plan's codecs and `tables` its
tables (-1 where its streams are complete); `colour` counts COLOURS. The last three are filled in by the
decoder (tile: of the plan)."""

TILE = np.dtype(
    [
        ("start", "<i8"), ("length", "<i8"), ("body", "<i4"), ("left", "<i4"), ("top", "<i4"),
        ("width", "<i4"), ("height", "<i4"), ("x", "<i4"), ("y", "<i4"), ("pad", "<i4"),
    ],
    align=True,
)  # fmt: skip
"""The part of a tile that a canvas sees: its byte range (length 0: not stored), which of the bodies it is,
where the part lies in the tile and where it goes on the canvas (decoded pixels)."""

OUTPUT = np.dtype(
    [
        ("left", "<f8"), ("top", "<f8"), ("right", "<f8"), ("bottom", "<f8"), ("target", "<i8"),
        ("width", "<i4"), ("height", "<i4"), ("x", "<i4"), ("y", "<i4"),
        ("box_width", "<i4"), ("box_height", "<i4"), ("exact", "<i4"), ("pad", "<i4"),
    ],
    align=True,
)  # fmt: skip
"""A patch: its window within its box, its byte offset in the batch, its size, its box on the canvas.
`exact`: the patch is the box. Nothing outside the box is looked at, so that a patch has the same pixels on
a canvas of its own and on a shared one."""

COLOURS = ("rgb", "ycbcr", "gray")

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
    (of the tile in its level) one a tile, `row` (which of the n patches) one an output."""

    canvases: NDArray[np.void]
    tiles: NDArray[np.void]
    outputs: NDArray[np.void]
    slide: NDArray[np.int64]
    level: NDArray[np.int64]
    number: NDArray[np.int64]
    row: NDArray[np.int64]
    codecs: tuple[Codec, ...]

    def __len__(self) -> int:
        return len(self.canvases)

    @cached_property
    def tables(self) -> tuple[bytes, ...]:
        """The JPEG tables that `canvases["tables"]` counts."""
        return tuple(codec.tables for codec in self.codecs)

    def tiles_of(self, canvas: int) -> slice:
        """Where a canvas's tiles are."""
        first = int(self.canvases["first_tile"][canvas])
        return slice(first, first + int(self.canvases["n_tiles"][canvas]))

    def outputs_of(self, canvas: int) -> slice:
        """Where a canvas's patches are."""
        first = int(self.canvases["first_output"][canvas])
        return slice(first, first + int(self.canvases["n_outputs"][canvas]))


def can_plan(corpus: Corpus, slides: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which corpus rows `plan_batch` can plan: byte ranges of one object, in whole JPEG streams."""
    used, at = np.unique(
        corpus.levels["codec"][corpus.records["first_level"][slides]], return_inverse=True
    )
    codecs = [corpus.codecs[int(i)] for i in used]
    jpeg = np.asarray([codec.kind == "jpeg" and not codec.headless for codec in codecs], bool)
    ranges = corpus.records["reader"][slides] == READERS.index("ranges")
    return np.asarray(ranges & (corpus.records["n_objects"][slides] == 0) & jpeg[at])


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
    sides = np.stack([size_px * draws.mpp / records[name][slide] for name in ("mpp_x", "mpp_y")], 1)
    origin = np.stack([draws.x_px0, draws.y_px0], 1).astype(np.float64)
    downsample = _pair(levels, "downsample_x", "downsample_y", level)
    tile = _pair(levels, "tile_width_px", "tile_height_px", level)
    scale = _scales((sides / downsample / size_px).min(axis=1), tile)
    downsample, tile = downsample * scale[:, None], tile // scale[:, None]
    limit = -(-_pair(levels, "width_px", "height_px", level) // scale[:, None])
    box, window, exact = _boxes(origin / downsample, sides / downsample, size_px)

    group = draws.draw // patches_per_read
    order = np.lexsort((np.arange(len(slide)), group, level, slide))
    key = (slide[order], level[order], scale[order], group[order])
    canvas, box_of = _canvases(key, box[order], patches_per_read > 1)
    first = np.flatnonzero(np.diff(canvas, prepend=-1))
    some = order[first]  # one row of each canvas

    plan_tiles, number, counts = _tiles(
        corpus, slide[some], level[some], box_of, tile[some], limit[some]
    )
    canvases = np.zeros(len(some), CANVAS)
    canvases["size_bytes"], canvases["mtime_ns"] = (
        records["size_bytes"][slide[some]],
        records["mtime_ns"][slide[some]],
    )
    canvases["key"] = slide_keys(corpus.digest, slide[some])
    canvases["fd"] = -1
    canvases["first_tile"], canvases["n_tiles"] = np.cumsum(counts) - counts, counts
    canvases["first_output"], canvases["n_outputs"] = first, np.diff(first, append=len(order))
    canvases["width"], canvases["height"] = (box_of[:, 2:] - box_of[:, :2]).T
    canvases["tile_width"], canvases["tile_height"] = (tile[some] * scale[some, None]).T
    canvases["scale"] = scale[some]
    used, at = np.unique(levels["codec"][level[some]], return_inverse=True)
    codecs = [corpus.codecs[int(i)] for i in used]
    canvases["colour"] = np.asarray([_colour(codec) for codec in codecs])[at]
    canvases["fill"] = np.asarray([codec.fill for codec in codecs])[at]
    canvases["tables"] = np.where(np.asarray([bool(codec.tables) for codec in codecs])[at], at, -1)
    canvases["codec"] = at

    outputs = np.zeros(len(order), OUTPUT)
    for name, column in zip(("left", "top", "right", "bottom"), window[order].T, strict=True):
        outputs[name] = column
    outputs["x"], outputs["y"] = (box[order, :2] - box_of[canvas, :2]).T
    outputs["box_width"], outputs["box_height"] = (box[order, 2:] - box[order, :2]).T
    outputs["target"] = targets[order] * (3 * size_px * size_px)
    outputs["width"] = outputs["height"] = size_px
    outputs["exact"] = exact[order]
    return BatchPlan(
        canvases, plan_tiles, outputs, slide[some], level[some], number, order, tuple(codecs)
    )


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


def _scales(reduction: NDArray[np.float64], tile: NDArray[Any]) -> NDArray[np.int64]:
    """plan.choose_scale, for JPEG levels."""
    out = np.ones(len(reduction), np.int64)
    for scale in sorted(DCT_SCALES):
        fits = (scale <= reduction * (1 + LEVEL_TOLERANCE)) & (tile % scale == 0).all(axis=1)
        out[fits] = scale
    return out


def _boxes(
    corner: NDArray[np.float64], side: NDArray[np.float64], size_px: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]:
    """plan.plan_window: (left, top, right, bottom) of what is read, the window in it, whether it is exact."""
    end = corner + side
    exact = np.asarray((np.abs(end - corner - size_px) < EXACT_WITHIN_PX).all(axis=1))
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
) -> tuple[NDArray[np.void], NDArray[np.int64], NDArray[np.int64]]:
    """Rows of TILE, canvas by canvas and row by row; the tiles' numbers; how many each canvas has."""
    inside = np.hstack([np.maximum(box[:, :2], 0), np.minimum(box[:, 2:], limit)])
    begin = inside[:, :2] // tile
    grid = -(-inside[:, 2:] // tile) - begin
    grid[(inside[:, 2:] <= inside[:, :2]).any(axis=1)] = 0
    counts = grid.prod(axis=1)
    c = np.repeat(np.arange(len(box)), counts)
    j = np.arange(len(c)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = begin[c] + np.stack([j % grid[c, 0], j // grid[c, 0]], axis=1)
    number = place[:, 1] * corpus.levels["columns"][level[c]] + place[:, 0]
    corner = place * tile[c]
    low = np.maximum(corner, inside[c, :2])
    high = np.minimum(corner + tile[c], inside[c, 2:])
    out = np.zeros(len(c), TILE)
    out["start"], out["length"] = _ranges(corpus, slide[c], level[c], number)
    out["body"] = -1
    out["left"], out["top"] = (low - corner).T
    out["width"], out["height"] = (high - low).T
    out["x"], out["y"] = (low - box[c, :2]).T
    return out, number, counts


def _ranges(
    corpus: Corpus, slide: NDArray[np.int64], level: NDArray[np.int64], number: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Offset and length of tiles; the few that do not fit into a packed row are looked up one by one."""
    row = corpus.tiles[corpus.levels["first_tile"][level] + number]
    start = (row >> np.uint64(24)).astype(np.int64)
    length = (row & np.uint64(2**24 - 1)).astype(np.int64)
    for i in np.flatnonzero(length == 2**24 - 1):
        own = level[i] - corpus.records["first_level"][slide[i]]
        begin, stop = corpus.index(int(slide[i])).levels[int(own)].byte_range(int(number[i]))
        start[i], length[i] = begin, stop - begin
    return start, length
