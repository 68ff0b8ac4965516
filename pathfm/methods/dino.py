"""DINO (Caron et al. 2021, arXiv 2104.14294) with lightly's loss and projection head.

A student sees all views, an exponential moving average of it (the teacher) the global ones; the
student learns to predict the teacher's softmax over K prototypes for every other view. Centring
and a sharp teacher temperature keep both from collapsing.
"""

from __future__ import annotations

from typing import cast

import torch
from lightly.loss import DINOLoss
from torch import Tensor
from torch.func import functional_call

from pathfm.backbone import Backbone
from pathfm.methods.distillation import (
    StudentTeacher,
    ema_momentum,
    keys_of,
    move_centre,
    projection_head,
    summarise,
    teacher_temperature,
    wide,
)
from pathfm.methods.protocol import MicroBatch
from pathfm.methods.settings import DinoSettings


class Dino(StudentTeacher):
    """Student, teacher and the centred loss; see `pathfm.methods.Method`."""

    def __init__(self, backbone: Backbone, settings: DinoSettings, steps: int, seed: int) -> None:
        head = projection_head(backbone.dim, settings, seed=seed)
        super().__init__(backbone, settings, steps, {"head": head})
        self.settings = settings
        self.criterion = _StillLoss(
            output_dim=settings.out_dim,
            student_temp=settings.student_temp,
            center_momentum=settings.center_momentum,
        )
        self._teacher_out: dict[int, Tensor] = {}
        self._centre = torch.empty(0)  # the centre that this step's losses subtract

    @torch.no_grad()
    def look(self, micro: MicroBatch) -> None:
        """The teacher's outputs for the global views."""
        backbone = cast(Backbone, self.teacher["backbone"])
        features = backbone.embed(torch.cat(list(micro.views[: micro.n_global])))
        self._teacher_out[micro.index] = cast(Tensor, self.teacher["head"](features))

    @torch.no_grad()
    def settle(self, step: int) -> None:
        """Moves the centre by the mean output over micro-batches and ranks (eq. 4).

        The step's own losses use the centre as it was, as in the authors' code.
        """
        centre, temperature = self.criterion.center, teacher_temperature(self.settings, step)
        self._centre = centre.clone()
        with torch.autocast(centre.device.type, enabled=False):
            logits = (wide(self._teacher_out[i]) for i in sorted(self._teacher_out))
            outputs = summarise(
                (out, torch.softmax((out - centre.flatten()) / temperature, dim=-1))
                for out in logits
            )
            self._diagnostics = {
                **outputs.described(),
                "centre_norm": centre.norm(),
                "centre_sd": centre.std(),
            }
            move_centre(centre, outputs, self.settings.center_momentum)

    def loss(self, micro: MicroBatch) -> Tensor:
        """Mean cross-entropy over pairs (teacher's global view, student's other view), fp32.

        Divided by the number of micro-batches. Wants `look` at this micro-batch and `settle` first.
        """
        teacher_out = self._teacher_out.pop(micro.index)
        student_out = self._student(micro)
        with torch.autocast(teacher_out.device.type, enabled=False):
            views = (
                list(wide(teacher_out).chunk(micro.n_global)),
                list(wide(student_out).chunk(len(micro.views))),
            )
            temperature = {"teacher_temp": teacher_temperature(self.settings, micro.step)}
            loss = functional_call(self.criterion, {"center": self._centre}, views, temperature)
        return cast(Tensor, loss) / micro.count

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """teacher = m teacher + (1 - m) student, m from `ema[0]` to `ema[1]` along a cosine."""
        self.update_teacher(ema_momentum(self.settings, step, self.steps))

    def _student(self, micro: MicroBatch) -> Tensor:
        """Head outputs (views * b, K); one backbone pass a size of view, one head pass for all."""
        backbone, n_views = cast(Backbone, self.student["backbone"]), len(micro.views)
        features = [
            backbone.embed(torch.cat(list(micro.views[of.start : of.stop])), keys_of(micro, of))
            for of in (range(micro.n_global), range(micro.n_global, n_views))
            if len(of)
        ]
        return cast(Tensor, self.student["head"](torch.cat(features)))


class _StillLoss(DINOLoss):  # type: ignore[misc]  # lightly has no types
    """lightly's loss, whose centre would move in every forward: once a micro-batch, too often."""

    def update_center(self, teacher_out: Tensor) -> None:
        """Nothing: `Dino.settle` moves the centre, once an optimizer step."""


def build(backbone: Backbone, settings: DinoSettings, *, steps: int, seed: int) -> Dino:
    """DINO around `backbone`, which becomes the student; the teacher is a copy of it."""
    return Dino(backbone, settings, steps, seed)
