"""Labels of which a known share is wrong."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from online_patching.philox import integers, words
from pathfm.runtime import PathfmError

_STREAM = 421

Labels = NDArray[np.int64]


def flip_labels(labels: Labels, share: float, n_classes: int, seed: int, repeat: int = 0) -> Labels:
    """A copy of labels (n,) of which round(share * n) are another class, all others alike likely.

    Symmetric noise. Which rows, and what they become, follow from (seed, repeat, row): at a larger
    share the same rows are wrong in the same way, and more. Raises `PathfmError` for a share outside
    0..1, or fewer than two classes.
    """
    if not 0 <= share <= 1:
        raise PathfmError(f"a share {share:g} of wrong labels: wanted 0 to 1")
    if n_classes < 2:
        raise PathfmError("labels of one class cannot be mistaken for another: give two classes")
    drawn = words(seed, np.arange(len(labels)), repeat, _STREAM, 2)
    rows = np.argsort(drawn[:, 0], kind="stable")[: round(share * len(labels))]
    out = labels.copy()
    out[rows] = (labels[rows] + 1 + integers(drawn[rows, 1], n_classes - 1)) % n_classes
    return out
