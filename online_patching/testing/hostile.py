"""Files that lie: valid slides, indexes and masks with fields, bytes and sizes changed, by number.

Input number i is a pure function of (seed, i), so that one which breaks something can be made again
alone. Nothing is written: a HostileFile is a base, the patches over it and the size it claims, which
may be petabytes; HostileStores serves it as a local file or server would.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from online_patching.philox import words
from online_patching.stores import Stores

T = TypeVar("T")

_STREAM = 9001
_WORDS = 64
_TYPES = (0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 16, 18, 99, 65535)
_TAGS = (254, 256, 257, 258, 259, 262, 270, 273, 277, 279, 282, 284, 296, 317, 322, 323, 324, 325,
         330, 339, 347, 32997, 65420)  # fmt: skip
_NUMBERS = (0, 1, 2, 3, 7, 8, 16, 255, 256, 4095, 4096, 65535, 65536, 2**24 - 1, 2**24, 2**31 - 1,
            2**31, 2**32 - 1, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
_SIZES_BYTES = (0, 1, 7, 8, 15, 16, 2**16, 2**31, 2**32, 2**40, 2**62)


@dataclass(frozen=True)
class Field:
    """A number in a file: where it lies, how wide it is, and what it means."""

    start: int
    width: int
    role: str
    """order, next, directory (its number of tags), tag, type, count, value, table (of a tag's values)"""
    pool: tuple[int, ...] = ()
    """Numbers that mean something here, where they are not those of a TIFF."""

    def value(self, data: bytes, order: str) -> int:
        """The number as it stands in the file."""
        return int.from_bytes(data[self.start : self.start + self.width], _end(order))


@dataclass(frozen=True)
class Seed:
    """A file to start from, with its numbers."""

    name: str
    data: bytes = field(repr=False)
    order: str = "<"
    fields: tuple[Field, ...] = field(default=(), repr=False)
    directories: tuple[int, ...] = ()


@dataclass(frozen=True)
class HostileFile:
    """`base` with `patches` (position, bytes) laid over it, cut or continued by zeros to a size."""

    kind: str
    base: bytes = field(repr=False)
    patches: tuple[tuple[int, bytes], ...]
    size_bytes: int

    def read(self, start: int, stop: int) -> bytes:
        """The bytes start..stop, fewer at the end."""
        stop = min(stop, self.size_bytes)
        data = self.base[start:stop]
        data += bytes(max(0, stop - start - len(data)))
        for place, patch in self.patches:
            low, high = max(start, place), min(stop, place + len(patch))
            if low < high:
                data = (
                    data[: low - start] + patch[low - place : high - place] + data[high - start :]
                )
        return data

    def whole(self) -> bytes:
        """All bytes: for files that are small."""
        return self.read(0, self.size_bytes)


class HostileStores(Stores):
    """Stores whose only object is a HostileFile, and that count what was asked of them."""

    def __init__(self, file: HostileFile) -> None:
        super().__init__()
        self.file, self.requests, self.bytes_read = file, 0, 0

    def read(self, uri: str, start: int, stop: int | None, token: str = "") -> bytes:
        """Bytes of the file."""
        data = self.file.read(start, self.file.size_bytes if stop is None else stop)
        self.requests += 1
        self.bytes_read += len(data)
        return data


class _Dice:
    """One input's random words, one after another."""

    def __init__(self, row: Sequence[int]) -> None:
        self._row = iter(row)

    def below(self, bound: int) -> int:
        return (next(self._row) * bound) >> 32

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]


def hostile_files(
    seeds: Sequence[Seed], numbers: Sequence[int], seed: int = 0
) -> Iterator[HostileFile]:
    """Input `number` for each of `numbers`, all made from the same seeds."""
    for row in words(seed, numbers, 0, _STREAM, _WORDS).tolist():
        dice = _Dice(row)
        start = dice.pick(seeds)
        kind, change = dice.pick(_CHANGES if start.fields else _BYTE_CHANGES)
        patches, size = change(start, dice)
        yield HostileFile(f"{kind}: {start.name}", start.data, tuple(patches), size)


Change = tuple[list[tuple[int, bytes]], int]
"""Patches, and the size the file claims."""


def _fields(seed: Seed, dice: _Dice) -> Change:
    """One to three numbers replaced."""
    chosen = [dice.pick(seed.fields) for _ in range(1 + dice.below(3))]
    return [(f.start, _lie(seed, f, dice)) for f in chosen], len(seed.data)


