"""Patches that failed or were refused, and what takes their place: the next attempt of their draw."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import (
    LoaderError,
    PatchingError,
    SamplerError,
    SlideError,
    StoreError,
)
from online_patching.loading.batch import FILTERED, DrawSource, Failure
from online_patching.loading.turn import BatchInMaking
from online_patching.sampling.sampler import MAX_ATTEMPTS


def reasons_against(
    source: DrawSource, batch: BatchInMaking, good: list[int], bad: Mapping[int, PatchingError]
) -> dict[int, str]:
    """Why some of these rows are replaced: they failed, or a pixel filter refuses them."""
    reasons = {row: _reason(error) for row, error in bad.items()}
    if source.filters and good:
        first_view = batch.pixels[good, 0] if source.context else batch.pixels[good]
        for one in source.filters:
            for row, keep in zip(good, one.keep(first_view), strict=True):
                if not keep:
                    reasons.setdefault(row, f"{FILTERED}{one.name}")
    return reasons


def replace(
    source: DrawSource, batch: BatchInMaking, reasons: Mapping[int, str]
) -> NDArray[np.int64]:
    """Give rows the next attempt of their draws, f(seed, draw, attempt) alone; returns them in order.

    LoaderError when a draw has had all its attempts.
    """
    rows = np.asarray(sorted(reasons))
    columns = batch.drawn().take(rows)
    names = [source.corpus.slide_id(int(row)) for row in columns.slide]
    why = [reasons[row] for row in rows.tolist()]
    found = zip(columns.draw.tolist(), columns.attempt.tolist(), names, why, strict=True)
    failures = [Failure(*one) for one in found]
    last = failures[int(columns.attempt.argmax())]
    if last.attempt + 1 >= MAX_ATTEMPTS:
        raise LoaderError(
            f"draw {last.draw} failed {MAX_ATTEMPTS} times, last on {last.slide_id}: {last.reason}"
        )
    try:
        again = source.draw_batch(columns.draw, columns.attempt + 1, batch.barred)
    except SamplerError as cause:
        raise LoaderError(
            f"draw {last.draw} cannot be replaced after {last.slide_id}: {last.reason} ({cause})"
        ) from None
    with batch.lock:
        batch.failures += failures
        for name, column in vars(batch.drawn()).items():
            column[rows] = getattr(again, name)
    return rows


def _reason(error: PatchingError) -> str:
    told = error.reason if isinstance(error, SlideError | StoreError) else str(error)
    return f"{type(error).__name__}: {told}"
