"""DINO (Caron et al. 2021, arXiv 2104.14294) with lightly's loss and projection head.

A student sees all views, an exponential moving average of it (the teacher) the global ones; the
student learns to predict the teacher's softmax over K prototypes for every other view. Centring
and a sharp teacher temperature keep both from collapsing.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import cast

import torch
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from torch import Tensor, nn

from pathfm.backbone import Backbone, seeded_init
from pathfm.methods.protocol import MicroBatch
from pathfm.methods.settings import DinoSettings
from pathfm.schedules import cosine, linear

HEAD_INIT_DRAW = 1
"""Draw number of the head's initial weights under the run's seed."""


class Dino(nn.Module):
    """Student, teacher and the centred loss; see `pathfm.methods.Method`."""

    def __init__(
        self, student: Backbone, teacher: Backbone, settings: DinoSettings, steps: int, seed: int
    ) -> None:
        super().__init__()
        self.settings, self.steps = settings, steps
        with seeded_init(seed, HEAD_INIT_DRAW):
            student_head = _head(student.dim, settings)
        # deepcopy(head) raises on weight_norm: the second head is built and given the first's state
        teacher_head = _head(student.dim, settings)
        teacher_head.load_state_dict(student_head.state_dict())
        teacher.network.load_state_dict(student.network.state_dict())
        self.student = nn.ModuleDict({"backbone": student, "head": student_head})
        self.teacher = nn.ModuleDict({"backbone": teacher, "head": teacher_head})
        self.criterion = DINOLoss(
            output_dim=settings.out_dim,
            student_temp=settings.student_temp,
            center_momentum=settings.center_momentum,
        )
        if settings.freeze_patch_embed:
            cast(nn.Module, student.network.patch_embed).requires_grad_(False)
        self.student.train()
        self.teacher.eval().requires_grad_(False)
        self._diagnostics: dict[str, Tensor] = {}
        self._teacher_out: dict[int, Tensor] = {}

    @property
    def exported(self) -> Backbone:
        """The teacher's backbone: better than the student's all along (paper, section 5.2)."""
        return cast(Backbone, self.teacher["backbone"])

    def trained(self) -> nn.Module:
        """The student."""
        return self.student

    @torch.no_grad()
    def look(self, micro: MicroBatch) -> None:
        """The teacher's outputs for the global views."""
        self._teacher_out[micro.index] = self._forward(
            self.teacher, [torch.cat(list(micro.views[: micro.n_global]))]
        )

    def settle(self, step: int) -> None:
        """Nothing yet: the centre moves in `loss`."""

    def forward(self, micro: MicroBatch) -> Tensor:
        """`loss`."""
        return self.loss(micro)

    def loss(self, micro: MicroBatch) -> Tensor:
        """Mean cross-entropy over pairs (teacher's global view, student's other view), fp32.

        Moves the centre, so call it once an optimizer step.
        """
        views, n_global = micro.views, micro.n_global
        teacher_out = self._teacher_out.pop(micro.index)
        groups = [torch.cat(list(views[:n_global]))]
        if len(views) > n_global:
            groups.append(torch.cat(list(views[n_global:])))
        student_out = self._forward(self.student, groups)
        temperature = linear(
            self.settings.warmup_teacher_temp,
            self.settings.teacher_temp,
            micro.step,
            self.settings.warmup_teacher_temp_steps,
        )
        # bf16 has 8 bits: a log-softmax over thousands of prototypes needs fp32
        with torch.autocast(teacher_out.device.type, enabled=False):
            teacher_out, student_out = teacher_out.float(), student_out.float()
            self._diagnostics = self._describe(teacher_out, temperature)
            return cast(
                Tensor,
                self.criterion(
                    list(teacher_out.chunk(n_global)),
                    list(student_out.chunk(len(views))),
                    teacher_temp=temperature,
                ),
            )

    def before_update(self, step: int) -> None:
        """Takes the prototypes' gradient away in the first `freeze_last_layer_steps` steps."""
        if step < self.settings.freeze_last_layer_steps:
            for parameter in cast(nn.Module, self.student["head"].last_layer).parameters():
                parameter.grad = None

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """teacher = m teacher + (1 - m) student, m from `ema[0]` to `ema[1]` along a cosine."""
        momentum = cosine(*self.settings.ema, step, self.steps)
        torch._foreach_lerp_(
            list(self.teacher.parameters()), list(self.student.parameters()), 1.0 - momentum
        )

    def diagnostics(self) -> Mapping[str, Tensor]:
        """What tells a collapse from learning, of the last batch.

        teacher_entropy: mean entropy of the teacher's softmax a view (nats; 0: one prototype takes
        all; log K: it says nothing). teacher_marginal_entropy: entropy of the mean of these softmax
        (log K: all prototypes are used; 0: collapse). centre_norm, centre_sd: of the centre.
        """
        return self._diagnostics

    def _forward(self, network: nn.ModuleDict, groups: list[Tensor]) -> Tensor:
        """Head outputs (n, K); one backbone pass a group of equal size, one head pass for all."""
        backbone = cast(Backbone, network["backbone"])
        features = torch.cat([backbone.embed(group) for group in groups])
        return cast(Tensor, network["head"](features))

    @torch.no_grad()
    def _describe(self, teacher_out: Tensor, temperature: float) -> dict[str, Tensor]:
        centre = cast(Tensor, self.criterion.center).flatten()
        log_p = torch.log_softmax((teacher_out - centre) / temperature, dim=-1)
        p = log_p.exp()
        marginal = p.mean(0)
        return {
            "teacher_entropy": -(p * log_p).sum(-1).mean(),
            "teacher_marginal_entropy": torch.special.entr(marginal).sum(),
            "centre_norm": centre.norm(),
            "centre_sd": centre.std(),
        }


def build(backbone: Backbone, settings: DinoSettings, *, steps: int, seed: int) -> Dino:
    """DINO around `backbone`, which becomes the student; the teacher is a copy of it."""
    import copy

    return Dino(backbone, copy.deepcopy(backbone), settings, steps, seed)


def _head(dim: int, settings: DinoSettings) -> nn.Module:
    with warnings.catch_warnings():
        # lightly still uses torch.nn.utils.weight_norm; its parametrized successor renames tensors
        warnings.simplefilter("ignore", FutureWarning)
        head = DINOProjectionHead(
            dim,
            settings.hidden_dim,
            settings.bottleneck_dim,
            settings.out_dim,
            norm_last_layer=settings.norm_last_layer,
        )
    return cast(nn.Module, head)
