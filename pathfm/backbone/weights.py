"""Weights by name: a file, a folder that a run wrote, timm's own download, or at random.

Which of these, and how many tensors of it, is `Backbone.weights_note`. A file that leaves a tensor
of the backbone at its random start is refused: timm alone would train on in silence.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import timm
import torch
from huggingface_hub import constants, get_session
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from pathfm.backbone.create import create, key_drop_path
from pathfm.backbone.network import Backbone, seeded_init
from pathfm.runtime import PathfmError


def load_backbone(
    name: str,
    weights: str,
    img_size: int | None = None,
    *,
    drop_path: float = 0.0,
    **architecture: object,
) -> Backbone:
    """A backbone by timm name with weights from `weights`, in eval mode, on the CPU.

    weights: "random" or "random:SEED"; "imagenet" (timm's download or its cache); "dinov2" (the same,
    of the tag lvd142m); a .safetensors file; a folder in timm's local-dir form, a run or a checkpoint
    that holds one. img_size: side in pixels that a transformer's position embedding is resampled to
    once; None: as the folder or the architecture says, 224 for architectures made for more (DINOv2).
    drop_path: rate of keyed stochastic depth in the last block, falling linearly to 0 in the first.
    `architecture` goes to timm (depth=2, embed_dim=64, ...). Raises PathfmError.
    """
    kind, _, seed = weights.partition(":")
    path = Path(weights)
    if kind == "random":
        found, source = _at_random(name, seed, img_size, architecture), name
    elif weights in ("imagenet", "dinov2"):
        source = name if weights == "imagenet" else _dinov2_tag(name)
        found = _from_timm(source, weights, img_size, architecture)
    elif (folder := find_backbone_folder(path)) is not None:
        found, source = _from_folder(folder, name, img_size), f"local-dir:{folder}"
    elif path.is_file():
        found, source = _from_file(path, name, img_size, architecture), name
    else:
        raise PathfmError(
            f"weights {weights!r}: no such file or run folder. Give a .safetensors file, a run "
            "folder, 'imagenet', 'dinov2' or 'random'"
        )
    network, note = found
    key_drop_path(network, source, drop_path, **architecture)
    return Backbone(network, _name_of(network, name), note, img_size)


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


def _name_of(network: Any, name: str) -> str:
    """The name asked for; a folder's architecture where none was."""
    return name or str(network.pretrained_cfg["architecture"])


def _at_random(
    name: str, seed: str, img_size: int | None, architecture: Mapping[str, Any]
) -> tuple[nn.Module, str]:
    """timm's own initialisation, from a seed."""
    if seed and not seed.isdigit():
        raise PathfmError(
            f"weights 'random:{seed}': the seed after 'random:' must be a whole number"
        )
    with seeded_init(int(seed or 0)):
        network = create(name, img_size, pretrained=False, **architecture)
    return network, f"random weights (seed {int(seed or 0)})"


def _dinov2_tag(name: str) -> str:
    """timm's name of DINOv2's weights for an architecture; PathfmError where there are none."""
    source = f"{name.split('.')[0]}.lvd142m"
    there = timm.list_pretrained("*.lvd142m")
    if source not in there:
        raise PathfmError(
            f"weights 'dinov2': there are none for {name}. Set backbone to one of "
            f"{', '.join(tag.removesuffix('.lvd142m') for tag in there)}"
        )
    return source


def _from_timm(
    source: str, weights: str, img_size: int | None, architecture: Mapping[str, Any]
) -> tuple[nn.Module, str]:
    """timm's own weights, from its cache or by download."""
    config = timm.get_pretrained_cfg(source)
    on_hub = config.hf_hub_id if config else None
    try:
        with _cache_only_without_hub() if on_hub else nullcontext():
            network = create(source, img_size, pretrained=True, **architecture)
    except PathfmError:
        raise
    except Exception as error:  # hub, network and cache errors share no base class
        hub = on_hub or source
        raise PathfmError(
            f"weights {weights!r} of {source}: neither in timm's cache nor to be downloaded "
            f"({type(error).__name__}). Fetch model.safetensors of {hub} where there is a network "
            "and give that file as weights, or 'random'"
        ) from error
    tag = cast(Any, network).pretrained_cfg.get("tag") or "default"
    return network, f"timm's weights {source.split('.')[0]}.{tag}"


@contextmanager
def _cache_only_without_hub() -> Iterator[None]:
    """Inside, huggingface_hub looks only into its cache when the hub does not answer within 10 s.

    By itself it would ask again for a minute, and print each time.
    """
    offline = constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = offline or not _hub_answers()
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _hub_answers() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of the network, the proxy or certificates, by httpx or requests
        return False
    return True


