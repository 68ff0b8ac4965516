"""What ``pathfm robustness`` wants to know."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field, model_validator

from pathfm.corruptions import CORRUPTIONS, SEVERITIES
from pathfm.corruptions.apply import find_corruption
from pathfm.leakage import Policy
from pathfm.models import WEIGHTS_HELP
from pathfm.runtime import PathfmError, Precision
from pathfm.tracking import TrackingConfig
from pathfm.uncertainty import Options

_NAME = re.compile(r"[\w.-]{1,64}")


class RobustnessConfig(BaseModel, frozen=True, extra="forbid"):
    """Which models, on which pictures, under what."""

    data: str = Field(
        description="labelled folder (DATA/<class>/*.png|jpg|tif, or DATA/train|val|test/<class>/), a table "
        "of patches (.csv), or NAME=FOLDER of a public data set"
    )
    models: list[str] = Field(
        min_length=1,
        description="NAME=WEIGHTS of each; the first is the reference that the others' errors are a share "
        f"of (usually init=imagenet). WEIGHTS: {WEIGHTS_HELP}",
    )
    backbone: str = Field(
        "vit_tiny_patch16_224", description="timm name, for weights that do not name theirs"
    )
    out: Path = Field(Path("robustness"), description="folder for results and features")
    corruptions: list[str] = Field(
        list(CORRUPTIONS), min_length=1, description="which corruptions, by name"
    )
    severities: list[int] = Field(
        list(SEVERITIES), min_length=1, description="which severities; mCE as published has 1 to 5"
    )
    noise_shares: list[float] = Field(
        [0.1, 0.2, 0.3, 0.4],
        description="shares of training labels made wrong, one probe each; none: leave it out",
    )
    sites: Path | None = Field(
        None,
        description="CSV with the columns path (below DATA), site and, if known, slide: adds the site index",
    )
    k: int | None = Field(
        None,
        ge=1,
        le=600,
        description="neighbours of the site index; unset: the median over models of the k that names classes best",
    )
    input_px: int = Field(224, ge=32, le=2048, description="side of the input, px")
    per_class: int | None = Field(
        None, ge=2, description="at most so many pictures of each class; unset: all"
    )
    n_splits: int = Field(
        3,
        ge=1,
        le=100,
        description="repeats, each with its own split; a data set with splits of its own has one, unless it is "
        "trained on few pictures a class, which every repeat draws anew",
    )
    test_share: float = Field(0.3, gt=0, lt=1, description="share of each class tested on")
    validation_share: float = Field(
        0.2, gt=0, lt=1, description="share of the training half that chooses C"
    )
    c_values: tuple[float, ...] = Field(
        (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0),
        min_length=1,
        description="inverse L2 strengths tried (scikit-learn's C)",
    )
    seed: int = Field(0, ge=0, lt=2**64, description="key of splits, corruptions and wrong labels")
    leaks: Policy = Field(
        "refuse",
        description="tested pictures that a model has seen in pretraining: refuse them, or mark the table",
    )
    intervals: Options = Field(Options(), description="how intervals are made")
    batch_size: int = Field(32, ge=1, le=4096, description="pictures in one forward pass")
    threads: int = Field(2, ge=1, le=256, description="threads that decode, resize and corrupt")
    device: str = Field("auto", description="auto, cpu or cuda:N")
    precision: Precision = Field(
        "fp32",
        description="of the forward pass: fp32, bf16, or auto: bf16 where the hardware has it",
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="where the run is recorded")

    @model_validator(mode="after")
    def _known(self) -> Self:
        try:
            for name in self.corruptions:
                find_corruption(name)
            self.named_models()
        except PathfmError as error:
            raise ValueError(str(error)) from None
        for what in ("corruptions", "severities", "noise_shares"):
            given = getattr(self, what)
            if len(set(given)) < len(given):
                raise ValueError(f"{what}: {', '.join(map(str, given))} has one twice")
        if wrong := set(self.severities) - set(SEVERITIES):
            raise ValueError(f"severities: {min(wrong)} is none of 1, 2, 3, 4, 5")
        if not all(0 < share < 1 for share in self.noise_shares):
            raise ValueError("noise_shares: each must lie between 0 and 1")
        return self

    def named_models(self) -> dict[str, str]:
        """Weights by name, the reference first; `PathfmError` for a name that is none, or twice."""
        found: dict[str, str] = {}
        for text in self.models:
            name, equals, weights = text.partition("=")
            if not equals or not weights or not _NAME.fullmatch(name):
                raise PathfmError(
                    f"models: {text!r} should be NAME=WEIGHTS, such as init=imagenet; a name has letters, "
                    "digits, dots, - and _"
                )
            if name in found:
                raise PathfmError(f"models: two are called {name!r}; a table needs two names")
            found[name] = weights
        return found

    def cases(self) -> list[tuple[str, int]]:
        """(corruption, severity), corruption by corruption, mildest first."""
        return [(name, s) for name in self.corruptions for s in sorted(self.severities)]
