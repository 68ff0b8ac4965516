"""Networks to be looked through, each as a function from a picture to its outputs' maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from pathfm.backbone import Backbone, load_backbone
from pathfm.erf import ErfConfig
from pathfm.segmentation.models import build_model, init_weights, load_model
from pathfm.segmentation.segformer import PRESETS, STRIDES, SegFormer
from pathfm.segmentation.unet import ThumbnailUNet

Outputs = Callable[[Tensor], Mapping[str, tuple[Tensor, int, float]]]
"""(1, 3, h, w) in 0..1 -> by the name of the output its map (1, C, h', w'), the pixels from one cell
to the next, and how many pixels a cell's centre lies below and right of its corner: half a cell, but
half a pixel for a strided convolution of odd kernel, whose cell j is centred on pixel stride * j."""


def networks(config: ErfConfig) -> Iterator[tuple[str, bool, str, Outputs]]:
    """(name, trained?, which weights, its outputs) of everything asked for, one at a time."""
    seen = set()
    for path in config.weights:
        model, _ = load_model(path)
        seen.add(model_label(model))
        yield model_label(model), True, str(path.name), outputs_of(model)
        yield (
            model_label(model),
            False,
            f"seed {config.seed}",
            outputs_of(init_weights(model, config.seed)),
        )
    for name in config.models:
        model = init_weights(build_model(name), config.seed)
        if model_label(model) not in seen:
            yield model_label(model), False, f"seed {config.seed}", outputs_of(model)
    if config.vit:
        given = {False: f"random:{config.seed}", True: config.vit_weights}
        for trained, weights in given.items():
            if weights:
                backbone = load_backbone(config.vit, weights)
                backbone.check_input(config.size_px, "size_px")
                label = config.vit.split(".")[0]
                yield label, trained, backbone.weights_note, outputs_of(backbone)


def model_label(model: nn.Module) -> str:
    """What a picture calls a segmentation model."""
    if isinstance(model, ThumbnailUNet):
        return "U-Net" if model.stem == 2 else f"U-Net, stem {model.stem}"
    if isinstance(model, SegFormer):
        of = model.encoder.settings
        names = [p for p, s in PRESETS.items() if (s.widths, s.depths) == (of.widths, of.depths)]
        return f"SegFormer {names[0].upper()}" if names else "SegFormer"
    return type(model).__name__


def outputs_of(model: nn.Module) -> Outputs:
    """A network's outputs worth looking at, as maps; the network goes to eval mode."""
    model.eval().requires_grad_(False)
    if isinstance(model, SegFormer):

        def stages_and_logits(rgb: Tensor) -> dict[str, tuple[Tensor, int, float]]:
            maps = model.encoder(2 * rgb - 1)
            named = {f"stage {k}": (x, STRIDES[k - 1], 0.5) for k, x in enumerate(maps, 1)}
            return {**named, "logits": (model.decoder(maps), STRIDES[0], STRIDES[0] / 2)}

        return stages_and_logits
    if isinstance(model, Backbone):

        def tokens(rgb: Tensor) -> dict[str, tuple[Tensor, int, float]]:
            mean, sd = (torch.tensor(v)[:, None, None] for v in (model.mean, model.std))
            _, patches = model.tokens((rgb - mean) / sd)
            grid = patches.transpose(1, 2).reshape(1, -1, *model.grid(rgb.shape[-1]))
            return {"tokens": (grid, model.patch_size, model.patch_size / 2)}

        return tokens

    def logits(rgb: Tensor) -> dict[str, tuple[Tensor, int, float]]:
        out = model(rgb)
        return {"logits": (out[:, None] if out.dim() == 3 else out, 1, 0.5)}

    return logits
