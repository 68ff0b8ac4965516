"""Which parameters learn how fast: groups by decay and layer, and their schedules."""

from __future__ import annotations

from typing import Any

from torch import nn

from pathfm.backbone import Backbone
from pathfm.pretrain import PretrainConfig
from pathfm.pretrain.settings import OptimConfig
from pathfm.schedules import cosine, warmup_cosine


def parameter_groups(module: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters, in groups that share weight decay and learning rate.

    `decays` is False for biases, norms and single tokens (one dimension). `lr_factor` falls by
    `optim.layer_decay` for each layer of a backbone below its top (Bao et al. 2021, as DINOv2 does),
    and is `optim.patch_embed_lr` times that at the patch projection; 1 for heads.
    """
    factors = _lr_factors(module, optim)
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        factor, decays = factors.get(name, 1.0), parameter.ndim > 1
        empty: dict[str, Any] = {"params": [], "decays": decays, "lr_factor": factor}
        groups.setdefault((factor, decays), empty)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, key=lambda key: (-key[0], not key[1]))]


def set_schedule(groups: list[dict[str, Any]], config: PretrainConfig, step: int) -> float:
    """Gives every group its learning rate and decay of this step; returns the highest rate."""
    lr, weight_decay = schedule(config, step)
    for group in groups:
        group["lr"] = lr * group["lr_factor"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    return lr


def schedule(config: PretrainConfig, step: int) -> tuple[float, float]:
    """Learning rate and weight decay of an optimizer step."""
    optim, steps = config.optim, config.steps
    lr = warmup_cosine(optim.lr, optim.min_lr, step, steps, optim.warmup_steps)
    return lr, cosine(*optim.weight_decay, step, steps)


def _lr_factors(module: nn.Module, optim: OptimConfig) -> dict[str, float]:
    """Factor of each parameter of a backbone inside `module`."""
    factors: dict[str, float] = {}
    for prefix, part in module.named_modules():
        if not isinstance(part, Backbone):
            continue
        stem = {id(parameter) for parameter in part.stem.parameters()}
        for name, parameter in part.named_parameters():
            depth = part.n_layers + 1 - part.layer_of(name)
            factor = optim.layer_decay**depth
            whole = f"{prefix}.{name}" if prefix else name
            factors[whole] = factor * (optim.patch_embed_lr if id(parameter) in stem else 1.0)
    return factors
