"""Verb `erf`: how much of a picture each network really looks at, before and after training.

The effective receptive field (Luo et al. 2016, arXiv 1701.04128) of an output is where the input's
gradient of its central cell is large. Here, for every input pixel, the energy

    E(y, x) = mean over inputs of  e / sum e,   e = sum over R, G, B of  (d sum_c s_c f_c(centre) / d rgb)^2

with s_c = +1 or -1 at random, anew for every input. Each input counts alike: unscaled, one with a large
gradient (flat glass under a layer norm) decides alone. Not the plain sum over channels: after a layer
norm that sum is constant and its gradient zero, wherever the network looks.

One PNG, a column for each output (logits of a U-Net; each stage and the logits of a SegFormer; tokens
of a ViT), untrained above trained, and the same figures as JSON.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from torch import Tensor, nn

from online_patching.philox import words
from online_patching.stores.local import atomic_write_bytes, atomic_write_text
from pathfm.backbone import Backbone, load_backbone
from pathfm.runtime import PathfmError, make_folder, provenance
from pathfm.segmentation.models import build_model, init_weights, load_model
from pathfm.segmentation.segformer import PRESETS, STRIDES, SegFormer
from pathfm.segmentation.synthetic import draw_thumbnail
from pathfm.segmentation.unet import ThumbnailUNet

Energy = NDArray[np.float64]
Outputs = Callable[[Tensor], Mapping[str, tuple[Tensor, float]]]
"""(1, 3, h, w) in 0..1 -> by the name of the output its map (1, C, h', w') and how many pixels a
cell's centre lies below and right of its corner: half a cell, but half a pixel for a strided
convolution of odd kernel, whose cell j is centred on pixel stride * j."""

_SIGN_STREAM = 7310
SHARES = (0.5, 0.9)
_SCALE_BAR_PX = 100
_PANEL_IN, _TITLE_IN = 1.85, 0.5


class ErfConfig(BaseModel, frozen=True, extra="forbid"):
    """Which networks to look through, and at what."""

    out: Path = Field(Path("erf.png"), description="the picture; figures go beside it as .json")
    models: list[str] = Field(
        ["unet", "segformer_b0"], description="segmentation models, drawn untrained"
    )
    weights: list[Path] = Field(
        [], description="trained weights of segmentation models, drawn below their untrained selves"
    )
    vit: str = Field("vit_tiny_patch16_224", description="a ViT by timm name; empty for none")
    vit_weights: str | None = Field(
        None, description="its trained weights: a .safetensors file or a run folder"
    )
    size_px: int = Field(512, ge=32, le=4096, description="side of the pictures looked at")
    inputs: int = Field(16, ge=1, le=10_000, description="pictures averaged over")
    seed: int = Field(0, ge=0, description="of first weights, pictures and signs")


@dataclass(frozen=True)
class Field2d:
    """The energy of one output's gradient over the picture, and the radii that hold its shares.

    energy: (h, w), sums to 1. centre: (y, x) in pixels of the middle of the output's cell.
    """

    network: str
    output: str
    trained: bool
    weights: str
    energy: Energy
    centre: tuple[float, float]

    def radius_px(self, share: float) -> float:
        """Radius of the smallest circle round the centre that holds this share of the energy."""
        return energy_radius(self.energy, self.centre, share)


@dataclass(frozen=True)
class ErfResult:
    """What was measured, and where the picture is."""

    fields: tuple[Field2d, ...]
    path: Path


def run(config: ErfConfig) -> ErfResult:
    """Writes the picture and its figures, and prints the radii."""
    if not (config.models or config.weights or config.vit):
        raise PathfmError("nothing to look through: name models, weights or a vit")
    pictures = [_picture(config, number) for number in range(config.inputs)]
    found: list[Field2d] = []
    for network, trained, weights, outputs in networks(config):
        fields = receptive_fields(outputs, pictures, config.seed)
        for output, (energy, centre) in fields.items():
            found.append(Field2d(network, output, trained, weights, energy, centre))
            radii = "  ".join(f"{s:.0%} {found[-1].radius_px(s):6.1f} px" for s in SHARES)
            print(f"{network:14} {output:8} {'trained' if trained else 'untrained':9}  {radii}")
    make_folder(config.out.parent)
    atomic_write_bytes(config.out, drawn(found, config.size_px))
    figures = {
        **config.model_dump(mode="json"),
        **provenance(),
        "fields": [_told(f) for f in found],
    }
    atomic_write_text(config.out.with_suffix(".json"), json.dumps(figures, indent=1) + "\n")
    print(f"picture: {config.out}")
    return ErfResult(tuple(found), config.out)


def _picture(config: ErfConfig, number: int) -> Tensor:
    """A synthetic thumbnail, (1, 3, side, side) in 0..1."""
    rgb = draw_thumbnail(config.seed, number, config.size_px).rgb
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None].float() / 255


def _told(field: Field2d) -> dict[str, Any]:
    radii = {f"radius_{share:.0%}_px".replace("%", ""): field.radius_px(share) for share in SHARES}
    told = {"network": field.network, "output": field.output, "trained": field.trained}
    return {**told, "weights": field.weights, **{k: round(v, 1) for k, v in radii.items()}}


# --- networks ---------------------------------------------------------------------------------------


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

        def stages_and_logits(rgb: Tensor) -> dict[str, tuple[Tensor, float]]:
            maps = model.encoder(2 * rgb - 1)
            named = {f"stage {k}": (x, 0.5) for k, x in enumerate(maps, 1)}
            return {**named, "logits": (model.decoder(maps), STRIDES[0] / 2)}

        return stages_and_logits
    if isinstance(model, Backbone):

        def tokens(rgb: Tensor) -> dict[str, tuple[Tensor, float]]:
            mean, sd = (torch.tensor(v)[:, None, None] for v in (model.mean, model.std))
            side = rgb.shape[-1] // model.patch_size
            patches = model((rgb - mean) / sd)[:, -(side**2) :]
            grid = patches.transpose(1, 2).reshape(1, -1, side, side)
            return {"tokens": (grid, model.patch_size / 2)}

        return tokens

    def logits(rgb: Tensor) -> dict[str, tuple[Tensor, float]]:
        out = model(rgb)
        return {"logits": (out[:, None] if out.dim() == 3 else out, 0.5)}

    return logits


# --- the field --------------------------------------------------------------------------------------


def random_signs(seed: int, draw: int, count: int) -> Tensor:
    """`count` numbers that are +1 or -1, a function of (seed, draw)."""
    blocks = [
        words(seed, [draw], block, _SIGN_STREAM, 1024)[0] for block in range(-(-count // 1024))
    ]
    bits = np.concatenate(blocks)[:count] & 1
    return torch.from_numpy(2.0 * bits - 1).float()


def receptive_fields(
    outputs: Outputs,
    pictures: Sequence[Tensor],
    seed: int,
    signs: Callable[[int, int, int], Tensor] = random_signs,
) -> dict[str, tuple[Energy, tuple[float, float]]]:
    """(energy (h, w) that sums to 1, centre (y, x) in pixels) of each output.

    pictures: (1, 3, h, w) each, all of one size. signs: (seed, number of the picture, channels) ->
    weights of the channels. Raises PathfmError where no gradient arrives, or none that is a number.
    """
    energies: dict[str, Energy] = {}
    centres: dict[str, tuple[float, float]] = {}
    for number, picture in enumerate(pictures):
        rgb = picture.clone().requires_grad_()
        for name, (out, offset_px) in outputs(rgb).items():
            rows, columns = out.shape[-2:]
            cell = out[0, :, rows // 2, columns // 2]
            signed = (cell * signs(seed, number, len(cell)).to(cell)).sum()
            (gradient,) = torch.autograd.grad(signed, rgb, retain_graph=True)
            energy = gradient[0].double().square().sum(0).numpy()
            scaled = energy / total if (total := energy.sum()) else energy
            energies[name] = energies.get(name, np.zeros_like(energy)) + scaled
            strides = (round(a / b) for a, b in zip(rgb.shape[-2:], (rows, columns), strict=True))
            corner = [n // 2 * s for n, s in zip((rows, columns), strides, strict=True)]
            centres[name] = (corner[0] + offset_px, corner[1] + offset_px)
    for name, energy in energies.items():
        if not 0 < energy.sum() < np.inf:
            raise PathfmError(
                f"the gradient of {name} is {energy.sum():.3g} in all: the output does not depend on "
                "the picture, or the weights are damaged"
            )
    return {name: (energy / energy.sum(), centres[name]) for name, energy in energies.items()}


def energy_radius(energy: Energy, centre: tuple[float, float], share: float) -> float:
    """Radius in pixels of the smallest circle round `centre` that holds a share of the energy.

    Pixels count whole, by the distance of their middles.
    """
    rows, columns = (np.arange(n) + 0.5 for n in energy.shape)
    distance = np.hypot(rows[:, None] - centre[0], columns - centre[1]).ravel()
    order = np.argsort(distance, kind="stable")
    held = np.cumsum(energy.ravel()[order])
    at = min(int(np.searchsorted(held, share * held[-1])), held.size - 1)
    return float(distance[order[at]])


# --- the picture ------------------------------------------------------------------------------------


def drawn(fields: Sequence[Field2d], size_px: int) -> bytes:
    """A PNG: a column for each output, untrained above trained, gradients on one log scale.

    Shown is the root of the energy over its maximum, down to 1/1000, with circles that hold the shares.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys((f.network, f.output) for f in fields))
    rows = sorted({f.trained for f in fields})
    width, height = 1.2 + _PANEL_IN * len(columns), 0.1 + (_PANEL_IN + _TITLE_IN) * len(rows)
    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)

    def place(x: float, y: float, wide: float, tall: float) -> Any:
        """Axes in inches from the upper left corner."""
        return figure.add_axes((x / width, 1 - (y + tall) / height, wide / width, tall / height))

    shown: Any = None
    for field in fields:
        row, column = rows.index(field.trained), columns.index((field.network, field.output))
        y = _TITLE_IN + row * (_PANEL_IN + _TITLE_IN)
        axis = place(0.3 + column * _PANEL_IN, y, _PANEL_IN - 0.1, _PANEL_IN - 0.1)
        amplitude = np.sqrt(field.energy / field.energy.max()).clip(1e-3, 1)
        extent = (0, size_px, size_px, 0)
        shown = axis.imshow(amplitude, cmap="magma", norm=LogNorm(1e-3, 1), extent=extent)
        axis.set_axis_off()
        _annotate(axis, field, size_px)
    for row, trained in enumerate(rows):
        middle = 1 - (_TITLE_IN + row * (_PANEL_IN + _TITLE_IN) + _PANEL_IN / 2) / height
        name = "trained" if trained else "untrained"
        figure.text(0.08 / width, middle, name, rotation=90, va="center", fontsize=9)
    bar = place(width - 0.75, _TITLE_IN + 0.1, 0.12, _PANEL_IN - 0.3)
    figure.colorbar(shown, cax=bar).ax.tick_params(labelsize=7)
    bar.set_title("gradient\n/ largest", fontsize=7)
    page = io.BytesIO()
    figure.savefig(page, format="png", metadata={"Software": None})
    return page.getvalue()


def _annotate(axis: Any, field: Field2d, size_px: int) -> None:
    """Circles of the shares, a scale bar, the radii in words."""
    from matplotlib.patches import Circle

    y, x = field.centre
    radii = [field.radius_px(share) for share in SHARES]
    for radius, style in zip(radii, ("-", "--"), strict=True):
        axis.add_patch(Circle((x, y), radius, fill=False, color="#5ce1e6", lw=0.9, ls=style))
    axis.set_xlim(0, size_px)
    axis.set_ylim(size_px, 0)
    left, low = 0.06 * size_px, 0.94 * size_px
    axis.plot([left, left + _SCALE_BAR_PX], [low, low], color="white", lw=2, solid_capstyle="butt")
    axis.text(left, low - 0.02 * size_px, f"{_SCALE_BAR_PX} px", color="white", fontsize=6.5)
    words_ = ", ".join(f"{s:.0%}: {r:.0f} px" for s, r in zip(SHARES, radii, strict=True))
    axis.set_title(f"{field.network}\n{field.output}\n{words_}", fontsize=7)