def _lie(seed: Seed, spot: Field, dice: _Dice) -> bytes:
    """A number that is wrong in a way that means something where it stands."""
    true = spot.value(seed.data, seed.order)
    places = [*seed.directories, len(seed.data), len(seed.data) - 1, spot.start]
    near = [true + 1, true - 1, 2 * true, true // 2, true ^ (1 << dice.below(8 * spot.width))]
    pools: list[Sequence[int]] = [_NUMBERS, near, places]
    if spot.pool:
        pools = [spot.pool, spot.pool, near]
    elif spot.role == "type":
        pools = [_TYPES]
    elif spot.role == "tag":
        pools = [_TAGS, near]
    elif spot.role == "next":
        pools = [places]
    number = dice.pick(dice.pick(pools))
    return (number % (1 << 8 * spot.width)).to_bytes(spot.width, _end(seed.order))


def _flips(seed: Seed, dice: _Dice) -> Change:
    """One to eight bytes replaced, anywhere."""
    return _noise(seed, dice, 0, len(seed.data)), len(seed.data)


def _noise(seed: Seed, dice: _Dice, low: int, high: int) -> list[tuple[int, bytes]]:
    count = 1 + dice.below(8)
    return [(low + dice.below(high - low), bytes([dice.below(256)])) for _ in range(count)]


def _head_flips(seed: Seed, dice: _Dice) -> Change:
    """One to eight bytes replaced near a directory or the start."""
    near = dice.pick((0, *seed.directories))
    return _noise(seed, dice, near, min(len(seed.data), near + 400)), len(seed.data)


def _sizes(seed: Seed, dice: _Dice) -> Change:
    """Cut anywhere or claimed to go on, half of them with a number replaced besides."""
    size = dice.pick((dice.below(len(seed.data) + 1), dice.pick(_SIZES_BYTES), len(seed.data) + 1))
    return (_fields(seed, dice)[0] if seed.fields and dice.below(2) else []), size


def _runs(seed: Seed, dice: _Dice) -> Change:
    """A stretch overwritten by one byte, or by a stretch from elsewhere."""
    at, length = dice.below(len(seed.data)), 1 + dice.below(64)
    other = dice.below(len(seed.data))
    data = dice.pick((bytes(length), b"\xff" * length, seed.data[other : other + length] or b"\0"))
    return [(at, bytes(data))], len(seed.data)


def _frames(seed: Seed, dice: _Dice) -> Change:
    """The frame header of a JPEG tile claims another size, or bytes of the tile are replaced."""
    at = seed.data.find(b"\xff\xc0\x00\x11")
    if at < 0:
        return _flips(seed, dice)
    if dice.below(2):
        return _noise(seed, dice, at, min(len(seed.data), at + 60)), len(seed.data)
    sides = [dice.pick((0, 1, 15, 17, 4096, 65500, 65535)) for _ in range(2)]
    return [(at + 5, struct.pack(">HH", *sides))], len(seed.data)


Named = tuple[str, Callable[[Seed, _Dice], Change]]
_BYTE_CHANGES: tuple[Named, ...] = (("bytes", _flips), ("stretch", _runs), ("size", _sizes))
_CHANGES: tuple[Named, ...] = (
    *[("numbers", _fields)] * 6, *[("header bytes", _head_flips)] * 2, ("bytes", _flips),
    ("stretch", _runs), *[("size", _sizes)] * 2, ("frame", _frames),
)  # fmt: skip


def tiff_seed(name: str, data: bytes) -> Seed:
    """A valid TIFF with every number of its headers found: by a walk of its own, not the reader's."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack(f"{order}H", data[2:4])[0] == 43
    pointer, count, head = (8, 8, 8) if big else (4, 2, 4)
    found = [Field(0, 2, "order"), Field(2, 2, "order"), Field(head, pointer, "next")]
    waiting = [found[-1].value(data, order)]
    seen: list[int] = []
    while waiting:
        place = waiting.pop(0)
        if not 0 < place <= len(data) - count or place in seen or len(seen) > 64:
            continue
        seen.append(place)
        tags = min(200, int.from_bytes(data[place : place + count], _end(order)))
        found.append(Field(place, count, "directory"))
        size, at = 4 + 2 * pointer, place + count
        for entry in range(at, at + tags * size, size):
            found.extend(_entry_fields(data, order, entry, pointer))
            if data[entry : entry + 2] == struct.pack(f"{order}H", 330):
                waiting += [f.value(data, order) for f in found[-3:] if f.role == "table"]
        link = Field(at + tags * size, pointer, "next")
        found.append(link)
        waiting.append(link.value(data, order))
    inside = tuple(f for f in found if f.start + f.width <= len(data))
    return Seed(name, data, order, inside, tuple(seen))


_WIDTHS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 12: 8, 13: 4, 16: 8, 18: 8}


def _entry_fields(data: bytes, order: str, entry: int, pointer: int) -> list[Field]:
    """Tag, type, count and value of an entry, and the first and last numbers it points to."""
    at = entry + 4 + pointer
    fields = [Field(entry, 2, "tag"), Field(entry + 2, 2, "type"), Field(entry + 4, pointer, "count"),
              Field(at, pointer, "value")]  # fmt: skip
    kind, count = fields[1].value(data, order), fields[2].value(data, order)
    width = _WIDTHS.get(kind, 1)
    start = at if width * count <= pointer else fields[3].value(data, order)
    numbers = [n for n in dict.fromkeys((0, 1, count - 1)) if 0 <= n < count]
    wide = 4 if kind == 5 else width  # a RATIONAL is two numbers
    return fields + [Field(start + n * width, wide, "table") for n in numbers]


def _end(order: str) -> Literal["little", "big"]:
    return "little" if order == "<" else "big"
