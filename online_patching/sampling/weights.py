"""How often each slide is drawn, and which slides and patches a study may see at all.

Weights are arrays of one number >= 0 a slide, in corpus order; only their ratios count. They can be
multiplied: `group_weights(table, "site") * share_of_slides(ids, 0.1, seed)` draws every site
equally often from a tenth of the slides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.corpus import Corpus
from online_patching.errors import SamplerError

Floats = NDArray[np.float64]
Table = Mapping[str, Sequence[Any] | NDArray[Any]]
"""Columns of one value a slide, in corpus order; `table_of` makes one from rows with slide ids."""


def uniform_weights(corpus: Corpus) -> Floats:
    """Every slide equally often, as a PatchSampler does when it is given no weights."""
    return np.ones(len(corpus))


def area_weights(corpus: Corpus) -> Floats:
    """Each slide as often as it has tissue: µm² of its mask. Patches are then uniform over all
    tissue of the corpus."""
    out = np.zeros(len(corpus))
    for start, found in corpus.blocks():
        cells = found["mask_width"].astype(np.int64) * found["mask_height"]
        area = found["width_px0"] * found["mpp_x"] * (found["height_px0"] * found["mpp_y"])
        out[start : start + len(found)] = found["tissue_cells"] / cells * area
    return out


def group_weights(
    table: Table, by: str | Sequence[str], shares: Mapping[Any, float] | None = None
) -> Floats:
    """Every group equally often, and every slide of a group.

    `by` names a column of `table` (label, patient, site), or several, from the outside in:
    ("label", "patient") gives every label the same share, every patient of a label the same share of
    that, and every slide of a patient the same share of that. `shares` are other shares for the
    outermost groups: {"tumour": 3, "normal": 1}. A group it does not name, or one it names that has
    no slide, is an error.
    """
    names = (by,) if isinstance(by, str) else tuple(by)
    if not names:
        raise SamplerError("group_weights needs the name of at least one column.")
    columns = [np.asarray(_column(table, name)) for name in names]
    _same_length(names, columns)
    weights = _outer_shares(names[0], columns[0], shares)
    inner = np.zeros(len(columns[0]), np.int64)
    for depth, column in enumerate(columns):
        groups = np.unique(column, return_inverse=True)[1].reshape(-1)
        # The group of a slide is its value here together with the groups it is in outside.
        pairs = inner * (int(groups.max()) + 1) + groups
        finer = np.unique(pairs, return_inverse=True)[1].reshape(-1)
        if depth:
            weights = weights / _children(inner, finer)[inner]
        inner = finer
    return np.asarray(weights / np.bincount(inner)[inner])


def weight_column(table: Table, name: str) -> Floats:
    """A column of weights, checked: a number >= 0 a slide, not all of them 0."""
    return check_weights(_column(table, name), len(_column(table, name)), f"column {name!r}")


def table_of(
    ids: Sequence[str], rows: Iterable[Mapping[str, Any]], key: str = "slide_id"
) -> dict[str, NDArray[Any]]:
    """Rows that name slides (as csv.DictReader gives them) as columns in the order of `ids`.

    Rows of other slides are ignored. SamplerError when a slide has no row or two.
    """
    wanted, found = set(ids), {}
    for row in rows:
        if key not in row:
            raise SamplerError(f"a row has no {key!r}, only {', '.join(map(repr, row))}.")
        if row[key] in found:
            raise SamplerError(f"slide {row[key]!r} has more than one row.")
        if row[key] in wanted:
            found[row[key]] = row
    missing = [name for name in ids if name not in found]
    if missing:
        raise SamplerError(
            f"{len(missing)} of {len(ids)} slides have no row, such as {missing[0]!r}."
        )
    return {name: np.asarray([found[i][name] for i in ids]) for name in found[ids[0]]}


def share_of_slides(
    ids: Sequence[str], share: float, seed: int, groups: Sequence[Any] | None = None
) -> NDArray[np.bool_]:
    """Which slides belong to a share of them: a data-fraction study's corpus, as a bool a slide.

    Slides are ordered by a hash of (seed, id), and the first round(share * n), at least one, are
    in. So the slides of a smaller share are among those of a larger one; and a slide more in the
    corpus moves at most one other out or in. With `groups` (one value a slide, such as patients)
    whole groups are ordered and kept.
    """
    if not 0 < share <= 1:
        raise SamplerError(f"a share of slides lies in (0, 1], {share:g} does not.")
    names = [str(name) for name in (ids if groups is None else groups)]
    if len(names) != len(ids):
        raise SamplerError(f"{len(ids)} slides need as many groups, not {len(names)}.")
    if not names:
        raise SamplerError("there are no slides to take a share of.")
    if not 0 <= seed < 2**64:
        raise SamplerError(f"seed {seed} is not a 64-bit number >= 0.")
    key, units = seed.to_bytes(8, "little"), sorted(set(names))
    digests = b"".join(blake2b(name.encode(), key=key, digest_size=8).digest() for name in units)
    order = np.argsort(np.frombuffer(digests, "<u8"), kind="stable")
    kept = {units[i] for i in order[: max(1, int(share * len(units) + 0.5))].tolist()}
    return np.asarray([name in kept for name in names])


def check_weights(given: ArrayLike, n: int, what: str = "slide_weights") -> Floats:
    """`given` as float64; SamplerError unless there are n finite numbers >= 0, one above 0."""
    try:
        weights = np.asarray(given, np.float64)
    except (TypeError, ValueError):
        raise SamplerError(f"{what} are not numbers: {np.asarray(given)[:3]} ...") from None
    if weights.shape != (n,):
        raise SamplerError(f"{n} slides need as many weights; {what} have shape {weights.shape}.")
    wrong = ~(np.isfinite(weights) & (weights >= 0))
    if wrong.any():
        i = int(np.argmax(wrong))
        raise SamplerError(f"{what}: slide {i} has {weights[i]}, which is no number >= 0.")
    if not weights.any():
        raise SamplerError(f"{what}: all {n} are 0, so no slide can be drawn.")
    return weights


class SlideShares:
    """Weighted choice among many slides: one cumulative sum, 8 bytes a slide.

    A binary search a draw; an alias table would be O(1), but a million slides take seconds
    to build it in Python, and 16 bytes a slide in every process.
    """

    def __init__(self, weights: Floats) -> None:
        self._sums = np.cumsum(weights / weights.max())  # only ratios count, and sums stay finite
        self._last = int(np.flatnonzero(weights)[-1])

    def pick(self, u: Floats) -> NDArray[np.int64]:
        """Slides for uniform numbers in [0, 1), by weight; never one of weight 0."""
        found = np.searchsorted(self._sums, u * self._sums[-1], side="right")
        return np.asarray(np.minimum(found, self._last), np.int64)


def _column(table: Table, name: str) -> Sequence[Any] | NDArray[Any]:
    if name not in table:
        raise SamplerError(f"there is no column {name!r}; there are {', '.join(table)}.")
    return table[name]


def _same_length(names: Sequence[str], columns: Sequence[NDArray[Any]]) -> None:
    sizes = {name: len(column) for name, column in zip(names, columns, strict=True)}
    if len(set(sizes.values())) > 1 or not len(columns[0]):
        raise SamplerError(f"columns need one value a slide each; they have {sizes}.")
    for name, column in zip(names, columns, strict=True):
        empty = [value is None or value == "" or value != value for value in column.tolist()]
        if any(empty):
            raise SamplerError(
                f"column {name!r}: slide {empty.index(True)} has no value, so no group."
            )


def _outer_shares(name: str, column: NDArray[Any], shares: Mapping[Any, float] | None) -> Floats:
    values, of = np.unique(column, return_inverse=True)
    if shares is None:
        return np.ones(len(column))
    groups = values.tolist()
    absent = [group for group in shares if group not in groups]
    if absent:
        raise SamplerError(f"no slide has {name} {absent[0]!r}; slides have {groups}.")
    unnamed = [group for group in groups if group not in shares]
    if unnamed:
        raise SamplerError(f"shares name no {name} {unnamed[0]!r}, which slides have.")
    per_group = check_weights([shares[group] for group in groups], len(groups), "shares")
    return np.asarray(per_group[of.reshape(-1)])


def _children(outer: NDArray[np.int64], inner: NDArray[np.int64]) -> NDArray[np.int64]:
    """For every outer group, how many inner groups it has."""
    parent = np.zeros(int(inner.max()) + 1, np.int64)
    parent[inner] = outer
    return np.asarray(np.bincount(parent, minlength=int(outer.max()) + 1))
