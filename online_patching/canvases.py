"""Runs the canvases of a BatchPlan: natively in one call, or one by one in Python with the same pixels.

Which of the two is decided when the package is imported: the native decoder where it is built, the
portable one elsewhere, or everywhere with ONLINE_PATCHING_DECODER=portable.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray

from online_patching import decode, native
from online_patching.batch_plan import BatchPlan
from online_patching.corpus import Corpus
from online_patching.decode import BadTileError, decode_tile
from online_patching.errors import (
    ObjectChangedError,
    ObjectNotFoundError,
    PatchingError,
    ShortReadError,
    StoreError,
    TileDecodeError,
)
from online_patching.resample import OUTSIDE, resize
from online_patching.stats import Stats
from online_patching.stores import LocalStore, local_path

DECODER = (
    native.ABOUT if native.AVAILABLE else f"portable decoder: {decode.DECODER} ({native.ABOUT})"
)

Failed = dict[int, PatchingError]
"""Canvases of a plan that could not be made, and why."""


def read_local(
    corpus: Corpus,
    plan: BatchPlan,
    first: int,
    stop: int,
    batch: NDArray[np.uint8],
    store: LocalStore,
    stats: Stats,
) -> Failed:
    """Make canvases first..stop of local slides. A slide that was deleted, cut short or changed since it
    was indexed fails its canvases; one whose disk cannot be read raises StoreError."""
    slides = plan.slide[first:stop].tolist()
    keys = {row: local_path(corpus.uri(row)) for row in set(slides)}
    with store.hold(keys.values()) as held:
        failed: Failed = {}
        handles = [held[keys[row]] for row in slides]
        for i, handle in enumerate(handles, first):
            if isinstance(handle, ObjectNotFoundError):
                failed[i] = handle
            elif isinstance(handle, PatchingError):
                raise handle
        plan.canvases["fd"][first:stop] = [h if isinstance(h, int) else -1 for h in handles]
        for a, b in _runs(first, stop, failed):
            if native.AVAILABLE:
                native.read(plan.canvases, plan.tiles, plan.outputs, plan.tables, (), batch, a, b)
            else:
                for i in range(a, b):
                    _portable(
                        corpus, plan, i, batch, _from_file(corpus, plan, i, store, keys), failed
                    )
    if native.AVAILABLE:
        _explain(corpus, plan, first, stop, failed)
    _count(plan, first, stop, stats)
    return failed


def read_bodies(
    corpus: Corpus,
    plan: BatchPlan,
    canvases: Sequence[int],
    bodies: Sequence[bytes],
    batch: NDArray[np.uint8],
) -> Failed:
    """Make some canvases from their tiles' bytes: those of the first, in the order of the plan, then
    those of the next; b"" for a tile that is not stored."""
    failed: Failed = {}
    of = [plan.tiles_of(canvas) for canvas in canvases]
    if not native.AVAILABLE:
        left = iter(bodies)
        for canvas, its in zip(canvases, of, strict=True):
            mine = list(islice(left, its.stop - its.start))
            _portable(corpus, plan, canvas, batch, mine, failed)
        return failed
    tiles = np.concatenate([plan.tiles[its] for its in of])
    tiles["body"] = np.arange(len(tiles))
    some = plan.canvases[list(canvases)]
    first = np.cumsum(some["n_tiles"]) - some["n_tiles"]
    shift = some["first_tile"] - first
    some["first_tile"] = first
    native.read(some, tiles, plan.outputs, plan.tables, bodies, batch, 0, len(some))
    for i in np.flatnonzero(some["status"]).tolist():
        some["tile"][i] += shift[i]
        some["first_tile"][i] += shift[i]
        plan.canvases[canvases[i]] = some[i]
        _explain(corpus, plan, canvases[i], canvases[i] + 1, failed)
    return failed


def _runs(first: int, stop: int, without: Failed) -> list[tuple[int, int]]:
    """first..stop as stretches that leave some out."""
    cuts = [first - 1, *sorted(without), stop]
    return [(a + 1, b) for a, b in pairwise(cuts) if b > a + 1]


def _count(plan: BatchPlan, first: int, stop: int, stats: Stats) -> None:
    # Canvases are numbered in the order of their tiles.
    tiles = slice(plan.tiles_of(first).start, plan.tiles_of(stop - 1).stop)
    lengths = plan.tiles["length"][tiles]
    size, stored = int(lengths.sum()), int(np.count_nonzero(lengths))
    stats.add(tiles=len(lengths), requests=stored, bytes_wanted=size, bytes_read=size)


def _explain(corpus: Corpus, plan: BatchPlan, first: int, stop: int, failed: Failed) -> None:
    """Errors for the statuses that the native decoder left."""
    for i in np.flatnonzero(plan.canvases["status"][first:stop]) + first:
        if int(i) in failed:
            continue
        canvas = plan.canvases[i]
        uri, status, at = corpus.uri(int(plan.slide[i])), int(canvas["status"]), int(canvas["tile"])
        message = canvas["message"].decode(errors="replace")
        if status == native.BAD_TILE:
            failed[int(i)] = _bad_tile(corpus, plan, int(i), at, message)
        elif status == native.SHORT_READ:
            start, length = int(plan.tiles["start"][at]), int(plan.tiles["length"][at])
            failed[int(i)] = ShortReadError(uri, start, start + length, int(canvas["size_bytes"]))
        elif status == native.CHANGED:
            failed[int(i)] = ObjectChangedError(
                uri, "changed since it was indexed. Index it again."
            )
        elif status == native.IO_ERROR:
            raise StoreError(uri, "cannot be read: the disk or network drive reports an error.")
        else:
            raise MemoryError(
                f"{uri}: {message} for a canvas of {canvas['width']} x {canvas['height']} px"
            )


def _bad_tile(corpus: Corpus, plan: BatchPlan, canvas: int, tile: int, why: str) -> TileDecodeError:
    slide = int(plan.slide[canvas])
    level = int(plan.level[canvas]) - int(corpus.records["first_level"][slide])
    return TileDecodeError(corpus.uri(slide), level, int(plan.number[tile]), f"{why}.")


def _from_file(
    corpus: Corpus, plan: BatchPlan, canvas: int, store: LocalStore, keys: dict[int, str]
) -> list[bytes] | PatchingError:
    """The bytes of a canvas's tiles, or what is wrong with the slide."""
    slide = int(plan.slide[canvas])
    key, token = keys[slide], corpus.token(slide)
    try:
        tiles = plan.tiles[plan.tiles_of(canvas)]
        bodies = [
            store.read(key, int(t["start"]), int(t["start"] + t["length"])) if t["length"] else b""
            for t in tiles
        ]
        if token and store.version(key)[1] != token:  # afterwards: old and new are never mixed
            return ObjectChangedError(
                corpus.uri(slide), "changed since it was indexed. Index it again."
            )
        return bodies
    except (ShortReadError, ObjectNotFoundError) as error:
        return error


