"""PathoROB's robustness index: are neighbours in feature space of one class, or of one hospital?

Kömen et al., "Towards Robust Foundation Models for Digital Pathology" (2025, arXiv 2507.17845). Among
the k nearest neighbours of every picture let SO be of the same class and another site, and OS of another
class and the same site:

    RI = SO / (SO + OS)

1: features follow biology alone; 0: the site alone. Neighbours that share both, or neither, say
nothing and are left out. Neighbours are by Euclidean distance between features of length 1, and those
of the picture's own slide are no candidates.

What features that tell nothing would get depends on the data: with C classes at S sites and equally many
pictures of each class at each site (S - 1) / (S + C - 2), with 400 of one class and 20 of another 0.9.
So the data are balanced first (`balanced_rows`), as PathoROB's sets are (360, 900 or 5,100 patches of every
class at every centre), and the chance index stands beside the figure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.philox import words
from pathfm.metrics import nearest
from pathfm.runtime import PathfmError

_STREAM = 424

MOST_NEIGHBOURS = 600  # PathoROB's bound of k for most of its sets
_BLOCK_FLOATS = 1 << 24

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class SiteIndex:
    """The index, its k, the four shares of neighbours, and the index of each class (NaN: none).

    n: pictures. chance: the index of features that tell nothing, on the same pictures.
    """

    index: float
    k: int
    n: int
    chance: float
    same_both: float  # shares of all n * k neighbours; they sum to 1
    same_class: float  # SO
    same_site: float  # OS
    same_neither: float
    per_class: NDArray[np.float64]


def site_index(
    nearest: NDArray[np.int64],
    labels: ArrayLike,
    sites: Sequence[str],
    k: int,
    slides: Sequence[str] = (),
) -> SiteIndex:
    """The robustness index of neighbours (n, at least k), as `neighbours` gives them for these slides.

    labels: (n,) classes; sites: n names of hospitals or scanners. It is about the features only where
    the classes are alike common at all sites: `balanced_rows`. Raises `PathfmError` where it says
    nothing: one site, no class at two sites, no site with two classes, or k too large.
    """
    y = np.asarray(labels, np.int64)
    _, site = np.unique(np.asarray(sites, str), return_inverse=True)
    _check_crossed(y, site)
    if not 1 <= k <= nearest.shape[1]:
        raise PathfmError(
            f"k = {k} neighbours asked for, but {nearest.shape[1]} found for every picture: "
            "lower k, or take more slides"
        )
    near = nearest[:, :k]
    class_same, site_same = y[near] == y[:, None], site[near] == site[:, None]
    so, os = class_same & ~site_same, ~class_same & site_same
    by_class = [(int(so[y == c].sum()), int(os[y == c].sum())) for c in range(int(y.max()) + 1)]
    return SiteIndex(
        index=_ratio(int(so.sum()), int(os.sum())),
        k=k,
        n=len(y),
        chance=_chance(y, site, slides),
        same_both=float((class_same & site_same).mean()),
        same_class=float(so.mean()),
        same_site=float(os.mean()),
        same_neither=float((~class_same & ~site_same).mean()),
        per_class=np.array([_ratio(*pair) for pair in by_class]),
    )


def balanced_rows(labels: ArrayLike, sites: Sequence[str], seed: int) -> NDArray[np.int64]:
    """Row numbers, ascending, with as many pictures of each class at each site as the rarest pair has.

    Which are kept follows from (seed, row) alone. Raises `PathfmError` where a class does not occur at a
    site: then the index would be about the data.
    """
    y = np.asarray(labels, np.int64)
    names, site = np.unique(np.asarray(sites, str), return_inverse=True)
    _check_crossed(y, site)
    classes = np.unique(y)
    keys = words(seed, np.arange(len(y)), 0, _STREAM, 1)[:, 0]
    shuffled = np.argsort(keys, kind="stable")
    cells = {
        (c, s): shuffled[(y[shuffled] == c) & (site[shuffled] == s)]
        for c in classes.tolist()
        for s in range(len(names))
    }
    if empty := [pair for pair, rows in cells.items() if not len(rows)]:
        c, s = empty[0]
        raise PathfmError(
            f"sites: class {c} has no picture from {names[s]} ({len(empty)} of {len(cells)} pairs of class "
            "and site are empty): a site index wants every class at every site. Leave classes or sites out"
        )
    fewest = min(map(len, cells.values()))
    return np.sort(np.concatenate([rows[:fewest] for rows in cells.values()]))


def neighbours(
    features: ArrayLike, slides: Sequence[str] = (), most: int = MOST_NEIGHBOURS
) -> NDArray[np.int64]:
    """Row numbers (n, m) of each row's nearest other rows, nearest first; equals by row number.

    features: (n, d), each row divided by its length. slides: n names; rows of one's own slide are
    left out (without names, only the row itself). m is `most`, or as many as the row with the fewest
    candidates has. Raises `PathfmError` where a row has none.
    """
    x = np.asarray(features, np.float32)
    if not np.isfinite(x).all():
        raise PathfmError(
            "features that are not finite have no neighbours: the backbone has diverged"
        )
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12))
    _, slide, count = np.unique(
        np.asarray(slides, str) if len(slides) else np.arange(len(x)),
        return_inverse=True,
        return_counts=True,
    )
    m = min(most, len(x) - int(count.max()))
    if m < 1:
        raise PathfmError(
            f"all {len(x):,} pictures are of one slide: neighbours are looked for in other slides"
        )
    out = np.empty((len(x), m), np.int64)
    step = max(1, _BLOCK_FLOATS // len(x))
    for at in range(0, len(x), step):
        rows = slice(at, at + step)
        nearness = x[rows] @ x.T
        nearness[slide[rows, None] == slide[None, :]] = -np.inf
        out[rows] = _first(nearness, m)
    return out


def best_k(nearest: NDArray[np.int64], labels: ArrayLike, most: int = MOST_NEIGHBOURS) -> int:
    """The k at which kNN names the class best (balanced accuracy), as PathoROB chooses it.

    Tried: 1, 3, 5, 7, 9, 11, 21, 31, ... below `most`; the smallest of equals. Votes are equal and a tie
    goes to the lowest class. PathoROB takes the median of the models' best k for all of them: so
    should a comparison.
    """
    y = np.asarray(labels, np.int64)
    tried = [k for k in (1, 3, 5, 7, 9, *range(11, most, 10)) if k <= nearest.shape[1]]
    votes = np.zeros((len(y), int(y.max()) + 1), np.int64)
    rows, best, done = np.arange(len(y)), (-1.0, 1), 0
    classes = np.unique(y)
    for k in tried:
        for column in range(done, k):
            votes[rows, y[nearest[:, column]]] += 1
        done = k
        right = votes.argmax(axis=1) == y
        score = float(np.mean([right[y == c].mean() for c in classes]))
        if score > best[0]:
            best = (score, k)
    return best[1]


def _first(nearness: NDArray[np.float32], m: int) -> NDArray[np.int64]:
    """Columns of the m largest values of each row, largest first, equals by column."""
    found = np.nonzero(nearest(nearness, m))[1].reshape(len(nearness), m)
    order = np.argsort(-np.take_along_axis(nearness, found, axis=1), axis=1, kind="stable")
    return np.take_along_axis(found, order, axis=1)


def _ratio(so: int, os: int) -> float:
    return so / (so + os) if so + os else float("nan")


def _chance(y: Labels, site: NDArray[np.int64], slides: Sequence[str]) -> float:
    """The index where all candidates of a picture, those of other slides, are alike likely its neighbours."""
    names = np.asarray(slides, str) if len(slides) else np.arange(len(y))
    slide = np.unique(names, return_inverse=True)[1]
    candidates = len(y) - _alike(slide)
    both = _alike(y, site) - _alike(y, site, slide)
    so = _alike(y) - _alike(y, slide) - both
    os = _alike(site) - _alike(site, slide) - both
    has = candidates > 0
    share_so, share_os = (float((x[has] / candidates[has]).sum()) for x in (so, os))
    return share_so / (share_so + share_os) if share_so + share_os else float("nan")


def _alike(*columns: Labels) -> Labels:
    """How many rows are equal to each row in all these columns, itself counted: (n,)."""
    _, place, count = np.unique(np.stack(columns), axis=1, return_inverse=True, return_counts=True)
    found: Labels = count[place.ravel()]
    return found


def _check_crossed(y: Labels, site: NDArray[np.int64]) -> None:
    pairs = np.unique(np.stack([y, site]), axis=1)
    if len(np.unique(site)) < 2:
        raise PathfmError("all pictures are of one site: a site index needs two")
    if np.unique(pairs[0], return_counts=True)[1].max() < 2:
        raise PathfmError(
            "no class occurs at two sites: class and site cannot be told apart, whatever the features"
        )
    if np.unique(pairs[1], return_counts=True)[1].max() < 2:
        raise PathfmError(
            "no site has two classes: class and site cannot be told apart, whatever the features"
        )
