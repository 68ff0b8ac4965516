"""A slide as a person uses it: patches in µm, regions in pixels, a thumbnail."""

from __future__ import annotations

import math
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from online_patching.decode import BadTileError, decode_tile
from online_patching.errors import ObjectChangedError, SamplerError, TileDecodeError
from online_patching.fetch import Body, Piece, fetch_local, fetch_remote, pieces_of, plan_request
from online_patching.formats import read_slide_index, zarr
from online_patching.formats.region_pool import workers
from online_patching.geometry import Box
from online_patching.plan import (
    ReadPlan,
    choose_level,
    choose_scale,
    phase_px,
    plan_square,
    round_half_up,
    tiles_of,
)
from online_patching.resample import paste, resample, seen_box
from online_patching.slide_index import Level, SlideIndex
from online_patching.stats import Stats
from online_patching.stores import Stores, is_remote

_STRIP_PX = 2**24


def open_slide(slide: str | SlideIndex, *, mpp: float | tuple[float, float] | None = None) -> Slide:
    """A Slide from a path, URL or SlideIndex. `mpp` overrides the µm/px the file carries."""
    stores = Stores()
    try:
        index = read_slide_index(slide, mpp=mpp, stores=stores) if isinstance(slide, str) else slide
        return Slide(index, stores)
    except BaseException:
        stores.close()
        raise


class Slide:
    """Pixels of one slide, read on demand. Close it, or use it as a context manager.

    Everything returned is uint8 RGB of shape (height, width, 3); what lies outside the slide is
    white (255).
    """

    def __init__(self, index: SlideIndex, stores: Stores | None = None) -> None:
        self.index = index
        self.stats = Stats()
        self._stores = stores or Stores()
        check_unchanged(index, self._stores)

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height in level-0 pixels."""
        return self.index.dimensions

    @property
    def mpp(self) -> float:
        """µm/px of level 0 (mean of the axes)."""
        return self.index.mpp

    @property
    def levels(self) -> tuple[Level, ...]:
        """The pyramid, as indexed."""
        return self.index.levels

    def read_patch(
        self, *, x_um: float, y_um: float, mpp: float, size_px: int
    ) -> NDArray[np.uint8]:
        """`size_px` x `size_px` pixels at exactly `mpp`, from the upper left corner (x_um, y_um).

        The pixels that a loader delivers for the same place: the coarsest level at most 2 % coarser than
        asked, decoded smaller where it is twice as fine or more, resampled with antialiasing. Refuses
        (SamplerError) to upscale more than 2x. What lies outside the slide is white.
        """
        if not (math.isfinite(x_um) and math.isfinite(y_um)) or size_px < 1 or size_px % 1:
            raise SamplerError(
                f"a patch of {size_px} px at ({x_um:g}, {y_um:g}) µm: give a whole size_px of at least 1 and a place."
            )
        mpp_x, mpp_y = self.index.mpp_x, self.index.mpp_y
        corner, sides = (x_um / mpp_x, y_um / mpp_y), (size_px * mpp / mpp_x, size_px * mpp / mpp_y)
        return self.read_plan(plan_square(self.index, mpp, corner, sides, size_px))

    def read_region(
        self, location_px0: tuple[int, int], level: int, size_px: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """`size_px` (width, height) pixels of a level, OpenSlide's convention: the location is in
        level-0 pixels, rounded to the level's nearest whole pixel (OpenSlide interpolates there).
        """
        chosen = self.levels[level]
        x = round_half_up(location_px0[0] / chosen.downsample_x)
        y = round_half_up(location_px0[1] / chosen.downsample_y)
        return self.read_box(level, Box(x, y, x + size_px[0], y + size_px[1]))

    def thumbnail(self, mpp: float = 8.0) -> NDArray[np.uint8]:
        """The whole slide at about `mpp`: round(height * mpp_y / mpp) rows, and columns likewise.

        It spans exactly the slide, so that pixel (r, c) covers the same part of it as cell (r, c)
        of a mask of that shape. Never finer than level 0. Read strip by strip, and decoded smaller where the
        level is twice as fine or more: a slide of a single level costs its bytes and little else.
        """
        mpp = max(mpp, self.mpp)
        w0, h0 = self.dimensions
        width, height = (
            max(1, round(w0 * self.index.mpp_x / mpp)),
            max(1, round(h0 * self.index.mpp_y / mpp)),
        )
        number = choose_level([level.mpp for level in self.levels], mpp)
        level = self.levels[number]
        sx, sy = level.width_px / width, level.height_px / height
        scale = choose_scale(level, min(sx, sy))
        level, sx, sy = level.reduced(scale), sx / scale, sy / scale
        phase = phase_px(level.codec, scale)
        rows = max(1, min(height, int(_STRIP_PX / (level.width_px * sy))))
        strips = []
        for top in range(0, height, rows):
            bottom = min(height, top + rows)
            strips.append(
                self._strip(
                    (number, scale),
                    (phase, top * sy + phase, width * sx + phase, bottom * sy + phase),
                    (width, bottom - top),
                )
            )
        return np.concatenate(strips)

    def _strip(
        self,
        at: tuple[int, int],
        window: tuple[float, float, float, float],
        size_px: tuple[int, int],
    ) -> NDArray[np.uint8]:
        """A resampled window of a level decoded at 1/scale, `at` (level, scale); its margins stop at the
        slide's edge, so that no white bleeds in."""
        number, scale = at
        level = self.levels[number].reduced(scale)
        left, top, right, bottom = window
        margin = math.ceil((bottom - top) / size_px[1]) + 1
        box = Box(0, max(0, math.floor(top) - margin), level.width_px,
                  min(level.height_px, math.ceil(bottom) + margin))  # fmt: skip
        inner = (left, top - box.top, min(right, box.width), min(bottom - box.top, box.height))
        plan = ReadPlan(number, box, tiles_of(level, box), size_px, inner, scale)
        return self.read_plan(plan)

    def read_box(self, level: int, box: Box) -> NDArray[np.uint8]:
        """A box of whole pixels of a level, as stored."""
        plan = ReadPlan(
            level, box, tiles_of(self.levels[level], box), (box.width, box.height), None
        )
        return self.read_plan(plan)

    def read_plan(self, plan: ReadPlan) -> NDArray[np.uint8]:
        """Run a plan and wait for its pixels."""
        if self.index.fallback:
            return finish_fallback(self.index, plan)
        pieces = pieces_of(self.index, plan)
        data: list[Body]
        if is_remote(self.index.uri):
            request = plan_request(self.index, plan, pieces)
            work = fetch_remote(self.index, pieces, request, self._stores, self.stats)
            data = self._stores.loop.run(work)
        else:
            data = fetch_local(self.index, pieces, self._stores, self.stats)
        if self.levels[plan.level].keys is not None and None in data:
            check_unchanged(self.index, self._stores)  # chunks are absent; is the slide?
        return finish(self.index, plan, pieces, data)

    def close(self) -> None:
        """Close files and connections."""
        self._stores.close()

    def __repr__(self) -> str:
        w, h = self.dimensions
        return f"<Slide {self.index.slide_id}: {w} x {h} px at {self.mpp:.4g} µm/px, {len(self.levels)} levels>"

    def __reduce__(self) -> tuple[object, ...]:
        return (Slide, (self.index,))

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_unchanged(index: SlideIndex, stores: Stores) -> None:
    """Raise ObjectChangedError, or ObjectNotFoundError, unless the slide is the one that was indexed.

    By size and mtime (local), ETag or the like (remote), or the Zarr group's metadata; of a slide of several
    local objects, each of them. Meant for the first touch of a slide; over HTTP every request is checked by
    its ETag besides, and remote objects of a slide are by that alone.
    """
    if index.objects and not is_remote(index.uri):
        for number, item in enumerate(index.objects):
            key = index.object_key(number)
            if item.token:
                _refuse_changed(key, item.token, stores.version(key)[1])
    if not index.token:
        return
    is_zarr = index.container in ("ome-zarr", "zarr")
    now = zarr.fingerprint(index.uri, stores) if is_zarr else stores.version(index.uri)[1]
    _refuse_changed(index.uri, index.token, now)