def _from_file(
    path: Path, name: str, img_size: int | None, architecture: Mapping[str, Any]
) -> tuple[nn.Module, str]:
    """A .safetensors file as timm or DINOv2 names its tensors; all of the backbone must be there."""
    stored = _read_tensors(path)
    fitting = _check_fit(path, name, stored, architecture)
    overlay = {"file": str(path)}
    network = create(
        name, img_size, pretrained=True, pretrained_cfg_overlay=overlay, **architecture
    )
    changed = _changed(network, fitting, path)
    n = len(network.state_dict())
    note = f"weights from {path.name}, {n} of {n} backbone tensors"
    if len(fitting) > n:
        note += f" ({len(fitting) - n} of the classifier left out)"
    return network, note + changed


def _from_folder(folder: Path, name: str, img_size: int | None) -> tuple[nn.Module, str]:
    """What `export_backbone` wrote. The architecture is the folder's; another name is refused."""
    try:
        architecture = str(json.loads((folder / "config.json").read_text())["architecture"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PathfmError(
            f"{folder}/config.json is no timm config ({error}). Export it again"
        ) from None
    if name and name.split(".")[0] != architecture:
        raise PathfmError(
            f"{folder} holds a {architecture}, not a {name}. Set backbone to {architecture}"
        )
    path = folder / "model.safetensors"
    stored = _read_tensors(path)
    _check_fit(path, f"local-dir:{folder}", stored, {})
    network = create(f"local-dir:{folder}", img_size, pretrained=True)
    changed = _changed(network, stored, path)
    n = len(stored)
    return network, f"weights from {folder}, {n} of {n} tensors{changed}"


def _changed(network: Any, stored: Mapping[str, Tensor], path: Path) -> str:
    """What to add to a note: nothing, or that the position embedding was resampled.

    Raises PathfmError if any other tensor of the network is not the file's.
    """
    ours = network.state_dict()
    other = [name for name, tensor in ours.items() if not torch.equal(tensor, stored[name])]
    if not other:
        return ""
    if other != ["pos_embed"]:
        raise PathfmError(
            f"weights {path}: {len(other)} of {len(ours)} tensors are not the file's after loading, "
            f"first {other[0]}. This timm converts them: save the model from timm, and load that"
        )
    return f", pos_embed resampled to {network.patch_embed.img_size[0]} px"


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


def _classifier_keys(network: nn.Module) -> set[str]:
    """State keys of the classifier that `num_classes=0` leaves away."""
    named = cast(Any, network).pretrained_cfg.get("classifier") or ()
    prefixes = (named,) if isinstance(named, str) else tuple(named)
    return {f"{prefix}.{kind}" for prefix in prefixes for kind in ("weight", "bias")}


def _check_fit(
    path: Path, name: str, stored: Mapping[str, Tensor], architecture: Mapping[str, Any]
) -> Mapping[str, Tensor]:
    """The file's tensors as timm names them; PathfmError unless they are what the backbone wants.

    timm itself loads without `strict` when the classifier is left away: a file with none of the
    right names would pass. Only a position embedding may have another length (it is resampled).
    """
    with torch.device("meta"):
        wanted = create(name, None, pretrained=False, **architecture)
    if "mask_token" in stored and hasattr(wanted, "patch_embed"):
        stored = _renamed_from_dinov2(stored, name, architecture)
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
        return stored
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


def _renamed_from_dinov2(
    stored: Mapping[str, Tensor], name: str, architecture: Mapping[str, Any]
) -> Mapping[str, Tensor]:
    """Tensors as DINOv2's repository names them, by timm's names, at the size they have.

    With registers timm adds the CLS token's position to the token itself.
    """
    places, projection = stored.get("pos_embed"), stored.get("patch_embed.proj.weight")
    if places is None or projection is None or places.ndim != 3 or projection.ndim != 4:
        return stored
    side_px = math.isqrt(places.shape[1] - 1) * projection.shape[-1]
    with torch.device("meta"):
        same_size = create(name, side_px, pretrained=False, **architecture)
    return dict(checkpoint_filter_fn(dict(stored), cast(Any, same_size)))


def _resamples(key: str, stored: Mapping[str, Tensor], shape: tuple[int, ...]) -> bool:
    """Whether a tensor differs from `shape` only in the length of a position embedding."""
    have = tuple(stored[key].shape)
    return key == "pos_embed" and len(have) == 3 and have[2] == shape[2]
