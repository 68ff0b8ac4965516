"""Vision transformers by name, their weights, and their export: the only file that imports timm.

Weights come in as a file, a folder that a run wrote, timm's own download, or at random; which of
these, and how many tensors of it, is `Backbone.weights_note`. A file that leaves a tensor of the
backbone at its random start is refused: timm alone would train on in silence.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pathfm.runtime import PathfmError, torch_generator

INIT_STREAM = 1 << 17
"""Philox stream of random initial weights (the views' streams start at 1 << 16)."""


class Backbone(nn.Module):
    """A timm vision transformer without its classifier, and what one must know to feed it.

    vit: the timm model. name: its timm name. mean, std: what inputs on 0..1 are normalised with,
    one value a channel. input_px: the side its weights were made for; other multiples of
    `patch_size` work too (the position embedding is resampled in the forward pass).
    """

    def __init__(self, vit: nn.Module, name: str, weights_note: str) -> None:
        super().__init__()
        config = cast(Any, vit).pretrained_cfg
        self.network, self.name, self.weights_note = vit, name, weights_note
        self.eval()
        self.mean: tuple[float, ...] = tuple(map(float, config["mean"]))
        self.std: tuple[float, ...] = tuple(map(float, config["std"]))
        self.patch_size = int(cast(Any, vit).patch_embed.patch_size[0])
        self.input_px = int(cast(Any, vit).patch_embed.img_size[0])
        self.dim = int(cast(Any, vit).num_features)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) after the last norm, prefix tokens (CLS, registers) first.

        x: normalised float (B, 3, H, W); H and W multiples of `patch_size`.
        """
        return cast(Tensor, cast(Any, self.network).forward_features(x))

    def embed(self, x: Tensor) -> Tensor:
        """One feature vector an image, (B, D): CLS, or the pooling the architecture was made with."""
        return cast(Tensor, self.network(x))

    def check_input(self, size_px: int, what: str) -> None:
        """Raises PathfmError, naming the option `what`, unless inputs of this side can be fed."""
        if size_px % self.patch_size:
            near = max(1, round(size_px / self.patch_size)) * self.patch_size
            raise PathfmError(
                f"{what} = {size_px} is no multiple of the {self.patch_size} px patches of "
                f"{self.name}: try {near}"
            )

    def plain_attention(self) -> None:
        """Attention as two matrix products instead of torch's fused kernel; same numbers.

        For training on a CPU: the backward pass of the fused kernel took 37 % of a DINO step on
        10 and 50 tokens in bf16; without it a step is 1.8 times as fast (torch 2.14, Zen 5, 2026).
        """
        for module in self.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # type: ignore[assignment]

    @property
    def digest(self) -> str:
        """sha256 over names, types, shapes and bytes of all tensors, in the order of the names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(flat.numpy().tobytes())
        return digest.hexdigest()


def load_backbone(
    name: str, weights: str, img_size: int | None = None, **architecture: object
) -> Backbone:
    """A backbone by timm name with weights from `weights`, in eval mode, on the CPU.

    weights: "random" or "random:SEED"; "imagenet" (timm's download or its cache); a .safetensors
    file; a folder in timm's local-dir form, a run or a checkpoint that holds one. img_size is the
    side in pixels the position embedding is resampled to once (None: as the architecture says).
    `architecture` goes to timm (depth=2, embed_dim=64, ...). Raises PathfmError.
    """
    kind, _, seed = weights.partition(":")
    if kind == "random":
        if seed and not seed.isdigit():
            raise PathfmError(
                f"weights {weights!r}: the seed after 'random:' must be a whole number"
            )
        with seeded_init(int(seed or 0)):
            vit = _create(name, img_size, pretrained=False, **architecture)
        return Backbone(vit, name, f"random weights (seed {int(seed or 0)})")
    if weights == "imagenet":
        return _from_timm(name, img_size, architecture)
    path = Path(weights)
    folder = find_backbone_folder(path)
    if folder is not None:
        return _from_folder(folder, name, img_size)
    if path.is_file():
        return _from_file(path, name, img_size, architecture)
    raise PathfmError(
        f"weights {weights!r}: no such file or run folder. Give a .safetensors file, a run folder, "
        "'imagenet' or 'random'"
    )


