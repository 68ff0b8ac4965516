"""timm networks by name, as structures: no classifier, any input size, nothing random in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers.drop import DropPath
from torch import nn

from pathfm.backbone.keyed import KeyedDropPath
from pathfm.runtime import PathfmError

USUAL_PX = 224
"""Side that transformers made for larger inputs (DINOv2: 518 px) are built for when none is said."""


def create(name: str, img_size: int | None, **arguments: Any) -> nn.Module:
    """timm's model without classifier, a transformer of any input size or a ConvNet.

    img_size: side in pixels of a transformer's position embedding; None: as the architecture or the
    folder (``local-dir:...``) says, at most `USUAL_PX` for an architecture. `arguments` go to timm. A
    dropout that the architecture brings is set to 0. Raises PathfmError for a name timm does not
    know, a network that is neither, and for arguments that would drop anything at random.
    """
    _refuse_unkeyed(arguments)
    local = name.startswith("local-dir:")
    if not local and not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0][:12]}*")[:3] or ["vit_small_patch16_224"]
        raise PathfmError(f"backbone {name!r} is no timm model. Try {', '.join(near)}")
    if img_size is None and not local:
        img_size = min(USUAL_PX, _made_for_px(name))
    sized: dict[str, Any] = {"dynamic_img_size": True}
    if img_size is not None:
        sized["img_size"] = img_size
    try:
        model = timm.create_model(name, num_classes=0, **sized, **arguments)
    except TypeError as error:
        if "dynamic_img_size" not in str(error) and "img_size" not in str(error):
            raise _unusable(name, str(error)) from None
        model = _conv_net(name, arguments)
    _without_dropout(model)
    _check_kind(name, model)
    return model


def key_drop_path(model: nn.Module, name: str, rate: float, **arguments: Any) -> None:
    """Puts keyed stochastic depth into a model that `create` made of the same name and arguments.

    The rates are timm's own, from 0 at the first block to `rate` at the last (stage-wise in some
    ConvNets). Parameters and their names stay. Raises PathfmError for a rate outside [0, 1), and
    where the architecture has no such branches.
    """
    if not 0 <= rate < 1:
        raise PathfmError(f"drop_path = {rate}: give a share of 0 or more and below 1")
    if rate == 0:
        return
    try:
        with torch.device("meta"):
            twin = timm.create_model(name, num_classes=0, drop_path_rate=rate, **arguments)
    except TypeError as error:
        raise _unusable(name, str(error)) from None
    rates = {path: m.drop_prob for path, m in twin.named_modules() if isinstance(m, DropPath)}
    if not rates:
        raise PathfmError(f"backbone {name!r} has no residual branches to drop: set drop_path 0")
    for path, drop_prob in rates.items():
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, KeyedDropPath(drop_prob))


def _refuse_unkeyed(arguments: Mapping[str, object]) -> None:
    """PathfmError for dropout rates: timm's layers would draw from torch's global generator."""
    for key, value in arguments.items():
        if ("drop" in key and key.endswith("rate") and value) or key == "drop_path":
            raise PathfmError(
                f"{key} = {value}: dropout here is not a function of seed and sample. "
                "Use drop_path, which is"
            )


def _made_for_px(name: str) -> int:
    config = timm.get_pretrained_cfg(name)
    return int(config.input_size[-1]) if config else USUAL_PX


def _conv_net(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, num_classes=0, **arguments)
    except TypeError as error:
        raise _unusable(name, str(error)) from None


def _check_kind(name: str, model: Any) -> None:
    """PathfmError unless the model is a plain vision transformer or a ConvNet with a stem and stages."""
    if hasattr(model, "patch_embed"):
        if not hasattr(model, "num_prefix_tokens"):
            raise _unusable(name, f"it is a {type(model).__name__}")
    elif (
        model.pretrained_cfg.get("fixed_input_size")
        or not getattr(model, "feature_info", None)
        or not hasattr(model, "group_matcher")
    ):
        raise _unusable(name, f"it is a {type(model).__name__}")


def _unusable(name: str, why: str) -> PathfmError:
    return PathfmError(
        f"backbone {name!r} cannot be built as a vision transformer of any input size, nor as a ConvNet "
        f"({why}). Choose one such as vit_small_patch16_224 or resnet50"
    )


def _without_dropout(model: nn.Module) -> None:
    """Sets every dropout that an architecture brings along to 0: its draws would not be keyed."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
