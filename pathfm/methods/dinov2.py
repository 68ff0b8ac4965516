"""DINOv2 (Oquab et al. 2023, arXiv 2304.07193): DINO, iBOT on masked patches, and a regulariser.

The student sees the global views with some patches masked, and the local views whole; the teacher
sees the global views whole. CLS tokens learn as in DINO (arXiv 2104.14294), each masked patch token
learns the teacher's assignment of the same patch (iBOT, arXiv 2111.07832), and KoLeo or KDE keeps
the student's global CLS tokens apart. Sinkhorn-Knopp or a moving centre makes teacher outputs
targets; what they need of other samples comes from all micro-batches and ranks.

Registers and stochastic depth are the backbone's, layer-wise decay is the optimizer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pathfm import ranks
from pathfm.backbone import Backbone
from pathfm.losses.sinkhorn import sinkhorn
from pathfm.losses.spread import kde, koleo
from pathfm.methods.caching import JointLoss
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
from pathfm.methods.masks import block_masks
from pathfm.methods.protocol import MicroBatch
from pathfm.methods.settings import Dinov2Settings

IBOT_HEAD_INIT_DRAW = 3
"""Draw number of the patch head's initial weights under the run's seed."""


@dataclass(frozen=True)
class Hidden:
    """The masked patches of a micro-batch's global views, views one after the other.

    masks: (n_global * b, T) bool. where: (n,) rows of the flattened (n_global * b * T) patches.
    weights: (n,) one over the number of patches masked in the same view.
    """

    masks: Tensor
    where: Tensor
    weights: Tensor


@dataclass(frozen=True)
class _Seen:
    """What `look` kept of a micro-batch: masks, the teacher's logits or, once settled, targets."""

    hidden: Hidden
    cls: Tensor
    patches: Tensor


