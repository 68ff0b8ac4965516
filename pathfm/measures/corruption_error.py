"""mCE: errors on corrupted pictures as a share of a reference's, corruption by corruption.

Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019), section 4: with E[s, c] the error at severity s of corruption c,

    CE_c          = 100 * sum_s E[s, c]             / sum_s E_ref[s, c]
    relative CE_c = 100 * sum_s (E[s, c] - E_clean) / sum_s (E_ref[s, c] - E_ref_clean)

and their means over c. 100 is no better than the reference; less is better.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pathfm.runtime import PathfmError

LEAST = 0.01
"""Mean error, and mean rise of it, of the reference below which a corruption is left out: one
point in a hundred is about what sampling does to a thousand pictures, and a share of it is noise."""


@dataclass(frozen=True)
class CorruptionErrors:
    """CE of every corruption and their means, in per cent of the reference; NaN where left out.

    unnormalised: the plain mean error (0..1) over corruptions and severities, which needs no
    reference. used, relative_used: (c,) whether a corruption counts in the mean; both depend on the
    reference alone, so models compared with one reference are averaged over the same corruptions.
    """

    ce: NDArray[np.float64]
    relative: NDArray[np.float64]
    mce: float
    relative_mce: float
    unnormalised: float
    used: NDArray[np.bool_]
    relative_used: NDArray[np.bool_]


def corruption_errors(
    errors: ArrayLike,
    clean: float,
    reference: ArrayLike,
    reference_clean: float,
    least: float = LEAST,
) -> CorruptionErrors:
    """CE and relative CE of a table of errors (c, severities) beside the reference's.

    errors, reference: 0..1, same shape; clean: error on the pictures as they are. A corruption on
    which the reference's mean error is below `least` has no CE; one that raises the reference's
    error by less than `least` in the mean (or lowers it) has no relative CE. The means leave these
    out, and are NaN where none is left. Raises `PathfmError` for tables that do not fit or are not
    errors.
    """
    e, r = np.asarray(errors, np.float64), np.asarray(reference, np.float64)
    _check(e, r, clean, reference_clean)
    mean, mean_ref = e.mean(axis=1), r.mean(axis=1)
    used = mean_ref >= least
    rise, rise_ref = mean - clean, mean_ref - reference_clean
    relative_used = rise_ref >= least
    ce, relative = _share(mean, mean_ref, used), _share(rise, rise_ref, relative_used)
    return CorruptionErrors(
        ce=ce,
        relative=relative,
        mce=_mean(ce[used]),
        relative_mce=_mean(relative[relative_used]),
        unnormalised=float(e.mean()),
        used=used,
        relative_used=relative_used,
    )


def _share(
    part: NDArray[np.float64], whole: NDArray[np.float64], where: NDArray[np.bool_]
) -> NDArray[np.float64]:
    out = np.full(len(part), np.nan)
    np.divide(100.0 * part, whole, out=out, where=where)
    return out


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _check(
    e: NDArray[np.float64], r: NDArray[np.float64], clean: float, reference_clean: float
) -> None:
    if e.ndim != 2 or e.shape != r.shape or 0 in e.shape:
        raise PathfmError(
            f"errors {e.shape} and the reference's {r.shape} must both be (corruptions, severities)"
        )
    every = np.concatenate([e.ravel(), r.ravel(), [clean, reference_clean]])
    if not ((every >= 0) & (every <= 1)).all():  # NaN fails too
        raise PathfmError(
            f"errors must lie between 0 and 1; found {every.min():g} to {every.max():g}"
        )
