"""The parts of a pretraining run's settings: views, optimizer, reading, estimates. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from pathfm.views import ViewSpec

Decay = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FirstGlobalView(ViewSpec, frozen=True, extra="forbid"):
    """DINO's first global crop: always blurred."""

    size_px: int = Field(224, ge=8, le=1024, description="side of the view in pixels")
    scale: tuple[float, float] = Field(
        (0.4, 1.0), description="smallest and largest share of the patch's area that is cropped"
    )
    blur: float = Field(1.0, ge=0, le=1, description="probability of a Gaussian blur")


class SecondGlobalView(FirstGlobalView, frozen=True, extra="forbid"):
    """DINO's second global crop: seldom blurred, sometimes solarised."""

    blur: float = Field(0.1, ge=0, le=1, description="probability of a Gaussian blur")
    solarize: float = Field(
        0.2, ge=0, le=1, description="probability that values >= 0.5 are inverted"
    )


class ViewsConfig(BaseModel, frozen=True, extra="forbid"):
    """The views of each patch: global crops, and local ones beside them. Defaults are DINO's; each
    method has its own in `METHOD_VIEWS`."""

    global_1: FirstGlobalView = Field(FirstGlobalView(), description="the first global crop")
    global_2: SecondGlobalView = Field(SecondGlobalView(), description="the second global crop")
    local: ViewSpec = Field(ViewSpec(), description="every local crop")
    n_global: int = Field(
        2, ge=1, le=2, description="number of global crops; unset: the method's (supervised 1)"
    )
    n_local: int = Field(
        8, ge=0, le=64, description="number of local crops; unset: the method's (DINO, DINOv2 8)"
    )

    @model_validator(mode="after")
    def _globals_go_through_in_one_pass(self) -> ViewsConfig:
        one, two = self.global_1.size_px, self.global_2.size_px
        if self.n_global == 2 and one != two:
            raise ValueError(f"global_1.size_px {one} and global_2.size_px {two} must be equal")
        return self

    @property
    def specs(self) -> list[ViewSpec]:
        """One spec a view, the global ones first."""
        return [*[self.global_1, self.global_2][: self.n_global], *[self.local] * self.n_local]


_CONTRASTED: dict[str, Any] = {"scale": (0.2, 1.0), "blur": 0.5, "solarize": 0.0}
"""Chen et al. 2020 (appendix A: jitter at 0.8, grey 0.2, blur at 0.5), the colour as DINO's; crops
from 0.2 of the area as in SupCon's reference code, for 0.08 of a patch is a few cells."""

METHOD_VIEWS: dict[str, dict[str, Any]] = {
    "dino": {},
    "dinov2": {  # Oquab et al. 2023, ssl_default_config.yaml
        "global_1": {"scale": (0.32, 1.0)},
        "global_2": {"scale": (0.32, 1.0)},
        "local": {"scale": (0.05, 0.32)},
    },
    "simclr": {"global_1": _CONTRASTED, "global_2": _CONTRASTED, "n_local": 0},
    "supcon": {"global_1": _CONTRASTED, "global_2": _CONTRASTED, "n_local": 0},
    # one view, drawn as SupCon's: the two are compared
    "supervised": {"global_1": _CONTRASTED, "n_global": 1, "n_local": 0},
}
"""What each method's views are where the settings say nothing."""

MULTI_CROP = ("dino", "dinov2")
"""Methods with local crops beside the two global ones."""


def views_of(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's own views under those that are given."""
    return _under(METHOD_VIEWS.get(method, {}), given)


def _under(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        nested = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = _under(below, value) if nested else value  # type: ignore[arg-type]
    return merged


class OptimConfig(BaseModel, frozen=True, extra="forbid"):
    """AdamW and its schedules, all in optimizer steps."""

    lr: float = Field(5e-4, gt=0, lt=1, description="learning rate after warm-up, not scaled by us")
    min_lr: float = Field(1e-6, ge=0, lt=1, description="learning rate at the last step, a cosine")
    warmup_steps: int = Field(0, ge=0, description="optimizer steps from 0 to lr, a line")
    weight_decay: tuple[Decay, Decay] = Field(
        (0.04, 0.4), description="first and last, along a cosine; not on biases and norms"
    )
    clip_grad_norm: float = Field(3.0, gt=0, description="largest norm of the whole gradient")
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="factor on the learning rate for every layer of the backbone further from the top",
    )
    patch_embed_lr: float = Field(
        1.0, gt=0, le=1, description="factor on the learning rate of the patch projection"
    )


class ReadingConfig(BaseModel, frozen=True, extra="forbid"):
    """How patches are read, and what may fail; where nothing fails, none of it changes which."""

    workers: int = Field(
        0, ge=0, le=256, description="loader processes of each rank; 0: threads in this one"
    )
    threads: int = Field(2, ge=1, le=256, description="decode threads of each process")
    prefetch: int | None = Field(
        None,
        ge=1,
        le=64,
        description="batches read ahead; unset: 2, or what a network's latency needs",
    )
    max_failed_fraction: float = Field(
        0.05,
        ge=0,
        le=1,
        description="share of the draws that may fail for damage before the run stops; draws of slides that "
        "are gone or replaced do not count",
    )
    quarantine_after: int | None = Field(
        8,
        ge=1,
        description="failures of a slide in a window, and half of the draws that chose it, before it is left "
        "out; null: never",
    )
    window_draws: int = Field(
        2**16,
        ge=1,
        le=2**40,
        description="draws in a window, at least batch_size; a slide is left out from the window after next on",
    )


class EstimateConfig(BaseModel, frozen=True, extra="forbid"):
    """What `--dry-run` counts, and what time and money are reckoned with."""

    draws: int = Field(
        16_384, ge=1, le=2**22, description="first draws of the run that are planned, at most"
    )
    time_patches: int = Field(
        256, ge=0, le=65_536, description="patches that are really read to time it; 0: none are"
    )
    patches_per_s: float | None = Field(
        None, gt=0, description="rate at which training takes patches, where it is known"
    )
    price_per_gb: float = Field(0, ge=0, description="price of a GB (10^9 bytes) read remotely")
    price_per_1000_gets: float = Field(0, ge=0, description="price of 1,000 remote requests")
