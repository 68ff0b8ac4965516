"""Zarr stores that lie: metadata, shard tables, chunks and sizes changed, by number.

Store number i is a pure function of (seed, i), as hostile.py's files are. Nothing is written: a HostileZarr is
a table of small objects, and ZarrStores serves them as a folder or server would.
"""

from __future__ import annotations

import copy
import json
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import google_crc32c

from online_patching.errors import ObjectNotFoundError, PatchingError
from online_patching.philox import words
from online_patching.stores import Listed, Stores
from online_patching.testing.drawing import SyntheticSlide
from online_patching.testing.hostile import _Dice
from online_patching.testing.ome_zarr import Storage, write_ome_zarr, write_zarr_array

URI = "hostile.zarr"
_STREAM, _WORDS = 9002, 96
_SIZES_PX = (70, 50)
_LIES: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, 3, 4, 7, 8, 16, 63, 255, 256, 4096, 65535, 2**22, 2**22 + 1, 2**31 - 1,
    2**31, 2**32, 2**53, 2**63, 2**64, 10**30, -1, -(2**40), 0.5, 1e300, -1e-300, "", "0", "x", "..",
    "../..", "/", "a/b", "zstd", "blosc", "gzip", "bytes", "sharding_indexed", "crc32c", "transpose",
    "imagecodecs_jpeg", "jpeg", "little", "big", "start", "end", "uint8", "|u1", "<u2", "c", "y", "x",
    "default", "v2", "F", ".", "é" * 300, "\n\0", "A" * 5000, [], {}, [[]], [0], [3, 4], [2, 1, 0],
    [16, 16, 3], [64, 64, 3], [1] * 5, [10**9] * 3, {"name": "bytes"}, {"id": "zstd"}, {"id": "blosc"},
    {"name": "zstd", "configuration": {}}, {"name": "transpose", "configuration": {"order": [1, 0, 2]}},
    {"name": "crc32c"}, {"type": "scale", "scale": [1, 1, 1]}, {"path": "0"},
)  # fmt: skip
_OFFSETS = (0, 1, 15, 16, 64, 2**16, 2**31, 2**32, 2**40, 2**63, 2**64 - 1, 2**64 - 2, 2**64 - 16)
_BOMBS = (
    b"[" * 200_000, b'{"a":' * 100_000, b"{}" + b" " * 400_000, b"1" * 6000, b"[" + b"{}," * 300_000 + b"0]",
    b'{"zarr_format": 2, "zarr_format": 3}', b"\xff\xfe", b"null", b"NaN",
)  # fmt: skip


@dataclass(frozen=True)
class ZarrSeed:
    """A sound store: its objects, its documents parsed, the places of values in each, and its shards."""

    name: str
    objects: dict[str, bytes] = field(repr=False)
    documents: dict[str, Any] = field(repr=False)
    places: dict[str, list[tuple[Any, ...]]] = field(repr=False)
    data: tuple[str, ...] = field(repr=False)
    table_chunks: int = 0


@dataclass(frozen=True)
class HostileZarr:
    """The objects of a store."""

    kind: str
    objects: dict[str, bytes] = field(repr=False)
    claimed: dict[str, int] = field(default_factory=dict)


class ZarrStores(Stores):
    """Stores that hold a HostileZarr below URI, and count what was asked of them."""

    def __init__(self, store: HostileZarr) -> None:
        super().__init__()
        self.store, self.requests, self.bytes_read = store, 0, 0

    def _find(self, uri: str) -> str:
        self.requests += 1
        name = uri.removeprefix(f"{URI}/")
        assert uri != name and f"/{name}/".find("/../") < 0, f"{uri!r} leaves the store"
        if name not in self.store.objects:
            raise ObjectNotFoundError(uri, "there is no such object.")
        return name

    def version(self, uri: str) -> tuple[int, str]:
        """The size that is claimed."""
        name = self._find(uri)
        return self.store.claimed.get(name, len(self.store.objects[name])), "1-1"

    def read(self, uri: str, start: int, stop: int | None, token: str = "") -> bytes:
        """Bytes, and zeros where a size is claimed that is not there."""
        size, _ = self.version(uri)
        stop = size if stop is None else min(stop, size)
        data = self.store.objects[self._find(uri)][start:stop]
        self.bytes_read += stop - start
        return data + bytes(max(0, stop - start - len(data)))

    def version_many(self, uris: Sequence[str]) -> list[Any]:
        """Each object's version, or what went wrong."""
        return [_caught(self.version, uri) for uri in uris]

    def read_many(self, requests: Sequence[Any]) -> list[Any]:
        """Each range's bytes, or what went wrong."""
        return [_caught(self.read, *request) for request in requests]

    def list(self, prefix: str, most: int = 0) -> list[Listed]:
        """All objects."""
        return sorted(Listed(f"{URI}/{n}", *self.version(f"{URI}/{n}")) for n in self.store.objects)


