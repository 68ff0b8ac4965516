"""Attention-based multiple instance learning: a bag of patch features -> the logits of a slide.

The gated form of Ilse et al. 2018 (arXiv:1802.04712), eq. 8 and 9, with kaiko-eva's sizes: features are
projected to 128 first, so that the products of long vectors are not all nearly alike. Bags of a
batch lie one behind the other, so that nothing is padded, masked or computed in vain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pathfm.runtime import PathfmError


class AbMil(nn.Module):
    """Logits (B, outputs) of B bags of features.

    dim: width of a feature. outputs: logits. projected: width the features are projected to first, None
    for none. attention: hidden width of both attention branches. hidden: widths of the classifier's
    hidden layers (ReLU). Parameters are made in kaiko-eva's order, so one torch seed makes both alike.
    """

    def __init__(
        self,
        dim: int,
        outputs: int,
        projected: int | None = 128,
        attention: int = 128,
        hidden: Sequence[int] = (128, 64),
    ) -> None:
        super().__init__()
        width = projected or dim
        self.project = nn.Linear(dim, width) if projected else nn.Identity()
        self.value = nn.Linear(width, attention)
        self.gate = nn.Linear(width, attention)
        self.score = nn.Linear(attention, 1)
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        self.classify = nn.Sequential(*layers, nn.Linear(width, outputs))

    def forward(self, features: Tensor, sizes: Sequence[int]) -> Tensor:
        """features: all bags' patches one behind the other, (sum of sizes, dim); sizes: patches a bag.

        -> (B, outputs). The order of the patches in a bag does not matter. Raises PathfmError for an
        empty bag and for sizes that do not add up.
        """
        projected, weights = self._weighed(features, sizes)
        pooled = [w @ x for w, x in zip(weights, torch.split(projected, list(sizes)), strict=True)]
        return cast(Tensor, self.classify(torch.stack(pooled)))

    def attention(self, features: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """What each patch weighs in its slide: a tensor (n,) a bag, which sums to 1."""
        return self._weighed(features, sizes)[1]

    def _weighed(self, features: Tensor, sizes: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        _check_sizes(features, sizes)
        x = self.project(features)
        scores = self.score(torch.tanh(self.value(x)) * torch.sigmoid(self.gate(x)))[:, 0]
        return x, [part.softmax(0) for part in torch.split(scores, list(sizes))]


class MeanPool(nn.Module):
    """Logits (B, outputs) of the mean of each bag, by one linear layer: what attention must beat."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.classify = nn.Linear(dim, outputs)

    def forward(self, features: Tensor, sizes: Sequence[int]) -> Tensor:
        """As `AbMil.forward`."""
        _check_sizes(features, sizes)
        pooled = torch.stack([part.mean(0) for part in torch.split(features, list(sizes))])
        return cast(Tensor, self.classify(pooled))


def _check_sizes(features: Tensor, sizes: Sequence[int]) -> None:
    if sum(sizes) != len(features) or not sizes or min(sizes) < 1:
        raise PathfmError(
            f"{len(features):,} features cannot be bags of {list(sizes)[:5]} patches: each bag wants "
            "at least one, and together they are all the rows"
        )
