"""What happens to each patch in each view: a table of numbers drawn from (seed, draw, view).

Only numpy and our Philox words: the same draw gets the same view whatever the batch, the rank, the
device or the number of threads. `pathfm.views.render` turns a table and patches into pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

VIEW_STREAM_BASE = 1 << 16
"""Philox stream of view 0; view v draws from VIEW_STREAM_BASE + v. The sampler's are below."""

CROP_ATTEMPTS = 10
"""Tries for a crop that fits, as in torchvision's RandomResizedCrop; then the whole patch."""

MAX_BLUR_SIGMA_PX = 4.0

_WORDS = (
    *("x", "y", "jitter", "brightness", "contrast", "saturation", "hue"),
    *("flip", "turn", "quarter_turns", "gray", "blur", "sigma", "solarize"),
    *("restain", "scale_h", "scale_e", "scale_d", "shift_h", "shift_e", "shift_d"),
)
"""One word each, after the crop's 2 * CROP_ATTEMPTS; append only, or every stored run changes."""

HED_LIGHT, HED_STRONG = 0.05, 0.2
"""Strengths of `ViewSpec.hed` that Tellez et al. 2019 call HED-light and HED-strong."""

_Array = NDArray[np.float64]


class ViewSpec(BaseModel, frozen=True, extra="forbid"):
    """How one group of views is drawn. Probabilities are per view; defaults are DINO's locals.

    Ranges follow Caron et al. 2021 (facebookresearch/dino, `DataAugmentationDINO`), plus
    right-angle turns, since tissue has no upper side.
    """

    size_px: int = Field(96, ge=8, le=1024, description="side of the view in pixels")
    scale: tuple[float, float] = Field(
        (0.05, 0.4), description="smallest and largest share of the patch's area that is cropped"
    )
    ratio: tuple[float, float] = Field(
        (0.75, 4 / 3), description="smallest and largest width / height of the crop"
    )
    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    turn: float = Field(
        1.0, ge=0, le=1, description="probability of a turn by 0, 90, 180 or 270 deg"
    )
    jitter: float = Field(0.8, ge=0, le=1, description="probability of any colour jitter")
    brightness: float = Field(0.4, ge=0, le=1, description="factor drawn from 1 +- this")
    contrast: float = Field(0.4, ge=0, le=1, description="factor drawn from 1 +- this")
    saturation: float = Field(0.2, ge=0, le=1, description="factor drawn from 1 +- this")
    hue: float = Field(
        0.1, ge=0, le=0.5, description="turns of the colour circle, drawn from +- this"
    )
    gray: float = Field(0.2, ge=0, le=1, description="probability of greyscale")
    blur: float = Field(0.5, ge=0, le=1, description="probability of a Gaussian blur")
    blur_sigma_px: tuple[float, float] = Field(
        (0.1, 2.0), description="smallest and largest standard deviation of the blur, view pixels"
    )
    solarize: float = Field(
        0.0, ge=0, le=1, description="probability that values >= 0.5 are inverted"
    )
    hed: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="stain jitter: the amounts of haematoxylin, eosin and DAB are each multiplied by "
        "a factor from 1 +- this and get from +- this added, in base-10 optical density; "
        "0 is none, 0.05 Tellez's HED-light, 0.2 HED-strong",
    )
    restain: float = Field(
        1.0, ge=0, le=1, description="probability of the stain jitter, where hed is above 0"
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        "bilinear", description="filter that crops are resized with; DINO's own code has bicubic"
    )
    antialias: bool = Field(
        True, description="widen that filter where a crop shrinks; without, fine texture aliases"
    )

    @model_validator(mode="after")
    def _check_ranges(self) -> ViewSpec:
        for name, (low, high), floor, ceiling in (
            ("scale", self.scale, 0.0, 1.0),
            ("ratio", self.ratio, 0.0, math.inf),
            ("blur_sigma_px", self.blur_sigma_px, 0.0, MAX_BLUR_SIGMA_PX),
        ):
            if not floor < low <= high <= ceiling:
                raise ValueError(
                    f"{name} must be two numbers with {floor} < low <= high <= {ceiling}, "
                    f"not {low}, {high}"
                )
        return self