def _caught(work: Any, *args: Any) -> Any:
    try:
        return work(*args)
    except PatchingError as error:
        return error


def zarr_seeds() -> list[ZarrSeed]:
    """Small sound stores of every kind."""
    slide = SyntheticSlide(6, *_SIZES_PX, mpp=0.5)
    picture = slide.render(0, 0, *_SIZES_PX)
    storages = [
        Storage(2, 16, compressor=name, axes="yxc")
        for name in ("zstd", "gzip", "zlib", "none", "jpeg", "blosc-lz4-2-256", "blosc-zstd-1-0",
                     "blosc-blosclz-0-128", "blosc-zlib-2-0")
    ]  # fmt: skip
    storages += [
        Storage(2, 16, 1, "zstd", "tczyx", order="F"),
        Storage(3, 16, compressor="zstd", crc32c=True, order="F"),
        Storage(3, 16, compressor="blosc-lz4-1-64", axes="tczyx"),
        *[
            Storage(3, 16, compressor=name, axes="yxc", shard_px=32, table=table)  # type: ignore[arg-type]
            for name, table in (("zstd", "end"), ("gzip", "start"), ("none", "end-unchecked"))
        ],
        Storage(3, 16, 1, "blosc-lz4-2-0", shard_px=64, crc32c=True),
    ]
    out = []
    with tempfile.TemporaryDirectory() as folder:
        for number, storage in enumerate(storages):
            path = Path(folder) / str(number)
            if number % 3:
                write_ome_zarr(
                    path, slide, version="0.4" if storage.version == 2 else "0.5", level0=picture,
                    storage=storage, downsamples=(2.0,), container=number % 3 == 2,
                )  # fmt: skip
            else:
                write_zarr_array(path, picture, storage)
            out.append(_seed(f"{number} {storage.compressor} v{storage.version}", path, storage))
            root = path / "zarr.json" if storage.version == 3 else path / ".zmetadata"
            if number % 3 == 1:
                _consolidate(path, root)
                out.append(_seed(f"{number} consolidated", path, storage))
    return out


def _consolidate(path: Path, root: Path) -> None:
    """Consolidated metadata as zarr-python writes it, in either version."""
    documents = {
        str(p.relative_to(path)): json.loads(p.read_bytes())
        for p in sorted(path.rglob("*")) if p.name in ("zarr.json", ".zarray", ".zgroup", ".zattrs")
    }  # fmt: skip
    if root.name == ".zmetadata":
        root.write_text(json.dumps({"zarr_consolidated_format": 1, "metadata": documents}))
        return
    held = documents.pop("zarr.json")
    inside = {name.removesuffix("/zarr.json"): one for name, one in documents.items()}
    held["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": inside}
    root.write_text(json.dumps(held))


def _seed(name: str, path: Path, storage: Storage) -> ZarrSeed:
    files = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    names = ("zarr.json", ".zarray", ".zgroup", ".zattrs", ".zmetadata")
    documents = {n: json.loads(body) for n, body in files.items() if n.rpartition("/")[2] in names}
    places = {n: list(_places(one)) for n, one in documents.items()}
    data = tuple(sorted(set(files) - set(documents)))
    side = 0 if storage.shard_px is None else storage.shard_px // storage.chunk_px
    return ZarrSeed(name, files, documents, places, data, side * side)


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a document but the document itself."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, one in inside:
        yield (*at, key)
        yield from _places(one, (*at, key))


def hostile_zarrs(
    seeds: Sequence[ZarrSeed], numbers: Sequence[int], seed: int = 0
) -> Iterator[HostileZarr]:
    """Store `number` for each of `numbers`, all made from the same seeds."""
    for row in words(seed, numbers, 0, _STREAM, _WORDS).tolist():
        dice = _Dice(row)
        start = dice.pick(seeds)
        kind, change = dice.pick(_CHANGES)
        made = change(start, dice)
        yield replace(made, kind=f"{kind}: {start.name}")


def _with(seed: ZarrSeed, name: str, body: bytes) -> HostileZarr:
    return HostileZarr("", {**seed.objects, name: body})


