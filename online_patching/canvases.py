"""Runs the canvases of a BatchPlan: natively in one call, or one by one in Python with the same pixels.

Which of the two is decided when the package is imported: the native decoder where it is built, the
portable one elsewhere, or everywhere with ONLINE_PATCHING_DECODER=portable. Tiles of other codecs than JPEG
are decoded one by one by `decode_tile` and pasted and resampled by either.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray

from online_patching import decode, native
from online_patching.batch_plan import FILE, WHOLE, BatchPlan
from online_patching.batch_plan.pieces import CHUNKS
from online_patching.batch_plan.tables import CHUNK, HEADLESS, JPEG, PIXELS
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
from online_patching.geometry import Box
from online_patching.resample import OUTSIDE, resize
from online_patching.stats import Stats
from online_patching.stores import LocalStore, local_path

DECODER = (
    native.ABOUT if native.AVAILABLE else f"portable decoder: {decode.DECODER} ({native.ABOUT})"
)

_AT_ONCE = 8  # canvases whose bytes are held for one call
_NO_FILES = np.zeros(0, FILE)
_CHANGED = "changed since it was indexed. Index it again."

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
    failed: Failed = {}
    itself = _reads_itself(corpus, plan, first, stop)
    edges = [first, *(np.flatnonzero(np.diff(itself)) + first + 1).tolist(), stop]
    for a, b in pairwise(edges):
        if itself[a - first]:
            _read_natively(corpus, plan, a, b, batch, store, stats, failed)
            continue
        for begin in range(a, b, _AT_ONCE):
            canvases, bodies = [], []
            for canvas in range(begin, min(b, begin + _AT_ONCE)):
                folder = local_path(corpus.uri(int(plan.slide[canvas])))
                found = _from_files(corpus, plan, canvas, store, folder)
                if isinstance(found, PatchingError):
                    failed[canvas] = found
                    continue
                canvases.append(canvas)
                bodies += found
            sizes = [len(body) for body in bodies]
            stats.add(tiles=len(sizes), requests=sum(map(bool, sizes)), bytes_wanted=sum(sizes),
                      bytes_read=sum(sizes))  # fmt: skip
            failed |= read_bodies(corpus, plan, canvases, bodies, batch)
    return failed


def _reads_itself(corpus: Corpus, plan: BatchPlan, first: int, stop: int) -> NDArray[np.bool_]:
    """Which canvases the native decoder reads from files: what it decodes."""
    packing = plan.canvases["packing"][first:stop]
    chunks = corpus.records["reader"][plan.slide[first:stop]] == CHUNKS
    return np.asarray(np.isin(packing, _known()) & ~(chunks & (packing == HEADLESS)))


def _known() -> list[int]:
    """The packings that are decoded natively here."""
    if not native.AVAILABLE:
        return []
    return [JPEG, HEADLESS, CHUNK] if native.CHUNKS else [JPEG, HEADLESS]


def _read_natively(
    corpus: Corpus,
    plan: BatchPlan,
    first: int,
    stop: int,
    batch: NDArray[np.uint8],
    store: LocalStore,
    stats: Stats,
    failed: Failed,
) -> None:
    """Canvases first..stop, of tiles in files, or that are files."""
    its = slice(plan.tiles_of(first).start, plan.tiles_of(stop - 1).stop)
    lengths, file = plan.tiles["length"][its], plan.tiles["file"][its]
    whole = lengths == WHOLE
    ranges = np.unique(file[~whole & (file >= 0)]).tolist()
    paths = {number: local_path(plan.keys[number]) for number in ranges}
    tiles, chunks = plan.tiles, _paths(plan, file[whole])
    if chunks:
        tiles = tiles.copy()  # bodies are counted in each call
        tiles["body"][its][whole] = np.arange(len(chunks))
    files = plan.files.copy()  # other threads hold descriptors of their own
    with store.hold(paths.values()) as held:
        for number, path in paths.items():
            handle = held[path]
            if isinstance(handle, int):
                files["fd"][number] = handle
            elif isinstance(handle, ObjectNotFoundError):
                owner = _owners(plan, first, stop)
                failed |= dict.fromkeys(owner[file == number].tolist(), handle)
            else:
                raise handle
        here = {canvas for canvas in failed if first <= canvas < stop}
        for a, b in _runs(first, stop, here):
            native.read(plan.canvases, tiles, plan.outputs, files, plan.tables, chunks, batch, a, b)
    _explain(corpus, plan, first, stop, failed, store)
    done = plan.canvases[first:stop]
    absent = int(done["absent"].sum())
    if absent:
        failed |= _gone(corpus, plan, first + np.flatnonzero(done["absent"]))
    packing = np.repeat(done["packing"], done["n_tiles"])
    size = int(lengths[~whole & (packing != CHUNK)].sum()) + int(done["read_bytes"].sum())
    stored = int(np.count_nonzero(lengths)) - absent
    stats.add(tiles=len(lengths), requests=stored, bytes_wanted=size, bytes_read=size)


def _owners(plan: BatchPlan, first: int, stop: int) -> NDArray[np.int64]:
    """The canvas of each tile of canvases first..stop."""
    return np.repeat(np.arange(first, stop), plan.canvases["n_tiles"][first:stop])


def _paths(plan: BatchPlan, files: NDArray[np.int64]) -> list[bytes]:
    """The paths of some of a plan's files, as the native decoder opens them."""
    return [os.fsencode(local_path(plan.keys[number])) for number in files.tolist()]


