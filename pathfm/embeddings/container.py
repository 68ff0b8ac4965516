"""One safetensors file of large tables: written as a stream of blocks, read in place.

The library of that name wants all tensors in memory to write them, and cannot give bfloat16 to
numpy. The format is simple (github.com/huggingface/safetensors): 8 bytes with the length of a JSON
header, the header, and the tensors' bytes one after the other.
"""

from __future__ import annotations

import glob
import json
import math
import os
import secrets
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pathfm.runtime import PathfmError

MAX_HEADER_BYTES = 256 << 20
_MAX_DIMENSIONS = 8
_DTYPES = {"F32": "<f4", "BF16": "<u2", "I64": "<i8", "U8": "|u1"}
_BLOCK_ROWS = 1 << 16
_LEFTOVER_S = 3600.0


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file: its kind ("F32", "BF16", "I64", "U8"), shape and first byte."""

    kind: str
    shape: tuple[int, ...]
    start_byte: int

    @property
    def n_bytes(self) -> int:
        """Its length."""
        return math.prod(self.shape) * np.dtype(_DTYPES[self.kind]).itemsize


@dataclass(frozen=True)
class Column:
    """A tensor to write: kind, shape, and its rows in blocks of that kind's numpy type."""

    kind: str
    shape: tuple[int, ...]
    blocks: Iterable[NDArray[Any]]

    @staticmethod
    def of(array: NDArray[Any]) -> Column:
        """A whole array in memory: float32, int64 or uint8."""
        kinds = {np.dtype(text): kind for kind, text in _DTYPES.items() if kind != "BF16"}
        return Column(kinds[array.dtype], array.shape, [array])


def write_container(path: Path, meta: Mapping[str, str], columns: Mapping[str, Column]) -> None:
    """Writes the file whole or not at all, block by block.

    Raises PathfmError where blocks do not add up to their shape, or the disk refuses.
    """
    header: dict[str, Any] = {"__metadata__": dict(meta)}
    offset = 0
    # Widest numbers first: all begin at a multiple of their size, so that they can be mapped.
    order = sorted(columns, key=lambda name: -np.dtype(_DTYPES[columns[name].kind]).itemsize)
    for name in order:
        column = columns[name]
        stop = offset + Place(column.kind, column.shape, 0).n_bytes
        header[name] = {
            "dtype": column.kind,
            "shape": list(column.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            _write_column(file, path, name, columns[name])


def _write_column(file: IO[bytes], path: Path, name: str, column: Column) -> None:
    wanted, written = Place(column.kind, column.shape, 0).n_bytes, 0
    for block in column.blocks:
        if block.dtype != np.dtype(_DTYPES[column.kind]):
            raise PathfmError(f"{path}: a block of {name} is {block.dtype}, not {column.kind}")
        file.write(np.ascontiguousarray(block).data if block.size else b"")
        written += block.nbytes
    if written != wanted:
        raise PathfmError(f"{path}: {name} has {written:,} bytes, {column.shape} wants {wanted:,}")


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` when the block ends, and vanishes when it fails."""
    hidden = hidden_beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with hidden.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        hidden.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise PathfmError(f"{path}: cannot be written ({reason}). Free space, or set out") from None
    finally:
        with suppress(OSError):
            hidden.unlink(missing_ok=True)


def hidden_beside(path: Path) -> Path:
    """A new name beside `path` for what will take its place.

    What killed processes left of earlier ones is deleted once it is an hour old: it can be large.
    """
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _LEFTOVER_S:
                left.unlink()
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def read_places(path: Path) -> tuple[dict[str, Any], dict[str, Place]]:
    """The metadata and where each tensor lies, checked against the file's size; reads no tensor.

    Raises OSError, ValueError, KeyError, TypeError or struct.error for what is no such file.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        if header_bytes > min(MAX_HEADER_BYTES, size_bytes):
            raise ValueError("no safetensors header")
        try:
            header = json.loads(file.read(header_bytes))
        except RecursionError:
            raise ValueError("a header that is nested too deep") from None
    meta = header.pop("__metadata__")
    first = 8 + header_bytes
    return dict(meta), {name: _place(told, first, size_bytes) for name, told in header.items()}


def _place(told: Mapping[str, Any], first: int, size_bytes: int) -> Place:
    shape = tuple(int(side) for side in told["shape"])
    start, stop = (int(offset) for offset in told["data_offsets"])
    if len(shape) > _MAX_DIMENSIONS or min((0, start, *shape)) < 0:
        raise ValueError(f"a tensor of shape {shape} at {start}")
    place = Place(str(told["dtype"]), shape, first + start)
    if stop - start != place.n_bytes or first + stop > size_bytes:
        raise ValueError(f"{size_bytes:,} bytes, too few for its tensors: the file is cut short")
    return place


def read_tensor(path: Path, place: Place, mmap: bool = False) -> NDArray[Any]:
    """A tensor as an array; BF16 as float32. With `mmap` the file's own pages, read-only.

    A mapped file must not shrink (reading past its end would kill the process): those written
    here are only ever replaced, and the old one lives on for whoever has it open. BF16 is always
    in memory, as numpy has no such type.
    """
    dtype = np.dtype(_DTYPES[place.kind])
    if not math.prod(place.shape):
        return np.zeros(place.shape, np.float32 if place.kind == "BF16" else dtype)
    if not mmap and place.kind != "BF16":  # read, not mapped and copied: that would hold it twice
        flat = np.fromfile(path, dtype, math.prod(place.shape), offset=place.start_byte)
        return flat.reshape(place.shape)
    mapped: NDArray[Any] = np.memmap(path, dtype, "r", place.start_byte, place.shape)
    return _blockwise(mapped) if place.kind == "BF16" else mapped


def _blockwise(stored: NDArray[np.uint16]) -> NDArray[np.float32]:
    wide = np.empty(stored.shape, np.float32)
    for at in range(0, len(stored), _BLOCK_ROWS):
        wide[at : at + _BLOCK_ROWS] = from_bf16(stored[at : at + _BLOCK_ROWS])
    return wide


def to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of the nearest bfloat16 of each number, ties to even; finite numbers only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    # Rounds up what lies above half of the 16 bits dropped, and half itself where the kept are odd.
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 numbers that bfloat16 bits stand for, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def pack_text(texts: Iterable[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Texts one after the other in UTF-8, and where each ends: a header for them would be 100 MB.

    File names that are no UTF-8 come back as they were.
    """
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    ends = np.cumsum([len(text) for text in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def unpack_text(packed: NDArray[np.uint8], ends: NDArray[np.int64]) -> tuple[str, ...]:
    """The texts that `pack_text` packed; ValueError where the ends make no sense."""
    starts = np.concatenate([[0], ends[:-1]]) if len(ends) else ends
    if len(ends) and (int(ends[-1]) != len(packed) or (ends < starts).any() or starts.min() < 0):
        raise ValueError("texts that end where they do not")
    raw, seen = packed.tobytes(), dict[str, str]()
    pairs = zip(starts.tolist(), ends.tolist(), strict=True)
    texts = (raw[start:stop].decode("utf-8", "surrogateescape") for start, stop in pairs)
    return tuple(seen.setdefault(text, text) for text in texts)  # equal groups once in memory
