"""Draw numbers -> patches: slide first, then µm/px, then a place on tissue. No I/O but the masks.

`sampler[i]` is a pure function of (seed, i): the same for any number of workers or ranks, and
for ever (raw Philox words with our own integer maps). Words of draw i, attempt a come from

    stream 0         words 0, 1: the slide (cumulative weights)   words 2, 3: the µm/px
    stream 2         words 0, 1: which of a slide's patches, where `patches_per_slide` limits them
    stream 16 + t    try t of the position: words 0, 3: tissue cell, words 1, 2: the point within it

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
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.corpus import Corpus
from online_patching.errors import SamplerError
from online_patching.mask import QUANTILE_SIDES_UM, ForegroundMask
from online_patching.philox import fine_uniform, words
from online_patching.plan import MAX_UPSCALE
from online_patching.sampling.draws import Draws as Draws
from online_patching.sampling.draws import Sampler, check_range, whole_numbers
from online_patching.sampling.filters import PixelFilter
from online_patching.sampling.magnification import Policy, Reach, policy_of
from online_patching.sampling.placing import (
    MAX_TRIES,
    Boxes,
    anywhere,
    first_place,
    neighbourhoods,
    tile_axes,
    within,
)
from online_patching.sampling.weights import SlideShares, check_weights
from online_patching.slide_index import SlideIndex

SLIDE_STREAM, GROUP_STREAM, POOL_STREAM, POOLED_STREAM = 0, 1, 2, 3
POSITION_STREAM, WINDOW_STREAM, MEMBER_STREAM, POOLED_POSITION_STREAM = 16, 1024, 2048, 3072
MAX_ATTEMPTS = 256
"""Attempts of one draw, over damage, quarantine, pixel filters and positions: a filter that keeps
one patch in twenty fails a draw once in 500,000."""

_LOG2_SIDES = np.log2(QUANTILE_SIDES_UM)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_Columns = tuple[Ints, Floats, Ints, Ints, Ints]
"""slide, µm/px, x, y, tries (0: no place was found)."""


class PatchSampler(Sampler):
    """Random patches of a corpus, for ever.

    `mpp` is what is drawn: a number, a list with `mpp_weights` (equal by default), or a policy of
    magnification.py; each slide draws from what it can serve of it. `slide_weights` are one weight
    a slide (equal by default; weights.py makes them). `size_px` is the side of a patch at its µm/px.

    `patches_per_read=k`: draws g*k .. g*k+k-1 come from one slide, at one µm/px, from one window of
    n x n tiles of the level that is read, n the least with n tiles >= 1.5 patch sides. The window is
    uniform among those that hold a uniform tissue point; origins are uniform in it (whole level-0
    pixels at which a read stays in the window; by the last, narrower row and column of tiles it may
    reach one tile further), kept when `min_foreground` of the patch is tissue.
    So k patches cost the tiles of about one, but they overlap, and a batch sees 1/k as many
    places: benchmarks/sampling_diversity.py prints by how much. Over many groups a slide's centres
    follow its tissue as at k = 1, smeared over a window. A redraw (attempt > 0) is an independent
    patch.

    `context=(4.0,)`: each draw also has a view of the same centre at 4 times its µm/px (`expand`).
    `patches_per_slide=N`: a slide ever yields at most N different patches, the same for every
    larger N; draws choose among them uniformly. `filters` are pixel filters (filters.py) that a
    loader applies: what they refuse moves to its next attempt.

    Raises SamplerError when no slide can serve anything.
    """

    def __init__(
        self,
        slides: Corpus | Sequence[SlideIndex],
        masks: Sequence[ForegroundMask] | None = None,
        *,
        size_px: int = 256,
        mpp: float | Sequence[float] | Policy = (0.25, 0.5, 1.0, 2.0),
        mpp_weights: Sequence[float] | None = None,
        slide_weights: ArrayLike | None = None,
        min_foreground: float = 0.4,
        seed: int = 0,
        patches_per_read: int = 1,
        context: Sequence[float] = (),
        patches_per_slide: int | None = None,
        filters: Sequence[PixelFilter] = (),
    ) -> None:
        corpus = slides if isinstance(slides, Corpus) else Corpus.from_slides(slides, masks or ())
        super().__init__(corpus, size_px, min_foreground, seed, context)
        self.policy = policy_of(mpp, mpp_weights)
        check_range(*self.policy.range)
        self.patches_per_read, self.patches_per_slide = patches_per_read, patches_per_slide
        self.filters = tuple(filters)
        self._check_limits()
        weights = None if slide_weights is None else check_weights(slide_weights, len(corpus))
        self._weights_digest = (
            "" if weights is None else hashlib.sha256(weights.tobytes()).hexdigest()[:16]
        )
        drawable = self._servable() if weights is None else self._servable() * weights
        if not drawable.any():
            raise SamplerError(self._why_nothing())
        self._share_out(drawable)

    def draw_batch(
        self, draws: ArrayLike, attempt: ArrayLike = 0, barred: Mapping[int, int] | None = None
    ) -> Draws:
        """Columns for many draw numbers; see Sampler.draw_batch."""
        number, tried = whole_numbers(draws, attempt)
        n = len(number)
        slide, mpp = np.zeros(n, np.int64), np.zeros(n)
        x, y, tries = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.int64)
        todo = np.arange(n)
        while len(todo):
            self._check_attempts(number[todo], tried[todo], barred)
            columns = self._attempt(number[todo], tried[todo])
            for out, column in zip((slide, mpp, x, y), columns, strict=False):
                out[todo] = column
            looked = columns[-1]
            tries[todo] += np.where(looked, looked, MAX_TRIES)
            again = (looked == 0) | _barred(columns[0], number[todo], barred)
            todo = todo[again]
            tried[todo] += 1
        return Draws(number, tried, slide, mpp, x, y, tries)

    @property
    def servable(self) -> dict[str, list[Any]]:
        """For each slide id the µm/px, or the intervals of them, it can serve (possibly none)."""
        served = self.policy.served(self._reach(slice(None)))
        return dict(zip(self.corpus.slide_ids, served, strict=True))

    @property
    def config(self) -> dict[str, Any]:
        """Everything that decides the stream besides the corpus, as JSON types."""
        return {
            **super().config,
            "mpp": self.policy.config,
            "slide_weights": self._weights_digest,
            "patches_per_read": self.patches_per_read,
            "patches_per_slide": self.patches_per_slide,
        }

    def _share_out(self, drawable: Floats) -> None:
        """Prepare `_choose`: slides are drawn by these weights, 0 for one that serves nothing."""
        self._shares = SlideShares(drawable)

    def _choose(self, group: Ints, u: Floats) -> Ints:
        """The slide of each group of `patches_per_read` draws, for uniform numbers in [0, 1)."""
        return self._shares.pick(u)

    def _attempt(self, number: Ints, tried: Ints) -> _Columns:
        """One attempt of each draw."""
        if self.patches_per_slide is not None:
            return self._pooled(number, tried)
        if self.patches_per_read == 1:
            return self._alone(number, tried)
        alone = tried > 0
        if alone.all():
            return self._alone(number, tried)
        together = self._in_groups(number[~alone])
        if not alone.any():
            return together
        out = tuple(np.empty(len(number), column.dtype) for column in together)
        for column, grouped, single in zip(
            out, together, self._alone(number[alone], tried[alone]), strict=True
        ):
            column[~alone], column[alone] = grouped, single
        return out  # type: ignore[return-value]

    def _alone(self, number: Ints, tried: Ints) -> _Columns:
        """Slide, µm/px and place of each draw, independent of all others."""
        w = words(self.seed, number, tried, SLIDE_STREAM, 4)
        slide = self._choose(number // self.patches_per_read, fine_uniform(w[:, 0], w[:, 1]))
        mpp = self.policy.draw(fine_uniform(w[:, 2], w[:, 3]), self._reach(slide))
        place = anywhere(self.corpus, self._boxes(slide, mpp), self.min_foreground)
        return slide, mpp, *first_place(place, self.seed, number, tried, POSITION_STREAM)

    def _in_groups(self, number: Ints) -> _Columns:
        """The same for draws that share a read neighbourhood with the others of their group."""
        group, of = np.unique(number // self.patches_per_read, return_inverse=True)
        first = np.zeros_like(group)
        w = words(self.seed, group, first, GROUP_STREAM, 4)
        slide = self._choose(group, fine_uniform(w[:, 0], w[:, 1]))
        mpp = self.policy.draw(fine_uniform(w[:, 2], w[:, 3]), self._reach(slide))
        boxes = self._boxes(slide, mpp)
        axes = tile_axes(self.corpus, boxes, mpp, self.size_px)
        window = neighbourhoods(self.corpus, boxes, axes, self.min_foreground)
        column, row, found = first_place(window, self.seed, group, first, WINDOW_STREAM, 6)
        tries = np.zeros(len(number), np.int64)
        x, y = np.zeros_like(tries), np.zeros_like(tries)
        live = np.flatnonzero(found[of])
        of_live = of[live]
        place = within(
            self.corpus, boxes.take(of_live), (axes[0].take(of_live), axes[1].take(of_live)),
            column[of_live], row[of_live], self.min_foreground,
        )  # fmt: skip
        x[live], y[live], tries[live] = first_place(
            place, self.seed, number[live], np.zeros_like(live), MEMBER_STREAM
        )
        return slide[of], mpp[of], x, y, tries

    def _pooled(self, number: Ints, tried: Ints) -> _Columns:
        """One of the slide's `patches_per_slide` patches: patch p of slide s is a function of
        (seed, s, p), the first attempt of it that finds a place."""
        w = words(self.seed, number, tried, SLIDE_STREAM, 2)
        slide = self._choose(number, fine_uniform(w[:, 0], w[:, 1]))
        w = words(self.seed, number, tried, POOL_STREAM, 2)
        patch = (fine_uniform(w[:, 0], w[:, 1]) * (self.patches_per_slide or 1)).astype(np.int64)
        key = (slide << 32) | patch
        mpp, x, y = np.zeros(len(key)), np.zeros(len(key), np.int64), np.zeros(len(key), np.int64)
        tries, turn, todo = np.zeros_like(x), np.zeros_like(x), np.arange(len(key))
        while len(todo) and int(turn[todo[0]]) < MAX_ATTEMPTS:
            w = words(self.seed, key[todo], turn[todo], POOLED_STREAM, 2)
            some = slide[todo]
            mpp[todo] = self.policy.draw(fine_uniform(w[:, 0], w[:, 1]), self._reach(some))
            place = anywhere(self.corpus, self._boxes(some, mpp[todo]), self.min_foreground)
            x[todo], y[todo], tries[todo] = first_place(
                place, self.seed, key[todo], turn[todo], POOLED_POSITION_STREAM
            )
            turn[todo] += 1
            todo = todo[tries[todo] == 0]
        return slide, mpp, x, y, tries

    def _boxes(self, slide: Ints, mpp: Floats) -> Boxes:
        records = self.corpus.records
        limits = (np.asarray(records[f"{name}_px0"][slide]) for name in ("width", "height"))
        return Boxes(slide, *self.box_px0(slide, mpp), *limits)

    def _reach(self, rows: Any) -> Reach:
        """What some slides can serve; context views finer than the draw count."""
        return self._reach_of(self.corpus.records[rows])

    def _reach_of(self, found: NDArray[np.void]) -> Reach:
        finest = (found["mpp_x"] + found["mpp_y"]) / 2
        least = finest / (MAX_UPSCALE * (1 + 1e-9)) / min((1.0, *self.context))
        rich = found["rich_fractions"]
        return Reach(least, rich, _LOG2_SIDES, self.size_px, self.min_foreground)

    def _servable(self) -> Floats:
        """1.0 for every slide that can serve something, else 0.0."""
        out = np.zeros(len(self.corpus))
        for start, found in self.corpus.blocks():
            out[start : start + len(found)] = self.policy.servable(self._reach_of(found))
        return out

    def _check_attempts(self, number: Ints, tried: Ints, barred: Mapping[int, int] | None) -> None:
        over = tried >= MAX_ATTEMPTS
        if over.any():
            raise SamplerError(
                f"draw {number[over][0]} found no patch in {MAX_ATTEMPTS} attempts of {MAX_TRIES} "
                f"positions with {self.min_foreground:.0%} foreground"
                + (f" and {len(barred)} slide(s) in quarantine" if barred else "")
                + ". Lower min_foreground, loosen the filters, or check the masks."
            )

    def _why_nothing(self) -> str:
        records = self.corpus.records
        finest = float(((records["mpp_x"] + records["mpp_y"]) / 2).min())
        low, high = self.policy.range
        asked = getattr(self.policy, "mpps", (low, high))
        if finest > MAX_UPSCALE * high:
            return (
                f"no slide can serve {list(asked)} µm/px: the finest has {finest:g}, and patches are "
                f"upscaled at most {MAX_UPSCALE:g}x. Ask for coarser patches."
            )
        return (
            f"no box of {self.size_px} px at {list(asked)} µm/px is {self.min_foreground:.0%} tissue on any of "
            f"{len(self.corpus)} slide(s) with a weight. Lower min_foreground, ask for finer patches, or check "
            "the masks."
        )

    def _check_limits(self) -> None:
        if not 1 <= self.patches_per_read < 2**20:
            raise SamplerError(f"patches_per_read {self.patches_per_read} must be at least 1.")
        if self.patches_per_slide is None:
            return
        if not 1 <= self.patches_per_slide < 2**32:
            raise SamplerError(f"patches_per_slide {self.patches_per_slide} must be at least 1.")
        if self.patches_per_read > 1:
            raise SamplerError(
                "patches_per_slide and patches_per_read do not go together: a slide's few patches are "
                "drawn one by one."
            )


def _barred(slide: Ints, number: Ints, barred: Mapping[int, int] | None) -> NDArray[np.bool_]:
    """Which draws lie on a slide that is in quarantine for them."""
    if not barred:
        return np.zeros(len(slide), bool)
    rows = np.asarray(sorted(barred), np.int64)
    since = np.asarray([barred[row] for row in rows.tolist()], np.int64)
    at = np.minimum(np.searchsorted(rows, slide), len(rows) - 1)
    return np.asarray((rows[at] == slide) & (number >= since[at]))