def _gone(corpus: Corpus, plan: BatchPlan, canvases: NDArray[np.int64]) -> Failed:
    """Of canvases that lack chunks, those whose slide is not there at all: it was deleted, or a drive is no
    longer there. Where it is, an absent chunk holds the fill value."""
    failed: Failed = {}
    for slide in np.unique(plan.slide[canvases]).tolist():
        uri = corpus.uri(slide)
        if not os.path.isdir(local_path(uri)):
            error = ObjectNotFoundError(uri, "there is no such folder. Check the path.")
            failed |= dict.fromkeys(canvases[plan.slide[canvases] == slide].tolist(), error)
    return failed


def read_bodies(
    corpus: Corpus,
    plan: BatchPlan,
    canvases: Sequence[int],
    bodies: Sequence[bytes],
    batch: NDArray[np.uint8],
) -> Failed:
    """Make some canvases from their pieces' bytes: those of the first, in the order of the plan, then
    those of the next; b"" for a piece that is not stored."""
    failed: Failed = {}
    left, known = iter(bodies), _known()
    streams: list[int] = []
    its: list[bytes] = []
    for canvas in canvases:
        mine = list(islice(left, int(plan.canvases["n_tiles"][canvas])))
        if plan.canvases["packing"][canvas] in known:
            streams.append(canvas)
            its += mine
            continue
        try:
            pixels = _decoded(corpus, plan, canvas, mine)
        except TileDecodeError as error:
            failed[canvas] = error
        else:
            (_paste_natively if native.AVAILABLE else _paste)(plan, canvas, pixels, batch)
    if streams:
        _read_streams(corpus, plan, streams, its, batch, failed)
    return failed


def _read_streams(
    corpus: Corpus,
    plan: BatchPlan,
    canvases: list[int],
    bodies: list[bytes],
    batch: NDArray[np.uint8],
    failed: Failed,
) -> None:
    """Canvases of JPEG tiles that are in memory, in one native call."""
    tiles = np.concatenate([plan.tiles[plan.tiles_of(canvas)] for canvas in canvases])
    tiles["start"] += np.where(tiles["file"] < 0, 0, plan.files["base"][tiles["file"]])
    tiles["body"], tiles["length"], tiles["file"] = np.arange(len(tiles)), [*map(len, bodies)], -1
    some = plan.canvases[canvases]
    first = np.cumsum(some["n_tiles"]) - some["n_tiles"]
    shift = some["first_tile"] - first
    some["first_tile"] = first
    native.read(some, tiles, plan.outputs, _NO_FILES, plan.tables, bodies, batch, 0, len(some))
    for i in np.flatnonzero(some["status"]).tolist():
        some["tile"][i] += shift[i]
        some["first_tile"][i] += shift[i]
        plan.canvases[canvases[i]] = some[i]
        _explain(corpus, plan, canvases[i], canvases[i] + 1, failed)


def _runs(first: int, stop: int, without: set[int]) -> list[tuple[int, int]]:
    """first..stop as stretches that leave some out."""
    cuts = [first - 1, *sorted(without), stop]
    return [(a + 1, b) for a, b in pairwise(cuts) if b > a + 1]


def _explain(
    corpus: Corpus,
    plan: BatchPlan,
    first: int,
    stop: int,
    failed: Failed,
    store: LocalStore | None = None,
) -> None:
    """Errors for the statuses that the native decoder left, which read from `store`."""
    for i in np.flatnonzero(plan.canvases["status"][first:stop]) + first:
        if int(i) in failed:
            continue
        canvas = plan.canvases[i]
        status, at = int(canvas["status"]), int(canvas["tile"])
        message = canvas["message"].decode(errors="replace")
        file = int(plan.tiles["file"][at]) if status != native.NO_MEMORY else -1
        uri = plan.keys[file] if file >= 0 else corpus.uri(int(plan.slide[i]))
        if status == native.BAD_TILE:
            failed[int(i)] = bad_tile(corpus, plan, int(i), at, message)
        elif status == native.SHORT_READ:
            start, length = int(plan.tiles["start"][at]), int(plan.tiles["length"][at])
            size = int(plan.files["size_bytes"][file])
            failed[int(i)] = ShortReadError(uri, start, start + length, size)
        elif status == native.CHANGED:
            failed[int(i)] = ObjectChangedError(uri, _CHANGED)
        elif status == native.IO_ERROR:
            if store is not None and plan.tiles["length"][at] == WHOLE:
                store.read(local_path(uri), 0, None)  # says what is wrong with it
            raise StoreError(uri, "cannot be read: the disk or network drive reports an error.")
        else:
            raise MemoryError(
                f"{uri}: {message} for a canvas of {canvas['width']} x {canvas['height']} px"
            )