def _portable(
    corpus: Corpus,
    plan: BatchPlan,
    canvas: int,
    batch: NDArray[np.uint8],
    bodies: list[bytes] | PatchingError,
    failed: Failed,
) -> None:
    """One canvas: what native.read does, in Python."""
    if isinstance(bodies, PatchingError):
        failed[canvas] = bodies
        return
    c = plan.canvases[canvas]
    codec = plan.codecs[c["codec"]]
    pixels = np.full((c["height"], c["width"], 3), OUTSIDE, np.uint8)
    tiles = plan.tiles_of(canvas)
    for at, tile, body in zip(
        range(tiles.start, tiles.stop), plan.tiles[tiles], bodies, strict=True
    ):
        try:
            whole = decode_tile(
                codec, body or None, int(c["tile_width"]), int(c["tile_height"]), int(c["scale"])
            )
        except BadTileError as error:
            failed[canvas] = _bad_tile(corpus, plan, canvas, at, str(error))
            return
        x, y, left, top = (int(tile[name]) for name in ("x", "y", "left", "top"))
        w, h = int(tile["width"]), int(tile["height"])
        pixels[y : y + h, x : x + w] = whole[top : top + h, left : left + w]
    flat = batch.reshape(-1)
    for o in plan.outputs[plan.outputs_of(canvas)]:
        w, h = int(o["width"]), int(o["height"])
        window = tuple(float(o[name]) for name in ("left", "top", "right", "bottom"))
        x, y = int(o["x"]), int(o["y"])
        box = pixels[y : y + int(o["box_height"]), x : x + int(o["box_width"])]
        patch = box if o["exact"] else resize(box, window, (w, h))  # type: ignore[arg-type]
        target = int(o["target"])
        flat[target : target + patch.size] = patch.reshape(-1)
