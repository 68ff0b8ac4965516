"""What SimCLR and SupCon share: a projection on the sphere, and a loss over all views of a batch.

The head has no BatchNorm (SimCLR's has): it would couple samples a second time, within a
micro-batch only, so that the step would depend on how its batch is split. Nothing else couples
samples but the loss, which is taken over all ranks and micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn

from pathfm import ranks
from pathfm.backbone import Backbone, seeded_init
from pathfm.losses.sphere import sphere_facts, sphere_sums
from pathfm.losses.supcon import Kind, supcon_loss
from pathfm.methods.caching import JointLoss
from pathfm.methods.embedding import embed_views
from pathfm.methods.protocol import MicroBatch
from pathfm.methods.settings import ContrastiveSettings
from pathfm.runtime import PathfmError

HEAD_INIT_DRAW = 1
"""Draw number of the head's initial weights under the run's seed."""


class Contrastive(nn.Module):
    """Backbone and projection head under `supcon_loss`; see `pathfm.methods.Method`.

    by_class: positives are the views of a class (SupCon), else those of one sample (SimCLR).
    """

    def __init__(
        self,
        backbone: Backbone,
        settings: ContrastiveSettings,
        seed: int,
        *,
        kind: Kind,
        by_class: bool,
    ) -> None:
        super().__init__()
        self.settings, self.kind, self.by_class = settings, kind, by_class
        with seeded_init(seed, HEAD_INIT_DRAW):
            head = SimCLRProjectionHead(
                backbone.dim,
                settings.hidden_dim,
                settings.projection_dim,
                num_layers=2,
                batch_norm=False,
            )
        self.student = nn.ModuleDict({"backbone": backbone, "head": head})
        self.student.train()
        self._joint = JointLoss(self._share)
        self._seen: dict[int, Tensor] = {}
        self._classes: Tensor | None = None
        self._diagnostics: dict[str, Tensor] = {}

    @property
    def exported(self) -> Backbone:
        """The trained backbone; the projection is thrown away (SimCLR, section 4.2; SupCon, 3.1)."""
        return cast(Backbone, self.student["backbone"])

    def trained(self) -> nn.Module:
        """Backbone and head."""
        return self.student

    def look(self, micro: MicroBatch) -> None:
        """Classes always; projections where there are several micro-batches."""
        if self.by_class:
            if micro.labels is None:
                raise PathfmError("SupCon without labels: say where they come from (labels)")
            self._seen[micro.index] = micro.labels
        elif len(micro.views) < 2:
            raise PathfmError("SimCLR with one view a sample has no positives: draw two or more")
        self._joint.look(micro, self._project)

    def settle(self, step: int) -> None:
        """Gathers the classes of the global batch; with micro-batches, the loss and its gradient."""
        if self.by_class:
            ours = torch.cat([self._seen[index] for index in sorted(self._seen)])
            self._classes = ranks.gather_rows(ours)
            self._seen = {}
        self._joint.settle()

    def forward(self, micro: MicroBatch) -> Tensor:
        """`loss`."""
        return self.loss(micro)

    def loss(self, micro: MicroBatch) -> Tensor:
        """This micro-batch's share of the mean over the anchors of the global batch, fp32."""
        return self._joint.loss(micro, self._project(micro))

    def before_update(self, step: int) -> None:
        """Nothing."""

    def after_update(self, step: int) -> None:
        """Nothing: the optimizer owns all there is."""

    def diagnostics(self) -> Mapping[str, Tensor]:
        """Of the global batch: `losses.sphere.sphere_facts` of projections, and the temperature."""
        return self._diagnostics

    def _project(self, micro: MicroBatch) -> Tensor:
        """Projections (b, v, d) of length 1, fp32: all views of a sample beside each other."""
        features = self.student["head"](embed_views(self.exported, micro))
        with torch.autocast(features.device.type, enabled=False):
            z = F.normalize(features.float(), dim=1)
        return z.view(len(micro.views), len(micro), -1).transpose(0, 1)

    def _share(self, ours: Tensor) -> Tensor:
        """The loss of our rows (n, v, d) as anchors against all ranks' rows."""
        z = ranks.gather_rows(ours.flatten(0, 1), grad=True)
        n_views, n_rows = ours.shape[1], ours.shape[0] * ours.shape[1]
        samples = self._classes
        if samples is None:
            samples = torch.arange(len(z) // n_views, device=z.device)
        labels = samples.repeat_interleave(n_views)
        anchors = slice(ranks.rank() * n_rows, (ranks.rank() + 1) * n_rows)
        temperature = self.settings.temperature
        facts = sphere_facts(ranks.sum_over_ranks(sphere_sums(z, labels, anchors)))
        self._diagnostics = facts | {"temperature": z.new_full((), temperature).detach()}
        return supcon_loss(z, labels, temperature, self.kind, anchors)
