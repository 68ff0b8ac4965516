"""Real artefacts to lay over training crops: cut-outs of pen and of coverslip edges.

A template is two files of one size in a folder, `NAME.png` and `NAME_mask.png` (white where the
artefact is), as HistoQC ships them. Names that begin with `pen` are ink.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathfm.runtime import PathfmError

_LARGEST_PX = 50_000_000
_OPAQUE = 0.65  # ink that lets less light through hides tissue
_LONG_SIDE = (0.7, 2.5)  # of a pasted template, in crops

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Template:
    """An artefact: the light it lets through (h, w, 3) uint8, 255 all; where it is; what it is."""

    name: str
    light: Pixels
    mask: NDArray[np.bool_]
    ink: bool


def read_templates(folder: Path) -> list[Template]:
    """Every template of a folder, by name.

    Raises ``PathfmError`` for files that cannot be read, sizes that differ, or no template at all.
    """
    found = []
    for path in sorted(folder.glob("*_mask.png")):
        picture = path.with_name(path.name.removesuffix("_mask.png") + ".png")
        if picture.exists():
            rgb, mask = _open(picture, "RGB"), _open(path, "L") > 127
            if rgb.shape[:2] != mask.shape or not mask.any() or mask.all():
                raise PathfmError(
                    f"template {picture}: picture {rgb.shape[:2]} and mask {mask.shape} differ, or "
                    "the mask is all of one kind; both need one size, white where the artefact is"
                )
            found.append(_template(picture.stem, rgb, mask))
    if not found:
        raise PathfmError(f"{folder}: no NAME.png with its NAME_mask.png in there")
    return found


def _open(path: Path, mode: str) -> Pixels:
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > _LARGEST_PX:
                raise PathfmError(
                    f"{path}: {opened.width}x{opened.height} px, more than {_LARGEST_PX:,}: make "
                    "it smaller"
                )
            return np.asarray(opened.convert(mode))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise PathfmError(f"{path}: not a picture that can be read ({error})") from error


def _template(name: str, rgb: Pixels, mask: NDArray[np.bool_]) -> Template:
    """Cropped to the artefact; its light is relative to the brightest glass of its own slide."""
    glass = np.maximum(np.percentile(rgb[~mask], 90, axis=0), 1)
    light = np.clip(rgb / glass * 255, 0, 255).astype(np.uint8)
    rows, columns = (np.flatnonzero(mask.any(axis=a)) for a in (1, 0))
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Template(name, light[box], mask[box], name.startswith("pen"))


def paste(
    rgb: Pixels, tissue: NDArray[np.bool_], templates: Sequence[Template], u: NDArray[np.float64]
) -> tuple[Pixels, NDArray[np.bool_]]:
    """A crop (c, c, 3) and its truth under one of the templates; `u` are six numbers in [0, 1).

    Light is multiplied, as dye and glass do it. Opaque ink is no tissue; under thin ink and the
    edges of coverslips tissue stays.
    """
    template = templates[int(u[0] * len(templates))]
    turned = [np.rot90(a, int(u[1] * 4)) for a in (template.light, template.mask)]
    light, mask = (a[:, ::-1] if u[2] < 0.5 else a for a in turned)
    crop = len(tissue)
    h, w = mask.shape
    low, high = _LONG_SIDE
    scale = crop * low * (high / low) ** u[3] / max(h, w)
    size = max(1, round(w * scale)), max(1, round(h * scale))
    small = Image.fromarray(np.ascontiguousarray(light)).resize(size, Image.Resampling.HAMMING)
    where = Image.fromarray(mask.astype(np.uint8) * np.uint8(255))
    share = np.asarray(where.resize(size, Image.Resampling.HAMMING), np.float32) / 255
    # Half of the template at least lies on the crop along each axis.
    x, y = (round(p * crop - s / 2) for p, s in zip(u[4:6], size, strict=True))
    to = np.s_[max(y, 0) : y + size[1], max(x, 0) : x + size[0]]
    rgb, tissue = rgb.copy(), tissue.copy()
    part = rgb[to]
    cut = np.s_[max(-y, 0) : max(-y, 0) + part.shape[0], max(-x, 0) : max(-x, 0) + part.shape[1]]
    through, share = np.asarray(small, np.float32)[cut] / 255, share[cut]
    rgb[to] = part * (1 - share[..., None] * (1 - through)) + 0.5
    if template.ink:
        tissue[to] &= ~((share > 0.5) & (through.mean(axis=2) < _OPAQUE))
    return rgb, tissue
