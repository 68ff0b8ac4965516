"""OME-Zarr 0.4 (Zarr v2) and 0.5 (Zarr v3) and plain arrays -> SlideIndex.

An unsharded chunk is an object with a computed name; a sharded one is a byte range of its shard, whose tables
are read here, once (zarr_shards.py). Metadata documents are few and small and are read by ourselves, strictly
(zarr_image.py, zarr_metadata.py).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from online_patching.errors import (
    DamagedSlideError,
    NotASlideError,
    ObjectNotFoundError,
    UnsupportedSlideError,
)
from online_patching.formats.vendors import Mpp, require_mpp
from online_patching.formats.zarr_image import Documents, ZarrImage, find_image
from online_patching.formats.zarr_metadata import BadDocumentError, NotReadError, ZarrArray
from online_patching.formats.zarr_shards import Stored, most_stored_bytes, read_tables
from online_patching.slide_index import ChunkKeys, Codec, Level, SlideIndex
from online_patching.stores import Stores, redact

_MAX_CHUNK_BYTES = 64 * 2**20
_MIN_CHUNK_PX = 64
_MAX_TILES = 2**28
_HASHED_BYTES = 2**20
_JPEG_HEAD_BYTES = 64 * 2**10


def read_index(uri: str, slide_id: str, override: Mpp | None, stores: Stores) -> SlideIndex:
    """The index of a Zarr image: the first multiscale of a group, or an array; 8-bit RGB, t = z = 0.

    Takes a bounded time and 64 MiB whatever the metadata says, and one round of requests for the
    documents of all levels, and one for the tables of all shards.
    """
    name = redact(uri)
    documents = Documents(uri, stores)
    image = find_image(name, documents)
    levels = [_stored(name, path, documents, image) for path in image.paths]
    _check_sizes(name, levels)
    mpp = require_mpp(name, override, image.mpp)
    found = [_level(name, stored, levels[0], mpp) for stored in levels]
    index = SlideIndex(
        slide_id, uri, image.container, "ome" if image.container == "ome-zarr" else "zarr",
        mpp.x, mpp.y, mpp.source, tuple(found), token=image.fingerprint,
    )  # fmt: skip
    if any(stored.array.shard is not None for stored in levels):
        objects, rows = read_tables(uri, levels, stores)
        ranged = (
            replace(level, keys=None, rows=packed, overflow=large)
            for level, (packed, large) in zip(found, rows, strict=True)
        )
        index = replace(index, levels=tuple(ranged), objects=objects)
    head, digest = _middle_chunk(index, stores)
    return replace(_coloured(index, head), content_hash=digest)


def fingerprint(uri: str, stores: Stores) -> str:
    """SHA-256 of the image's metadata documents: the token of a Zarr slide.

    ObjectNotFoundError when there are none: the store is gone.
    """
    documents = Documents(uri, stores)
    try:
        return find_image(redact(uri), documents).fingerprint
    except NotASlideError:
        raise ObjectNotFoundError(
            uri, "its Zarr metadata is gone. Index the slide again."
        ) from None


def is_there(uri: str, stores: Stores) -> bool:
    """Whether a Zarr array or group lies at a URI that does not say so by its name."""
    documents = Documents(uri, stores)
    documents.load("")
    return documents.version("") > 0


def _stored(name: str, path: str, documents: Documents, image: ZarrImage) -> Stored:
    try:
        array = documents.array(path)
    except BadDocumentError as error:
        raise DamagedSlideError(
            name, f"level {path!r} is no readable Zarr array: {error}."
        ) from None
    except NotReadError as error:
        raise UnsupportedSlideError(name, f"level {path!r}: {error}.") from None
    if array is None:
        raise DamagedSlideError(name, f"level {path!r} is named, and there is no such array.")
    axes = image.axes or _guessed_axes(name, array.shape)
    if len(axes) != len(array.shape):
        raise DamagedSlideError(
            name, f"level {path!r} has {len(array.shape)} axes, and its image {axes!r}."
        )
    sizes, chunk = (dict(zip(axes, s, strict=True)) for s in (array.shape, array.chunk))
    _refuse_channels(name, array.dtype, sizes.get("c", 1))
    if any(chunk.get(axis, 1) > 1 for axis in "tz"):
        raise UnsupportedSlideError(name, "chunks of several planes (t, z) are not read.")
    if image.container == "zarr" and any(sizes.get(axis, 1) > 1 for axis in "tz"):
        raise UnsupportedSlideError(name, f"a stack of planes {array.shape}; name one picture.")
    return Stored(path, array, axes, 3 if chunk["c"] == 1 else 1)


def _guessed_axes(name: str, shape: tuple[int, ...]) -> str:
    """Axes of an array that does not name them: y, x, c or c, y, x, after axes of length 1."""
    last, before = shape[-1] in (3, 4), len(shape) > 2 and shape[-3] in (3, 4)
    extra = len(shape) - 3
    if extra >= 0 and last != before and max(shape[:extra], default=1) == 1:
        return "tz"[:extra] + ("yxc" if last else "cyx")
    if len(shape) == 5 and shape[1] in (3, 4) and shape[0] == shape[2] == 1:
        return "tczyx"
    if len(shape) == 4 and shape[0] in (3, 4) and shape[1] == 1:
        return "czyx"
    raise UnsupportedSlideError(
        name,
        f"an array of shape {shape} that is neither (y, x, 3) nor (3, y, x), and names no axes.",
    )


def _refuse_channels(name: str, dtype: str, channels: int) -> None:
    if dtype == "uint8" and channels in (3, 4):
        return
    told = f"{channels} channel(s) of {dtype}: not 8-bit RGB"
    if channels in (3, 4):
        raise UnsupportedSlideError(name, f"{told}.")
    if channels > 4:
        raise UnsupportedSlideError(name, f"{told}; multiplex.", "multiplex")
    raise UnsupportedSlideError(name, f"{told}; fluorescence, or a mask.", "fluorescence")


def _check_sizes(name: str, levels: list[Stored]) -> None:
    """Refuse chunks that random patches cannot be read from, and pyramids upside down."""
    total = 0
    first = levels[0].pair(levels[0].array.shape)
    for stored in levels:
        size, chunk = stored.pair(stored.array.shape), stored.pair(stored.array.chunk)
        area = chunk["x"] * chunk["y"]
        if area * chunk["c"] > _MAX_CHUNK_BYTES:
            raise UnsupportedSlideError(
                name,
                f"chunks of {chunk['x']} x {chunk['y']} px are too large to read at random.",
            )
        if area < min(_MIN_CHUNK_PX, size["x"] * size["y"]):
            raise UnsupportedSlideError(
                name,
                f"chunks of {chunk['x']} x {chunk['y']} px are too small to read patches from.",
            )
        if chunk["c"] == 2:
            raise UnsupportedSlideError(
                name, "chunks of 2 channels split RGB; store 1 or 3 together."
            )
        if size["x"] > first["x"] or size["y"] > first["y"]:
            raise DamagedSlideError(name, f"level {stored.path!r} is larger than the first.")
        total += -(-size["x"] // chunk["x"]) * -(-size["y"] // chunk["y"])
    if total > _MAX_TILES:
        raise UnsupportedSlideError(name, f"{total:,} chunks are more than a slide has.")


def _level(name: str, stored: Stored, finest: Stored, mpp: Mpp) -> Level:
    size, chunk = stored.pair(stored.array.shape), stored.pair(stored.array.chunk)
    first = finest.pair(finest.array.shape)
    dx, dy = first["x"] / size["x"], first["y"] / size["y"]
    keys = ChunkKeys(stored.name(()), stored.array.separator, stored.axes)
    return Level(
        size["x"], size["y"], chunk["x"], chunk["y"], dx, dy, mpp.x * dx, mpp.y * dy,
        _codec(name, stored.array, stored.axes, chunk["c"]), keys=keys, parts=stored.parts,
    )  # fmt: skip


def _codec(name: str, array: ZarrArray, axes: str, held: int) -> Codec:
    """How a chunk of `held` channels becomes pixels."""
    order = "".join(axes[n] for n in array.stored if axes[n] in "cyx")
    if array.filters and array.filters[0]["id"] == "jpeg":
        if order != "yxc" or held != 3:
            raise UnsupportedSlideError(
                name, f"JPEG chunks of {held} channels in the order {order}; only y, x, 3 are read."
            )
        return Codec("jpeg", fill=array.fill)
    filters: tuple[dict[str, Any], ...] = array.filters
    if held == 1:
        order = order.replace("c", "")
    if order not in ("yxc", "cyx", "yx"):
        filters = ({"id": "transpose", "stored": order}, *filters)
    planar = order == "cyx"
    return Codec("chunk", samples=held, planar=planar, filters=filters, fill=array.fill)


def _middle_chunk(index: SlideIndex, stores: Stores) -> tuple[bytes, str]:
    """The middle chunk of the coarsest level, and its SHA-256: metadata alone cannot tell images apart."""
    level = index.levels[-1]
    rows = level.n_tiles // level.columns
    middle = (rows // 2) * level.columns + level.columns // 2
    body = b""
    try:
        if level.keys is None:
            start, stop = level.byte_range(middle * level.parts)
            if start < stop:
                key, start, stop, token = index.locate(start, min(stop, start + _HASHED_BYTES))
                body = stores.read(key, start, stop, token)
        else:
            key = f"{index.uri.rstrip('/')}/{level.keys.key(rows // 2, level.columns // 2, 0)}"
            size, token = stores.version(key)
            _refuse_long(index.uri, key, level, size)
            body = stores.read(key, 0, min(size, _HASHED_BYTES), token) if size else b""
    except ObjectNotFoundError:
        pass
    return body[:_JPEG_HEAD_BYTES], hashlib.sha256(body).hexdigest()


def _refuse_long(uri: str, key: str, level: Level, size: int) -> None:
    most = most_stored_bytes(level.tile_width_px * level.tile_height_px * level.codec.samples)
    if size > most:
        raise DamagedSlideError(
            uri, f"its chunk {redact(key)[-60:]} has {size:,} bytes; a chunk has at most {most:,}."
        )


def _coloured(index: SlideIndex, head: bytes) -> SlideIndex:
    """The index with the colour space that its JPEG chunks are in, as libjpeg would guess it from one."""
    if all(level.codec.kind != "jpeg" for level in index.levels):
        return index
    colour = jpeg_colour(head)
    return replace(
        index,
        levels=tuple(
            replace(level, codec=replace(level.codec, colour=colour))
            if level.codec.kind == "jpeg"
            else level
            for level in index.levels
        ),
    )


def jpeg_colour(head: bytes) -> str:
    """rgb or ycbcr: libjpeg's rule for three components (a JFIF marker, Adobe's, component ids)."""
    at, adobe, jfif = 2, -1, False
    while at + 4 <= len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], int.from_bytes(head[at + 2 : at + 4], "big")
        body = head[at + 4 : at + 2 + length]
        if marker == 0xE0 and body[:5] == b"JFIF\0":
            jfif = True
        elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        elif marker in (0xC0, 0xC1) and len(body) >= 15:
            ids = bytes(body[6:15:3])
            if jfif:
                return "ycbcr"
            if adobe >= 0:
                return "rgb" if adobe == 0 else "ycbcr"
            return "rgb" if ids == b"RGB" else "ycbcr"
        elif marker == 0xDA or length < 2:
            break
        at += 2 + length
    return "ycbcr"
