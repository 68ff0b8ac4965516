"""One Zarr array's metadata document (v2 `.zarray`, v3 `zarr.json`) -> ZarrArray, strictly.

Documents come from strangers: everything is checked before it is believed, in microseconds and without
zarr-python (0.4 s to import, milliseconds an array, and it takes chunk grids that no memory holds). Our
tests compare the two on everything that is accepted.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any, NoReturn

MAX_DOCUMENT_BYTES = 2**20
"""An array's is a kilobyte, consolidated ones some dozens. Parsed, hostile JSON takes 24 times its size."""

_MAX_SIDE = 2**22
_MAX_CODECS = 8
_COMPRESSORS = frozenset({"blosc", "zstd", "gzip", "zlib"})
_PICTURES = {"imagecodecs_jpeg": "jpeg", "jpeg": "jpeg", "imagecodecs_jpeg8": "jpeg"}
_SETTINGS = frozenset({"level", "quality", "optimize", "smoothing", "subsampling", "predictor"})
_DTYPE = re.compile(r"[<>|=]?([iufbc])(\d{1,2})")
_KINDS = {"i": "int", "u": "uint", "f": "float", "b": "bool", "c": "complex"}


class BadDocumentError(Exception):
    """A document that contradicts the Zarr specification, or itself."""


class NotReadError(Exception):
    """A valid way of storing an array that is not read here."""


@dataclass(frozen=True)
class ZarrArray:
    """How one array is stored. All sizes follow the array's own axes.

    `chunk` is what is compressed as one, `shard` (of whole chunks) what is one object where chunks are
    packed. `stored` lists the axes from the slowest to the fastest within a chunk. `filters` were applied
    to a chunk in this order: {"id": blosc, zstd, gzip, zlib, crc32c or jpeg}. A chunk (or shard) is at
    `prefix` + its indices joined by `separator`. A shard's table lies at its start or end, in this byte
    order, with or without CRC.
    """

    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    fill: int
    stored: tuple[int, ...]
    filters: tuple[dict[str, Any], ...]
    prefix: str
    separator: str
    names: tuple[str | None, ...] = ()
    shard: tuple[int, ...] | None = None
    table_at_end: bool = True
    table_order: str = "<"
    table_checked: bool = True