def find_backbone_folder(path: Path) -> Path | None:
    """The folder in timm's local-dir form that `path` names, or None.

    `path` may be that folder, a run or a checkpoint with `backbone/` in it, a run that has only
    checkpoints yet, or a `last` file that names a checkpoint beside it.
    """
    if path.name == "last" and not path.exists():
        path = path.parent / "checkpoints" / "last"
    if path.name == "last" and path.is_file():
        path = path.parent / path.read_text().strip()
    for folder in (path, path / "backbone"):
        if (folder / "config.json").is_file() and (folder / "model.safetensors").is_file():
            return folder
    pointer = path / "checkpoints" / "last"
    return find_backbone_folder(pointer) if pointer.is_file() else None


def export_backbone(backbone: Backbone, folder: Path) -> None:
    """Writes model.safetensors and config.json so that timm.create_model("local-dir:...") loads it.

    The config carries mean, std and input size: others need nothing of ours to use the model.
    """
    from timm.models import save_for_hf

    vit = cast(Any, backbone.network)
    vit.pretrained_cfg = dict(vit.pretrained_cfg) | {"mean": backbone.mean, "std": backbone.std}
    size = {"input_size": (3, backbone.input_px, backbone.input_px)}
    save_for_hf(vit, str(folder), safe_serialization=True, data_config=size)


@contextlib.contextmanager
def seeded_init(seed: int, draw: int = 0) -> Iterator[None]:
    """A context in which torch's CPU generator is a function of (seed, draw); restored after it.

    For initial weights only: libraries draw them from the global generator and take no other.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_generator(seed, draw, INIT_STREAM).initial_seed())
        yield


def _create(name: str, img_size: int | None, **arguments: Any) -> nn.Module:
    """timm's model without classifier, any input size; a wrong name is a PathfmError."""
    if not name.startswith("local-dir:") and not timm.is_model(name):
        near = timm.list_models(f"*{name.split('.')[0][:12]}*")[:3] or ["vit_small_patch16_224"]
        raise PathfmError(f"backbone {name!r} is no timm model. Try {', '.join(near)}")
    if img_size is not None:
        arguments["img_size"] = img_size
    try:
        model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **arguments)
    except TypeError as error:
        raise PathfmError(
            f"backbone {name!r} cannot be built as a vision transformer of any input size ({error}). "
            "Choose a ViT such as vit_small_patch16_224"
        ) from None
    if not (hasattr(model, "patch_embed") and hasattr(model, "num_prefix_tokens")):
        raise PathfmError(
            f"backbone {name!r} is a {type(model).__name__}, no plain vision transformer. Choose one "
            "such as vit_small_patch16_224"
        )
    return model


def _from_timm(name: str, img_size: int | None, architecture: Mapping[str, object]) -> Backbone:
    """timm's own weights, from its cache or by download."""
    try:
        vit = _create(name, img_size, pretrained=True, **architecture)
    except PathfmError:
        raise
    except Exception as error:  # hub, network and cache errors share no base class
        raise PathfmError(
            f"weights 'imagenet' of {name}: neither in timm's cache nor to be downloaded "
            f"({type(error).__name__}). Give a .safetensors file instead, or 'random'"
        ) from error
    tag = cast(Any, vit).pretrained_cfg.get("tag") or "default"
    return Backbone(vit, name, f"timm's weights {name.split('.')[0]}.{tag}")


