"""Look-ups in many packed bitmaps at once: the n-th set cell, the set share of a box.

Every sum is of integers, and every float operation is one per draw, in one order: a look-up gives
the same bits alone, in any batch and on any machine. Rows of bits are read eight bytes at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import MaskError

PADDING_BYTES = 8
"""How many bytes must follow the last bitmap of a buffer, so that its last word can be read."""

_PIECE_WORDS = 2**18
"""Words looked at together: bounds memory (about 20 MB) when boxes are as large as slides."""

_FROM = np.array([(2**64 - 1) >> n for n in range(65)], np.uint64)
"""_FROM[n] has the bits of columns n..63 of a word set; column 0 is the highest bit."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Ask = Callable[[Ints, Any], None]
"""Told which byte ranges of the packed rows (first byte, bytes; one a draw) are about to be read."""

_NEARBY_BYTES = 4096
"""A look at a cell is followed by one at the box around it: that much before and behind it."""


def nobody(start: Ints, n_bytes: Any) -> None:
    """Does not care."""


class Bitmaps(NamedTuple):
    """Where the bitmap of each of n draws lies: int64 arrays of n.

    `counts` is the position, in the array of row counts, of the bitmap's first one (how many cells
    are set above row 0, 1, ... height); `bits` the byte at which its packed rows begin. Cell
    (row, column) of width x height cells covers an equal share of width_px0 x height_px0 pixels.
    """

    counts: Ints
    bits: Ints
    width: Ints
    height: Ints
    width_px0: Ints
    height_px0: Ints

    def take(self, which: Any) -> Bitmaps:
        """Those of some of the draws."""
        return Bitmaps(*(column[which] for column in self))


def tissue_points(
    counts: Ints,
    packed: NDArray[np.uint8],
    at: Bitmaps,
    cells: Ints,
    u: Floats,
    v: Floats,
    ask: Ask = nobody,
) -> tuple[Floats, Floats]:
    """Level-0 x and y of the point (u, v) in [0, 1) within the `cells`-th set cell (row-major).

    MaskError when a bitmap has no such cell, or when its counts contradict its bits.
    """
    row = _row_of(counts, at, cells)
    rank = cells - counts[at.counts + row]
    column = np.empty(len(cells), np.int64)
    n_words = (at.width + 63) >> 6
    row_bytes = (at.width + 7) >> 3
    ask(at.bits + row * row_bytes - _NEARBY_BYTES, row_bytes + 2 * _NEARBY_BYTES)
    for some in _pieces(n_words):
        column[some] = _column_of(
            packed, at.take(some), n_words[some], row[some], rank[some], cells[some]
        )
    return (column + u) * at.width_px0 / at.width, (row + v) * at.height_px0 / at.height


def tissue_fractions(
    packed: NDArray[np.uint8],
    at: Bitmaps,
    x_px0: Floats,
    y_px0: Floats,
    w_px0: Floats,
    h_px0: Floats,
    ask: Ask = nobody,
) -> Floats:
    """The set share of boxes in level-0 pixels: exact, cells at their edges by the part covered.

    What lies outside the slide counts as not set; an empty box has a share of 0.
    """
    across = _Span(x_px0, w_px0, at.width, at.width_px0)
    down = _Span(y_px0, h_px0, at.height, at.height_px0)
    out = np.zeros(len(across.first))
    live = np.flatnonzero((across.cells > 0) & (down.cells > 0))
    if len(live) < len(out):
        at, across, down = at.take(live), across.take(live), down.take(live)
    n_words = ((across.stop + 7) >> 3) - (across.first >> 3) + 7 >> 3
    row_bytes = (at.width + 7) >> 3
    ask(at.bits + down.first * row_bytes + (across.first >> 3), down.cells * row_bytes)
    for some in _pieces(down.cells * n_words):
        out[live[some]] = _shares(
            packed, at.take(some), n_words[some], across.take(some), down.take(some)
        )
    return out


class _Span:
    """One axis of boxes: cells first..stop-1, and the parts of the first and last that are covered."""

    def __init__(self, start_px0: Floats, side_px0: Floats, limit: Ints, limit_px0: Ints) -> None:
        scale = limit / limit_px0
        low, high = start_px0 * scale, (start_px0 + side_px0) * scale
        self.length = high - low
        self.first = np.clip(np.floor(low), 0, limit).astype(np.int64)
        self.stop = np.clip(np.ceil(high), 0, limit).astype(np.int64)
        self.cells = np.where(self.length > 0, np.maximum(self.stop - self.first, 0), 0)
        head = np.minimum(self.first + 1, high) - np.maximum(self.first, low)
        tail = np.minimum(self.stop, high) - np.maximum(self.stop - 1, low)
        self.head = np.clip(head, 0.0, 1.0)
        self.tail = np.where(self.cells > 1, np.clip(tail, 0.0, 1.0), 0.0)

    def take(self, which: Any) -> _Span:
        """Those of some of the draws."""
        part = object.__new__(_Span)
        part.__dict__.update({name: column[which] for name, column in self.__dict__.items()})
        return part