def parse_json(data: bytes) -> dict[str, Any]:
    """The object that a document holds."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadDocumentError(f"no JSON ({str(error)[:60]})") from None
    if not isinstance(found, dict):
        raise BadDocumentError(f"a JSON {type(found).__name__} instead of an object")
    return found


def parse_array(document: dict[str, Any]) -> ZarrArray:
    """The array that a parsed `.zarray` or `zarr.json` describes; BadDocumentError or NotReadError."""
    version = document.get("zarr_format")
    if version == 2:
        return _version_2(document)
    if version == 3:
        return _version_3(document)
    raise BadDocumentError(f"zarr_format {version!r:.20}")


# --- version 2 ------------------------------------------------------------------------------------


def _version_2(document: dict[str, Any]) -> ZarrArray:
    shape = _sizes(document.get("shape"), "shape")
    chunk = _sizes(document.get("chunks"), "chunks", len(shape))
    order = document.get("order", "C")
    if order not in ("C", "F"):
        raise BadDocumentError(f"order {order!r:.20}")
    separator = document.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise BadDocumentError(f"dimension_separator {separator!r:.20}")
    entries = document.get("filters") or []
    if not isinstance(entries, list):
        raise BadDocumentError("filters are no list")
    if document.get("compressor") is not None:
        entries = [*entries, document["compressor"]]
    if len(entries) > _MAX_CODECS or not all(isinstance(entry, dict) for entry in entries):
        raise BadDocumentError("filters or a compressor that are no codecs")
    axes = tuple(range(len(shape)))
    dtype = _dtype_2(document.get("dtype"))
    return ZarrArray(
        shape, chunk, dtype, _fill(document.get("fill_value"), dtype),
        axes if order == "C" else axes[::-1],
        _chain([(entry.get("id"), entry) for entry in entries]), "", separator,
    )  # fmt: skip


def _dtype_2(given: Any) -> str:
    match = _DTYPE.fullmatch(given) if isinstance(given, str) else None
    return f"{_KINDS[match[1]]}{8 * int(match[2])}" if match else f"{given!r:.40}"


# --- version 3 ------------------------------------------------------------------------------------

_KNOWN_3 = frozenset(
    "zarr_format node_type shape data_type chunk_grid chunk_key_encoding fill_value codecs attributes "
    "dimension_names storage_transformers consolidated_metadata".split()
)


def _version_3(document: dict[str, Any]) -> ZarrArray:
    if document.get("node_type") != "array":
        raise BadDocumentError(f"node_type {document.get('node_type')!r:.20} instead of an array")
    for name in sorted(set(document) - _KNOWN_3):
        extra = document[name]
        if not isinstance(extra, dict) or extra.get("must_understand") is not False:
            raise NotReadError(f"its metadata demands {name[:40]!r}, which is not known here")
    if document.get("storage_transformers"):
        raise NotReadError("storage transformers are not read")
    shape = _sizes(document.get("shape"), "shape")
    name, grid = _named(document.get("chunk_grid"))
    if name != "regular":
        raise NotReadError(f"a chunk grid {name[:40]!r} is not read (regular is)")
    outer = _sizes(grid.get("chunk_shape"), "chunk_shape", len(shape))
    prefix, separator = _keys_3(document.get("chunk_key_encoding"))
    given = document.get("data_type")
    plain = isinstance(given, str) and given.isidentifier()
    dtype = str(given)[:40] if plain else f"{given!r:.40}"
    codecs = _codecs_3(document.get("codecs"))
    names = document.get("dimension_names") or (None,) * len(shape)
    if not isinstance(names, list | tuple) or len(names) != len(shape):
        raise BadDocumentError(f"dimension_names {names!r:.60} for {len(shape)} axes")
    chunk, shard, table = outer, None, dict[str, Any]()
    if codecs and codecs[0][0] == "sharding_indexed":
        if len(codecs) > 1:
            raise NotReadError(f"{codecs[1][0][:40]} around whole shards is not read")
        shard, chunk, codecs, table = _sharding(codecs[0][1], outer)
    stored, filters = _inner(codecs, len(shape))
    return ZarrArray(
        shape, chunk, dtype, _fill(document.get("fill_value"), dtype), stored, filters,
        prefix, separator, tuple(n if isinstance(n, str) else None for n in names), shard, **table,
    )  # fmt: skip


def _keys_3(given: Any) -> tuple[str, str]:
    name, settings = _named(given)
    if name not in ("default", "v2"):
        raise NotReadError(f"chunk keys {name[:40]!r} are not read (default and v2 are)")
    separator = settings.get("separator", "/" if name == "default" else ".")
    if separator not in (".", "/"):
        raise BadDocumentError(f"a separator {separator!r:.20} of chunk keys")
    return (f"c{separator}" if name == "default" else ""), separator


Codecs = list[tuple[str, dict[str, Any]]]


def _codecs_3(given: Any) -> Codecs:
    if not isinstance(given, list) or not 0 < len(given) <= _MAX_CODECS:
        raise BadDocumentError(f"codecs {given!r:.60}")
    return [_named(entry) for entry in given]


def _sharding(
    settings: dict[str, Any], outer: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], Codecs, dict[str, Any]]:
    """Shard, chunk, the chunk's codecs, and where and how the table is."""
    chunk = _sizes(settings.get("chunk_shape"), "a shard's chunk_shape", len(outer))
    if any(whole % part for whole, part in zip(outer, chunk, strict=True)):
        raise BadDocumentError(f"chunks of {chunk} do not divide shards of {outer}")
    location = settings.get("index_location", "end")
    if location not in ("start", "end"):
        raise BadDocumentError(f"index_location {location!r:.20}")
    table = _codecs_3(settings.get("index_codecs"))
    names = [name for name, _ in table]
    if names not in (["bytes"], ["bytes", "crc32c"]):
        raise NotReadError(f"shard tables coded as {'+'.join(names)[:60]} are not read")
    order = _endian(table[0][1], "little")
    codecs = _codecs_3(settings.get("codecs"))
    if codecs[0][0] == "sharding_indexed":
        raise NotReadError("shards within shards are not read")
    more = {
        "table_at_end": location == "end",
        "table_order": order,
        "table_checked": len(names) == 2,
    }
    return outer, chunk, codecs, more


