"""Draw numbers -> patches balanced by class: the class first, then a slide or region of it, then a place.

The class of draw i comes from the order of its block (class_order.py). What follows is a PatchSampler's
way, with the same words: slide, µm/px, place. A redraw keeps its class, so every batch that is delivered
is as balanced as the draws are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.corpus import Corpus, CorpusView
from online_patching.errors import SamplerError
from online_patching.sampling.class_order import ClassOrder
from online_patching.sampling.draws import Draws, Sampler
from online_patching.sampling.placing import MAX_TRIES
from online_patching.sampling.sampler import MAX_ATTEMPTS, PatchSampler
from online_patching.sampling.weights import area_weights

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class ClassSupply:
    """What there is of a class: rows (slides, or regions of slides), and how many can serve a patch."""

    name: str
    rows: int
    servable: int
    tissue_mm2: float


class BalancedSampler(Sampler):
    """Random patches for ever, every class equally often in each block of draws.

    `labels` is a class number for each row of `slides`, -1 for none. `slides` is a Corpus (a class a
    slide), or a CorpusView whose masks are regions (a class a region; a patch is then of a class when
    at least `min_foreground` of it is tissue of the region). Draws name slides of the Corpus that is
    read, `corpus`, never rows of the view.

    Each consecutive block of n_classes draws holds every class once, in an order keyed by (seed,
    block); with `class_weights` (whole numbers, by class) class c comes `class_weights[c]` times in
    blocks of their sum. `unlabelled` more draws of each block are of rows with label -1, and have that
    label. With `patches_per_read=k` a block is of groups of k draws.

    Within a class, and for all other arguments, as PatchSampler: slides are drawn by `slide_weights`
    (one a row, equal by default) among those of the class.

    Raises SamplerError, with the numbers, when a class can serve no patch.
    """

    def __init__(
        self,
        slides: Corpus,
        labels: ArrayLike,
        class_names: Sequence[str],
        *,
        class_weights: Sequence[int] | None = None,
        unlabelled: int = 0,
        slide_weights: ArrayLike | None = None,
        seed: int = 0,
        **rest: Any,
    ) -> None:
        self.class_names = tuple(class_names)
        weights = [1] * len(self.class_names) if class_weights is None else list(class_weights)
        if len(weights) != len(self.class_names):
            raise SamplerError(f"{len(self.class_names)} classes, {len(weights)} class_weights.")
        if not 0 <= seed < 2**64:
            raise SamplerError(f"seed {seed} is not a 64-bit number >= 0.")
        if unlabelled < 0:
            raise SamplerError(f"unlabelled {unlabelled} is a number of draws >= 0.")
        order = ClassOrder([*weights, *[unlabelled] * (unlabelled > 0)], seed)
        found = _checked(labels, len(slides), len(self.class_names))
        self._inner = _ByClass(slides, found, self.class_names, order, slide_weights, seed, **rest)
        base = slides.base if isinstance(slides, CorpusView) else slides
        inner = self._inner
        super().__init__(base, inner.size_px, inner.min_foreground, seed, inner.context)
        self.patches_per_read, self.filters = inner.patches_per_read, inner.filters
        self._rows = slides.rows if isinstance(slides, CorpusView) else None
        self._unlabelled, self._labels_digest = unlabelled, _digest(slides, found)

    @property
    def supply(self) -> list[ClassSupply]:
        """For each class what there is of it; last the unlabelled, where some are drawn."""
        return self._inner.supply

    def labels(self, draws: ArrayLike) -> Ints:
        """The class of each draw number, -1 for a draw of unlabelled slides: (n,) int64."""
        group = np.atleast_1d(np.asarray(draws, np.int64)) // self.patches_per_read
        found = self._inner.order.classes(group)
        return np.where(found == len(self.class_names), -1, found)

    def draw_batch(
        self, draws: ArrayLike, attempt: ArrayLike = 0, barred: Mapping[int, int] | None = None
    ) -> Draws:
        """Columns for many draw numbers; see Sampler.draw_batch."""
        if self._rows is None:
            return self._inner.draw_batch(draws, attempt, barred)
        here: dict[int, int] = {}
        for slide, since in (barred or {}).items():
            here |= dict.fromkeys(np.flatnonzero(self._rows == slide).tolist(), since)
        found = self._inner.draw_batch(draws, attempt, here)
        return replace(found, slide=self._rows[found.slide])

    @property
    def config(self) -> dict[str, Any]:
        """Everything that decides the stream besides the corpus, as JSON types."""
        return {
            **self._inner.config,
            "sampler": type(self).__name__,
            "classes": list(self.class_names),
            "class_weights": self._inner.order.weights.tolist(),
            "unlabelled": self._unlabelled,
            "labels": self._labels_digest,
        }


class _ByClass(PatchSampler):
    """A PatchSampler of rows that have a class, which chooses among those of a draw's class."""

    def __init__(
        self,
        slides: Corpus,
        labels: Ints,
        class_names: tuple[str, ...],
        order: ClassOrder,
        slide_weights: ArrayLike | None,
        seed: int,
        **rest: Any,
    ) -> None:
        self.order, self._names = order, (*class_names, "(unlabelled)")
        # Rows without a label are a class of their own, drawn where it has a weight.
        self._class = np.where(labels < 0, len(class_names), labels)
        super().__init__(slides, slide_weights=slide_weights, seed=seed, **rest)

    @property
    def supply(self) -> list[ClassSupply]:
        """See BalancedSampler.supply."""
        n = len(self.order.weights)
        rows = np.bincount(self._class, minlength=n)
        servable = np.bincount(self._class[self._drawable > 0], minlength=n)
        area = np.bincount(self._class, area_weights(self.corpus) / 1e6, minlength=n)
        counts = zip(self._names[:n], rows.tolist(), servable.tolist(), area.tolist(), strict=False)
        return [ClassSupply(*one) for one in counts]

    def _share_out(self, drawable: Floats) -> None:
        """Cumulative shares of each class's rows, one class after another: class c's end at c + 1."""
        self._drawable = drawable > 0
        lacking = [one for one in self.supply if not one.servable]
        if lacking:
            raise SamplerError(self._why_no_class(lacking))
        drawn = np.flatnonzero(self._drawable & (self._class < len(self.order.weights)))
        self._members = drawn[np.argsort(self._class[drawn], kind="stable")]
        of, weight = self._class[self._members], drawable[self._members]
        self._first = np.searchsorted(of, np.arange(len(self.order.weights)))
        self._last = np.append(self._first[1:], len(of)) - 1
        parts = np.split(weight, self._first[1:])
        shares = [np.cumsum(p / p.max()) for p in parts]
        self._ends = np.concatenate([c + s / s[-1] for c, s in enumerate(shares)])

    def _choose(self, group: Ints, u: Floats) -> Ints:
        of = self.order.classes(group)
        at = np.searchsorted(self._ends, of + u, side="right")
        return np.asarray(self._members[np.clip(at, self._first[of], self._last[of])])

    def _why_no_class(self, lacking: list[ClassSupply]) -> str:
        told = "; ".join(
            f"class {one.name!r}: 0 of {one.rows} row(s), {one.tissue_mm2:.3g} mm² together"
            for one in lacking[:5]
        )
        asked = list(getattr(self.policy, "mpps", self.policy.range))
        return (
            f"{len(lacking)} of {len(self.order.weights)} classes can serve no patch of {self.size_px} px at {asked} "
            f"µm/px with {self.min_foreground:.0%} tissue ({told}). Leave such a class out, ask for finer or "
            "smaller patches, or lower the threshold."
        )

    def _check_attempts(self, number: Ints, tried: Ints, barred: Mapping[int, int] | None) -> None:
        over = tried >= MAX_ATTEMPTS
        if over.any():
            first = number[over][:1]
            of = int(self.order.classes(first // self.patches_per_read)[0])
            raise SamplerError(
                f"draw {first[0]}, class {self._names[of]!r}, found no patch in {MAX_ATTEMPTS} attempts of "
                f"{MAX_TRIES} positions with {self.min_foreground:.0%} foreground on the class's "
                f"{self.supply[of].servable} row(s); {len(barred or {})} row(s) of all classes are in quarantine. "
                "Lower the threshold, loosen the filters, or leave the class out."
            )


def _checked(labels: ArrayLike, rows: int, classes: int) -> Ints:
    found = np.atleast_1d(np.asarray(labels))
    if found.dtype.kind not in "iu" or found.shape != (rows,):
        raise SamplerError(
            f"{rows} rows need as many class numbers, not {found.dtype} of shape {found.shape}."
        )
    found = found.astype(np.int64)
    if not classes or int(found.min()) < -1 or int(found.max()) >= classes:
        raise SamplerError(
            f"{classes} classes have the numbers 0 to {classes - 1}, and -1 is none; labels run from "
            f"{found.min()} to {found.max()}."
        )
    return found


def _digest(slides: Corpus, labels: Ints) -> str:
    """Of which class each row has, and of what rows of a view are."""
    of_view = slides.digest if isinstance(slides, CorpusView) else ""
    text = of_view.encode() + labels.astype("<i8").tobytes()
    return hashlib.sha256(text).hexdigest()[:16]
