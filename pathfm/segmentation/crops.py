"""Endless batches of training crops from pictures of many sizes; batch k depends on (seed, k) only.

Each crop: a picture by weight, a scale by µm/px, a place (anywhere, at a border of tissue, or at
something rare), antialiased pixels and the truth by area; then `pathfm.segmentation.augment`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from online_patching.philox import integers, uniform, words
from pathfm.runtime import PathfmError
from pathfm.segmentation.augment import AugmentSettings, augment
from pathfm.segmentation.templates import Template, paste

_STREAM, _PASTE_STREAM = 7311, 7312
Box = tuple[float, float, float, float]
_PLACES = 4096  # places of interest kept of a picture


@dataclass(frozen=True)
class TrainingPicture:
    """A picture with its truth: rgb (h, w, 3) uint8; tissue and ignore (h, w) bool.

    `mpp` is in µm/px, None when unknown; `weight` is its share of the crops, in any unit.
    `kinds` (h, w) uint8, where known, lets crops look for what is rare: anything that is neither 0
    (glass) nor 1 (plain tissue).
    """

    name: str
    rgb: NDArray[np.uint8]
    tissue: NDArray[np.bool_]
    ignore: NDArray[np.bool_]
    mpp: float | None = None
    weight: float = 1.0
    kinds: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        """Raises ``PathfmError`` for shapes or numbers that do not fit together."""
        size = self.rgb.shape[:2]
        if self.rgb.ndim != 3 or self.rgb.shape[2] != 3 or 0 in size or self.rgb.dtype != np.uint8:
            found = f"{self.rgb.dtype} {self.rgb.shape}"
            raise PathfmError(f"{self.name}: rgb is {found}, not uint8 (h, w, 3)")
        for name in ("tissue", "ignore", "kinds"):
            mask = getattr(self, name)
            if mask is not None and mask.shape != size:
                raise PathfmError(
                    f"{self.name}: {name} is {mask.shape}, the picture {size}: draw it at the "
                    "picture's own size"
                )
        if not (np.isfinite(self.weight) and self.weight >= 0):
            raise PathfmError(f"{self.name}: weight is {self.weight}; give one of 0 or more")
        if self.mpp is not None and not (np.isfinite(self.mpp) and self.mpp > 0):
            raise PathfmError(f"{self.name}: mpp is {self.mpp}; give µm/px above 0, or None")


@dataclass(frozen=True)
class CropSettings:
    """How crops are cut and changed."""

    crop_px: int = 256
    batch_size: int = 8
    mpp_range: tuple[float, float] = (4.0, 32.0)
    unknown_scale: tuple[float, float] = (0.5, 2.0)  # picture px per crop px, mpp unknown
    finest_scale: float = 0.5  # no picture is enlarged more than twice
    stretch: float = 0.12  # half-width of the log of the crop's aspect ratio
    border_share: float = 0.3  # of crops, placed at a border of tissue
    rare_share: float = 0.35  # of crops, placed at a rare kind
    paste_chance: float = 0.2  # a real artefact laid over the crop, where templates are given
    augmentation: AugmentSettings = field(default_factory=AugmentSettings)


def batches(
    pictures: Sequence[TrainingPicture],
    settings: CropSettings,
    seed: int,
    first: int = 0,
    templates: Sequence[Template] = (),
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless (rgb (B, 3, c, c) float 0..1, truth (B, c, c) bool, ignore (B, c, c) bool).

    Starts at batch `first`. Raises ``PathfmError`` when no picture has a weight above 0.
    """
    source = CropSource(pictures, settings, seed, templates)
    number = first
    while True:
        yield source.batch(number)
        number += 1


