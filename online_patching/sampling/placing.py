"""Where on its slide a draw lies: tries at random places until one is tissue enough, in step.

Every function works on columns of n draws of different slides. What try t of a draw is depends on
(seed, draw, attempt, t) alone; how many tries are looked at together is a matter of speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching.corpus import Corpus
from online_patching.philox import fine_uniform, uniform, words
from online_patching.plan import DCT_SCALES, EXACT_WITHIN_PX, LEVEL_TOLERANCE
from online_patching.sampling.levels import choose_levels

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Words = NDArray[np.uint32]

MAX_TRIES = 256
"""Places tried in one attempt. At the least acceptance a slide may have (2 %), 0.6 % of draws
run out of tries and move to their next attempt."""

_LOOK_AHEAD = 256
"""About how many places are looked at in one go, once most draws of a batch have theirs."""


@dataclass(frozen=True)
class Boxes:
    """Columns: a box size on a slide for each of n draws."""

    slide: Ints
    width: Floats
    height: Floats
    slide_width: Ints
    slide_height: Ints

    def take(self, which: Any) -> Boxes:
        """Some of them."""
        return Boxes(*(getattr(self, name)[which] for name in self.__dataclass_fields__))


def origin_inside(center_px0: Floats, side_px0: Floats, limit_px0: Ints) -> Ints:
    """The whole-pixel origins of boxes around centres, pushed inside [0, limit); a box larger than
    the slide is centred on it. Halves go up."""
    free = limit_px0 - side_px0
    pushed = np.clip(np.floor(center_px0 - side_px0 / 2 + 0.5), 0, np.floor(np.maximum(free, 0)))
    return np.asarray(np.where(free <= 0, np.floor(free / 2 + 0.5), pushed).astype(np.int64))


def tissue_centers(corpus: Corpus, slide: Ints, w: Words) -> tuple[Floats, Floats]:
    """Points uniform over the tissue of each slide: words 0 and 3 choose a cell of the mask, 1 and
    2 the point in it."""
    cells = np.asarray(corpus.records["tissue_cells"][slide], np.int64)
    cell = (fine_uniform(w[:, 0], w[:, 3]) * cells).astype(np.int64)
    point = uniform(w[:, 1:3])
    return corpus.tissue_points(slide, np.minimum(cell, cells - 1), point[:, 0], point[:, 1])


def tissue_enough(
    corpus: Corpus, boxes: Boxes, x: Ints, y: Ints, least: float
) -> NDArray[np.bool_]:
    """Whether at least `least` of each box is tissue."""
    if least <= 0:
        return np.ones(len(x), bool)
    share = corpus.tissue_fractions(boxes.slide, x, y, boxes.width, boxes.height)
    return np.asarray(share >= least)


Place = Callable[[NDArray[np.intp], Words], tuple[Ints, Ints, NDArray[np.bool_]]]
"""(which draws, their words) -> x, y, and whether the place is tissue enough."""


def first_place(
    place: Place, seed: int, number: Ints, attempt: Ints, stream: int, count: int = 4
) -> tuple[Ints, Ints, Ints]:
    """x, y of the first try of each draw that `place` accepts, and how many were looked at.

    Try t has `count` words of stream `stream + t`. After MAX_TRIES refusals `tries` is 0.
    """
    n = len(number)
    x, y, tries = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64)
    todo, done = np.arange(n), 0
    while len(todo) and done < MAX_TRIES:
        ahead = min(max(_LOOK_AHEAD // len(todo) // (1 if done else 8), 1), 16, MAX_TRIES - done)
        which = np.repeat(todo, ahead)
        streams = stream + done + np.tile(np.arange(ahead), len(todo))
        w = words(seed, number[which], attempt[which], streams, count)
        at_x, at_y, good = place(which, w)
        good = good.reshape(-1, ahead)
        first = np.argmax(good, axis=1)
        found = good[np.arange(len(todo)), first]
        cell = (np.arange(len(todo)) * ahead + first)[found]
        x[todo[found]], y[todo[found]] = at_x[cell], at_y[cell]
        tries[todo[found]] = done + first[found] + 1
        todo, done = todo[~found], done + ahead
    return x, y, tries


def anywhere(corpus: Corpus, boxes: Boxes, least: float) -> Place:
    """Boxes centred on uniform tissue points, pushed inside the slide."""

    def place(which: NDArray[np.intp], w: Words) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        some = boxes.take(which)
        cx, cy = tissue_centers(corpus, some.slide, w)
        x = origin_inside(cx, some.width, some.slide_width)
        y = origin_inside(cy, some.height, some.slide_height)
        return x, y, tissue_enough(corpus, some, x, y, least)

    return place


@dataclass(frozen=True)
class Axis:
    """One axis of the tile grid that boxes are read from, in step: `windows` are `n` of `tiles`
    tiles of `tile_px` level pixels; `margin` are the level pixels that resampling reads around a
    box; `scale` level-0 pixels are one of the level."""

    n: Ints
    tiles: Ints
    tile_px: Floats
    scale: Floats
    before: Floats
    after: Floats
    side: Floats
    limit: Ints

    def take(self, which: Any) -> Axis:
        """Some of them."""
        return Axis(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def first_tile(self, center_px0: Floats, u: Floats) -> Ints:
        """The first tile of a window that holds the centre: uniform among those on the level."""
        tile = np.floor(center_px0 / self.scale / self.tile_px).astype(np.int64)
        tile = np.clip(tile, 0, self.tiles - 1)
        low = np.maximum(tile - self.n + 1, 0)
        high = np.minimum(tile, self.tiles - self.n)
        return np.asarray(low + (u * (high - low + 1)).astype(np.int64))

    def origins(self, first: Ints) -> tuple[Ints, Ints]:
        """The least and greatest level-0 origin whose read stays in the window. At the slide's
        border the border itself bounds it."""
        stop = first + self.n
        free = np.floor(np.maximum(self.limit - self.side, 0))
        low = np.ceil((first * self.tile_px + self.before) * self.scale)
        high = np.floor((stop * self.tile_px - self.after) * self.scale - self.side)
        high = np.clip(np.where(stop >= self.tiles, free, high), 0, free)
        low = np.clip(np.where(first <= 0, 0, low), 0, high)
        centred = np.floor((self.limit - self.side) / 2 + 0.5)
        large = self.side >= self.limit
        low, high = np.where(large, centred, low), np.where(large, centred, high)
        return low.astype(np.int64), high.astype(np.int64)


NEIGHBOURHOOD = 1.5
"""A read neighbourhood is at least this many patch sides across."""


def tile_axes(corpus: Corpus, boxes: Boxes, mpp: Floats, size_px: int) -> tuple[Axis, Axis]:
    """The tile grids, across and down, of the levels that boxes at `mpp` are read from."""
    level = corpus.levels[choose_levels(corpus, boxes.slide, mpp)]
    wide = boxes.width / level["downsample_x"], boxes.height / level["downsample_y"]
    before, after = _margins(wide, size_px)
    axes = []
    for axis, (name, long, side_px0, limit) in enumerate(
        (
            ("x", "width", boxes.width, boxes.slide_width),
            ("y", "height", boxes.height, boxes.slide_height),
        )
    ):
        tile = np.asarray(level[f"tile_{long}_px"], np.int64)
        tiles = -(-np.asarray(level[f"{long}_px"], np.int64) // tile)
        n = np.minimum(np.ceil(NEIGHBOURHOOD * wide[axis] / tile).astype(np.int64), tiles)
        scale = np.asarray(level[f"downsample_{name}"], np.float64)
        edges = before[axis], after[axis]
        axes.append(Axis(n, tiles, tile.astype(np.float64), scale, *edges, side_px0, limit))
    return axes[0], axes[1]


def _margins(wide: tuple[Floats, Floats], size_px: int) -> tuple[list[Floats], list[Floats]]:
    """How many level pixels plan.plan_window may read before and after boxes `wide` level pixels
    across and down, whether or not their tiles are decoded smaller (choose_scale)."""
    reduction = np.minimum(*wide) / size_px * (1 + LEVEL_TOLERANCE)
    whole, smaller = np.ones_like(reduction), np.ones_like(reduction)
    for scale in sorted(DCT_SCALES):
        smaller = np.where(scale <= reduction, scale, smaller)
    before, after = [0 * whole, 0 * whole], [0 * whole, 0 * whole]
    for step in (whole, smaller):
        exact = np.ones(len(reduction), bool)
        for side in wide:
            exact &= np.abs(side / step - size_px) < EXACT_WITHIN_PX
        for axis, side in enumerate(wide):
            filtered = (np.ceil(np.maximum(1.0, side / step / size_px)) + 1) * step
            before[axis] = np.maximum(before[axis], np.where(exact, 0.0, filtered))
            after[axis] = np.maximum(after[axis], np.where(exact, step, filtered))
    return before, after


def neighbourhoods(corpus: Corpus, boxes: Boxes, axes: tuple[Axis, Axis], least: float) -> Place:
    """Windows of tiles that hold a uniform tissue point: `place` gives their first column and row.

    A window is accepted when the box around that point, pushed into the window, is tissue enough:
    so at least one origin in it is.
    """

    def place(which: NDArray[np.intp], w: Words) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        some, across, down = boxes.take(which), axes[0].take(which), axes[1].take(which)
        cx, cy = tissue_centers(corpus, some.slide, w)
        choice = uniform(w[:, 4:6])
        column, row = across.first_tile(cx, choice[:, 0]), down.first_tile(cy, choice[:, 1])
        x = np.clip(np.floor(cx - some.width / 2 + 0.5).astype(np.int64), *across.origins(column))
        y = np.clip(np.floor(cy - some.height / 2 + 0.5).astype(np.int64), *down.origins(row))
        return column, row, tissue_enough(corpus, some, x, y, least)

    return place


def within(
    corpus: Corpus, boxes: Boxes, axes: tuple[Axis, Axis], column: Ints, row: Ints, least: float
) -> Place:
    """Boxes whose origins are uniform in the windows that begin at tile (column, row)."""
    low_x, high_x = axes[0].origins(column)
    low_y, high_y = axes[1].origins(row)

    def place(which: NDArray[np.intp], w: Words) -> tuple[Ints, Ints, NDArray[np.bool_]]:
        u, v = uniform(w[:, 0]), uniform(w[:, 1])
        x = low_x[which] + (u * (high_x - low_x + 1)[which]).astype(np.int64)
        y = low_y[which] + (v * (high_y - low_y + 1)[which]).astype(np.int64)
        return x, y, tissue_enough(corpus, boxes.take(which), x, y, least)

    return place