class Dinov2(StudentTeacher):
    """Student, teacher, masks and three losses; see `pathfm.methods.Method`."""

    def __init__(self, backbone: Backbone, settings: Dinov2Settings, steps: int, seed: int) -> None:
        heads = {"head": projection_head(backbone.dim, settings, seed=seed)}
        patch_dim = settings.out_dim
        if settings.separate_ibot_head:
            patch_dim = settings.ibot_out_dim or settings.out_dim
            heads["ibot_head"] = projection_head(
                backbone.dim, settings, seed=seed, draw=IBOT_HEAD_INIT_DRAW, out_dim=patch_dim
            )
        backbone.add_mask_token(seed)
        super().__init__(backbone, settings, steps, heads)
        self.settings = settings
        self.centres = nn.ModuleDict()
        if settings.centring == "softmax":
            self.centres["cls"] = _Centre(settings.out_dim)
            self.centres["patches"] = _Centre(patch_dim)
        self._spread = JointLoss(self._regulariser)
        self._seen: dict[int, _Seen] = {}
        self._parts: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self, micro: MicroBatch) -> None:
        """Masks, and the teacher's outputs for the whole global views: CLS and masked patches."""
        backbone = cast(Backbone, self.teacher["backbone"])
        hidden = hide(micro, backbone, self.settings)
        cls, patches = backbone.tokens(torch.cat(list(micro.views[: micro.n_global])))
        outputs = self._project(self.teacher, cls, patches.flatten(0, 1)[hidden.where])
        self._seen[micro.index] = _Seen(hidden, *outputs)
        if self.settings.regulariser_weight:
            self._spread.look(micro, lambda m: _by_sample(self._student_global(m, hidden)[0], m))

    @torch.no_grad()
    def settle(self, step: int) -> None:
        """Makes targets of the teacher's outputs, over micro-batches and ranks; moves centres.

        Under "softmax" the step's own losses use the centres as they were, as the authors' code.
        """
        order = sorted(self._seen)
        seen = [self._seen[index] for index in order]
        temperature = teacher_temperature(self.settings, step)
        with torch.autocast(seen[0].cls.device.type, enabled=False):
            self._diagnostics = {}
            cls = self._targets("cls", [s.cls for s in seen], temperature, "")
            patches = self._targets("patches", [s.patches for s in seen], temperature, "patch_")
        for index, s, c, p in zip(order, seen, cls, patches, strict=True):
            self._seen[index] = _Seen(s.hidden, c, p)
        self._spread.settle()
        self._parts = {}

    def loss(self, micro: MicroBatch) -> Tensor:
        """dino_weight DINO + ibot_weight iBOT + regulariser_weight KoLeo or KDE, fp32.

        The micro-batch's share. Wants `look` at this micro-batch and `settle` first.
        """
        settings, seen = self.settings, self._seen.pop(micro.index)
        cls, patches = self._student_global(micro, seen.hidden)
        rows = _by_sample(cls, micro)
        cls_out, patch_out = self._project(
            self.student,
            torch.cat([cls, *self._student_local(micro)]),
            patches.flatten(0, 1)[seen.hidden.where],
        )
        with torch.autocast(cls.device.type, enabled=False):
            targets = seen.cls.view(micro.n_global, len(micro), -1)
            outputs = wide(cls_out).view(len(micro.views), len(micro), -1)
            dino = view_cross_entropy(targets, outputs, settings.student_temp) / micro.count
            ibot = patch_cross_entropy(
                seen.patches, wide(patch_out), seen.hidden, settings.student_temp
            )
            ibot = ibot / micro.count
            loss = settings.dino_weight * dino + settings.ibot_weight * ibot
            parts = {"dino_loss": dino, "ibot_loss": ibot}
            if settings.regulariser_weight:
                parts["regulariser"] = self._spread.loss(micro, rows)
                loss = loss + settings.regulariser_weight * parts["regulariser"]
        parts["masked_share"] = seen.hidden.masks.to(loss.dtype).mean() / micro.count
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, torch.zeros_like(part)) + part.detach()
        return loss

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        """Holds prototypes still at first; joins the ranks' parts of the loss for `diagnostics`."""
        super().before_update(step)
        if self._parts:
            ours = torch.stack(list(self._parts.values()))
            means = ranks.sum_over_ranks(ours) / ranks.world_size()
            self._diagnostics |= dict(zip(self._parts, means, strict=True))
            self._parts = {}

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        """teacher = m teacher + (1 - m) student, m from `ema[0]` to `ema[1]` along a cosine."""
        self.update_teacher(ema_momentum(self.settings, step, self.steps))

    def _student_global(self, micro: MicroBatch, hidden: Hidden) -> tuple[Tensor, Tensor]:
        """CLS (n_global * b, d) and patch tokens (n_global * b, T, d) of the masked global views."""
        backbone, of = cast(Backbone, self.student["backbone"]), range(micro.n_global)
        views = torch.cat(list(micro.views[: micro.n_global]))
        return backbone.tokens(views, keys_of(micro, of), hidden.masks)

    def _student_local(self, micro: MicroBatch) -> list[Tensor]:
        """CLS tokens of the local views, [(n_local * b, d)]; [] where there are none."""
        backbone = cast(Backbone, self.student["backbone"])
        of = range(micro.n_global, len(micro.views))
        if not of:
            return []
        views = torch.cat(list(micro.views[micro.n_global :]))
        return [backbone.tokens(views, keys_of(micro, of))[0]]

    def _project(
        self, network: nn.ModuleDict, cls: Tensor, patches: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits of CLS tokens (n, K) and of masked patch tokens (m, K'); m may be 0.

        No masked patch still is a forward pass: its gradient is zero, where DDP would miss none.
        """
        if self.settings.separate_ibot_head:
            return network["head"](cls), network["ibot_head"](patches)
        both = cast(Tensor, network["head"](torch.cat([cls, patches])))
        return both[: len(cls)], both[len(cls) :]

    def _targets(
        self, name: str, parts: list[Tensor], temperature: float, prefix: str
    ) -> tuple[Tensor, ...]:
        """Each micro-batch's targets from its logits; adds to the diagnostics, moves the centre."""
        logits = wide(torch.cat(parts))
        centre = cast(_Centre, self.centres[name]).center if name in self.centres else None
        if centre is None:
            targets = sinkhorn(logits, temperature, self.settings.sinkhorn_iterations)
        else:
            targets = torch.softmax((logits - centre) / temperature, dim=-1)
        outputs = summarise([(logits, targets)])
        self._diagnostics |= outputs.described(f"{prefix}teacher")
        if centre is not None:
            self._diagnostics[f"{prefix}centre_norm"] = centre.norm()
            self._diagnostics[f"{prefix}centre_sd"] = centre.std()
            move_centre(centre, outputs, self.settings.center_momentum)
        return torch.split(targets, [len(part) for part in parts])

    def _regulariser(self, rows: Tensor) -> Tensor:
        """The spreading term of (b, n_global, d), summed over views, neighbours from all ranks.

        Two views of one sample are meant to be near: they are never neighbours.
        """
        everybody = (ranks.gather_rows(view, grad=True) for view in rows.unbind(1))
        if self.settings.regulariser == "koleo":
            return torch.stack([koleo(view) for view in everybody]).sum()
        kappa = self.settings.kde_concentration
        return torch.stack([kde(view, kappa) for view in everybody]).sum()


class _Centre(nn.Module):
    """A moving mean of teacher outputs, (K,), kept in checkpoints."""

    center: Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(k))


def hide(micro: MicroBatch, backbone: Backbone, settings: Dinov2Settings) -> Hidden:
    """The masks of a micro-batch's global views, keyed by its draws, on the views' device."""
    device, grid = micro.views[0].device, backbone.grid(micro.views[0].shape[-1])
    masks = np.concatenate(
        [
            block_masks(
                micro.draws,
                grid,
                seed=micro.seed,
                view=view,
                probability=settings.mask_probability,
                ratio=settings.mask_ratio,
            )
            for view in range(micro.n_global)
        ]
    )
    counts = masks.sum(1)
    where = np.flatnonzero(masks)  # here and not on the device, where it would wait for kernels
    weights = np.repeat(1.0 / np.maximum(counts, 1), counts).astype(np.float32)
    return Hidden(_to(masks, device), _to(where, device), _to(weights, device))


def view_cross_entropy(targets: Tensor, outputs: Tensor, temperature: float) -> Tensor:
    """Mean of -sum_k p_k log q_k over pairs of a target view and another output view, and samples.

    targets: p (n_global, b, K). outputs: logits (n_views, b, K), the first n_global of the same
    views; q is their softmax at `temperature`. DINO's eq. 3.
    """
    log_q = torch.log_softmax(outputs / temperature, dim=-1)
    pairs = -torch.einsum("tbk,sbk->ts", targets, log_q).fill_diagonal_(0.0)
    n_pairs = pairs.numel() - min(pairs.shape)
    return pairs.sum() / (n_pairs * targets.shape[1])


def patch_cross_entropy(
    targets: Tensor, outputs: Tensor, hidden: Hidden, temperature: float
) -> Tensor:
    """iBOT's loss: mean over all global views of the mean over a view's masked patches.

    targets: p (n, K), outputs: logits (n, K) of the masked patches. A view without masked patches
    counts as 0, so the loss is one number however a batch is split (iBOT eq. 2, DINOv2's code).
    """
    each = -(targets * torch.log_softmax(outputs / temperature, dim=-1)).sum(-1)
    return (each * hidden.weights.to(each.dtype)).sum() / len(hidden.masks)


def build(backbone: Backbone, settings: Dinov2Settings, *, steps: int, seed: int) -> Dinov2:
    """DINOv2 around `backbone`, which becomes the student; the teacher is a copy of it."""
    return Dinov2(backbone, settings, steps, seed)


def _by_sample(cls: Tensor, micro: MicroBatch) -> Tensor:
    """(n_global * b, d), views one after the other -> (b, n_global, d) in fp32."""
    return wide(cls).view(micro.n_global, len(micro), -1).transpose(0, 1)


def _to(array: NDArray[Any], device: torch.device) -> Tensor:
    """To the device, on CUDA without waiting for what runs there."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
