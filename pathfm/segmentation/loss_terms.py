"""One term of a segmentation loss as config; needs no torch, so that ``--help`` is quick.

loss: [{name: bce}, {name: dice, smooth: 1.0, weight: 0.5}]
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

Reduction = Literal["image", "batch"]
EmptyRule = Literal["count", "skip"]
LossName = Literal["bce", "soft_bce", "focal", "dice", "jaccard", "tversky", "focal_tversky", "mcc"]

_SUMMED = ("reduction", "empty", "class_weights", "classes")
_PIXELWISE = ("reduction", "class_weights", "classes")
OPTIONS: dict[LossName, tuple[str, ...]] = {
    "bce": ("label_smoothing", *_PIXELWISE),
    "soft_bce": ("label_smoothing", *_PIXELWISE),
    "focal": ("gamma", "alpha", *_PIXELWISE),
    "dice": ("smooth", "beta", "squared", *_SUMMED),
    "jaccard": ("smooth", *_SUMMED),
    "tversky": ("alpha", "beta", "smooth", *_SUMMED),
    "focal_tversky": ("alpha", "beta", "gamma", "smooth", *_SUMMED),
    "mcc": _SUMMED,
}

LARGEST = 1e6  # of any weight or option: beyond it float32 sums and squares may overflow

_Amount = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False)]


class LossTerm(BaseModel, frozen=True, extra="forbid"):
    """A loss, its weight in the sum, and its options; an option left out has the loss's default.

    Refuses an option that the named loss does not have, and says which it has, and values that
    the loss refuses whatever the number of classes.
    """

    name: LossName = Field(description="which loss")
    weight: float = Field(
        1.0, gt=0, le=LARGEST, allow_inf_nan=False, description="its weight in the sum"
    )
    smooth: _Amount | None = Field(None, description="pixels added to both sides of the fraction")
    alpha: _Amount | None = Field(
        None, description="Tversky: weight of false positives; focal: of the foreground (0..1)"
    )
    beta: _Amount | None = Field(
        None, description="Tversky: weight of false negatives; dice: of recall (F-beta)"
    )
    gamma: _Amount | None = Field(None, description="how far focal losses focus")
    squared: bool | None = Field(None, description="dice: squares below the line (V-Net)")
    label_smoothing: float | None = Field(None, ge=0, le=1, description="0.1: 1 becomes 0.95")
    reduction: Reduction | None = Field(None, description="count each image, or the whole batch")
    empty: EmptyRule | None = Field(None, description="absent classes: count (1 if empty) or skip")
    class_weights: tuple[_Amount, ...] | None = Field(None, description="one weight a class")
    classes: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="classes that take part; leave 0 out to drop the background"
    )

    @property
    def options(self) -> dict[str, Any]:
        """The options that were given, as keywords of the loss."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return {k: v for k, v in given.items() if k not in ("name", "weight") and v is not None}

    @model_validator(mode="after")
    def _fits_the_loss(self) -> LossTerm:
        has = OPTIONS[self.name]
        for option in self.options:
            if option not in has:
                raise ValueError(f"{self.name} has no option {option!r}: it has {', '.join(has)}")
        if self.classes is not None and len({*self.classes}) != max(1, len(self.classes)):
            raise ValueError(
                f"classes = {list(self.classes)}: wants different numbers, at least one"
            )
        if self.class_weights is not None and not any(self.class_weights):
            raise ValueError(f"class_weights = {list(self.class_weights)}: wants one above 0")
        self._values_fit()
        return self

    def _values_fit(self) -> None:
        """Raises ValueError for values that make no sense for the named loss."""
        if self.name in ("tversky", "focal_tversky") and self.alpha == 0 and self.beta == 0:
            raise ValueError("alpha = beta = 0: no error would cost anything")
        if self.name == "focal" and self.alpha is not None and self.alpha > 1:
            raise ValueError(f"alpha = {self.alpha}: focal wants 0 to 1")
        if self.name == "focal" and self.alpha is not None and self.class_weights is not None:
            raise ValueError("focal wants alpha (binary) or class_weights, not both")
        if self.name == "focal_tversky" and not (self.gamma is None or 0.1 <= self.gamma <= 10):
            raise ValueError(f"gamma = {self.gamma}: focal_tversky wants 0.1 to 10")
        if self.squared and self.beta not in (None, 1):
            raise ValueError("the V-Net form (squared) has no beta")
