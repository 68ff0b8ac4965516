"""A backbone as a folder in timm's local-dir form, which timm loads without us."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from timm.models import save_for_hf

from pathfm.backbone.network import Backbone


def export_backbone(backbone: Backbone, folder: Path) -> None:
    """Writes model.safetensors and config.json so that timm.create_model("local-dir:...") loads it.

    The config carries mean, std and input size: others need nothing of ours to use the model.
    Neither the mask token nor stochastic depth is in it.
    """
    network = cast(Any, backbone.network)
    network.pretrained_cfg = dict(network.pretrained_cfg) | {
        "mean": backbone.mean,
        "std": backbone.std,
    }
    size = {"input_size": (3, backbone.input_px, backbone.input_px)}
    save_for_hf(network, str(folder), safe_serialization=True, data_config=size)
