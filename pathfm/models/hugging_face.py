"""A folder as transformers' `save_pretrained` writes it -> Embedder. Local files, safetensors, no code.

transformers is an extra (`pip install "pathfm[hf]"`). Read are models whose output has a known place
for the CLS token, and those that end in a map of cells.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pathfm.models.embedder import Embedder, digest_of
from pathfm.runtime import PathfmError, one_line

# Tokens before the patches, besides the registers that a config counts.
_PREFIX = {
    "vit": 1,
    "vit_msn": 1,
    "deit": 2,  # CLS and distillation
    "beit": 1,
    "data2vec-vision": 1,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
}
_MAPS = {"resnet", "convnext", "convnextv2", "regnet", "dinov3_convnext"}
_NOTES = {"_name_or_path", "transformers_version", "torch_dtype", "dtype"}  # decide no feature
_HEADS = ("classifier", "pooler.", "head.", "decoder.", "lm_head", "embeddings.mask_token")


def from_hugging_face(
    folder: str, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Embedder:
    """The model in a folder that transformers wrote.

    mean, std: in place of those in preprocessor_config.json. Raises PathfmError for a folder that is
    none or brings its own code, pickles (`pytorch_model.bin`), a kind of model whose tokens we do not
    know, tensors that are missing, and where nothing says the normalisation.
    """
    root = Path(folder)
    config = _read_json(root, "config.json")
    kind = str(config.get("model_type", ""))
    _refuse(root, config, kind)
    network = _load(root)
    scales = _normalisation(root, mean, std)
    prefix = _PREFIX.get(kind, 0) + int(config.get("num_register_tokens") or 0)
    takes = inspect.signature(network.forward).parameters
    extra = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    def tokens(x: Tensor, patches: bool) -> tuple[Tensor, Tensor | None]:
        told = network(pixel_values=x, **extra)
        last: Tensor = told.last_hidden_state
        if kind in _PREFIX:
            return last[:, 0], last[:, prefix:]
        if last.ndim == 3:  # a ConvNet that already flattened its map, its mean in front
            return told.pooler_output.flatten(1), last[:, 1:]
        return told.pooler_output.flatten(1), last.flatten(2).transpose(1, 2)

    side = config.get("patch_size") if kind in _PREFIX else None
    return Embedder(
        network,
        tokens,
        name=root.resolve().name,
        weights_note=f"{kind} of transformers from {root}",
        digest=digest_of(
            network.state_dict(), {k: v for k, v in config.items() if k not in _NOTES}
        ),
        mean=scales[0],
        std=scales[1],
        patch_px=int(side) if side else None,
    )


def _refuse(root: Path, config: dict[str, Any], kind: str) -> None:
    """PathfmError for what is not read."""
    if kind not in _PREFIX and kind not in _MAPS:
        raise PathfmError(
            f"{root}: a model of type {kind!r}; known are {', '.join(sorted({*_PREFIX, *_MAPS}))}. "
            "Write a function that loads it, and give python:MODULE:FUNCTION"
        )
    if "auto_map" in config:
        raise PathfmError(
            f"{root} brings its own code, which is not run. Load it in a function of yours and give "
            "python:MODULE:FUNCTION"
        )
    index = root / "model.safetensors.index.json"
    if index.is_file():
        names = set(_read_json(root, index.name).get("weight_map", {}).values())
        if wrong := [n for n in names if not isinstance(n, str) or n != Path(n).name]:
            raise PathfmError(f"{index}: {wrong[0]!r} lies outside the folder; it is not read")
    elif not (root / "model.safetensors").is_file():
        raise PathfmError(
            f"{root}: no model.safetensors. Pickles (.bin, .pth) are not loaded: write it again with "
            "save_pretrained(..., safe_serialization=True)"
        )


def _load(root: Path) -> Any:
    """The network, all of whose tensors are the folder's."""
    try:
        from transformers import AutoModel
        from transformers.utils import logging as told
    except ImportError:
        raise PathfmError(
            f'{root} needs transformers, which is not installed: pip install "pathfm[hf]"'
        ) from None
    logging: Any = told
    quiet, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        network, report = AutoModel.from_pretrained(
            str(root),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # of transformers, safetensors and json, without a common base
        raise PathfmError(
            f"{root}: transformers cannot load it ({one_line(error)[:200]})"
        ) from None
    finally:
        logging.set_verbosity(quiet)
        if bars:
            logging.enable_progress_bar()
    wrong = [key for key in sorted(report["missing_keys"]) if not key.startswith(_HEADS)]
    wrong += [str(key) for key in sorted(report["mismatched_keys"], key=str)]
    if wrong:
        raise PathfmError(
            f"{root}: {len(wrong)} tensors of the network are not in the file or of another shape, "
            f"first {wrong[0]}; they would be random"
        )
    return network.float()


def _normalisation(
    root: Path, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[Sequence[float], Sequence[float]]:
    if mean is not None and std is not None:
        return mean, std
    try:
        told = _read_json(root, "preprocessor_config.json")
        return (
            told["image_mean"] if mean is None else mean,
            told["image_std"] if std is None else std,
        )
    except (PathfmError, KeyError):
        raise PathfmError(
            f"{root}: nothing says what its input is normalised with (preprocessor_config.json with "
            "image_mean and image_std). Set mean and std"
        ) from None


def _read_json(root: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((root / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PathfmError(f"{root / name}: cannot be read ({one_line(error)[:160]})") from None
    if not isinstance(found, dict):
        raise PathfmError(f"{root / name}: wants a JSON object, found a {type(found).__name__}")
    return found
