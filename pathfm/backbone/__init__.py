"""Backbones by timm name: vision transformers and ConvNets. The only package that imports timm.

create.py    a name -> the structure, without classifier and without unkeyed randomness
weights.py   imagenet, dinov2, a file, a run's folder or random -> tensors, every one accounted for
network.py   Backbone: embed, tokens, mask token, layers
keyed.py     stochastic depth that follows from (seed, draw, view, layer)
layers.py    how deep a parameter lies
export.py    a folder that timm.create_model("local-dir:...") loads
"""

from pathfm.backbone.export import export_backbone
from pathfm.backbone.keyed import SampleKeys
from pathfm.backbone.network import INIT_STREAM, Backbone, seeded_init
from pathfm.backbone.weights import find_backbone_folder, load_backbone

__all__ = [
    "INIT_STREAM",
    "Backbone",
    "SampleKeys",
    "export_backbone",
    "find_backbone_folder",
    "load_backbone",
    "seeded_init",
]
