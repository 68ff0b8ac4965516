"""Which level every draw of a batch is read from: plan.choose_level for many slides at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.corpus import Corpus
from online_patching.errors import SamplerError
from online_patching.plan import LEVEL_TOLERANCE, MAX_UPSCALE


def choose_levels(corpus: Corpus, rows: ArrayLike, mpps: ArrayLike) -> NDArray[np.int64]:
    """Rows of `corpus.levels` to read: for each slide (a corpus row) at the µm/px wanted of it.

    `mpps` is one number or one a slide. The rule, and the choice between equal levels, are
    plan.choose_level's: the coarsest level at most 2 % coarser than asked, else the finest, never
    more than 2x upscaled. SamplerError where a slide cannot serve its µm/px, naming the first.
    """
    slide = np.atleast_1d(np.asarray(rows, np.int64))
    asked = np.broadcast_to(np.asarray(mpps, np.float64), slide.shape)
    if not ((asked > 0) & (asked < np.inf)).all():
        wrong = asked[~((asked > 0) & (asked < np.inf))][0]
        raise SamplerError(
            f"{wrong} µm/px is not a magnification; ask for a number above 0, such as 0.5."
        )
    if not len(slide):
        return np.zeros(0, np.int64)
    corpus.check(slide)
    first = np.asarray(corpus.records["first_level"][slide], np.int64)
    count = np.asarray(corpus.records["n_levels"][slide], np.int64)
    column = np.arange(count.max())
    there = column < count[:, None]
    mpp = corpus.levels["mpp"][first[:, None] + np.where(there, column, 0)]
    fine = there & (mpp <= asked[:, None] * (1 + LEVEL_TOLERANCE))
    # Reversed, so that argmax gives the last of equal levels, as choose_level does.
    coarsest = len(column) - 1 - np.argmax(np.where(fine, mpp, -np.inf)[:, ::-1], axis=1)
    finest = np.argmin(np.where(there, mpp, np.inf), axis=1)
    finest_mpp = mpp[np.arange(len(slide)), finest]
    refused = finest_mpp > MAX_UPSCALE * asked * (1 + 1e-9)
    if refused.any():
        i = int(np.argmax(refused))
        raise SamplerError(
            f"slide {slide[i]}: its finest level has {finest_mpp[i]:g} µm/px: {asked[i]:g} µm/px would upscale it "
            f"{finest_mpp[i] / asked[i]:.1f}x, more than {MAX_UPSCALE:g}x. Ask for coarser patches."
        )
    return np.asarray(first + np.where(fine.any(axis=1), coarsest, finest))
