"""Drawn patches as columns, and what every sampler makes of them: boxes, context views, records."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.corpus import Corpus
from online_patching.errors import SamplerError
from online_patching.geometry import PatchRef
from online_patching.slide_index import MPP_SANE_RANGE

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Draws:
    """Columns of n draws, before they are PatchRefs. `tries` counts positions looked at.

    `slide` is a corpus row; `x_px0`, `y_px0` the upper left corner in level-0 pixels.
    """

    draw: Ints
    attempt: Ints
    slide: Ints
    mpp: Floats
    x_px0: Ints
    y_px0: Ints
    tries: Ints

    def __len__(self) -> int:
        return len(self.draw)

    def take(self, which: Any) -> Draws:
        """Some of the draws, by position, slice or mask."""
        return Draws(*(getattr(self, column.name)[which] for column in fields(self)))


class Sampler(ABC):
    """What samplers share. A sampler says what draw i is; `draw_batch` is all it must add.

    `context` are the factors, in the draw's own µm/px, of further views of the same centre;
    `patches_per_read` how many consecutive draws share a read neighbourhood; `filters` what a loader
    asks about the pixels of each draw (filters.py).
    """

    patches_per_read = 1
    filters: tuple[Any, ...] = ()

    def __init__(
        self,
        corpus: Corpus,
        size_px: int,
        min_foreground: float,
        seed: int,
        context: Sequence[float] = (),
    ) -> None:
        self.corpus, self.size_px, self.seed = corpus, size_px, seed
        self.min_foreground = min_foreground
        self.context = tuple(float(factor) for factor in context)
        if not 0 <= min_foreground <= 1:
            raise SamplerError(f"min_foreground {min_foreground:g} is not a share between 0 and 1.")
        if not 0 <= seed < 2**64:
            raise SamplerError(f"seed {seed} is not a 64-bit number >= 0.")
        if size_px < 1:
            raise SamplerError(f"size_px {size_px} is not a size.")
        if not all(0 < factor < np.inf for factor in self.context):
            raise SamplerError(f"context {self.context}: each factor must be above 0, such as 4.0.")

    @property
    def config(self) -> dict[str, Any]:
        """Everything that decides the stream besides the corpus, as JSON types."""
        return {
            "sampler": type(self).__name__,
            "size_px": self.size_px,
            "min_foreground": self.min_foreground,
            "seed": self.seed,
            "context": list(self.context),
            "filters": [one.config for one in self.filters],
        }

    @property
    def digest(self) -> str:
        """SHA-256 of `config`."""
        return hashlib.sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()

    @abstractmethod
    def draw_batch(
        self, draws: ArrayLike, attempt: ArrayLike = 0, barred: Mapping[int, int] | None = None
    ) -> Draws:
        """Columns for many draw numbers, each a pure function of (seed, number, attempt).

        `attempt` (one, or one a draw) is where to start: the redraw of a bad one. `barred` maps
        corpus rows of quarantined slides to the first draw that may not use them: such a draw
        moves to its next attempt.
        """

    def __getitem__(self, draw: int) -> PatchRef:
        """The patch of one draw number."""
        return self.refs(self.draw_batch([draw]))[0]

    def box_px0(self, rows: ArrayLike, mpp: ArrayLike) -> tuple[Floats, Floats]:
        """Width and height, in level-0 pixels, of a patch at `mpp` on corpus rows: by axis, as the
        µm/px of a slide may differ by axis."""
        records, side = self.corpus.records, self.size_px * np.asarray(mpp, np.float64)
        row = np.asarray(rows, np.int64)
        return side / records["mpp_x"][row], side / records["mpp_y"][row]

    def expand(self, draws: Draws) -> Draws:
        """Each draw, then its context views: n * (1 + len(context)) rows, draw-major.

        A context view has the draw's centre, `factor` times its µm/px and the same `size_px`. It
        is never pushed: what lies outside the slide is filled in when it is read.
        """
        if not self.context:
            return draws
        factors = np.asarray((1.0, *self.context))
        many = draws.take(np.repeat(np.arange(len(draws)), len(factors)))
        mpp = many.mpp * np.tile(factors, len(draws))
        width, height = self.box_px0(many.slide, many.mpp)
        outer_width, outer_height = self.box_px0(many.slide, mpp)
        x = np.floor(many.x_px0 + (width - outer_width) / 2 + 0.5).astype(np.int64)
        y = np.floor(many.y_px0 + (height - outer_height) / 2 + 0.5).astype(np.int64)
        return Draws(many.draw, many.attempt, many.slide, mpp, x, y, many.tries)

    def refs(self, draws: Draws) -> list[PatchRef]:
        """PatchRefs of drawn columns."""
        names = {row: self.corpus.slide_id(row) for row in np.unique(draws.slide).tolist()}
        width, height = self.box_px0(draws.slide, draws.mpp)
        columns = (draws.draw, draws.attempt, draws.slide, draws.x_px0, draws.y_px0)
        return [
            PatchRef(draw, attempt, row, names[row], x, y, w, h, mpp, self.size_px)
            for draw, attempt, row, x, y, w, h, mpp in zip(
                *(column.tolist() for column in (*columns, width, height, draws.mpp)), strict=True
            )
        ]

    def mix(self, refs: Sequence[PatchRef]) -> dict[str, dict[float, int]]:
        """Realised counts: slide id -> µm/px -> patches."""
        out: dict[str, Counter[float]] = {}
        for ref in refs:
            out.setdefault(ref.slide_id, Counter())[ref.mpp] += 1
        return {k: dict(v) for k, v in out.items()}


def check_range(low: float, high: float) -> None:
    """Refuse µm/px that no slide has."""
    least, most = MPP_SANE_RANGE
    if not least <= low <= high <= most:
        raise SamplerError(
            f"{low:g} to {high:g} µm/px: each must lie in {least:g} to {most:g} µm/px."
        )


def whole_numbers(draws: ArrayLike, attempt: ArrayLike) -> tuple[Ints, Ints]:
    """Draw numbers and attempts as arrays of one length; SamplerError for negative ones."""
    number = np.atleast_1d(np.asarray(draws, np.int64))
    tried = np.broadcast_to(np.asarray(attempt, np.int64), number.shape).copy()
    if len(number) and (number.min() < 0 or tried.min() < 0):
        raise SamplerError("draw numbers and attempts are whole numbers >= 0.")
    return number, tried
