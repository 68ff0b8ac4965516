"""Patches at given places of slides, read through the byte ranges as training reads them."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from online_patching import read_slide_index
from online_patching.errors import PatchingError
from online_patching.slide import Slide
from online_patching.stores import Stores
from pathfm.runtime import PathfmError

_MAX_OPEN = 64  # slides whose tables stay in memory: some 2 MB each


@dataclass(frozen=True)
class Place:
    """The centre of a patch in a slide, in µm from its upper left corner or in level-0 pixels."""

    slide: str
    x: float
    y: float
    in_px0: bool
    slide_mpp: float = 0.0  # µm/px of level 0; 0: as the file says


class _Slides:
    """The slides last read; several threads may read one at the same time."""

    def __init__(self) -> None:
        self._stores = Stores()
        self._lock = threading.Lock()
        self._slides: OrderedDict[tuple[str, float], Slide] = OrderedDict()
        weakref.finalize(self, self._stores.close)  # connections end with the data set

    def slide(self, place: Place) -> Slide:
        key = (place.slide, place.slide_mpp)
        with self._lock:
            if key not in self._slides:
                mpp = place.slide_mpp or None
                index = read_slide_index(place.slide, mpp=mpp, stores=self._stores)
                self._slides[key] = Slide(index, self._stores)
                if len(self._slides) > _MAX_OPEN:
                    self._slides.popitem(last=False)
            self._slides.move_to_end(key)
            return self._slides[key]


@dataclass(frozen=True, eq=False)
class SlidePatches:
    """Square patches of `size_px` pixels around each place, at `mpp[i]` µm/px.

    asked: the µm/px is the reader's wish, one for all, not the table's: places are the same data at any.
    """

    places: tuple[Place, ...]
    mpp: NDArray[np.float64]
    size_px: int
    asked: bool = False
    cache: _Slides = field(default_factory=_Slides, repr=False)

    def read(self, i: int) -> NDArray[np.uint8]:
        """Patch i as uint8 (size_px, size_px, 3); white where it reaches out of the slide."""
        place, mpp = self.places[i], float(self.mpp[i])
        try:
            slide = self.cache.slide(place)
            scale_x, scale_y = (
                (slide.index.mpp_x, slide.index.mpp_y) if place.in_px0 else (1.0, 1.0)
            )
            half_um = self.size_px * mpp / 2
            return slide.read_patch(
                x_um=place.x * scale_x - half_um,
                y_um=place.y * scale_y - half_um,
                mpp=mpp,
                size_px=self.size_px,
            )
        except PatchingError as error:
            raise PathfmError(f"patch at ({place.x:g}, {place.y:g}): {error}") from None

    def content(self, i: int) -> str:
        """A digest of the slide's tables, the place, the size and the table's own µm/px: reads no pixel."""
        place, slide = self.places[i], self.slide_digest(i)
        mpp = "asked" if self.asked else self.mpp[i]
        parts = (slide, place.x, place.y, place.in_px0, place.slide_mpp, mpp, self.size_px)
        return hashlib.sha256(repr(tuple(map(str, parts))).encode()).hexdigest()

    def slide_digest(self, i: int) -> str:
        """The digest of the slide's tables, under which pretraining lists it."""
        try:
            return self.cache.slide(self.places[i]).index.digest
        except PatchingError as error:
            raise PathfmError(str(error)) from None

    def __reduce__(self) -> tuple[object, ...]:
        return (
            SlidePatches,
            (self.places, self.mpp, self.size_px, self.asked),
        )  # open files stay behind
