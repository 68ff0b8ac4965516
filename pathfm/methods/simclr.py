"""SimCLR (Chen et al. 2020, arXiv 2002.05709): the views of a sample against all other samples.

NT-Xent is `supcon_loss` with one label a sample. Two views as in the paper, or more.
"""

from __future__ import annotations

from pathfm.backbone import Backbone
from pathfm.methods.contrastive import Contrastive
from pathfm.methods.settings import SimclrSettings


def build(backbone: Backbone, settings: SimclrSettings, *, steps: int, seed: int) -> Contrastive:
    """SimCLR around `backbone`, which it trains in place."""
    return Contrastive(backbone, settings, seed, kind="out", by_class=False)
