"""The settings of each method, without its imports: what a YAML file may say."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

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
