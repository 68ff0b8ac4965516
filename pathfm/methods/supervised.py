"""Cross-entropy on labels through a linear classifier: the baseline SupCon is measured against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathfm import ranks
from pathfm.backbone import Backbone, seeded_init
from pathfm.methods.embedding import embed_views
from pathfm.methods.protocol import MicroBatch
from pathfm.methods.settings import SupervisedSettings
from pathfm.runtime import PathfmError

HEAD_INIT_DRAW = 1
"""Draw number of the classifier's initial weights under the run's seed."""


class Supervised(nn.Module):
    """Backbone and linear classifier; see `pathfm.methods.Method`.

    The loss is the mean over the labelled samples (-1: none) of the global batch, each in its first view.
    """

    def __init__(self, backbone: Backbone, settings: SupervisedSettings, seed: int) -> None:
        super().__init__()
        if settings.n_classes is None:
            raise PathfmError("supervised.n_classes is not known: give labels, or set it")
        self.settings = settings
        with seeded_init(seed, HEAD_INIT_DRAW):
            head = nn.Linear(backbone.dim, settings.n_classes)
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.student.train()
        self._seen: list[Tensor] = []
        self._labelled = torch.zeros(2)
        self._correct: list[Tensor] = []
        self._diagnostics: dict[str, Tensor] = {}

    @property
    def exported(self) -> Backbone:
        """The trained backbone, without the classifier."""
        return cast(Backbone, self.student["backbone"])

    def trained(self) -> nn.Module:
        """Backbone and classifier."""
        return self.student

    def look(self, micro: MicroBatch) -> None:
        """How many samples have a label, and how many there are."""
        if micro.labels is None:
            raise PathfmError("supervised without labels: say where they come from (labels)")
        n = torch.full((), len(micro), dtype=torch.float32, device=micro.labels.device)
        self._seen.append(torch.stack([(micro.labels >= 0).sum().float(), n]))

    def settle(self, step: int) -> None:
        """The same over micro-batches and ranks."""
        self._labelled = ranks.sum_over_ranks(torch.stack(self._seen).sum(0))
        self._seen, self._correct = [], []

    def forward(self, micro: MicroBatch) -> Tensor:
        """`loss`."""
        return self.loss(micro)

    def loss(self, micro: MicroBatch) -> Tensor:
        """Summed cross-entropy of our labelled samples, times ranks, over all ranks' number; fp32.

        0, with a gradient of 0, where no sample of the step has a label.
        """
        logits = self.student["head"](embed_views(self.exported, micro, 1))
        labels = cast(Tensor, micro.labels)
        with torch.autocast(logits.device.type, enabled=False):
            logits = logits.float()
            total = F.cross_entropy(
                logits,
                labels,
                ignore_index=-1,
                reduction="sum",
                label_smoothing=self.settings.label_smoothing,
            )
            self._correct.append((logits.argmax(1) == labels).sum())
            return total / self._labelled[0].clamp(min=1) * ranks.world_size()

    def before_update(self, step: int) -> None:
        """Adds up what was right, over micro-batches and ranks."""
        correct = ranks.sum_over_ranks(torch.stack(self._correct).sum())
        labelled, samples = self._labelled.unbind()
        self._diagnostics = {
            "train_accuracy": correct / labelled,
            "labelled_share": labelled / samples,
        }

    def after_update(self, step: int) -> None:
        """Nothing: the optimizer owns all there is."""

    def diagnostics(self) -> Mapping[str, Tensor]:
        """Of the global batch, before the update: train_accuracy over views, 0..1 (NaN without a
        label), and labelled_share, the samples that have one."""
        return self._diagnostics


def build(backbone: Backbone, settings: SupervisedSettings, *, steps: int, seed: int) -> Supervised:
    """A classifier on `backbone`, which it trains in place."""
    return Supervised(backbone, settings, seed)
