"""What a run draws from a corpus: its sampler, by magnifications, shares of slides, and labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from online_patching import BalancedSampler, Corpus, PatchSampler
from online_patching.sampling.magnification import Continuous, MaxAvg, MinMax, Policy
from online_patching.sampling.weights import share_of_slides
from pathfm.labels.regions import region_labels
from pathfm.labels.rows import LabelledRows
from pathfm.labels.tables import slide_labels
from pathfm.runtime import PathfmError

if TYPE_CHECKING:
    from pathfm.pretrain import PretrainConfig


def sampler_of(config: PretrainConfig, corpus: Corpus) -> PatchSampler | BalancedSampler:
    """What a run draws from a corpus: the same whether it trains or only tells what it would read."""
    rows = rows_of(config, corpus)
    settings: dict[str, Any] = {
        "size_px": config.patch_px,
        "mpp": magnifications(config),
        "min_foreground": config.min_foreground,
        "seed": config.seed,
    }
    if rows is None:
        return PatchSampler(
            corpus,
            slide_weights=_kept_slides(config, corpus),
            patches_per_slide=config.patches_per_slide,
            **settings,
        )
    if config.labels.source == "regions":
        settings["min_foreground"] = config.labels.min_region
    return rows.sampler(config.labels, **settings)


def magnifications(config: PretrainConfig) -> tuple[float, ...] | Policy:
    """What a run's µm/px are drawn by: the list itself, or a law between its ends."""
    low, high = min(config.mpp), max(config.mpp)
    match config.mpp_law:
        case None:
            return config.mpp
        case "max-avg":
            return MaxAvg(low, high)
        case "min-max":
            return MinMax(low, high)
        case law:
            return Continuous(low, high, law)


def _kept_slides(config: PretrainConfig, corpus: Corpus) -> NDArray[np.float64] | None:
    """Weight 1 for the slides of `slide_share`, 0 for others; None where all are drawn from."""
    if config.slide_share is None:
        return None
    kept = share_of_slides(corpus.slide_ids, config.slide_share, seed=config.seed)
    return kept.astype(np.float64)


def rows_of(config: PretrainConfig, corpus: Corpus) -> LabelledRows | None:
    """The labels of a corpus; None where the config gives none. PathfmError for a folder's."""
    source = config.labels.source
    if source is None:
        return None
    if source == "patches":
        raise PathfmError(
            f"labels.patches {config.labels.patches}: a run on it reads no slides, so there is nothing to tell of them"
        )
    read = region_labels if source == "regions" else slide_labels
    return read(config.labels, corpus, config.corpus)


def told_supply(sampler: PatchSampler | BalancedSampler) -> tuple[str, ...]:
    """What there is of each class, in a line."""
    if not isinstance(sampler, BalancedSampler):
        return ()
    each = "; ".join(
        f"{one.name}: {one.servable} of {one.rows}, {one.tissue_mm2:.3g} mm²"
        for one in sampler.supply
    )
    return (f"balanced by class, rows that can serve patches and their tissue: {each}",)