def _refuse_changed(key: str, then: str, now: str) -> None:
    if now != then:
        raise ObjectChangedError(
            key, f"changed since it was indexed ({then[:40]}, now {now[:40]}). Index it again."
        )


def finish(
    index: SlideIndex, plan: ReadPlan, pieces: list[Piece], data: list[Body]
) -> NDArray[np.uint8]:
    """Decode, paste and resample fetched pieces: the compute half of a read, for a thread."""
    level = index.levels[plan.level]
    size, reduced = (level.tile_width_px, level.tile_height_px), level.reduced(plan.scale)
    decoded = []
    for piece, body in zip(pieces, data, strict=True):
        seen = seen_box(reduced, plan.box, piece.tile)
        try:
            pixels = decode_tile(level.codec, body, *size, plan.scale, seen)
        except BadTileError as error:
            raise TileDecodeError(index.uri, plan.level, piece.tile.number, f"{error}.") from None
        decoded.append((piece.tile, piece.part, pixels))
    return resample(plan, paste(reduced, plan.box, decoded))


def finish_fallback(index: SlideIndex, plan: ReadPlan) -> NDArray[np.uint8]:
    """Read and resample a plan's box through the fallback reader's process."""
    level = index.levels[plan.level]
    inside = plan.box.intersect(Box(0, 0, level.width_px, level.height_px))
    canvas = np.full((plan.box.height, plan.box.width, 3), 255, np.uint8)
    if not inside.empty:
        target = inside.shift(-plan.box.left, -plan.box.top)
        canvas[target.top : target.bottom, target.left : target.right] = workers().read(
            index, plan.level, inside
        )
    return resample(plan, canvas)
