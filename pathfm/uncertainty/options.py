"""How intervals are made: options that verbs share."""

from __future__ import annotations

from pydantic import BaseModel, Field

from pathfm.uncertainty.intervals import Method


class Options(BaseModel, frozen=True, extra="forbid"):
    """How intervals are made."""

    level: float = Field(
        0.95, gt=0.5, lt=1, description="share of such intervals that hold the truth"
    )
    method: Method = Field(
        "bca",
        description="percentile, or bca: corrected for bias and skewness, as it is near 100 %",
    )
    n_resamples: int = Field(2000, ge=100, le=1_000_000, description="bootstrap resamples")
    seed: int = Field(0, ge=0, lt=2**64, description="key of the resamples")


DEFAULTS = Options()
