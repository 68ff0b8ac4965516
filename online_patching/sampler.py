"""Draw numbers -> patches: slide first, then µm/px, then a place on tissue. No I/O but the masks.

`sampler[i]` is a pure function of (seed, i): the same for any number of workers or ranks, and
for ever (raw Philox words with our own integer maps). Words of draw i, attempt a come from

    stream 0         word 0, 1: the slide (alias table)   word 2: the µm/px
    stream 16 + t    try t of the position: word 0: tissue cell, words 1, 2: the point within it

so that rejecting a position never changes the slide: the shares of slides stay as weighted.

Density of positions: the patch's centre is uniform over the slide's tissue area; a box that
would leave the slide is pushed inside (both extreme origins are reached, and carry the mass of
the centres closer to the edge than half a patch). It is kept when at least `min_foreground` of it
is tissue. A slide serves a µm/px when its finest level needs at most 2x upscaling and the best
2 % of its tissue-centred boxes reach the threshold; so a needle biopsy drops out of coarse
µm/px instead of stalling them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.corpus import Corpus
from online_patching.errors import SamplerError
from online_patching.geometry import PatchRef
from online_patching.mask import QUANTILE_SIDES_UM, ForegroundMask
from online_patching.philox import integers, uniform, words
from online_patching.plan import MAX_UPSCALE, round_half_up
from online_patching.slide_index import MPP_SANE_RANGE, SlideIndex

SLIDE_STREAM, POSITION_STREAM = 0, 16
MAX_TRIES = 256
"""Positions tried in one attempt. At the least acceptance a slide may have (2 %), 0.6 % of draws
run out of tries and move to their next attempt."""
MAX_ATTEMPTS = 32


@dataclass(frozen=True)
class Draws:
    """Columns of n draws, before they are PatchRefs. `tries` counts positions looked at."""

    draw: NDArray[np.int64]
    attempt: NDArray[np.int64]
    slide: NDArray[np.int64]
    mpp: NDArray[np.float64]
    x_px0: NDArray[np.int64]
    y_px0: NDArray[np.int64]
    tries: NDArray[np.int64]


class PatchSampler:
    """Random patches of a corpus.

    `mpp` are the magnifications asked for, `mpp_weights` their weights (equal by default; each
    slide draws among those it can serve). `slide_weights` are one weight a slide (equal by
    default). `size_px` is the side of a patch at its µm/px. Raises SamplerError when no slide
    can serve anything.
    """

    def __init__(
        self,
        slides: Corpus | Sequence[SlideIndex],
        masks: Sequence[ForegroundMask] | None = None,
        *,
        size_px: int = 256,
        mpp: float | Sequence[float] = (0.25, 0.5, 1.0, 2.0),
        mpp_weights: Sequence[float] | None = None,
        slide_weights: Sequence[float] | None = None,
        min_foreground: float = 0.4,
        seed: int = 0,
    ) -> None:
        self.corpus = (
            slides if isinstance(slides, Corpus) else Corpus.from_slides(slides, masks or ())
        )
        self.size_px, self.seed, self.min_foreground = size_px, seed, min_foreground
        self.mpps = np.atleast_1d(np.asarray(mpp, np.float64))
        self.mpp_weights = (
            np.ones(len(self.mpps)) if mpp_weights is None else np.asarray(mpp_weights, np.float64)
        )
        self._check()
        self._serves = self._served_mpps()
        weights = (
            np.ones(len(self.corpus))
            if slide_weights is None
            else np.asarray(slide_weights, np.float64)
        )
        if (
            weights.shape != (len(self.corpus),)
            or not (np.isfinite(weights) & (weights >= 0)).all()
        ):
            raise SamplerError(
                f"{len(self.corpus)} slides need as many weights >= 0, not {weights.shape}."
            )
        weights = weights * self._serves.any(axis=1)
        if not weights.sum():
            raise SamplerError(self._why_nothing())
        self._weights_digest = hashlib.sha256(weights.tobytes()).hexdigest()
        self._accept, self._alias = alias_table(weights)
        mix = np.cumsum(self._serves * self.mpp_weights, axis=1)
        self._mpp_cdf = mix / np.maximum(mix[:, -1:], 1e-300)

    def __getitem__(self, draw: int) -> PatchRef:
        """The patch of one draw number."""
        return self.refs(self.draw_batch([draw]))[0]

    def draw_batch(self, draws: ArrayLike, attempt: ArrayLike = 0) -> Draws:
        """Columns for many draw numbers; `attempt` is where to start (the redraw of a bad one)."""
        number = np.atleast_1d(np.asarray(draws, np.int64))
        tried = np.broadcast_to(np.asarray(attempt, np.int64), number.shape).copy()
        n = len(number)
        slide, choice = np.zeros(n, np.int64), np.zeros(n, np.int64)
        x, y, tries = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64)
        todo = np.arange(n)
        while len(todo):
            over = tried[todo] >= MAX_ATTEMPTS
            if over.any():
                raise SamplerError(
                    f"draw {number[todo][over][0]} found no patch in {MAX_ATTEMPTS} attempts of {MAX_TRIES} "
                    f"positions with {self.min_foreground:.0%} foreground. Lower min_foreground or check the masks."
                )
            slide[todo], choice[todo] = self._slide_and_mpp(number[todo], tried[todo])
            left = self._positions(todo, number, tried, slide, choice, x, y, tries)
            tried[left] += 1
            todo = left
        return Draws(number, tried, slide, self.mpps[choice], x, y, tries)

    def refs(self, draws: Draws) -> list[PatchRef]:
        """PatchRefs of drawn columns."""
        out = []
        for i in range(len(draws.draw)):
            row, mpp = int(draws.slide[i]), float(draws.mpp[i])
            width, height = self._box_px0(row, mpp)
            out.append(
                PatchRef(
                    int(draws.draw[i]), int(draws.attempt[i]), row, self.corpus.index(row).slide_id,
                    int(draws.x_px0[i]), int(draws.y_px0[i]), width, height, mpp, self.size_px,
                )
            )  # fmt: skip
        return out

    @property
    def servable(self) -> dict[str, list[float]]:
        """For each slide id, the µm/px it can serve (possibly none)."""
        ids = self.corpus.slide_ids
        return {ids[i]: [float(m) for m in self.mpps[self._serves[i]]] for i in range(len(ids))}

    @property
    def config(self) -> dict[str, Any]:
        """Everything that decides the stream besides the corpus, as JSON types."""
        return {
            "size_px": self.size_px,
            "mpp": self.mpps.tolist(),
            "mpp_weights": self.mpp_weights.tolist(),
            "min_foreground": self.min_foreground,
            "seed": self.seed,
            "slide_weights": self._weights_digest[:16],
        }

    @property
    def digest(self) -> str:
        """SHA-256 of `config`."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    def mix(self, refs: Sequence[PatchRef]) -> dict[str, dict[float, int]]:
        """Realised counts: slide id -> µm/px -> patches."""
        out: dict[str, Counter[float]] = {}
        for ref in refs:
            out.setdefault(ref.slide_id, Counter())[ref.mpp] += 1
        return {k: dict(v) for k, v in out.items()}

    def _slide_and_mpp(
        self, draws: NDArray[np.int64], attempts: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        w = words(self.seed, draws, attempts, SLIDE_STREAM, 3)
        column = integers(w[:, 0], len(self.corpus))
        slide = np.where(uniform(w[:, 1]) < self._accept[column], column, self._alias[column])
        choice = (uniform(w[:, 2])[:, None] >= self._mpp_cdf[slide]).sum(axis=1)
        return slide, choice

    def _positions(
        self,
        todo: NDArray[np.int64],
        number: NDArray[np.int64],
        tried: NDArray[np.int64],
        slide: NDArray[np.int64],
        choice: NDArray[np.int64],
        x: NDArray[np.int64],
        y: NDArray[np.int64],
        tries: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Fill in x, y for `todo`; return those for which every try was refused."""
        for t in range(MAX_TRIES):
            w = words(self.seed, number[todo], tried[todo], POSITION_STREAM + t, 3)
            point = uniform(w[:, 1:])
            refused = []
            for k, i in enumerate(todo):
                row, mpp = int(slide[i]), float(self.mpps[choice[i]])
                found = self._place(row, mpp, w[k, :1], point[k, 0], point[k, 1])
                tries[i] += 1
                if found is None:
                    refused.append(i)
                else:
                    x[i], y[i] = found
            todo = np.asarray(refused, np.int64)
            if not refused:
                break
        return todo

    def _place(
        self, row: int, mpp: float, cell_word: NDArray[np.uint32], u: float, v: float
    ) -> tuple[int, int] | None:
        """The origin of a patch centred on a random tissue point, or None when too little is tissue."""
        mask = self.corpus.mask(row)
        cx, cy = mask.tissue_point(int(integers(cell_word, mask.tissue_cells)[0]), u, v)
        width, height = self._box_px0(row, mpp)
        w0, h0 = mask.size_px0
        x, y = origin_inside(cx, width, w0), origin_inside(cy, height, h0)
        return (x, y) if mask.fraction(x, y, width, height) >= self.min_foreground else None

    def _box_px0(self, row: int, mpp: float) -> tuple[float, float]:
        record = self.corpus.records[row]
        return self.size_px * mpp / float(record["mpp_x"]), self.size_px * mpp / float(
            record["mpp_y"]
        )

    def _served_mpps(self) -> NDArray[np.bool_]:
        """(slides, mpps): fine enough, and with boxes tissue-rich enough."""
        records = self.corpus.records
        finest = (records["mpp_x"] + records["mpp_y"]) / 2
        fine = finest[:, None] <= MAX_UPSCALE * self.mpps[None, :] * (1 + 1e-9)
        sides = np.log2(QUANTILE_SIDES_UM)
        asked = np.log2(self.size_px * self.mpps)
        rich = np.stack([np.interp(asked, sides, row) for row in records["rich_fractions"]])
        return np.asarray(fine & (rich >= self.min_foreground - 1e-6))

    def _why_nothing(self) -> str:
        finest = float(((self.corpus.records["mpp_x"] + self.corpus.records["mpp_y"]) / 2).min())
        if finest > MAX_UPSCALE * self.mpps.max():
            return (
                f"no slide can serve {self.mpps.tolist()} µm/px: the finest has {finest:g}, and patches are "
                f"upscaled at most {MAX_UPSCALE:g}x. Ask for coarser patches."
            )
        return (
            f"no box of {self.size_px} px at {self.mpps.tolist()} µm/px is {self.min_foreground:.0%} tissue on any of "
            f"{len(self.corpus)} slide(s). Lower min_foreground, ask for finer patches, or check the masks."
        )

    def _check(self) -> None:
        low, high = MPP_SANE_RANGE
        if not len(self.mpps) or not ((self.mpps >= low) & (self.mpps <= high)).all():
            raise SamplerError(
                f"mpp {self.mpps.tolist()}: each must lie in {low:g} to {high:g} µm/px."
            )
        if self.mpp_weights.shape != self.mpps.shape or (self.mpp_weights <= 0).any():
            raise SamplerError(
                f"{len(self.mpps)} µm/px need as many weights > 0, not {self.mpp_weights.tolist()}."
            )
        if not 0 <= self.min_foreground <= 1:
            raise SamplerError(
                f"min_foreground {self.min_foreground:g} is not a share between 0 and 1."
            )
        if not 0 <= self.seed < 2**64:
            raise SamplerError(f"seed {self.seed} is not a 64-bit number >= 0.")
        if self.size_px < 1:
            raise SamplerError(f"size_px {self.size_px} is not a size.")


def origin_inside(center_px0: float, side_px0: float, limit_px0: int) -> int:
    """The whole-pixel origin of a box around a centre, pushed inside [0, limit); a box larger than
    the slide is centred on it."""
    if side_px0 >= limit_px0:
        return round_half_up((limit_px0 - side_px0) / 2)
    return min(max(round_half_up(center_px0 - side_px0 / 2), 0), math.floor(limit_px0 - side_px0))


def alias_table(weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Walker's alias table by Vose's method: O(1) weighted draws of a row.

    Returns (accept, alias): column c, uniform, stays c with probability accept[c], else alias[c].
    """
    n = len(weights)
    accept, alias = weights * (n / weights.sum()), np.arange(n)
    small = [int(i) for i in np.flatnonzero(accept < 1)]
    large = [int(i) for i in np.flatnonzero(accept >= 1)]
    while small and large:
        low, high = small.pop(), large[-1]
        alias[low] = high
        accept[high] -= 1 - accept[low]
        if accept[high] < 1:
            small.append(large.pop())
    # What is left is 1 up to rounding, and must not lead to a row of weight 0.
    for i in small + large:
        accept[i] = 1.0 if weights[i] > 0 else 0.0
        if weights[i] <= 0:
            alias[i] = int(np.argmax(weights))
    return accept, alias