def _inner(codecs: Codecs, n_axes: int) -> tuple[tuple[int, ...], tuple[dict[str, Any], ...]]:
    """Stored order of the axes, and the filters of a chunk's bytes."""
    stored = tuple(range(n_axes))
    while codecs and codecs[0][0] == "transpose":
        order = codecs[0][1].get("order")
        if not isinstance(order, list) or any(type(n) is not int for n in order):
            raise BadDocumentError(f"a transpose of order {order!r:.40}")
        if sorted(order) != list(range(n_axes)):
            raise BadDocumentError(f"a transpose of order {order!r:.40} for {n_axes} axes")
        stored, codecs = tuple(stored[n] for n in order), codecs[1:]
    if not codecs or codecs[0][0] == "sharding_indexed":
        raise NotReadError("shards of transposed arrays are not read")
    if codecs[0][0] in _PICTURES:
        return stored, _chain(codecs)
    if codecs[0][0] != "bytes":
        raise NotReadError(f"chunk codec {codecs[0][0][:40]!r} is not read (bytes is)")
    _endian(codecs[0][1], None)
    return stored, _chain(codecs[1:])


def _endian(settings: dict[str, Any], default: str | None) -> str:
    endian = settings.get("endian", default)
    if endian not in ("little", "big", default):
        raise BadDocumentError(f"endian {endian!r:.20}")
    return ">" if endian == "big" else "<"


# --- both -----------------------------------------------------------------------------------------


def _chain(entries: list[tuple[Any, dict[str, Any]]]) -> tuple[dict[str, Any], ...]:
    """Filters by one set of names: at most one compressor, checksums around or inside it."""
    out: list[dict[str, Any]] = []
    for given, settings in entries:
        name = str(given).removeprefix("numcodecs.")
        if name in _PICTURES:
            _check_picture(name, settings)
            out.append({"id": _PICTURES[name]})
        elif name in _COMPRESSORS:
            cname = settings.get("cname")
            out.append({"id": name, "cname": cname} if isinstance(cname, str) else {"id": name})
        elif name == "crc32c" and settings.get("location", "end") == "end":
            out.append({"id": name})
        else:
            raise NotReadError(
                f"chunk codec {name[:40]!r} is not read (blosc, zstd, gzip, zlib, jpeg and crc32c are)"
            )
    names = [entry["id"] for entry in out if entry["id"] != "crc32c"]
    if len(names) > 1 or ("jpeg" in names and len(out) > 1):
        raise NotReadError(f"chunks coded as {'+'.join(e['id'] for e in out)} are not read")
    return tuple(out)


def _check_picture(name: str, settings: dict[str, Any]) -> None:
    """A JPEG codec whose streams are whole, 8 bits deep, and decode to what was encoded."""
    for key, value in settings.items():
        if key in ("id", *_SETTINGS) or value in (None, False):
            continue
        if (key, value) != ("bitspersample", 8) and not key.startswith("squeeze"):
            raise NotReadError(f"chunk codec {name} with {key[:40]} {value!r:.40} is not read")


def _named(entry: Any) -> tuple[str, dict[str, Any]]:
    """Name and configuration of a v3 extension point."""
    if isinstance(entry, str):
        entry = {"name": entry}
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str) or not name.isprintable():
        raise BadDocumentError(f"{entry!r:.60} instead of a name with its configuration")
    settings = entry.get("configuration") or {}
    if not isinstance(settings, dict):
        raise BadDocumentError(f"configuration {settings!r:.60} of {name[:40]}")
    return name, settings


def _sizes(given: Any, what: str, n_axes: int | None = None) -> tuple[int, ...]:
    if not isinstance(given, list) or not (
        2 <= len(given) <= 5 if n_axes is None else len(given) == n_axes
    ):
        _bad_sizes(given, what)
    if not all(type(n) is int and 0 < n <= _MAX_SIDE for n in given):
        _bad_sizes(given, what)
    return tuple(given)


def _bad_sizes(given: Any, what: str) -> NoReturn:
    raise BadDocumentError(f"{what} {given!r:.60} (2 to 5 axes, each of 1 to {_MAX_SIDE:,})")


def _fill(given: Any, dtype: str) -> int:
    if given is None or dtype != "uint8":
        return 0
    if isinstance(given, float) and math.isfinite(given) and given.is_integer():
        given = int(given)
    if type(given) is not int or not 0 <= given <= 255:
        raise BadDocumentError(f"fill_value {given!r:.40} of {dtype}")
    return given