class CropSource:
    """Batches by number: `batch(k)` is a pure function of the pictures, the settings and (seed, k).

    Holds the places of interest of every picture it has cut from.
    """

    def __init__(
        self,
        pictures: Sequence[TrainingPicture],
        settings: CropSettings,
        seed: int,
        templates: Sequence[Template] = (),
    ) -> None:
        self.pictures, self.settings, self.seed = list(pictures), settings, seed
        self.templates = tuple(templates)
        weights = np.array([p.weight for p in self.pictures], np.float64)
        if not weights.sum() > 0:
            raise PathfmError(
                f"{len(self.pictures)} training pictures, none with a weight above 0: "
                "nothing to cut crops from"
            )
        self._until = np.cumsum(weights) / weights.sum()
        self._places: dict[tuple[int, str], NDArray[np.int64]] = {}

    def batch(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Batch `number`: rgb (B, 3, c, c), truth (B, c, c), ignore (B, c, c)."""
        s = self.settings
        samples = np.arange(number * s.batch_size, (number + 1) * s.batch_size)
        drawn = words(self.seed, samples, 0, _STREAM, 12)
        pasted = uniform(words(self.seed, samples, 0, _PASTE_STREAM, 7))
        parts = [self._under(*self._cut(a), b) for a, b in zip(drawn, pasted, strict=True)]
        rgb, masks = (torch.from_numpy(np.stack(part)) for part in zip(*parts, strict=True))
        x = rgb.permute(0, 3, 1, 2).float() / 255
        x, masks = augment(x, masks, s.augmentation, self.seed, samples)
        return x, masks[:, 0], masks[:, 1]

    def _under(
        self, rgb: NDArray[np.uint8], masks: NDArray[np.bool_], u: NDArray[np.float64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """The crop, now and then with a real artefact over it."""
        if not self.templates or u[6] >= self.settings.paste_chance:
            return rgb, masks
        rgb, tissue = paste(rgb, masks[0], self.templates, u)
        return rgb, np.stack([tissue, masks[1]])

    def _cut(self, w: NDArray[np.uint32]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """One crop (c, c, 3) and its (2, c, c) truth and ignore, before augmentation."""
        u = uniform(w)
        which = min(int(np.searchsorted(self._until, u[0], side="right")), len(self._until) - 1)
        picture = self.pictures[which]
        h, w_px = picture.tissue.shape
        width, height = self._size(picture, float(u[1]), float(u[2]))
        x, y = u[3] * max(w_px - width, 0), u[4] * max(h - height, 0)
        place = self._place(which, float(u[5]), w[6:7])
        if place is not None:  # somewhere in the crop, not always in its middle
            x = min(max(place[1] - width * u[7], 0), max(w_px - width, 0))
            y = min(max(place[0] - height * u[8], 0), max(h - height, 0))
        if width > w_px:
            x = (w_px - width) * u[7]
        if height > h:
            y = (h - height) * u[8]
        return cut(picture, float(x), float(y), width, height, self.settings.crop_px)

    def _size(self, picture: TrainingPicture, u: float, v: float) -> tuple[float, float]:
        """Width and height in picture px of a crop, its scale log-uniform.

        As coarse as the picture is large enough for: a crop is a part of a picture, not its frame.
        """
        s = self.settings
        low, high = s.unknown_scale
        if picture.mpp is not None:
            low, high = (mpp / picture.mpp for mpp in s.mpp_range)
        low = max(low, s.finest_scale)
        high = min(high, min(picture.tissue.shape) / s.crop_px)
        scale = low * (max(high, low) / low) ** u
        aspect = np.exp(s.stretch * (v - 0.5))
        return s.crop_px * scale * aspect, s.crop_px * scale / aspect

    def _place(self, which: int, u: float, w: NDArray[np.uint32]) -> NDArray[np.int64] | None:
        """(row, column) of a place to see, or None for anywhere."""
        s = self.settings
        if u >= s.border_share + s.rare_share:
            return None
        what = "border" if u < s.border_share else "rare"
        key = (which, what)
        if key not in self._places:
            self._places[key] = places(self.pictures[which], what)
        found = self._places[key]
        return found[integers(w, len(found))[0]] if len(found) else None


def places(picture: TrainingPicture, what: str) -> NDArray[np.int64]:
    """(n, 2) rows and columns of tissue's borders or of rare kinds, at most 4,096, evenly thinned.

    Rare kinds take turns, so that a hair is sought as often as a broad stroke of ink.
    """
    if what == "border":
        t = picture.tissue
        edge = np.zeros_like(t)
        edge[:, 1:] |= t[:, 1:] != t[:, :-1]
        edge[1:] |= t[1:] != t[:-1]
        return _thinned(np.argwhere(edge), _PLACES)
    if picture.kinds is None:
        return np.zeros((0, 2), np.int64)
    rare = [k for k in np.unique(picture.kinds).tolist() if k > 1]
    share = _PLACES // max(1, len(rare))
    found = [_repeated(np.argwhere(picture.kinds == k), share) for k in rare]
    return np.concatenate(found) if found else np.zeros((0, 2), np.int64)


def _thinned(points: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    return points[:: -(-len(points) // most)] if len(points) > most else points


def _repeated(points: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return points[np.linspace(0, len(points) - 1, count).astype(np.int64)]


def cut(
    picture: TrainingPicture, x: float, y: float, width: float, height: float, crop_px: int
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """The box (picture px, fractions allowed) as (c, c, 3) uint8, with (2, c, c) truth and ignore.

    Pixels are antialiased; a crop pixel is tissue when at least half its area is, and ignored when
    any of it is. What lies outside the picture mirrors it, and is ignored.
    """
    h, w = picture.tissue.shape
    left, top = int(np.floor(x)) - 2, int(np.floor(y)) - 2
    right, bottom = int(np.ceil(x + width)) + 2, int(np.ceil(y + height)) + 2
    rows, columns = _mirrored(top, bottom, h), _mirrored(left, right, w)
    outside = x < -0.01 or y < -0.01 or x + width > w + 0.01 or y + height > h + 0.01
    box = (x - left, y - top, x - left + width, y - top + height)
    inside = left >= 0 and top >= 0 and right <= w and bottom <= h
    window = np.s_[top:bottom, left:right] if inside else np.ix_(rows, columns)
    rgb = np.ascontiguousarray(picture.rgb[window])
    fine = width < crop_px or height < crop_px
    how = Image.Resampling.BICUBIC if fine else Image.Resampling.HAMMING
    small = np.asarray(Image.fromarray(rgb).resize((crop_px, crop_px), how, box=box))
    ignore = picture.ignore[window]
    if outside:
        beyond_y = (np.arange(top, bottom) < 0) | (np.arange(top, bottom) >= h)
        beyond_x = (np.arange(left, right) < 0) | (np.arange(left, right) >= w)
        ignore = ignore | beyond_y[:, None] | beyond_x[None]
    tissue = _area(picture.tissue[window], box, crop_px) >= 128
    unsure = (
        _area(ignore, box, crop_px) > 0 if ignore.any() else np.zeros((crop_px, crop_px), np.bool_)
    )
    return small, np.stack([tissue, unsure])


def _area(mask: NDArray[np.bool_], box: Box, crop_px: int) -> NDArray[np.uint8]:
    """(c, c) share of the picture pixels under each crop pixel that the mask holds, 0..255."""
    picture = Image.fromarray(np.ascontiguousarray(mask).view(np.uint8) * np.uint8(255))
    return np.asarray(picture.resize((crop_px, crop_px), Image.Resampling.BOX, box=box))


def _mirrored(start: int, stop: int, size: int) -> NDArray[np.int64]:
    """Indices start..stop of an axis continued by reflection; any distance outside."""
    at = np.arange(start, stop) % (2 * size)
    return np.where(at < size, at, 2 * size - 1 - at)
