"""Synthetic H&E-like slides: a picture that exists at every µm/px, drawn where it is asked for.

    slide = SyntheticSlide(seed=3, width_px0=7000, height_px0=5200, mpp=0.25)
    slide.render(1200, 800, 256, 256, mpp=0.5)      # uint8 (256, 256, 3)
    slide.class_map(mpp=8.0)                        # uint8 truth, 0 = glass

Colours follow Beer-Lambert: concentrations of eosin and haematoxylin times their optical densities
(Macenko et al. 2009), so stain varies between slides as real stain does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from online_patching.philox import uniform, words
from online_patching.testing.layout import (
    CLASS_NAMES,
    SIGNED_UM,
    STREAM,
    Array,
    Layout,
    f32,
    plan_layout,
)
from online_patching.testing.textures import TEXEL_UM, gather, nucleus_sprites, tables

# Per class, in the order of CLASS_NAMES: eosin and haematoxylin between the nuclei, how much of the
# fibre and of the grain texture shows, and how far cells are emptied to white vacuoles.
_EOSIN = f32([0.0, 0.50, 0.62, 0.42, 0.34, 0.72])
_HAEMATOXYLIN = f32([0.0, 0.26, 0.03, 0.02, 0.30, 0.16])
_FIBRE = f32([0.0, 0.08, 0.34, 0.15, 0.05, 0.05])
_GRAIN = f32([0.0, 0.20, 0.08, 0.0, 0.15, 0.34])
_VACUOLE = f32([0.0, 0.0, 0.0, 1.0, 0.0, 0.0])

_BLOCK_PX = 512
_FINEST_DRAWN_UM = 1.0  # coarser pictures are drawn at up to this and averaged


@dataclass(frozen=True)
class StainLook:
    """How one slide's stain and glass look: what differs between sites."""

    eosin_od: tuple[float, float, float]
    haematoxylin_od: tuple[float, float, float]
    glass_rgb: tuple[float, float, float]
    ink_rgb: tuple[float, float, float]

    @staticmethod
    def of_seed(seed: int) -> StainLook:
        """A plausible look: stain strengths ± 18 %, hues ± 8 %, glass slightly tinted."""
        u = uniform(words(seed, np.arange(4), 0, STREAM["stain"], 4))
        strength = 1 + 0.36 * (u[0, :2] - 0.5)
        eosin = np.array([0.2159, 0.8012, 0.5581]) * strength[0] * (1 + 0.16 * (u[1, :3] - 0.5))
        blue = np.array([0.5626, 0.7201, 0.4062]) * strength[1] * (1 + 0.16 * (u[2, :3] - 0.5))
        glass = 243.0 + 8.0 * (u[3, :3] - 0.5)
        inks = ((30.0, 110.0, 60.0), (30.0, 50.0, 140.0), (35.0, 35.0, 45.0))
        r, g, b = inks[int(u[0, 3] * 3)]
        return StainLook(_triple(eosin), _triple(blue), _triple(glass), (r, g, b))


def _triple(values: NDArray[np.float64]) -> tuple[float, float, float]:
    return float(values[0]), float(values[1]), float(values[2])


