"""Lays tissue on the glass: regions of several textures, holes, tears, folds, and its truth."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage

from pathfm.segmentation.synthetic import textures
from pathfm.segmentation.synthetic.canvas import Array, Canvas, Kind, Mask, f32
from pathfm.segmentation.synthetic.stains import Stain
from pathfm.segmentation.synthetic.textures import Texture

WIDE_HOLE_PX = 12.0
"""Holes and inlets of glass wider than this are glass; narrower ones belong to the tissue."""
_FAINTEST = 0.045  # mean optical density: paler than this not even a pathologist sees it
_UNSEEN = 0.012  # a patch as wide as a hole that absorbs less shows nothing: it is glass
_SMALL_PIECE_PX = 45  # pieces of a smaller area are not tissue but debris

_MAIN: tuple[tuple[Callable[[Canvas, float], Texture], Kind, float], ...] = (
    (textures.solid, Kind.TISSUE, 0.50),
    (textures.fibres, Kind.TISSUE, 0.20),
    (textures.alveoli, Kind.FAT, 0.07),
    (textures.fat, Kind.FAT, 0.06),
    (textures.pale, Kind.PALE, 0.09),
    (textures.loose, Kind.PALE, 0.08),
)
_OTHER = (
    (textures.fibres, Kind.TISSUE, 0.28),
    (textures.solid, Kind.TISSUE, 0.22),
    (textures.fat, Kind.FAT, 0.22),
    (textures.pale, Kind.PALE, 0.13),
    (textures.loose, Kind.PALE, 0.15),
)


def lay_tissue(c: Canvas, signed: Array, shape: str, stain: Stain, um: float) -> None:
    """Draws tissue where `signed` (px) > 0; `um` is px per µm. Marks what each pixel is."""
    texture, kinds = _regions(c, signed, shape, um)
    cover = f32(np.clip(signed / c.between(0.7, 2.2) + 0.5, 0, 1))
    cover = f32(cover * (1 - _lumens(c, shape)) * (1 - _tears(c, signed)))
    shown = f32(cover * (1 - texture.open))
    if c.chance(0.3):
        shown = f32(shown * _folds(c))
    shown = f32(shown * (1 + c.between(0, 0.15) * c.noise(c.size / 2, 1)))  # uneven thickness
    if c.chance(0.4):  # a section's edge is dyed more, or refracts
        rim = np.exp(-((signed / c.between(1, 4)) ** 2))
        shown = f32(shown * (1 + c.between(-0.2, 0.6) * rim))
    density = f32(np.maximum(texture.matrix, 0.04)[..., None] * stain.matrix)
    density = f32(density + np.maximum(texture.nuclei, 0)[..., None] * stain.nuclei)
    amount = texture.target * np.float32(stain.target_amount)
    density = f32(density + np.maximum(amount, 0)[..., None] * stain.target)
    # Two stains do not add up to double the darkness of a section: the sum is held at about one.
    density = np.maximum(density * (shown * np.float32(stain.strength * 0.8))[..., None], 0)
    mean = float(density.mean()) / max(float(cover.mean()), 1e-3)
    density = density * np.float32(max(1.0, _FAINTEST / max(mean, 1e-6)))
    c.rgb *= np.exp(-density)
    reach = int(WIDE_HOLE_PX) * (3 if shape == "smear" else 1)  # a film has grain, not holes
    seen = ndimage.uniform_filter(density.mean(axis=2), reach) > _UNSEEN
    _mark(c, (cover >= 0.5) & seen, kinds)
    if shape != "smear" and c.chance(0.25):
        _margin_ink(c, signed, cover)


def _regions(c: Canvas, signed: Array, shape: str, um: float) -> tuple[Texture, Array]:
    """The mixed texture of one to three regions, and each pixel's kind."""
    if shape == "smear":
        return textures.smear(c, um), np.full(signed.shape, Kind.TISSUE, np.float32)
    make, kind, _ = _MAIN[int(c.rng.choice(len(_MAIN), p=[m[2] for m in _MAIN]))]
    texture = make(c, um)
    kinds = np.full(signed.shape, kind, np.float32)
    for _ in range(int(c.rng.choice(3, p=(0.35, 0.4, 0.25)))):
        make, kind, _ = _OTHER[int(c.rng.choice(len(_OTHER), p=[m[2] for m in _OTHER]))]
        other = make(c, um)
        field = c.noise(c.span(25, 140), 2) - c.between(-0.6, 1.3)
        if c.chance(0.4) and shape in ("blob", "band", "ring"):  # a layer along the border
            field = (c.between(8, 60) - signed) / 12 + 0.6 * c.noise(c.span(20, 60), 2)
        share = np.clip(field * c.span(1, 12) + 0.5, 0, 1)
        for name in ("matrix", "nuclei", "target", "open"):
            mixed = getattr(texture, name)
            setattr(texture, name, mixed + (getattr(other, name) - mixed) * share)
        kinds[share > 0.5] = kind
    return texture, kinds


