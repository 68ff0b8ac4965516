"""Segmentation models by name, their weights at the start, and their files.

model = build_model("segformer_b0", classes=1)           # (B, 3, h, w) 0..1 -> logits (B, h, w)
save_model(model, "segformer_b0", "x.safetensors", {})    # fp16, says what it holds
model, facts = load_model("x.safetensors")                # fp32, eval mode
"""

from __future__ import annotations

import copy
import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from online_patching.stores.local import atomic_write_bytes
from pathfm.runtime import PathfmError, make_folder, one_line, torch_generator
from pathfm.segmentation.segformer import PRESETS, SegFormer, segformer
from pathfm.segmentation.unet import SHIPPED_WEIGHTS, ThumbnailUNet

MODEL_NAMES = ("unet", "unet_stem4", *(f"segformer_{preset}" for preset in PRESETS))
STEM4_WIDTHS = (24, 40, 64, 104)
MAX_FILE_BYTES = 512 << 20
MAX_CLASSES = 1024
_INIT_STREAM = 7202
_KEY, _FORMAT = "pathfm", "segmentation 1"


def build_model(name: str, classes: int = 1, **options: Any) -> nn.Module:
    """A model of `MODEL_NAMES` in training mode, with `init_weights(model, 0)`, on the CPU.

    In: (B, 3, h, w) float, 0..1, any h, w >= 1. Out: logits at full size, (B, h, w) for one class,
    else (B, classes, h, w). `options` go to `segformer` (drop_path, dropout, positional, ...).
    Touches no global random state. Raises PathfmError for a name or a number of classes it has not.
    """
    return init_weights(_empty(name, classes, options).to_empty(device="cpu"), 0)


def _empty(name: str, classes: int, options: Mapping[str, Any]) -> nn.Module:
    """The model without memory for its tensors."""
    if name not in MODEL_NAMES:
        raise PathfmError(f"no segmentation model {name!r}. There are {', '.join(MODEL_NAMES)}")
    if not 1 <= classes <= MAX_CLASSES:
        raise PathfmError(f"{name} with {classes} classes: choose 1 to {MAX_CLASSES}")
    with torch.device("meta"):
        if name == "unet":
            return ThumbnailUNet(classes=classes, **options)
        if name == "unet_stem4":
            return ThumbnailUNet(STEM4_WIDTHS, classes=classes, stem=4, **options)
        return segformer(name.removeprefix("segformer_"), classes, **options)


def init_weights(model: nn.Module, seed: int) -> nn.Module:
    """The same model, every parameter and buffer drawn afresh from the seed alone.

    U-Net: convolutions He-normal by fan-in. SegFormer: linear layers and position embeddings normal
    of 0.02 cut at 2 sd, convolutions He-normal by fan-out over groups, as its authors do. Norms 1 and 0,
    biases 0. The model must lie on the CPU. Raises PathfmError for a model of other layers.
    """
    generator = torch_generator(seed, 0, _INIT_STREAM)
    by_fan_out = any(isinstance(module, SegFormer) for module in model.modules())
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                _draw(module, name, parameter, by_fan_out, generator)
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()
    return model


def _draw(
    module: nn.Module, name: str, parameter: Tensor, by_fan_out: bool, generator: torch.Generator
) -> None:
    """Fills one parameter of a module: see `init_weights`."""
    if name == "bias":
        parameter.zero_()
    elif isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        parameter.fill_(1)
    elif isinstance(module, nn.Linear) or name == "embedding":
        sd = 0.02
        nn.init.trunc_normal_(parameter, std=sd, a=-2 * sd, b=2 * sd, generator=generator)
    elif isinstance(module, nn.Conv2d):
        area = math.prod(module.kernel_size)
        fan = module.out_channels if by_fan_out else module.in_channels
        parameter.normal_(0, math.sqrt(2 * module.groups / (area * fan)), generator=generator)
    else:
        raise PathfmError(f"no rule for the initial {name} of a {type(module).__name__}")


def multiply_adds_per_pixel(model: nn.Module, side_px: int = 256) -> float:
    """Multiply-adds of one forward pass for a pixel of a side_px x side_px picture, as computed here.

    Counted: convolutions, linear layers, both products of attention. Not counted: norms, activations,
    upsampling. By torch's own counter on tensors without memory, so that any size is cheap.
    """
    shadow = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:
        shadow(torch.zeros(1, 3, side_px, side_px, device="meta"))
    return float(counter.get_total_flops()) / 2 / side_px**2