@dataclass(frozen=True)
class SyntheticSlide:
    """A slide that can be drawn at any place and µm/px: a pure function of its fields.

    Equal windows on one pixel grid agree to 1 grey level however they are cut.
    """

    seed: int
    width_px0: int
    height_px0: int
    mpp: float = 0.25
    pen: bool = True
    fold: bool = True
    dust: int = 8
    look: StainLook | None = None
    class_names: tuple[str, ...] = field(default=CLASS_NAMES, init=False)

    @property
    def stain(self) -> StainLook:
        """The look given, or the one its seed gives."""
        return self.look or StainLook.of_seed(self.seed)

    @cached_property
    def layout(self) -> Layout:
        """Where what lies; computed at first use."""
        size_um = self.width_px0 * self.mpp, self.height_px0 * self.mpp
        return plan_layout(self.seed, *size_um, pen=self.pen, fold=self.fold, dust=self.dust)

    def render(
        self, x_px0: float, y_px0: float, width_px: int, height_px: int, mpp: float | None = None
    ) -> NDArray[np.uint8]:
        """The window whose upper left corner is (x_px0, y_px0): uint8 (height_px, width_px, 3).

        `mpp` is the picture's own; None means the slide's. Outside the slide the drawing goes on
        as glass. Above 1 µm/px it is drawn finer and averaged, so it does not alias.
        """
        mpp = self.mpp if mpp is None else mpp
        finer = max(1, int(np.ceil(mpp / _FINEST_DRAWN_UM)))
        origin = x_px0 * self.mpp / mpp * finer, y_px0 * self.mpp / mpp * finer
        out = np.empty((height_px, width_px, 3), np.uint8)
        step = max(1, _BLOCK_PX // finer)
        for top in range(0, height_px, step):
            for left in range(0, width_px, step):
                h, w = min(step, height_px - top), min(step, width_px - left)
                corner = origin[0] + left * finer, origin[1] + top * finer
                block = _draw(self, *corner, w * finer, h * finer, mpp / finer)
                if finer > 1:
                    block = block.reshape(h, finer, w, finer, 3).mean(axis=(1, 3))
                out[top : top + h, left : left + w] = block + np.float32(0.5)
        return out

    def class_map(self, mpp: float = 8.0) -> NDArray[np.uint8]:
        """Class of each pixel's centre at `mpp`: uint8 (h, w), 0 = glass, see `class_names`.

        Covers the slide exactly: h = round(height_px0 * self.mpp / mpp), at least 1.
        """
        width = max(1, round(self.width_px0 * self.mpp / mpp))
        height = max(1, round(self.height_px0 * self.mpp / mpp))
        x_um = (np.arange(width) + 0.5) * (self.width_px0 * self.mpp / width)
        y_um = (np.arange(height) + 0.5) * (self.height_px0 * self.mpp / height)
        i = (y_um / self.layout.pitch_um + 0.5).astype(np.int64)
        j = (x_um / self.layout.pitch_um + 0.5).astype(np.int64)
        return self.layout.truth[np.ix_(i, j)]


def _draw(
    slide: SyntheticSlide, x_px: float, y_px: float, width_px: int, height_px: int, mpp: float
) -> Array:
    """One block, float32 RGB 0..255; (x_px, y_px) is its corner in pixels of size `mpp`."""
    layout, stain = slide.layout, slide.stain
    x_um = np.asarray((x_px + np.arange(width_px) + 0.5) * mpp, np.float64)
    y_um = np.asarray((y_px + np.arange(height_px) + 0.5) * mpp, np.float64)
    lattice = _Window(layout, x_um, y_um)
    shape = (height_px, width_px)
    noise = gather(tables()["noise"], x_um, y_um, TEXEL_UM)
    rgb = np.empty((*shape, 3), np.float32)
    if lattice.any_above(layout.cover, -2.0):
        eosin, blue = _concentrations(slide, lattice, x_um, y_um)
        _stamp_nuclei(blue, layout, x_px, y_px, mpp)
        for c in range(3):
            od = eosin * np.float32(stain.eosin_od[c])
            od += blue * np.float32(stain.haematoxylin_od[c])
            np.multiply(np.exp(-od), np.float32(stain.glass_rgb[c]), out=rgb[..., c])
    else:
        rgb[:] = f32(stain.glass_rgb)
    for signed, ink, opacity in (
        (layout.pen, stain.ink_rgb, 0.68),
        (layout.dust, (70.0, 66.0, 62.0), 0.75),
    ):
        if signed is not None and lattice.any_above(signed, -1.0):
            alpha = np.clip(lattice.fine(signed) * np.float32(SIGNED_UM / 4) + 0.5, 0, 1) * opacity
            for c in range(3):
                rgb[..., c] += (np.float32(ink[c]) - rgb[..., c]) * alpha
    rgb += noise[..., None]
    return np.clip(rgb, 0, 255, out=rgb)


def _concentrations(
    slide: SyntheticSlide, lattice: _Window, x_um: NDArray[np.float64], y_um: NDArray[np.float64]
) -> tuple[Array, Array]:
    """Eosin and haematoxylin between the nuclei, (h, w) each."""
    layout, table = slide.layout, tables()
    cover = np.clip(lattice.fine(layout.cover) * np.float32(SIGNED_UM / 3.0) + 0.5, 0, 1)
    # The lattice is clamped at its ends: beyond the slide it would smear the last row.
    cover *= ((x_um > 0) & (x_um < slide.width_px0 * slide.mpp))[None]
    cover *= ((y_um > 0) & (y_um < slide.height_px0 * slide.mpp))[:, None]
    # Each slide starts elsewhere in the shared texture tables.
    shift_x, shift_y = uniform(words(slide.seed, [0], 0, STREAM["texture"], 2))[0] * 400.0
    x_um, y_um = x_um + shift_x, y_um + shift_y
    grain = gather(table["grain"], x_um, y_um, TEXEL_UM)
    fibre = gather(table["fibre"], x_um, y_um, TEXEL_UM)
    crossing = gather(table["crossing"], x_um, y_um, TEXEL_UM * 1.37)
    fibre += (crossing - fibre) * lattice.fine(layout.direction)
    texture = fibre * lattice.mixed(_FIBRE)
    texture += grain * lattice.mixed(_GRAIN)
    if lattice.any_above(layout.weights[3], 0.02):
        wall = gather(table["wall"], x_um, y_um, 0.5)
        cover = cover * (1 - lattice.mixed(_VACUOLE) * (1 - wall))
    cover = cover * lattice.fine(layout.thickness)
    eosin = lattice.mixed(_EOSIN) * np.maximum(1 + texture, 0.05) * cover
    blue = lattice.mixed(_HAEMATOXYLIN) * (1 + np.float32(0.25) * grain) * cover
    return eosin, blue


class _Window:
    """The part of a layout's lattice under one block, and its linear interpolation to pixels."""

    def __init__(
        self, layout: Layout, x_um: NDArray[np.float64], y_um: NDArray[np.float64]
    ) -> None:
        ny, nx = layout.truth.shape
        self._layout = layout
        self._rows, self._wy = _linear(y_um / layout.pitch_um, ny)
        self._columns, self._wx = _linear(x_um / layout.pitch_um, nx)

    def any_above(self, lattice: Array, value: float) -> bool:
        return bool((lattice[self._rows, self._columns] > value).any())

    def fine(self, lattice: Array) -> Array:
        """(h, w) values at the pixels: two small matrix products, 1 ns a pixel."""
        return f32(self._wy @ lattice[self._rows, self._columns] @ self._wx.T)

    def mixed(self, per_class: Array) -> Array:
        """(h, w) of a per-class number, mixed by the soft memberships."""
        here = self._layout.weights[:, self._rows, self._columns]
        return f32(self._wy @ np.tensordot(per_class, here, axes=1) @ self._wx.T)


def _linear(positions: NDArray[np.float64], nodes: int) -> tuple[slice, Array]:
    """The nodes needed, and (n, needed) weights of linear interpolation; clamped at the ends."""
    positions = np.clip(positions, 0, nodes - 1.001)
    first = np.floor(positions).astype(np.int64)
    start, stop = int(first[0]), int(first[-1]) + 2
    weights = np.zeros((len(positions), stop - start), np.float32)
    rows = np.arange(len(positions))
    t = (positions - first).astype(np.float32)
    weights[rows, first - start] = 1 - t
    weights[rows, first - start + 1] = t
    return slice(start, stop), weights


def _stamp_nuclei(blue: Array, layout: Layout, x_px: float, y_px: float, mpp: float) -> None:
    """Raises haematoxylin to each nucleus's own where that is darker: order does not matter."""
    nuclei, sprites = layout.nuclei, nucleus_sprites(mpp)
    height, width = blue.shape
    margin = max(s.shape[0] for s in sprites) // 2 + 1
    first, last = np.searchsorted(
        nuclei.y_um, [(y_px - margin) * mpp, (y_px + height + margin) * mpp]
    )
    x = np.floor(nuclei.x_um[first:last] / mpp - x_px + 0.5).astype(np.int64)
    y = np.floor(nuclei.y_um[first:last] / mpp - y_px + 0.5).astype(np.int64)
    number = nuclei.sprite[first:last]
    for k in np.flatnonzero((x > -margin) & (x < width + margin)).tolist():
        sprite = sprites[number[k]]
        half = sprite.shape[0] // 2
        top, left = int(y[k]) - half, int(x[k]) - half
        t, le = max(top, 0), max(left, 0)
        b, r = min(top + sprite.shape[0], height), min(left + sprite.shape[1], width)
        if b > t and r > le:
            under = blue[t:b, le:r]
            np.maximum(under, sprite[t - top : b - top, le - left : r - left], out=under)