def _lumens(c: Canvas, shape: str) -> Array:
    """Wide openings with sharp borders: vessels, cysts, ducts, glass between folds."""
    if shape == "smear" or not c.chance(0.4):
        return np.zeros((c.size, c.size), np.float32)
    field = c.noise(c.span(14, 70), int(c.between(1, 4))) - c.between(0.9, 2.2)
    return np.asarray(np.clip(field * c.between(4, 20), 0, 1), np.float32)


def _tears(c: Canvas, signed: Array) -> Array:
    """Cracks and tears: thin, long, branching, and not everywhere."""
    torn = np.zeros((c.size, c.size), np.float32)
    for _ in range(int(c.rng.choice(3, p=(0.6, 0.28, 0.12)))):
        line = np.abs(c.noise(c.span(15, 90), 3, stretch=c.between(1, 3)))
        where = np.clip(1.5 * c.noise(c.span(40, 160), 1) + c.between(-1, 0.6), 0, 1)
        width = c.span(0.02, 0.14) * where + 1e-4
        torn = np.maximum(torn, np.clip(2 * (1 - line / width), 0, 1))
    return torn


def _folds(c: Canvas) -> Array:
    """Where the section lies double: dark bands, short and bent."""
    times = np.ones((c.size, c.size), np.float32)
    for _ in range(int(c.between(1, 3.5))):
        u, v = c.plane()
        across = (u - c.between(-0.7, 0.7)) * c.size / 2 + c.between(0, 12) * c.noise(60, 1)
        ends = np.clip((c.between(0.1, 0.6) - np.abs(v - c.between(-0.6, 0.6))) * 20, 0, 1)
        times += c.between(0.4, 1.4) * np.exp(-((across / c.between(1, 4)) ** 4)) * ends
    return times


def _margin_ink(c: Canvas, signed: Array, cover: Array) -> None:
    """Surgical ink on part of the specimen's border: it lies on tissue, which stays tissue."""
    rim = np.exp(-((np.maximum(signed, 0) / c.between(1, 4)) ** 2)) * cover
    where = np.clip(3 * c.noise(c.span(40, 160), 1) - c.between(-1, 3), 0, 1)
    ink = np.array([(20, 20, 22), (15, 90, 60), (25, 50, 130), (190, 150, 20), (170, 30, 40)])
    c.blend(ink[c.rng.integers(5)], rim * where * c.between(0.4, 0.95))


def _mark(c: Canvas, covered: Mask, kinds: Array) -> None:
    """Truth: what is covered, and its narrow holes and inlets; not its crumbs."""
    white = ~covered
    glass = _wide(white)
    tissue = ~glass
    crumbs = _crumbs(tissue)
    c.mark(tissue & ~crumbs, Kind.TISSUE)
    inside = c.kinds == Kind.TISSUE
    c.kinds[inside] = kinds[inside].astype(np.uint8)
    c.mark(crumbs & ~white, Kind.DUST)


def _wide(white: Mask) -> Mask:
    """The parts of `white` where a disc of WIDE_HOLE_PX fits: a morphological opening.

    Found at half size (distances cost most of a thumbnail's time there); beyond the picture, white
    goes on as at its border.
    """
    if white.all() or not white.any():
        return white.copy()
    pad = int(WIDE_HOLE_PX)
    half = np.pad(white[::2, ::2], pad, mode="edge")
    reach = WIDE_HOLE_PX / 4
    core = ndimage.distance_transform_edt(half) > reach
    if not core.any():
        return np.zeros_like(white)
    near = reach + 1.0 - ndimage.distance_transform_edt(~core)
    signed = Image.fromarray(near[pad:-pad, pad:-pad].astype(np.float32))
    size = (white.shape[1], white.shape[0])
    wide = np.asarray(signed.resize(size, Image.Resampling.BILINEAR)) > 0
    return np.asarray(wide & white, np.bool_)


def _crumbs(tissue: Mask) -> Mask:
    """Pieces too small to be drawn."""
    labels, count = ndimage.label(tissue)
    if count < 2:
        return np.zeros_like(tissue)
    small = np.bincount(labels.ravel()) < _SMALL_PIECE_PX
    small[0] = False
    return np.asarray(small[labels], np.bool_)
