"""Every patch of a slide, once: a grid for embedding, and epochs of a grid in random order.

A place is a cell of a regular grid on a slide at a µm/px; a sheet is all places of one slide
at one µm/px. Places are numbered sheet by sheet, row by row. Nothing is stored for a place but one
bit, whether it is tissue enough, and 8 bytes for every 512: 150 bytes for a thousand places.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.corpus import Corpus
from online_patching.errors import SamplerError
from online_patching.geometry import PatchRef
from online_patching.mask import ForegroundMask
from online_patching.philox import fine_uniform, words
from online_patching.plan import MAX_UPSCALE
from online_patching.sampling.draws import Draws, Sampler, check_range, whole_numbers
from online_patching.sampling.permutation import permuted
from online_patching.slide_index import SlideIndex

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

REPLACEMENT_STREAM = 4
_MAX_ATTEMPTS = 256
_BLOCK_BITS = 512
_ITER_DRAWS = 256
_CHUNK = 2**16
"""Places looked at together when a grid is made: bounds its memory."""


class _Places(Sampler):
    """A sampler of a grid's places, whose redraws are any other of them."""

    @property
    @abstractmethod
    def _end(self) -> int | None:
        """How many draws there are; None where they never end."""

    def __len__(self) -> int:
        if self._end is None:
            raise TypeError("a sampler without a number of epochs has no length")
        return self._end

    def __iter__(self) -> Iterator[PatchRef]:
        """Every patch in order; without end where there is none."""
        start = 0
        while self._end is None or start < self._end:
            stop = start + _ITER_DRAWS if self._end is None else min(start + _ITER_DRAWS, self._end)
            yield from self.refs(self.draw_batch(np.arange(start, stop)))
            start = stop

    @abstractmethod
    def _places(self, number: Ints) -> Ints:
        """The place of each draw's first attempt."""

    def _draw(
        self,
        grid: GridSampler,
        draws: ArrayLike,
        attempt: ArrayLike,
        barred: Mapping[int, int] | None,
    ) -> Draws:
        """Columns of draws: the place they stand for, or a replacement at attempt > 0."""
        number, tried = whole_numbers(draws, attempt)
        if self._end is not None and len(number) and int(number.max()) >= self._end:
            raise SamplerError(f"there are draws 0 to {self._end - 1}, not {number.max()}.")
        place = self._places(number)
        while True:
            again = tried > 0
            w = words(self.seed, number[again], tried[again], REPLACEMENT_STREAM, 2)
            other = (fine_uniform(w[:, 0], w[:, 1]) * grid.n_kept).astype(np.int64)
            place[again] = grid.kept_places(other)
            out = grid.at(place, number, tried)
            moved = np.zeros(len(number), bool)
            for row, since in (barred or {}).items():
                moved |= (out.slide == row) & (number >= since)
            if not moved.any():
                return out
            tried[moved] += 1
            if int(tried.max()) >= _MAX_ATTEMPTS:
                raise SamplerError(
                    f"draw {number[moved][0]} found no place in {_MAX_ATTEMPTS} attempts with "
                    f"{len(barred or {})} slide(s) in quarantine."
                )


