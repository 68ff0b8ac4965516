"""A micro-batch's views through a backbone."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from pathfm.backbone import Backbone, SampleKeys
from pathfm.methods.protocol import MicroBatch


def embed_views(backbone: Backbone, micro: MicroBatch, n_views: int | None = None) -> Tensor:
    """Features (v b, dim) of the first `n_views` views (None: all), view by view, sample by sample.

    One forward pass a run of views of one size. Stochastic depth is keyed by draw and view.
    """
    views = micro.views[:n_views]
    features = []
    for _, numbered in groupby(enumerate(views), key=lambda pair: pair[1].shape[-2:]):
        numbers, group = zip(*numbered, strict=True)
        keys = SampleKeys.of_views(micro.seed, micro.draws, numbers)
        features.append(backbone.embed(torch.cat(group), keys))
    return torch.cat(features)
