"""What DINO and DINOv2 share: a student, a teacher that averages it, and what its outputs say."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from lightly.models.modules import DINOProjectionHead
from torch import Tensor, nn

from pathfm import ranks
from pathfm.backbone import Backbone, SampleKeys, seeded_init
from pathfm.losses.sinkhorn import SLAB_ELEMENTS
from pathfm.methods.protocol import MicroBatch
from pathfm.methods.settings import DinoSettings
from pathfm.schedules import cosine, linear

HEAD_INIT_DRAW = 1
"""Draw number of the head's initial weights under the run's seed."""


class StudentTeacher(nn.Module, ABC):
    """Two networks of one shape; the optimizer owns the student, the teacher follows it.

    student, teacher: a backbone and its heads by name, equal at the start, without shared memory.
    """

    def __init__(
        self, backbone: Backbone, settings: DinoSettings, steps: int, heads: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.steps = steps
        self.student = nn.ModuleDict({"backbone": backbone, **heads})
        self.teacher = nn.ModuleDict({"backbone": copy.deepcopy(backbone)})
        for name, head in heads.items():
            self.teacher[name] = twin(head, settings)
        self._heads, self._frozen_steps = tuple(heads), settings.freeze_last_layer_steps
        if settings.freeze_patch_embed:
            backbone.stem.requires_grad_(False)
        self.student.train()
        self.teacher.eval().requires_grad_(False)
        self._diagnostics: dict[str, Tensor] = {}

    @property
    def exported(self) -> Backbone:
        """The teacher's backbone: better than the student's all along (DINO, section 5.2)."""
        return cast(Backbone, self.teacher["backbone"])

    def trained(self) -> nn.Module:
        """The student."""
        return self.student

    def forward(self, micro: MicroBatch) -> Tensor:
        """`loss`, as DistributedDataParallel calls it."""
        return self.loss(micro)

    @abstractmethod
    def loss(self, micro: MicroBatch) -> Tensor:
        """The micro-batch's share of the step's loss."""

    def before_update(self, step: int) -> None:
        """Takes the prototypes' gradient away in the first `freeze_last_layer_steps` steps."""
        if step < self._frozen_steps:
            for name in self._heads:
                for parameter in cast(nn.Module, self.student[name].last_layer).parameters():
                    parameter.grad = None

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher = m teacher + (1 - m) student, the running statistics of a BatchNorm too."""
        share, running = 1.0 - momentum, []
        for theirs, ours in zip(self.teacher.buffers(), self.student.buffers(), strict=True):
            if theirs.is_floating_point():
                running.append((theirs, ours))
            else:
                theirs.copy_(ours)  # counts of batches
        weights = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        # two lists: under FSDP weights lie in shards and buffers do not
        for pairs in (list(weights), running):
            if pairs:
                teacher, student = zip(*pairs, strict=True)
                torch._foreach_lerp_(list(teacher), list(student), share)

    def diagnostics(self) -> Mapping[str, Tensor]:
        """What tells a collapse from learning, of the last step, over all its samples."""
        return self._diagnostics


def ema_momentum(settings: DinoSettings, step: int, steps: int) -> float:
    """Share of the teacher kept after a step: from `ema[0]` to `ema[1]` along a cosine."""
    return cosine(*settings.ema, step, steps)


def teacher_temperature(settings: DinoSettings, step: int) -> float:
    """Temperature of the teacher's softmax in a step: its warm-up is a line."""
    return linear(
        settings.warmup_teacher_temp,
        settings.teacher_temp,
        step,
        settings.warmup_teacher_temp_steps,
    )


