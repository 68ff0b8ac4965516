"""Verb `erf`: how much of a picture each network really looks at, before and after training.

The effective receptive field (Luo et al. 2016, arXiv 1701.04128) of an output is where the input's
gradient of its central cell is large. Here, for every input pixel, the energy

    E(y, x) = mean over inputs of  e / sum e,   e = sum over R, G, B of  (d sum_c s_c f_c(centre) / d rgb)^2

with s_c = +1 or -1 at random, anew for every input. Each input counts alike: unscaled, one with a large
gradient (flat glass under a layer norm) decides alone. Not the plain sum over channels: after a layer
norm that sum is constant and its gradient zero, wherever the network looks.

One PNG, a column for each output (logits of a U-Net; each stage and the logits of a SegFormer; tokens
of a ViT), untrained above trained, and the same figures as JSON.

    networks.py  what is looked through, and at which outputs
    fields.py    the gradient's energy, and the radii that hold its shares
    picture.py   the panels
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from pathfm.runtime import PathfmError, make_folder, provenance

if TYPE_CHECKING:  # torch is imported when there is work, not for --help
    from torch import Tensor

    from pathfm.erf.fields import Field2d

__all__ = ["ErfConfig", "ErfResult", "run"]


class ErfConfig(BaseModel, frozen=True, extra="forbid"):
    """Which networks to look through, and at what."""

    out: Path = Field(Path("erf.png"), description="the picture; figures go beside it as .json")
    models: list[str] = Field(
        ["unet", "segformer_b0"], description="segmentation models, drawn untrained"
    )
    weights: list[Path] = Field(
        [], description="trained weights of segmentation models, drawn below their untrained selves"
    )
    vit: str = Field("vit_tiny_patch16_224", description="a ViT by timm name; empty for none")
    vit_weights: str | None = Field(
        None, description="its trained weights: a .safetensors file or a run folder"
    )
    size_px: int = Field(512, ge=32, le=4096, description="side of the pictures looked at")
    inputs: int = Field(16, ge=1, le=10_000, description="pictures averaged over")
    seed: int = Field(0, ge=0, lt=2**64, description="of first weights, pictures and signs")


@dataclass(frozen=True)
class ErfResult:
    """What was measured, and where the picture is."""

    fields: tuple[Field2d, ...]
    path: Path


def run(config: ErfConfig) -> ErfResult:
    """Writes the picture and its figures, and prints the radii."""
    from online_patching.stores.local import atomic_write_bytes, atomic_write_text
    from pathfm.erf.fields import SHARES, Field2d, receptive_fields
    from pathfm.erf.networks import networks
    from pathfm.erf.picture import drawn

    if not (config.models or config.weights or config.vit):
        raise PathfmError("nothing to look through: name models, weights or a vit")
    pictures = [_picture(config, number) for number in range(config.inputs)]
    found: list[Field2d] = []
    for network, trained, weights, outputs in networks(config):
        fields = receptive_fields(outputs, pictures, config.seed)
        for output, (energy, centre) in fields.items():
            found.append(Field2d(network, output, trained, weights, energy, centre))
            radii = "  ".join(f"{s:.0%} {found[-1].radius_px(s):6.1f} px" for s in SHARES)
            print(f"{network:14} {output:8} {'trained' if trained else 'untrained':9}  {radii}")
    make_folder(config.out.parent)
    atomic_write_bytes(config.out, drawn(found, config.size_px))
    figures = {
        **config.model_dump(mode="json"),
        **provenance(),
        "fields": [_told(f) for f in found],
    }
    atomic_write_text(config.out.with_suffix(".json"), json.dumps(figures, indent=1) + "\n")
    print(f"picture: {config.out}")
    return ErfResult(tuple(found), config.out)


def _picture(config: ErfConfig, number: int) -> Tensor:
    """A synthetic thumbnail, (1, 3, side, side) in 0..1."""
    import numpy as np
    import torch

    from pathfm.segmentation.synthetic import draw_thumbnail

    rgb = draw_thumbnail(config.seed, number, config.size_px).rgb
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None].float() / 255


def _told(field: Field2d) -> dict[str, Any]:
    """A field's figures."""
    from pathfm.erf.fields import SHARES

    radii = {f"radius_{share:.0%}_px".replace("%", ""): field.radius_px(share) for share in SHARES}
    told = {"network": field.network, "output": field.output, "trained": field.trained}
    return {**told, "weights": field.weights, **{k: round(v, 1) for k, v in radii.items()}}
