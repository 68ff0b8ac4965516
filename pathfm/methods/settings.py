"""The settings of each method, without its imports: what a YAML file may say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]


class DinoSettings(BaseModel, frozen=True, extra="forbid"):
    """DINO's own knobs; defaults are those of Caron et al. 2021 for a ViT-S where not said."""

    out_dim: int = Field(65536, ge=2, description="prototypes K: width of the head's output")
    hidden_dim: int = Field(2048, ge=1, description="width of the head's two hidden layers")
    bottleneck_dim: int = Field(256, ge=1, description="width before the prototypes")
    norm_last_layer: bool = Field(True, description="keep every prototype at length 1")
    student_temp: float = Field(0.1, gt=0, le=1, description="temperature of the student's softmax")
    warmup_teacher_temp: float = Field(
        0.04, gt=0, le=1, description="temperature of the teacher's softmax at step 0"
    )
    teacher_temp: float = Field(
        0.04, gt=0, le=1, description="temperature of the teacher's softmax after its warm-up"
    )
    warmup_teacher_temp_steps: int = Field(
        0, ge=0, description="optimizer steps from the first temperature to the second, a line"
    )
    center_momentum: float = Field(
        0.9, ge=0, lt=1, description="share of the old centre kept at each step"
    )
    ema: tuple[Share, Share] = Field(
        (0.99, 1.0),
        description="share of the teacher kept at each step: first and last, along a cosine "
        "(0.996 in the paper, for runs a hundred times longer)",
    )
    freeze_last_layer_steps: int = Field(
        0, ge=0, description="optimizer steps in which the prototypes do not move"
    )
    freeze_patch_embed: bool = Field(
        True, description="keep the patch projection at its initial weights (steadier, cheaper)"
    )


class Dinov2Settings(DinoSettings, frozen=True, extra="forbid"):
    """DINOv2's own knobs; defaults are those of Oquab et al. 2023 and their code where not said."""

    teacher_temp: float = Field(
        0.07, gt=0, le=1, description="temperature of the teacher's softmax after its warm-up"
    )
    warmup_teacher_temp_steps: int = Field(
        1000,
        ge=0,
        description="optimizer steps from the first temperature to the second, a line (DINOv2: "
        "37,500 of 125,000)",
    )
    ema: tuple[Share, Share] = Field(
        (0.992, 1.0),
        description="share of the teacher kept at each step: first and last, along a cosine",
    )
    freeze_patch_embed: bool = Field(
        False, description="keep the patch projection at its initial weights (steadier, cheaper)"
    )
    centring: Literal["sinkhorn", "softmax"] = Field(
        "sinkhorn",
        description="targets of CLS and patches: Sinkhorn-Knopp over the global batch, or DINO's "
        "moving centre and a softmax",
    )
    sinkhorn_iterations: int = Field(
        3, ge=1, le=100, description="scalings of columns and rows by Sinkhorn-Knopp"
    )
    dino_weight: float = Field(1.0, gt=0, le=1000, description="weight of the loss on CLS tokens")
    ibot_weight: float = Field(
        1.0, gt=0, le=1000, description="weight of the loss on masked patch tokens"
    )
    separate_ibot_head: bool = Field(
        True, description="a head of their own for patch tokens (the paper, at scale), or CLS's"
    )
    ibot_out_dim: int | None = Field(
        None, ge=2, description="prototypes of the patches' own head (unset: out_dim)"
    )
    mask_probability: float = Field(
        0.5, ge=0, le=1, description="probability that a global view has masked patches"
    )
    mask_ratio: tuple[Share, Share] = Field(
        (0.1, 0.5), description="smallest and largest share of a masked view's patches"
    )
    regulariser: Literal["koleo", "kde"] = Field(
        "koleo",
        description="what spreads the student's global CLS tokens: nearest neighbours (KoLeo), or "
        "a kernel density estimate (KDE, as Virchow2 and Midnight)",
    )
    regulariser_weight: float = Field(
        0.1,
        ge=0,
        le=1000,
        description="weight of that term, summed over the global views; 0: none (KDE: 0.05)",
    )
    kde_concentration: float = Field(
        5.0, gt=0, le=1000, description="concentration kappa of KDE's von Mises-Fisher kernels"
    )

    @model_validator(mode="after")
    def _check(self) -> Dinov2Settings:
        low, high = self.mask_ratio
        if not 0 < low <= high:
            raise ValueError(f"mask_ratio must be 0 < low <= high <= 1, not {low}, {high}")
        if self.ibot_out_dim is not None and not self.separate_ibot_head:
            raise ValueError(
                f"ibot_out_dim {self.ibot_out_dim} without separate_ibot_head: one head has one "
                "width. Leave it out, or give patches a head of their own"
            )
        return self


class ContrastiveSettings(BaseModel, frozen=True, extra="forbid"):
    """What SimCLR and SupCon have in common: temperature and projection head."""

    temperature: float = Field(
        0.1,
        gt=0,
        le=10,
        description="temperature tau that cosines are divided by (0.1: both papers)",
    )
    hidden_dim: int = Field(2048, ge=1, description="width of the projection's hidden layer")
    projection_dim: int = Field(
        128, ge=2, description="width of the projection the loss is taken on"
    )


class SimclrSettings(ContrastiveSettings, frozen=True, extra="forbid"):
    """SimCLR's own knobs; defaults are those of Chen et al. 2020 for a ResNet-50."""


class SupconSettings(ContrastiveSettings, frozen=True, extra="forbid"):
    """SupCon's own knobs; defaults are those of Khosla et al. 2020."""

    kind: Literal["out", "in"] = Field(
        "out",
        description="sum over positives outside the logarithm (L_out, better) or inside (L_in)",
    )


class SupervisedSettings(BaseModel, frozen=True, extra="forbid"):
    """Knobs of the cross-entropy baseline."""

    n_classes: int | None = Field(
        None,
        ge=2,
        description="classes the classifier tells apart (unset: as many as the labels have)",
    )
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each target spread evenly over all classes"
    )