def _values(seed: ZarrSeed, dice: _Dice) -> HostileZarr:
    """One to three values of a document replaced, removed, repeated or exchanged."""
    name = dice.pick([n for n in sorted(seed.documents) if seed.places[n]])
    document = json.loads(seed.objects[name])
    for _ in range(1 + dice.below(3)):
        place = dice.pick(seed.places[name])
        holder, key = document, place[-1]
        try:
            for step in place[:-1]:
                holder = holder[step]
            true = holder[key]
            what = dice.below(8)
            if what == 0:
                del holder[key]
            elif what == 1 and isinstance(true, list):
                holder[key] = true * (2 + dice.below(40))
            elif what == 2 and isinstance(true, dict):
                holder[key] = {**true, str(dice.pick(_LIES))[:50]: dice.pick(_LIES)}
            elif what == 3 and type(true) is int:
                holder[key] = dice.pick(
                    (true + 1, true - 1, 2 * true, true // 2, -true, float(true))
                )
            else:
                holder[key] = copy.deepcopy(dice.pick(_LIES))
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took its place away
    return _with(seed, name, json.dumps(document).encode())


def _documents(seed: ZarrSeed, dice: _Dice) -> HostileZarr:
    """Bytes of a document replaced, or all of it, or another document in its place."""
    name = dice.pick(sorted(seed.documents))
    what = dice.below(12)
    if what == 0:
        return _with(seed, name, dice.pick(_BOMBS))
    if what <= 2:
        return _with(seed, name, seed.objects[dice.pick(sorted(seed.objects))])
    return _with(seed, name, _bytes(seed.objects[name], dice))


def _bytes(data: bytes, dice: _Dice, low: int = 0, high: int | None = None) -> bytes:
    """One to eight bytes replaced."""
    out = bytearray(data)
    high = len(out) if high is None else min(high, len(out))
    for _ in range(1 + dice.below(8)):
        if high > low:
            out[low + dice.below(high - low)] = dice.below(256)
    return bytes(out)


def _tables(seed: ZarrSeed, dice: _Dice) -> HostileZarr:
    """One to three numbers of a shard's table replaced; its checksum mostly made right again."""
    if not seed.table_chunks or not seed.data:
        return _values(seed, dice)
    name = dice.pick(seed.data)
    body, table_bytes = bytearray(seed.objects[name]), 16 * seed.table_chunks
    at_start, checked = "gzip" in seed.name, "none" not in seed.name
    at = 0 if at_start else len(body) - table_bytes - 4 * checked
    if at < 0:
        return _values(seed, dice)
    for _ in range(1 + dice.below(3)):
        spot = at + 8 * dice.below(2 * seed.table_chunks)
        (true,) = struct.unpack_from("<Q", body, spot)
        near = (
            true + 1,
            true - 1,
            2 * true,
            len(body),
            len(body) - true,
            true ^ 1 << dice.below(64),
        )
        struct.pack_into("<Q", body, spot, dice.pick(dice.pick((_OFFSETS, near))) % 2**64)
    if checked and dice.below(8):
        crc = google_crc32c.value(bytes(body[at : at + table_bytes]))
        struct.pack_into("<I", body, at + table_bytes, crc)
    return _with(seed, name, bytes(body))


def _chunks(seed: ZarrSeed, dice: _Dice) -> HostileZarr:
    """Bytes of every chunk or shard replaced, in its head, anywhere, or by a stretch of one byte."""
    objects = dict(seed.objects)
    what = dice.below(4)
    for name in seed.data[:4]:
        body = objects[name]
        if what == 0 and body:
            start, length = dice.below(len(body)), 1 + dice.below(64)
            body = body[:start] + dice.pick((b"\0", b"\xff")) * length + body[start + length :]
        objects[name] = _bytes(body, dice, 0, 24 if what == 1 else None)
    return HostileZarr("", objects)


def _sizes(seed: ZarrSeed, dice: _Dice) -> HostileZarr:
    """Objects cut short, gone, empty, or claimed to go on."""
    objects, claimed = dict(seed.objects), dict[str, int]()
    for _ in range(1 + dice.below(3)):
        name = dice.pick(sorted(seed.objects))
        what = dice.below(4)
        if what == 0:
            objects.pop(name, None)
        elif name in objects and what == 1:
            objects[name] = objects[name][: dice.below(len(objects[name]) + 1)]
        elif name in objects and what == 2:
            objects[name] += bytes(1 + dice.below(100))
        elif name in objects:
            claimed[name] = dice.pick((0, 1, 2**16, 2**21, 2**31, 2**40, 2**62))
    return HostileZarr("", objects, claimed)


_CHANGES = (
    *[("values", _values)] * 8, ("documents", _documents), *[("tables", _tables)] * 3,
    *[("chunks", _chunks)] * 3, *[("sizes", _sizes)] * 2,
)  # fmt: skip