def _pieces(cost: Ints) -> Iterator[slice]:
    """Slices of draws whose costs sum to at most _PIECE_WORDS, or that hold a single draw."""
    if not len(cost):
        return
    if int(cost.sum()) <= _PIECE_WORDS:
        yield slice(0, len(cost))
        return
    start, total = 0, 0
    for i, words in enumerate(cost.tolist()):
        if i > start and total + words > _PIECE_WORDS:
            yield slice(start, i)
            start, total = i, 0
        total += words
    yield slice(start, len(cost))


def _row_of(counts: Ints, at: Bitmaps, cells: Ints) -> Ints:
    """The last row above which at most `cells` cells are set: a binary search a draw, in step."""
    low, high = np.zeros_like(at.height), at.height
    for _ in range(int(at.height.max(initial=1) - 1).bit_length()):
        middle = (low + high) >> 1
        below = counts[at.counts + middle] <= cells
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


def _column_of(
    packed: NDArray[np.uint8], at: Bitmaps, n_words: Ints, row: Ints, rank: Ints, cells: Ints
) -> Ints:
    """The column of the `rank`-th set cell of a row: whole words are counted, one is looked into."""
    stop = np.cumsum(n_words)
    first = stop - n_words
    draw = np.repeat(np.arange(len(row)), n_words)
    number = np.arange(len(draw)) - first[draw]
    start = at.bits + row * ((at.width + 7) >> 3)
    words = _words(packed)[start[draw] + 8 * number].astype(np.uint64)
    words &= ~_FROM[np.minimum(at.width[draw] - 64 * number, 64)]  # the next row begins there
    before = np.zeros(len(words) + 1, np.int64)
    np.cumsum(np.bitwise_count(words), out=before[1:])
    wrong = (rank < 0) | (rank >= before[stop] - before[first])
    if wrong.any():
        raise MaskError(
            f"a mask has no tissue cell number {cells[wrong][0]}, or its row counts are damaged. "
            "Make the masks again."
        )
    target = before[first] + rank
    word = np.searchsorted(before, target, side="right") - 1
    bits = np.unpackbits(words[word].astype(">u8").view(np.uint8).reshape(-1, 8), axis=1)
    passed = np.cumsum(bits, axis=1, dtype=np.uint8) <= (target - before[word])[:, None]
    return np.asarray(64 * (word - first) + passed.sum(axis=1))


def _shares(
    packed: NDArray[np.uint8], at: Bitmaps, n_words: Ints, across: _Span, down: _Span
) -> Floats:
    """Set shares of boxes that are not empty.

    Set cells are counted apart in the left column, between, and in the right one; and of these in
    the top row, between, and in the bottom row: nine integers a draw, weighted at the end.
    """
    row_bytes = (at.width + 7) >> 3
    start = at.bits + down.first * row_bytes + (across.first >> 3)
    n_all = down.cells * n_words
    end = np.cumsum(n_all)
    begin = end - n_all
    draw = np.repeat(np.arange(len(n_all)), n_all)
    at_row = np.arange(len(draw)) - begin[draw]
    if int(n_words.max()) == 1:
        number, table = np.zeros(1, np.int64), draw
        wide, of_word = np.arange(len(n_all)), np.zeros(len(n_all), np.int64)
    else:
        wide = np.repeat(np.arange(len(n_all)), n_words)
        first_word = np.cumsum(n_words) - n_words
        of_word = np.arange(len(wide)) - first_word[wide]
        at_row, number = np.divmod(at_row, n_words[draw])
        table = first_word[draw] + number
    words = _words(packed)[start[draw] + at_row * row_bytes[draw] + 8 * number].astype(np.uint64)
    left = (across.first & 7)[wide] - 64 * of_word
    right = (across.stop - (across.first & ~7))[wide] - 64 * of_word
    edges = [_FROM[np.clip(edge, 0, 64)] for edge in (left, left + 1, right - 1, right)]
    counts = np.zeros(len(words) + 1, np.int64)
    top, between, bottom = 0.0, 0.0, 0.0
    for since, until, weight in zip(
        edges, edges[1:], (across.head, 1.0, across.tail), strict=False
    ):
        np.cumsum(np.bitwise_count(words & (since & ~until)[table]), out=counts[1:])
        upper = counts[begin + n_words] - counts[begin]
        lower = np.where(down.cells > 1, counts[end] - counts[end - n_words], 0)
        top = top + weight * upper
        between = between + weight * (counts[end] - counts[begin] - upper - lower)
        bottom = bottom + weight * lower
    tissue = down.head * top + between + down.tail * bottom
    return np.asarray(tissue / (across.length * down.length))


def _words(packed: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The eight bytes from every byte on, as overlapping big-endian words: index it, never `take`
    (which would copy all of it)."""
    return np.ndarray((len(packed) - 7,), ">u8", packed.data, strides=(1,))