def projection_head(
    dim: int, settings: DinoSettings, *, seed: int, draw: int = HEAD_INIT_DRAW, out_dim: int = 0
) -> nn.Module:
    """A head dim -> hidden -> hidden -> bottleneck -> length 1 -> K, drawn from (seed, draw)."""
    with seeded_init(seed, draw), warnings.catch_warnings():
        # lightly still uses torch.nn.utils.weight_norm; its parametrized successor renames tensors
        warnings.simplefilter("ignore", FutureWarning)
        head = DINOProjectionHead(
            dim,
            settings.hidden_dim,
            settings.bottleneck_dim,
            out_dim or settings.out_dim,
            norm_last_layer=settings.norm_last_layer,
        )
    return cast(nn.Module, head)


def twin(head: nn.Module, settings: DinoSettings) -> nn.Module:
    """A head with the same weights in memory of its own: deepcopy raises on weight_norm."""
    first = cast(nn.Linear, cast(nn.Sequential, head.layers)[0])
    prototypes = cast(nn.Linear, head.last_layer)
    second = projection_head(first.in_features, settings, seed=0, out_dim=prototypes.out_features)
    second.load_state_dict(head.state_dict())
    return second


def keys_of(micro: MicroBatch, views: range) -> SampleKeys:
    """Who the rows of these views are, in the order of `torch.cat(micro.views[...])`."""
    return SampleKeys.of_views(micro.seed, micro.draws, views)


def wide(x: Tensor) -> Tensor:
    """fp32, from a narrower type; float64 stays, so that gradients can be checked in it.

    bf16 has 8 bits: a log-softmax over thousands of prototypes needs fp32.
    """
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class Outputs:
    """What a teacher gave in a step, over all micro-batches and ranks.

    rows: how many outputs (a scalar tensor). mean: (K,), their mean, zero for no rows. entropy:
    mean entropy of a row's target, nats (0: one prototype takes all; log K: it says nothing).
    marginal_entropy: entropy of the mean target (log K: all prototypes are used).
    """

    rows: Tensor
    mean: Tensor
    entropy: Tensor
    marginal_entropy: Tensor

    def described(self, prefix: str = "teacher") -> dict[str, Tensor]:
        """For the log; `information` = marginal entropy - entropy is 0 in either collapse.

        It is the mutual information of sample and prototype: with all outputs equal it is 0,
        whatever the centring makes of them.
        """
        return {
            f"{prefix}_entropy": self.entropy,
            f"{prefix}_marginal_entropy": self.marginal_entropy,
            f"{prefix}_information": self.marginal_entropy - self.entropy,
        }


@torch.no_grad()
def summarise(parts: Iterable[tuple[Tensor, Tensor]]) -> Outputs:
    """Sums up (logits (n, K), targets (n, K)) of all micro-batches, then of all ranks.

    n may be 0 and differ between ranks; one collective.
    """
    sums: Tensor | None = None
    for logits, targets in parts:
        entropies = _entropy(targets)
        count = entropies.new_tensor(float(len(targets)))
        part = torch.cat([logits.sum(0), targets.sum(0), torch.stack([entropies, count])])
        sums = part if sums is None else sums + part
    assert sums is not None, "a step has at least one micro-batch"
    total = ranks.sum_over_ranks(sums)
    k, rows = (len(total) - 2) // 2, total[-1]
    per_row = total / rows.clamp(min=1.0)
    return Outputs(rows, per_row[:k], per_row[-2], torch.special.entr(per_row[k : 2 * k]).sum())


def _entropy(targets: Tensor) -> Tensor:
    """Sum of the rows' entropies, a slab at a time: (n, K) is gigabytes."""
    slab = max(1, SLAB_ELEMENTS // max(1, targets.shape[1]))
    return torch.stack(
        [torch.special.entr(part).sum() for part in torch.split(targets, slab)]
    ).sum()


@torch.no_grad()
def move_centre(centre: Tensor, outputs: Outputs, momentum: float) -> None:
    """centre = m centre + (1 - m) mean, in place; stays where it is when there were no outputs."""
    moved = centre * momentum + outputs.mean.view_as(centre) * (1 - momentum)
    centre.copy_(torch.where(outputs.rows > 0, moved, centre))