class GridSampler(_Places):
    """All patches of a grid on every slide, in order: for embedding whole slides.

    `mpp` is one µm/px or several; `overlap_px` how far neighbours overlap, in pixels of the patch.
    Patches cover each slide from its first to its last pixel: the last column and row are pushed
    inside, a slide smaller than a patch gets one in its middle. Only patches with at least
    `min_foreground` tissue are kept (0: all). Draw i is the i-th kept place: by slide in corpus
    order, then by µm/px in the order given, row, column. `len()` draws, then it ends.

    `left_out` lists what a slide cannot serve. Making one looks at every place once, about 1 µs
    each, unless `min_foreground` is 0.

    A place whose tiles are damaged has no replacement that means the same: attempt a > 0 of
    draw i is some other kept place, f(seed, i, a). An embedding drops draws with attempt > 0.
    """

    def __init__(
        self,
        slides: Corpus | Sequence[SlideIndex],
        masks: Sequence[ForegroundMask] | None = None,
        *,
        size_px: int = 256,
        mpp: float | Sequence[float] = 0.5,
        overlap_px: float = 0,
        min_foreground: float = 0.4,
        seed: int = 0,
        context: Sequence[float] = (),
    ) -> None:
        corpus = slides if isinstance(slides, Corpus) else Corpus.from_slides(slides, masks or ())
        super().__init__(corpus, size_px, min_foreground, seed, context)
        self.mpps = np.atleast_1d(np.asarray(mpp, np.float64))
        if not self.mpps.size or self.mpps.ndim != 1 or len(set(self.mpps)) < len(self.mpps):
            raise SamplerError(f"mpp {self.mpps.tolist()}: give one µm/px, or several that differ.")
        check_range(float(self.mpps.min()), float(self.mpps.max()))
        if not 0 <= overlap_px < size_px:
            raise SamplerError(f"overlap_px {overlap_px:g} must be at least 0 and below {size_px}.")
        self.overlap_px = float(overlap_px)
        self._sheets()
        self._look()

    @property
    def _end(self) -> int:
        return self.n_kept

    @property
    def n_kept(self) -> int:
        """Places with enough tissue, of all slides."""
        return int(self._sums[-1])

    @property
    def config(self) -> dict[str, Any]:
        """Everything that decides the stream besides the corpus, as JSON types."""
        return {**super().config, "mpp": self.mpps.tolist(), "overlap_px": self.overlap_px}

    @property
    def left_out(self) -> list[tuple[str, float, str]]:
        """(slide id, µm/px, reason) of every sheet without a patch."""
        out = []
        for row, mpp in zip(*(column.tolist() for column in self._too_fine), strict=True):
            finest = float(self._finest(row))
            reason = f"its finest level has {finest:g} µm/px, upscaled at most {MAX_UPSCALE:g}x"
            out.append((self.corpus.slide_id(row), mpp, reason))
        for sheet in np.flatnonzero(np.diff(self._kept_before(self._first)) == 0).tolist():
            reason = f"no place is {self.min_foreground:.0%} tissue"
            row = int(self._slide[sheet])
            out.append((self.corpus.slide_id(row), float(self._mpp[sheet]), reason))
        return out

    def draws_of(self, row: int) -> range:
        """The draw numbers of one slide (a corpus row), all its µm/px together."""
        low, high = np.searchsorted(self._slide, [row, row + 1])
        kept = self._kept_before(self._first[[low, high]])
        return range(int(kept[0]), int(kept[1]))

    def draw_batch(
        self, draws: ArrayLike, attempt: ArrayLike = 0, barred: Mapping[int, int] | None = None
    ) -> Draws:
        """Columns for many draw numbers; see Sampler.draw_batch."""
        return self._draw(self, draws, attempt, barred)

    def _places(self, number: Ints) -> Ints:
        return self.kept_places(number)

    def kept_places(self, which: Ints) -> Ints:
        """The number, among all places, of the `which`-th kept ones."""
        if self._bits is None:
            return which.copy()
        block = np.searchsorted(self._sums, which, side="right") - 1
        bits = np.unpackbits(self._bits.reshape(-1, _BLOCK_BITS // 8)[block], axis=1)
        passed = np.cumsum(bits, axis=1, dtype=np.int16) <= (which - self._sums[block])[:, None]
        return np.asarray(block * _BLOCK_BITS + passed.sum(axis=1))

    def at(self, place: Ints, number: Ints, tried: Ints) -> Draws:
        """The columns of draws at these places."""
        sheet = np.searchsorted(self._first, place, side="right") - 1
        slide, mpp = self._slide[sheet], self._mpp[sheet]
        row, column = np.divmod(place - self._first[sheet], self._columns[sheet])
        width, height = self.box_px0(slide, mpp)
        records, stride = self.corpus.records, 1 - self.overlap_px / self.size_px
        x = _origin(column, width, stride, records["width_px0"][slide])
        y = _origin(row, height, stride, records["height_px0"][slide])
        return Draws(number, tried, slide, mpp, x, y, np.ones_like(number))

    def _finest(self, rows: Any) -> Floats:
        records = self.corpus.records
        return np.asarray((records["mpp_x"][rows] + records["mpp_y"][rows]) / 2)

    def _sheets(self) -> None:
        """Which slide at which µm/px, how many columns, and the number of its first place."""
        n, finer = len(self.corpus), min((1.0, *self.context))
        self.corpus.check(np.arange(n))
        slide, mpp = np.repeat(np.arange(n), len(self.mpps)), np.tile(self.mpps, n)
        fine = self._finest(slide) <= MAX_UPSCALE * mpp * finer * (1 + 1e-9)
        self._too_fine = slide[~fine], mpp[~fine]
        self._slide, self._mpp = slide[fine], mpp[fine]
        width, height = self.box_px0(self._slide, self._mpp)
        records, stride = self.corpus.records, 1 - self.overlap_px / self.size_px
        self._columns = _count(width, stride, records["width_px0"][self._slide])
        places = self._columns * _count(height, stride, records["height_px0"][self._slide])
        self._first = np.concatenate([[0], np.cumsum(places)])

    def _look(self) -> None:
        """Which places have tissue enough: a bit each, and how many there are before each block."""
        total = int(self._first[-1])
        self._bits: NDArray[np.uint8] | None = None
        self._sums = np.asarray([0, total])
        if self.min_foreground > 0 and total:
            blocks = -(-total // _BLOCK_BITS)
            self._bits = np.zeros(blocks * _BLOCK_BITS // 8, np.uint8)
            for start in range(0, total, _CHUNK):
                place = np.arange(start, min(start + _CHUNK, total))
                some = self.at(place, place, place)
                box = self.box_px0(some.slide, some.mpp)
                share = self.corpus.tissue_fractions(some.slide, some.x_px0, some.y_px0, *box)
                packed = np.packbits(share >= self.min_foreground)
                self._bits[start // 8 : start // 8 + len(packed)] = packed
            counts = np.bitwise_count(self._bits.reshape(-1, _BLOCK_BITS // 8)).sum(axis=1)
            self._sums = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        if not self.n_kept:
            raise SamplerError(
                f"no place of {self.size_px} px at {self.mpps.tolist()} µm/px is {self.min_foreground:.0%} tissue on "
                f"any of {len(self.corpus)} slide(s) that can serve it. Lower min_foreground, or check the masks."
            )

    def _kept_before(self, place: Ints) -> Ints:
        """How many of the places below each of `place` are kept."""
        if self._bits is None:
            return place
        block, rest = np.divmod(place, _BLOCK_BITS)
        rows = self._bits.reshape(-1, _BLOCK_BITS // 8)
        out = self._sums[block].copy()
        inside = np.flatnonzero(rest)
        for i in range(0, len(inside), _CHUNK // 8):
            some = inside[i : i + _CHUNK // 8]
            bits = np.unpackbits(rows[block[some]], axis=1)
            out[some] += (bits * (np.arange(_BLOCK_BITS) < rest[some, None])).sum(
                axis=1, dtype=np.int64
            )
        return np.asarray(out)


class EpochSampler(_Places):
    """The places of a grid without replacement: each once an epoch, every epoch in another order.

    Draw i is place `i % n` of epoch `i // n`, n = `epoch_length`, in an order computed from
    (seed, epoch) and never stored (permutation.py). `epochs` is how many there are (None: without
    end); `len()` is then epochs * n. The places are those of a GridSampler: with overlap, or at several
    µm/px, there are more of them. A redraw (attempt > 0) is any place, so a damaged tile
    can make another place come twice.
    """

    def __init__(self, grid: GridSampler, seed: int = 0, epochs: int | None = None) -> None:
        super().__init__(grid.corpus, grid.size_px, grid.min_foreground, seed, grid.context)
        if epochs is not None and not 1 <= epochs < 2**32:
            raise SamplerError(f"epochs {epochs} must be at least 1.")
        self.grid, self.epochs, self.epoch_length = grid, epochs, grid.n_kept

    @property
    def _end(self) -> int | None:
        return None if self.epochs is None else self.epochs * self.epoch_length

    @property
    def config(self) -> dict[str, Any]:
        """Everything that decides the stream besides the corpus, as JSON types."""
        return {**super().config, "grid": self.grid.config}

    def draw_batch(
        self, draws: ArrayLike, attempt: ArrayLike = 0, barred: Mapping[int, int] | None = None
    ) -> Draws:
        """Columns for many draw numbers; see Sampler.draw_batch."""
        return self._draw(self.grid, draws, attempt, barred)

    def _places(self, number: Ints) -> Ints:
        epoch, at = np.divmod(number, self.epoch_length)
        return self.grid.kept_places(permuted(at, self.epoch_length, self.seed, epoch))


def _count(side: Floats, stride: float, limit: Ints) -> Ints:
    """How many boxes of `side`, every `stride * side`, cover 0 .. limit."""
    # Less a millionth: a step that divides the rest must not get another box by rounding.
    steps = np.ceil((limit - side) / (side * stride) - 1e-6)
    return np.asarray(1 + np.maximum(steps, 0).astype(np.int64))


def _origin(number: Ints, side: Floats, stride: float, limit: Ints) -> Ints:
    """The origin of the `number`-th of them; the last is pushed inside, a larger one centred."""
    free = limit - side
    pushed = np.minimum(np.floor(number * (side * stride) + 0.5), np.floor(np.maximum(free, 0)))
    return np.asarray(np.where(free <= 0, np.floor(free / 2 + 0.5), pushed).astype(np.int64))
