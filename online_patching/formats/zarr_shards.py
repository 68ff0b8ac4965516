"""Where every chunk of a sharded Zarr image lies: all shard tables, read at indexing and checked.

A shard is one object of many chunks with a table of (offset, length), 16 bytes a chunk, at its end or start.
Of an image with shards, what is stored without becomes objects of one chunk each, so that all of its tiles are
byte ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from online_patching.errors import (
    DamagedSlideError,
    ObjectNotFoundError,
    PatchingError,
    ShortReadError,
    UnsupportedSlideError,
)
from online_patching.formats.zarr_metadata import ZarrArray
from online_patching.slide_index import SlideObject, pack_rows
from online_patching.stores import Stores, is_remote

_MAX_OBJECTS = 2**16
_MAX_CHUNKS = 2 * 2**20
"""Of all shards together; a slide has about 150,000."""
_MAX_TABLE_CHUNKS = 2**18
_MAX_ADDRESS = 2**40
_MAX_LARGE = 4096
_AT_ONCE_BYTES = 8 * 2**20
_ABSENT = np.uint64(2**64 - 1)
_ENTRY_BYTES, _CRC_BYTES = 16, 4

Version = tuple[int, str]
Rows = tuple[NDArray[np.uint64], tuple[tuple[int, int], ...]]
"""What `pack_rows` gives."""


@dataclass(frozen=True)
class Stored:
    """One level as it is stored: its array, where it is, the axes' letters, how many channel chunks."""

    path: str
    array: ZarrArray
    axes: str
    parts: int

    def pair(self, sizes: Sequence[int]) -> dict[str, int]:
        """Sizes by axis."""
        return dict(zip(self.axes, sizes, strict=True))

    @property
    def outer(self) -> tuple[int, ...]:
        """The shape of one object."""
        return self.array.shard or self.array.chunk

    @property
    def per_object(self) -> tuple[int, ...]:
        """Chunks of an object along each axis."""
        return tuple(a // b for a, b in zip(self.outer, self.array.chunk, strict=True))

    @property
    def table_bytes(self) -> int:
        """The length of a shard's table; 0 without shards."""
        if self.array.shard is None:
            return 0
        return _ENTRY_BYTES * prod(self.per_object) + _CRC_BYTES * self.array.table_checked

    def objects(self) -> list[tuple[int, ...]]:
        """Grid places of the objects that hold the picture: t = z = 0 and the first channels."""
        shape, outer = self.pair(self.array.shape), self.pair(self.outer)
        counts = {axis: -(-shape[axis] // outer[axis]) for axis in "yx"}
        counts["c"] = -(-self.parts // outer["c"]) if self.parts > 1 else 1
        return list(product(*(range(counts.get(axis, 1)) for axis in self.axes)))

    def n_objects(self) -> int:
        """How many these are, without listing them."""
        shape, outer = self.pair(self.array.shape), self.pair(self.outer)
        return prod(-(-shape[axis] // outer[axis]) for axis in "yx") * self.parts

    def name(self, place: tuple[int, ...]) -> str:
        """The name of an object."""
        key = self.array.prefix + self.array.separator.join(map(str, place))
        return f"{self.path}/{key}" if self.path else key


def read_tables(
    uri: str, levels: Sequence[Stored], stores: Stores
) -> tuple[tuple[SlideObject, ...], list[Rows]]:
    """The objects that are there, and each level's tile rows of addresses in them.

    Chunks and shards that are absent have rows of no length. DamagedSlideError for a table with a wrong
    checksum or with entries outside its shard, ShortReadError for a shard shorter than its table.
    """
    _check_counts(uri, levels)
    wanted = [(level, place) for level in levels for place in level.objects()]
    names = [level.name(place) for level, place in wanted]
    versions = _versions(uri, levels, names, stores)
    there = [i for i, found in enumerate(versions) if found is not None]
    found = [versions[i] or (0, "") for i in there]
    total = sum(size for size, _ in found)  # of Python's numbers, which do not overflow
    if total >= _MAX_ADDRESS:
        raise UnsupportedSlideError(uri, f"shards of {total:,} bytes, more than a slide has.")
    starts = np.cumsum([0, *(size for size, _ in found)])
    objects = tuple(
        SlideObject(names[i], *version) for i, version in zip(there, found, strict=True)
    )
    grids = {id(level): _Grid(level) for level in levels}
    entries = _tables(uri, [wanted[i][0] for i in there], objects, stores)
    for i, start, table in zip(there, starts, entries, strict=False):
        level, place = wanted[i]
        grids[id(level)].put(place, int(start), table)
    return objects, [_packed(uri, grids[id(level)]) for level in levels]


def _check_counts(uri: str, levels: Sequence[Stored]) -> None:
    n_objects = sum(level.n_objects() for level in levels)
    if n_objects > _MAX_OBJECTS:
        raise UnsupportedSlideError(
            uri,
            f"{n_objects:,} shards are more than are read ({_MAX_OBJECTS:,}): make them larger.",
        )
    n_chunks = sum(level.n_objects() * prod(level.per_object) for level in levels)
    largest = max(prod(level.per_object) for level in levels)
    if n_chunks > _MAX_CHUNKS or largest > _MAX_TABLE_CHUNKS:
        raise UnsupportedSlideError(
            uri,
            f"{n_chunks:,} chunks in shards of up to {largest:,} are more than are read "
            f"({_MAX_CHUNKS:,}, and {_MAX_TABLE_CHUNKS:,} a shard).",
        )


def _versions(
    uri: str, levels: Sequence[Stored], names: list[str], stores: Stores
) -> list[Version | None]:
    """Size and token of each object, None for those that are absent: listed where that can be done."""
    base = uri.rstrip("/")
    if is_remote(uri) and not uri.startswith("http"):
        try:
            known: dict[str, Version] = {}
            for level in levels:
                folder = f"{base}/{level.path}" if level.path else base
                # Metadata and, in a plain store, other arrays lie below too.
                for item in stores.list(folder, 4 * _MAX_OBJECTS):
                    known[item.uri] = (item.size_bytes, item.token)
            return [known.get(f"{base}/{name}") for name in names]
        except PatchingError:
            pass  # may not be listed
    out: list[Version | None] = []
    for found in stores.version_many([f"{base}/{name}" for name in names]):
        if isinstance(found, PatchingError):
            if not isinstance(found, ObjectNotFoundError):
                raise found
            out.append(None)
        else:
            out.append(found)
    return out


Table = NDArray[np.uint64]
"""(offset, length) of each chunk of an object in C order; _ABSENT twice where there is none."""


def _tables(
    uri: str, levels: Sequence[Stored], objects: tuple[SlideObject, ...], stores: Stores
) -> Iterator[Table]:
    """The table of each object, read some at the same time."""
    for first, stop in _groups([level.table_bytes for level in levels]):
        some = range(first, stop)
        for i in some:
            level, item = levels[i], objects[i]
            if item.size_bytes < max(1, level.table_bytes):
                key = f"{uri.rstrip('/')}/{item.name}"
                raise ShortReadError(key, 0, max(1, level.table_bytes), item.size_bytes)
        sharded = [i for i in some if levels[i].array.shard is not None]
        requests = []
        for i in sharded:
            size, length = objects[i].size_bytes, levels[i].table_bytes
            start = size - length if levels[i].array.table_at_end else 0
            key = f"{uri.rstrip('/')}/{objects[i].name}"
            requests.append((key, start, start + length, objects[i].token))
        bodies = dict(zip(sharded, stores.read_many(requests), strict=True))
        for i in some:
            if i not in bodies:
                yield np.asarray([[0, objects[i].size_bytes]], np.uint64)
                continue
            body = bodies[i]
            if isinstance(body, PatchingError):
                raise body
            yield parse_table(uri, objects[i], levels[i].array, body)


def _groups(sizes: list[int]) -> Iterator[tuple[int, int]]:
    first, held = 0, 0
    for i, size in enumerate(sizes):
        if held + size > _AT_ONCE_BYTES or i - first >= 4096:
            yield first, i
            first, held = i, 0
        held += size
    if first < len(sizes):
        yield first, len(sizes)


def parse_table(uri: str, item: SlideObject, array: ZarrArray, body: bytes) -> Table:
    """A shard's table, checked: its CRC, and that every entry lies inside the shard."""
    if array.table_checked:
        body, crc = body[:-_CRC_BYTES], int.from_bytes(body[-_CRC_BYTES:], "little")
        if google_crc32c.value(body) != crc:
            raise DamagedSlideError(
                uri, f"the table of shard {item.name} has another checksum than it says."
            )
    table = np.frombuffer(body, f"{array.table_order}u8").astype(np.uint64).reshape(-1, 2)
    stored = (table != _ABSENT).any(axis=1)
    offset, length = table[stored].T
    size = np.uint64(item.size_bytes)
    wrong = (offset > size) | (length > size - np.minimum(offset, size)) | (length == 0)
    if wrong.any():
        at = int(np.flatnonzero(stored)[wrong.argmax()])
        start, count = (int(n) for n in table[at])
        raise DamagedSlideError(
            uri,
            f"chunk {at} of shard {item.name} lies at {start:,}, {count:,} bytes long; the shard has "
            f"{item.size_bytes:,}. It is damaged or still being written: copy it again.",
        )
    return table


class _Grid:
    """Addresses and lengths of one level's pieces, (rows, columns, parts); length 0 for absent ones."""

    def __init__(self, level: Stored) -> None:
        self.level = level
        shape, chunk = level.pair(level.array.shape), level.pair(level.array.chunk)
        size = (-(-shape["y"] // chunk["y"]), -(-shape["x"] // chunk["x"]), level.parts)
        self.start, self.length = np.zeros(size, np.int64), np.zeros(size, np.int64)

    def put(self, place: tuple[int, ...], base: int, table: Table) -> None:
        """Enter an object's chunks, those that lie in the picture."""
        level = self.level
        axes = [axis for axis in "yxc" if axis in level.axes]
        pick = tuple(slice(None) if axis in axes else 0 for axis in level.axes)
        left = [axis for axis in level.axes if axis in axes]
        local = table.reshape(*level.per_object, 2)[pick]
        local = local.transpose(*(left.index(axis) for axis in axes), len(axes))
        per, at = level.pair(level.per_object), level.pair(place)
        first = [at[axis] * per[axis] for axis in axes]
        room = [n - f for n, f in zip(self.start.shape, first, strict=True)]
        local = local[tuple(slice(0, max(0, n)) for n in room)]
        target = tuple(slice(f, f + n) for f, n in zip(first, local.shape, strict=False))
        there = local[..., 0] != _ABSENT
        there |= local[..., 1] != _ABSENT
        self.start[target] = np.where(there, base + local[..., 0].astype(np.int64), 0)
        self.length[target] = np.where(there, local[..., 1].astype(np.int64), 0)


def _packed(uri: str, grid: _Grid) -> Rows:
    array = grid.level.array
    most = most_stored_bytes(prod(array.chunk))
    longest = int(grid.length.max())
    if longest > most:
        raise DamagedSlideError(
            uri,
            f"a chunk of {longest:,} bytes; {array.chunk} of them never take more than {most:,}.",
        )
    rows, large = pack_rows(grid.start.reshape(-1), grid.length.reshape(-1))
    if len(large) > _MAX_LARGE:
        raise UnsupportedSlideError(uri, f"{len(large):,} chunks of 16 MiB and more.")
    return rows, large


def most_stored_bytes(decoded_bytes: int) -> int:
    """More than any codec takes for a chunk: what is longer is damage, or an attack."""
    return 2 * decoded_bytes + 2**16