def bad_tile(corpus: Corpus, plan: BatchPlan, canvas: int, tile: int, why: str) -> TileDecodeError:
    """A canvas's failure by its tile `tile` of the plan."""
    slide = int(plan.slide[canvas])
    level = int(plan.level[canvas]) - int(corpus.records["first_level"][slide])
    return TileDecodeError(corpus.uri(slide), level, int(plan.number[tile]), f"{why}.")


def _from_files(
    corpus: Corpus, plan: BatchPlan, canvas: int, store: LocalStore, folder: str
) -> list[bytes] | PatchingError:
    """The bytes of a canvas's pieces, or what is wrong with the slide, whose chunks lie in `folder`."""
    tiles = plan.tiles[plan.tiles_of(canvas)]
    bodies: list[bytes] = []
    where = zip(
        tiles["file"].tolist(), tiles["start"].tolist(), tiles["length"].tolist(), strict=True
    )
    try:
        for file, start, length in where:
            if length == WHOLE:
                bodies.append(_chunk(local_path(plan.keys[file]), store, folder))
            else:
                stop = start + length
                bodies.append(
                    store.read(local_path(plan.keys[file]), start, stop) if length else b""
                )
        for file in set(tiles["file"].tolist()) - {-1}:
            token, path = plan.tokens[file], local_path(plan.keys[file])
            if token and store.version(path)[1] != token:  # afterwards: old and new are never mixed
                return ObjectChangedError(plan.keys[file], _CHANGED)
        return bodies
    except BadTileError as error:
        at = plan.tiles_of(canvas).start + len(bodies)
        return bad_tile(corpus, plan, canvas, at, str(error))
    except (ShortReadError, ObjectNotFoundError) as error:
        return error


def _chunk(path: str, store: LocalStore, folder: str) -> bytes:
    """The bytes of a Zarr chunk; none where it alone is absent: it holds the fill value."""
    try:
        body = store.read(path, 0, None)
    except ObjectNotFoundError:
        if not os.path.isdir(folder):  # deleted, or a drive that is no longer there
            raise
        return b""
    if not body:
        raise BadTileError("its file is empty")
    return body


def _decoded(
    corpus: Corpus, plan: BatchPlan, canvas: int, bodies: list[bytes]
) -> list[NDArray[np.uint8]]:
    """The pixels that a canvas sees of each of its pieces."""
    c = plan.canvases[canvas]
    codec, scale = plan.codecs[c["codec"]], int(c["scale"])
    width, height = int(c["tile_width"]), int(c["tile_height"])
    tiles = plan.tiles_of(canvas)
    seen = (plan.tiles[name][tiles].tolist() for name in ("left", "top", "width", "height"))
    out = []
    for at, body, left, top, w, h in zip(
        range(tiles.start, tiles.stop), bodies, *seen, strict=True
    ):
        try:
            box = Box(left, top, left + w, top + h)
            out.append(decode_tile(codec, body or None, width, height, scale, box))
        except BadTileError as error:
            raise bad_tile(corpus, plan, canvas, at, str(error)) from None
    return out


def _paste_natively(
    plan: BatchPlan, canvas: int, pixels: list[NDArray[np.uint8]], batch: NDArray[np.uint8]
) -> None:
    """Patches of a canvas out of decoded pixels, pasted and resampled without the GIL."""
    some, tiles = plan.canvases[[canvas]], plan.tiles[plan.tiles_of(canvas)].copy()
    some["first_tile"], some["packing"] = 0, PIXELS
    tiles["file"], tiles["length"], tiles["body"] = -1, 1, np.arange(len(tiles))
    native.read(some, tiles, plan.outputs, _NO_FILES, plan.tables, pixels, batch, 0, 1)
    if some["status"][0]:
        raise MemoryError(f"no memory for a canvas of {some['width'][0]} x {some['height'][0]} px")


def _paste(
    plan: BatchPlan, canvas: int, pieces: list[NDArray[np.uint8]], batch: NDArray[np.uint8]
) -> None:
    """What `_paste_natively` does, in Python."""
    c = plan.canvases[canvas]
    pixels = np.full((c["height"], c["width"], 3), OUTSIDE, np.uint8)
    for tile, piece in zip(plan.tiles[plan.tiles_of(canvas)], pieces, strict=True):
        x, y, w, h, channel = (int(tile[k]) for k in ("x", "y", "width", "height", "channel"))
        pixels[y : y + h, x : x + w, channel : channel + piece.shape[2]] = piece
    flat = batch.reshape(-1)
    for o in plan.outputs[plan.outputs_of(canvas)]:
        w, h = int(o["width"]), int(o["height"])
        window = tuple(float(o[name]) for name in ("left", "top", "right", "bottom"))
        x, y = int(o["x"]), int(o["y"])
        box = pixels[y : y + int(o["box_height"]), x : x + int(o["box_width"])]
        patch = box if o["exact"] else resize(box, window, (w, h))  # type: ignore[arg-type]
        target = int(o["target"])
        flat[target : target + patch.size] = patch.reshape(-1)
