"""OME-Zarr 0.4 (Zarr v2) and 0.5 (Zarr v3) -> SlideIndex: tiles are chunks, ranges are objects.

The few metadata documents are fetched through our own stores and handed to zarr-python, which
knows both versions; chunks are planned, fetched and decoded by us.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, cast

import numpy as np

from online_patching.errors import (
    DamagedSlideError,
    NotASlideError,
    ObjectNotFoundError,
    UnsupportedSlideError,
)
from online_patching.formats.vendors import Mpp, require_mpp
from online_patching.slide_index import ChunkKeys, Codec, Level, SlideIndex
from online_patching.stores import Stores, redact

_GROUP_DOCUMENTS = ("zarr.json", ".zgroup", ".zattrs")
_ARRAY_DOCUMENTS = ("zarr.json", ".zarray")
_MAX_LEVELS = 32
_MAX_CHUNK_BYTES = 64 * 2**20
_TO_UM = {"micrometer": 1.0, "millimeter": 1e3, "nanometer": 1e-3, "meter": 1e6, "centimeter": 1e4}
_COMPRESSORS = frozenset({"blosc", "zstd", "gzip", "zlib"})


def read_index(uri: str, slide_id: str, override: Mpp | None, stores: Stores) -> SlideIndex:
    """The index of an OME-Zarr image: its first multiscale, 8-bit RGB, t = z = 0."""
    try:
        return _read_index(uri, slide_id, override, stores)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DamagedSlideError(
            uri, f"its Zarr metadata cannot be read ({type(error).__name__}: {str(error)[:80]})."
        ) from None


def fingerprint(uri: str, stores: Stores) -> str:
    """SHA-256 of the group's metadata documents: the token of a Zarr slide.

    ObjectNotFoundError when there are none: the store is gone.
    """
    documents = _fetch(uri, "", _GROUP_DOCUMENTS, stores)
    if not documents:
        raise ObjectNotFoundError(uri, "its Zarr metadata is gone. Index the slide again.")
    return hashlib.sha256(repr(sorted(documents.items())).encode()).hexdigest()


def _content_hash(uri: str, levels: tuple[Level, ...], stores: Stores) -> str:
    """SHA-256 of the middle chunk of the coarsest level: metadata alone cannot tell images apart."""
    level = levels[-1]
    assert level.keys is not None
    rows = level.n_tiles // level.columns
    key = level.keys.key(rows // 2, level.columns // 2, 0)
    try:
        body = stores.read(f"{uri.rstrip('/')}/{key}", 0, None)
    except ObjectNotFoundError:
        body = b""
    return hashlib.sha256(body).hexdigest()


def _read_index(uri: str, slide_id: str, override: Mpp | None, stores: Stores) -> SlideIndex:
    name = redact(uri)
    documents = _fetch(uri, "", _GROUP_DOCUMENTS, stores)
    if not documents:
        raise NotASlideError(name, "no Zarr group is there (neither zarr.json nor .zgroup).")
    multiscale = _multiscale(name, documents)
    axes = _axes(name, multiscale)
    datasets = multiscale.get("datasets")
    if not isinstance(datasets, list) or not 0 < len(datasets) <= _MAX_LEVELS:
        raise DamagedSlideError(
            name, f"its multiscale lists no usable datasets ({datasets!r:.80})."
        )
    for dataset in datasets:
        path = _safe_path(name, dataset)
        documents |= {
            f"{path}/{k}": v for k, v in _fetch(uri, path, _ARRAY_DOCUMENTS, stores).items()
        }
    found = require_mpp(name, override, _mpp(multiscale, datasets[0], axes))
    levels = _levels(name, documents, [_safe_path(name, d) for d in datasets], axes, found)
    return SlideIndex(
        slide_id, uri, "ome-zarr", "ome", found.x, found.y, found.source, levels,
        token=fingerprint(uri, stores), content_hash=_content_hash(uri, levels, stores),
    )  # fmt: skip


def _fetch(uri: str, path: str, names: tuple[str, ...], stores: Stores) -> dict[str, bytes]:
    found = {}
    for name in names:
        try:
            key = "/".join(part for part in (uri.rstrip("/"), path, name) if part)
            found[name] = stores.read(key, 0, None)
        except ObjectNotFoundError:
            continue
    return found


def _multiscale(name: str, documents: dict[str, bytes]) -> dict[str, Any]:
    try:
        if "zarr.json" in documents:
            attributes = json.loads(documents["zarr.json"]).get("attributes", {})
            attributes = attributes.get("ome", attributes)
        else:
            attributes = json.loads(documents.get(".zattrs", b"{}"))
        return cast(dict[str, Any], attributes["multiscales"][0])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise NotASlideError(
            name, "a Zarr group without OME multiscales. Point at the image's group."
        ) from None


def _axes(name: str, multiscale: dict[str, Any]) -> str:
    raw = multiscale.get("axes", ["t", "c", "z", "y", "x"])
    axes = "".join(str(a["name"] if isinstance(a, dict) else a) for a in raw)
    if not set("yx") <= set(axes) <= set("tczyx") or len(set(axes)) != len(axes):
        raise UnsupportedSlideError(name, f"axes {axes!r}; only t, c, z, y, x are read.")
    return axes


def _safe_path(name: str, dataset: Any) -> str:
    path = str(dataset.get("path", "")) if isinstance(dataset, dict) else ""
    if not path or path.startswith("/") or ".." in path.split("/") or "://" in path or "%" in path:
        raise DamagedSlideError(name, f"a dataset path {path[:60]!r} leaves the store.")
    return path.strip("/")


def _mpp(multiscale: dict[str, Any], dataset: dict[str, Any], axes: str) -> Mpp | None:
    """Level 0's scale times the multiscale's own, in µm, when the axes carry a unit of length."""
    try:
        units = [a.get("unit") for a in multiscale["axes"] if a["name"] in "yx"]
        scale = np.ones(len(axes))
        for holder in (dataset, multiscale):
            for transform in holder.get("coordinateTransformations", []):
                if transform["type"] == "scale":
                    scale = scale * np.asarray(transform["scale"], float)
        y, x = (float(scale[axes.index(a)]) * _TO_UM[u] for a, u in zip("yx", units, strict=True))
        return Mpp(x, y, "ome metadata")
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _levels(
    name: str, documents: dict[str, bytes], paths: list[str], axes: str, mpp: Mpp
) -> tuple[Level, ...]:
    # zarr-python costs 0.4 s to import; only Zarr slides pay for it.
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    make = default_buffer_prototype().buffer.from_bytes
    store = MemoryStore({k: make(v) for k, v in documents.items()})
    out: list[Level] = []
    for path in paths:
        try:
            array = zarr.open_array(store, path=path, mode="r")
        except Exception as error:  # zarr raises many types on hostile metadata
            raise DamagedSlideError(
                name,
                f"level {path!r} is not a readable Zarr array ({type(error).__name__}: {str(error)[:80]}).",
            ) from None
        out.append(_level(name, path, array, axes, out[0] if out else None, mpp))
    return tuple(out)


def _level(name: str, path: str, array: Any, axes: str, first: Level | None, mpp: Mpp) -> Level:
    size = dict(zip(axes, array.shape, strict=True))
    chunk = dict(zip(axes, array.chunks, strict=True))
    if str(array.dtype) != "uint8" or size.get("c", 1) not in (3, 4):
        raise UnsupportedSlideError(
            name,
            f"{size.get('c', 1)} channel(s) of {array.dtype}: not 8-bit RGB; fluorescence or multiplex.",
        )
    held = chunk["c"]
    if held < 3 and held != 1:
        raise UnsupportedSlideError(
            name, f"chunks of {held} channels split RGB; store 1 or 3 together."
        )
    if chunk["x"] * chunk["y"] * held > _MAX_CHUNK_BYTES:
        raise UnsupportedSlideError(
            name, f"chunks of {chunk['x']} x {chunk['y']} px are too large to read at random."
        )
    codec = _codec(name, array, axes, min(held, size["c"]) if held > 1 else 1)
    width, height = size["x"], size["y"]
    dx = first.width_px / width if first else 1.0
    dy = first.height_px / height if first else 1.0
    prefix, separator = _chunk_names(array, path)
    return Level(
        width, height, chunk["x"], chunk["y"], dx, dy, mpp.x * dx, mpp.y * dy, codec,
        keys=ChunkKeys(prefix, separator, axes), parts=3 if held == 1 else 1,
    )  # fmt: skip


def _codec(name: str, array: Any, axes: str, samples: int) -> Codec:
    spatial = [a for a in axes if a in "cyx"]
    if spatial not in (["c", "y", "x"], ["y", "x", "c"]):
        raise UnsupportedSlideError(name, f"axes {axes!r}; channels must come first or last.")
    filters = []
    if array.metadata.zarr_format == 2:
        if array.metadata.filters:
            raise UnsupportedSlideError(name, "Zarr v2 filters are not read.")
        if array.metadata.order != "C":
            raise UnsupportedSlideError(name, "Fortran-ordered chunks are not read.")
        if array.metadata.compressor is not None:
            filters.append(dict(array.metadata.compressor.get_config()))
    else:
        for entry in (codec.to_dict() for codec in array.metadata.codecs):
            if entry["name"] not in ("bytes", "crc32c"):
                filters.append({"name": entry["name"]})
            elif entry["name"] == "crc32c":
                raise UnsupportedSlideError(name, "checksummed chunks (crc32c) are not read.")
    for entry in filters:
        kind = entry.get("id") or entry.get("name")
        if kind not in _COMPRESSORS:
            raise UnsupportedSlideError(
                name, f"chunk codec {kind!r} is not read (blosc, zstd, gzip, zlib are)."
            )
    fill = int(array.fill_value or 0)
    return Codec(
        "chunk", samples=samples, planar=spatial[0] == "c", filters=tuple(filters), fill=fill
    )


def _chunk_names(array: Any, path: str) -> tuple[str, str]:
    if array.metadata.zarr_format == 2:
        return f"{path}/", array.metadata.dimension_separator
    encoding = array.metadata.chunk_key_encoding
    if encoding.name == "default":
        return f"{path}/c{encoding.separator}", encoding.separator
    return f"{path}/", encoding.separator