@dataclass(frozen=True)
class ViewTable:
    """The drawn numbers for n views of one size; every field has shape (n,).

    x, y, width, height: the crop in patch pixels, fractional, within the patch.
    flip_x, flip_y, transpose: the orientation, applied in this order.
    brightness, contrast, saturation: factors (1 = as it was); hue: turns (0 = as it was).
    gray, solarize: booleans; sigma_px: blur in view pixels (0 = none).
    stain_scale, stain_shift: (n, 3), for haematoxylin, eosin, DAB (1 and 0 = as it was).
    """

    x: _Array
    y: _Array
    width: _Array
    height: _Array
    flip_x: NDArray[np.bool_]
    flip_y: NDArray[np.bool_]
    transpose: NDArray[np.bool_]
    brightness: _Array
    contrast: _Array
    saturation: _Array
    hue: _Array
    gray: NDArray[np.bool_]
    sigma_px: _Array
    solarize: NDArray[np.bool_]
    stain_scale: _Array
    stain_shift: _Array

    def __len__(self) -> int:
        return len(self.x)

    def rows(self, which: NDArray[np.int64]) -> ViewTable:
        """Some of the views."""
        return ViewTable(**{field.name: getattr(self, field.name)[which] for field in fields(self)})

    @classmethod
    def join(cls, tables: Sequence[ViewTable]) -> ViewTable:
        """One table with the rows of several, in their order."""
        return cls(
            **{
                field.name: np.concatenate([getattr(table, field.name) for table in tables])
                for field in fields(cls)
            }
        )


def draw_views(
    spec: ViewSpec,
    seed: int,
    draws: NDArray[np.int64],
    view: int | NDArray[np.int64],
    patch_px: int,
) -> ViewTable:
    """The table of view number `view` for each draw; a pure function of (seed, draw, view).

    view: one number, or one for each draw.
    """
    # imported late: online_patching pulls in its readers, and this module must stay cheap
    from online_patching import philox

    crop_words = 2 * CROP_ATTEMPTS
    words = philox.words(
        seed, draws, attempt=0, stream=VIEW_STREAM_BASE + view, count=crop_words + len(_WORDS)
    )
    uniform = philox.uniform(words)
    u = dict(zip(_WORDS, uniform[:, crop_words:].T, strict=True))
    width, height = _crop_size(
        spec, uniform[:, :crop_words].reshape(-1, CROP_ATTEMPTS, 2), patch_px
    )
    jittered = u["jitter"] < spec.jitter
    flip = u["flip"] < spec.flip
    restained = (u["restain"] < spec.restain)[:, None] & (spec.hed > 0)
    scales = np.stack([u["scale_h"], u["scale_e"], u["scale_d"]], axis=1)
    shifts = np.stack([u["shift_h"], u["shift_e"], u["shift_d"]], axis=1)
    turns = np.where(u["turn"] < spec.turn, np.floor(4 * u["quarter_turns"]), 0)
    return ViewTable(
        x=u["x"] * (patch_px - width),
        y=u["y"] * (patch_px - height),
        width=width,
        height=height,
        # A flip, then k quarter turns anticlockwise (numpy.rot90), as flips and one transposition.
        flip_x=flip ^ np.isin(turns, (1, 2)),
        flip_y=np.isin(turns, (2, 3)),
        transpose=turns % 2 == 1,
        brightness=np.where(jittered, _around(1.0, spec.brightness, u["brightness"]), 1.0),
        contrast=np.where(jittered, _around(1.0, spec.contrast, u["contrast"]), 1.0),
        saturation=np.where(jittered, _around(1.0, spec.saturation, u["saturation"]), 1.0),
        hue=np.where(jittered, _around(0.0, spec.hue, u["hue"]), 0.0),
        gray=u["gray"] < spec.gray,
        sigma_px=np.where(u["blur"] < spec.blur, _lerp(u["sigma"], *spec.blur_sigma_px), 0.0),
        solarize=u["solarize"] < spec.solarize,
        stain_scale=np.where(restained, _around(1.0, spec.hed, scales), 1.0),
        stain_shift=np.where(restained, _around(0.0, spec.hed, shifts), 0.0),
    )


def _crop_size(spec: ViewSpec, u: _Array, patch_px: int) -> tuple[_Array, _Array]:
    """Width and height of the first of ten crops that fits, else of the whole patch."""
    area = _lerp(u[..., 0], *spec.scale)
    ratio = np.exp(_lerp(u[..., 1], math.log(spec.ratio[0]), math.log(spec.ratio[1])))
    width, height = np.sqrt(area * ratio), np.sqrt(area / ratio)
    fits = (width <= 1.0) & (height <= 1.0)
    rows, first = np.arange(len(u)), fits.argmax(axis=1)
    found = fits.any(axis=1)
    return (
        np.where(found, width[rows, first], 1.0) * patch_px,
        np.where(found, height[rows, first], 1.0) * patch_px,
    )


def _around(centre: float, spread: float, u: _Array) -> _Array:
    return centre + spread * (2.0 * u - 1.0)


def _lerp(u: _Array, low: float, high: float) -> _Array:
    return low + (high - low) * u