def save_model(model: nn.Module, name: str, path: Path | str, facts: Mapping[str, Any]) -> None:
    """A .safetensors file, fp16, that says which model it is; `facts` is any JSON beside it.

    Written whole or not at all. Raises PathfmError when a weight does not fit into fp16 (above 65,504,
    or not finite), when `model` is no `name` without options, or when the disk refuses.
    """
    classes = int(getattr(model, "classes", 1))
    wanted = _empty(name, classes, {}).state_dict()
    state = {key: _half(key, value) for key, value in model.state_dict().items()}
    misfit = _misfit(wanted, state)
    if misfit:
        raise PathfmError(f"{path}: the model to be saved is no {name}: {misfit}")
    about = {"format": _FORMAT, "model": name, "classes": classes, "facts": dict(facts)}
    # one key: safetensors writes several in an order that differs from run to run
    header = {_KEY: json.dumps(about, sort_keys=True)}
    make_folder(Path(path).parent)
    try:
        atomic_write_bytes(path, save(state, header))
    except OSError as error:
        raise PathfmError(f"{path}: cannot be written ({one_line(error)})") from error


def _half(key: str, value: Tensor) -> Tensor:
    """A tensor as it is stored."""
    if not value.is_floating_point():
        return value.detach().cpu().contiguous()
    half = value.detach().cpu().half().contiguous()
    if not half.isfinite().all():
        raise PathfmError(
            f"{key} does not fit into fp16 (largest {value.abs().max():.3g}, limit 65,504): the model "
            "has diverged; train again with a lower learning rate"
        )
    return half


def _single(value: Tensor) -> Tensor:
    """A tensor as it is computed with, before its numbers are looked at: float64 may overflow."""
    return value.float() if value.is_floating_point() else value


def load_model(path: Path | str = SHIPPED_WEIGHTS) -> tuple[nn.Module, dict[str, Any]]:
    """(model in fp32, eval mode, on the CPU; the facts it was saved with), of `save_model`'s file.

    Raises PathfmError, naming the file and the reason, when it is missing, damaged, larger than 512 MB,
    of another network, or holds numbers that are not finite.
    """
    path = Path(path)
    try:
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            raise PathfmError(
                f"{path}: {size_bytes:,} bytes, more than the {MAX_FILE_BYTES:,} that any model here has"
            )
        with safe_open(path, framework="pt") as file:
            name, classes, facts = _header(path, file.metadata() or {})
            model = _empty(name, classes, {})
            state = {key: _single(file.get_tensor(key)) for key in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise PathfmError(
            f"{path}: cannot be read ({error.strerror or one_line(error)}). Give a file that "
            "`pathfm foreground-train` wrote"
        ) from None
    except SafetensorError as error:
        raise PathfmError(
            f"{path} ({size_bytes:,} bytes): not a whole .safetensors file ({one_line(error)}). Copy it again"
        ) from None
    misfit = _misfit(model.state_dict(), state)
    if misfit:
        raise PathfmError(f"{path}: not the weights of {name} with {classes} classes: {misfit}")
    model.load_state_dict(state, assign=True)
    return model.eval(), facts


def _header(path: Path, header: Mapping[str, str]) -> tuple[str, int, dict[str, Any]]:
    """Name, classes and facts of a file's header, checked."""
    try:
        about = json.loads(header.get(_KEY, "null"))
    except (ValueError, RecursionError):  # int() of 5,000 digits is a ValueError too
        raise PathfmError(f"{path}: its header is damaged. Copy it again") from None
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise PathfmError(
            f"{path}: does not say which segmentation model it holds. Give a file that "
            "`pathfm foreground-train` wrote"
        )
    name, classes, facts = about.get("model"), about.get("classes"), about.get("facts")
    countable = isinstance(classes, int) and 1 <= classes <= MAX_CLASSES
    if name not in MODEL_NAMES or classes is True or not countable or not isinstance(facts, dict):
        told = reprlib.repr({"model": name, "classes": classes, "facts": facts})
        raise PathfmError(
            f"{path}: says {told}. Models are {', '.join(MODEL_NAMES)}, classes 1 to {MAX_CLASSES}, facts a mapping"
        )
    return str(name), cast(int, classes), facts


def _misfit(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What keeps `state` from being that of a model with `wanted`, or ""."""
    missing = [key for key in wanted if key not in state]
    extra = [key for key in state if key not in wanted]
    if missing or extra:
        first = (missing or extra)[0]
        return f"{len(missing)} tensors missing and {len(extra)} unknown, first {first!r:.80}"
    for key, tensor in state.items():
        if tensor.shape != wanted[key].shape:
            return f"{key} is {tuple(tensor.shape)}, wanted {tuple(wanted[key].shape)}"
        if tensor.is_floating_point() != wanted[key].is_floating_point():
            return f"{key} is {tensor.dtype}"
        if not tensor.isfinite().all():
            return f"{key} has numbers that are not finite"
    return ""
