"""SupCon (Khosla et al. 2020, arXiv 2004.11362): the views of a class against all others.

Labels come with the micro-batches, -1 for none. Batches balanced by class give every anchor
positives of other samples; see `pathfm.labels`.
"""

from __future__ import annotations

from pathfm.backbone import Backbone
from pathfm.methods.contrastive import Contrastive
from pathfm.methods.settings import SupconSettings


def build(backbone: Backbone, settings: SupconSettings, *, steps: int, seed: int) -> Contrastive:
    """SupCon around `backbone`, which it trains in place."""
    return Contrastive(backbone, settings, seed, kind=settings.kind, by_class=True)