def _from_file(
    path: Path, name: str, img_size: int | None, architecture: Mapping[str, object]
) -> Backbone:
    """A .safetensors file as timm names its tensors; every tensor of the backbone must be there."""
    stored = _read_tensors(path)
    _check_fit(path, name, stored, architecture)
    overlay = {"file": str(path)}
    vit = _create(name, img_size, pretrained=True, pretrained_cfg_overlay=overlay, **architecture)
    ours = vit.state_dict()
    left_out = len(stored) - len(ours)
    note = f"weights from {path.name}, {len(ours)} of {len(ours)} backbone tensors"
    if left_out:
        note += f" ({left_out} of the classifier left out)"
    resampled = [key for key in ours if ours[key].shape != stored[key].shape]
    if resampled:
        note += f", {resampled[0]} resampled to {img_size} px"
    return Backbone(vit, name, note)


def _from_folder(folder: Path, name: str, img_size: int | None) -> Backbone:
    """What `export_backbone` wrote. The architecture is the folder's; another name is refused."""
    try:
        architecture = str(json.loads((folder / "config.json").read_text())["architecture"])
    except (OSError, ValueError, KeyError) as error:
        raise PathfmError(
            f"{folder}/config.json is no timm config ({error}). Export it again"
        ) from None
    if name and name.split(".")[0] != architecture:
        raise PathfmError(
            f"{folder} holds a {architecture}, not a {name}. Set backbone to {architecture}"
        )
    stored = _read_tensors(folder / "model.safetensors")
    _check_fit(folder / "model.safetensors", f"local-dir:{folder}", stored, {})
    vit = _create(f"local-dir:{folder}", img_size, pretrained=True)
    return Backbone(
        vit, architecture, f"weights from {folder}, {len(stored)} of {len(stored)} tensors"
    )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, or a PathfmError that says what is wrong with it."""
    try:
        return load_file(path)
    except OSError as error:
        raise PathfmError(f"weights {path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise PathfmError(
            f"weights {path} ({path.stat().st_size:,} bytes): not a whole .safetensors file "
            f"({error}). Copy it again; pickles (.pth, .bin) are not loaded"
        ) from None


def _classifier_keys(vit: nn.Module) -> set[str]:
    """State keys of the classifier that `num_classes=0` leaves away."""
    named = cast(Any, vit).pretrained_cfg.get("classifier") or ()
    prefixes = (named,) if isinstance(named, str) else tuple(named)
    return {f"{prefix}.{kind}" for prefix in prefixes for kind in ("weight", "bias")}


def _check_fit(
    path: Path, name: str, stored: Mapping[str, Tensor], architecture: Mapping[str, object]
) -> None:
    """Raises PathfmError unless the file holds exactly the tensors that the backbone wants.

    timm itself loads without `strict` when the classifier is left away: a file with none of the
    right names would pass. Only a position embedding may have another length (it is resampled).
    """
    with torch.device("meta"):
        wanted = _create(name, None, pretrained=False, **architecture)
    shapes = {key: tuple(tensor.shape) for key, tensor in wanted.state_dict().items()}
    missing = [key for key in shapes if key not in stored]
    extra = [key for key in stored if key not in shapes and key not in _classifier_keys(wanted)]
    wrong = [
        key
        for key, shape in shapes.items()
        if key in stored
        and tuple(stored[key].shape) != shape
        and not _resamples(key, stored, shape)
    ]
    if not (missing or extra or wrong):
        return
    facts = [f"{len(shapes) - len(missing) - len(wrong)} of {len(shapes)} tensors fit"]
    if wrong:
        facts.append(f"{wrong[0]} is {tuple(stored[wrong[0]].shape)}, wanted {shapes[wrong[0]]}")
    if missing:
        facts.append(f"{len(missing)} missing, first {missing[0]}")
    if extra:
        facts.append(f"{len(extra)} unknown, first {extra[0]}")
    raise PathfmError(
        f"weights {path} do not fit {name}: {'; '.join(facts)}. "
        "Set backbone to the architecture the file was made for"
    )


def _resamples(key: str, stored: Mapping[str, Tensor], shape: tuple[int, ...]) -> bool:
    """Whether a tensor differs from `shape` only in the length of a position embedding."""
    have = tuple(stored[key].shape)
    return key == "pos_embed" and len(have) == 3 and have[2] == shape[2]
