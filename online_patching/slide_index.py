"""A slide as a table of byte ranges: its levels, and where every tile lies.

A SlideIndex is made once from headers (`formats/`) and saved; from then on nothing opens the slide.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.errors import CorpusError, MppError, redact
from online_patching.stores import atomic_write_bytes

MPP_SANE_RANGE = (0.05, 8.0)
"""µm/px that a slide scanner can make; anything else is a wrong tag."""

MPP_AXES_TOLERANCE = 0.05
"""How far µm/px may differ between the axes before the slide is refused."""

MPP_OVERRIDE = "override table"
"""The `mpp_source` of µm/px that a person gave: these may differ by axis as they like."""

CODEC_KINDS = frozenset(
    {"jpeg", "jpeg2000", "raw", "deflate", "lzw", "zstd", "packbits", "webp", "chunk"}
    | {"rle", "planes"}
)
"""What `Codec.kind` may be: the ways of storing a tile that decode.py undoes."""

INDEX_MAGIC = b"PFMINDX2"
"""How a saved index begins; another form of it has another name."""

_MAX_HEADER_BYTES = 64 * 2**20
_LENGTH_BITS = np.uint64(24)
_LENGTH_MASK = np.uint64(2**24 - 1)
_ESCAPE = 2**24 - 1
_MAX_OFFSET = 2**40


@dataclass(frozen=True)
class Codec:
    """How a tile's bytes become pixels.

    `kind`: jpeg, jpeg2000, raw, deflate, lzw, zstd (TIFF), rle and planes (DICOM: not compressed, with
    planes apart or YCbCr), or chunk (Zarr: `filters` is the
    list of codec configurations to undo, last first). `colour` is the space stored in a JPEG or
    JPEG 2000 stream: rgb, ycbcr or gray. `tables` are abbreviated JPEG tables; where the tiles are
    `headless` (bare restart intervals) they are a whole stream up to the end of its SOS header.
    `predictor` 2 is TIFF's horizontal differencing. `fill` is the value of a tile that is not stored.
    `reductions` is how many times a JPEG 2000 stream can be halved (its decomposition levels). `fragments`: what is
    stored of a tile are DICOM items, whose contents joined are the tile.
    """

    kind: str
    colour: str = "rgb"
    tables: bytes = b""
    predictor: int = 1
    samples: int = 3
    planar: bool = False
    filters: tuple[dict[str, Any], ...] = ()
    fill: int = 255
    headless: bool = False
    reductions: int = 0
    fragments: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON types only."""
        return {**asdict(self), "tables": base64.b64encode(self.tables).decode()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Codec:
        """What `to_json` gave."""
        tables = base64.b64decode(fields["tables"])
        return cls(**{**fields, "tables": tables, "filters": tuple(fields["filters"])})


@dataclass(frozen=True)
class ChunkKeys:
    """Names of a Zarr level's chunks: `prefix` + indices joined by `separator`.

    `axes` are the array's axes in order, of t, c, z, y, x; an index is 0 except along c, y and x.
    """

    prefix: str
    separator: str
    axes: str

    def key(self, row: int, column: int, channel: int) -> str:
        """The name of a chunk, relative to the store."""
        index = {"y": row, "x": column, "c": channel}
        return self.prefix + self.separator.join(str(index.get(axis, 0)) for axis in self.axes)


@dataclass(frozen=True)
class Level:
    """One resolution of the pyramid. Sizes are pixels of this level; tiles are row-major.

    `parts` is the number of stored pieces a tile consists of: 1, or the number of channel chunks
    of a Zarr array that stores channels apart. Piece p of tile t has number t * parts + p.
    `rows` packs (offset << 24 | length) a piece, as `pack_rows` makes them; `overflow` holds the
    (offset, length) of those that do not fit. A fallback slide has neither rows nor `keys`.
    """

    width_px: int
    height_px: int
    tile_width_px: int
    tile_height_px: int
    downsample_x: float
    downsample_y: float
    mpp_x: float
    mpp_y: float
    codec: Codec = field(repr=False)
    rows: NDArray[np.uint64] | None = field(default=None, compare=False, repr=False)
    overflow: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    keys: ChunkKeys | None = field(default=None, repr=False)
    parts: int = 1

    @property
    def mpp(self) -> float:
        """Mean µm/px of the two axes."""
        return (self.mpp_x + self.mpp_y) / 2

    @property
    def columns(self) -> int:
        """Tiles across."""
        return -(-self.width_px // self.tile_width_px)

    @property
    def n_tiles(self) -> int:
        """How many tiles there are."""
        return self.columns * -(-self.height_px // self.tile_height_px)

    def reduced(self, scale: int) -> Level:
        """This level as JPEG decoding at 1/scale gives it: the same tiles, each `scale` times smaller.

        `scale` divides the tile's sides. Pixels past the last whole one are kept, so sizes round up.
        """
        if scale == 1:
            return self
        return replace(
            self,
            width_px=-(-self.width_px // scale),
            height_px=-(-self.height_px // scale),
            tile_width_px=self.tile_width_px // scale,
            tile_height_px=self.tile_height_px // scale,
            downsample_x=self.downsample_x * scale,
            downsample_y=self.downsample_y * scale,
            mpp_x=self.mpp_x * scale,
            mpp_y=self.mpp_y * scale,
        )

    def byte_range(self, piece: int) -> tuple[int, int]:
        """Start and stop of a piece in the slide's object; equal when the tile is not stored."""
        if self.rows is None:
            raise CorpusError("a chunked or fallback level has no byte ranges in one object")
        row = int(self.rows[piece])
        offset, length = row >> 24, row & _ESCAPE
        if length == _ESCAPE:
            if offset >= len(self.overflow):
                raise CorpusError(f"tile row {piece} of the index points past its large tiles")
            offset, length = self.overflow[offset]
        return offset, offset + length


def pack_rows(
    offsets: ArrayLike, lengths: ArrayLike
) -> tuple[NDArray[np.uint64], tuple[tuple[int, int], ...]]:
    """Tile rows of 40-bit offset and 24-bit length, and the tiles too large or too far for them."""
    start = np.asarray(offsets, dtype=np.uint64)
    length = np.asarray(lengths, dtype=np.uint64)
    large = np.flatnonzero((length >= _ESCAPE) | (start >= _MAX_OFFSET))
    rows = (start << _LENGTH_BITS) | (length & _LENGTH_MASK)
    rows[large] = (np.arange(len(large), dtype=np.uint64) << _LENGTH_BITS) | np.uint64(_ESCAPE)
    return rows, tuple((int(start[i]), int(length[i])) for i in large)


@dataclass(frozen=True)
class SlideObject:
    """One of the objects that a slide of several lies in: a DICOM instance, a Zarr shard.

    `name` is relative to the slide's URI; `token` (size-mtime, or ETag) tells whether it is the same.
    """

    name: str
    size_bytes: int
    token: str = ""

    def __post_init__(self) -> None:
        parts = str(self.name).split("/")
        inside = not {"", ".", ".."} & set(parts) and not {"\\", "?", "#", "%"} & set(
            str(self.name)
        )
        if not inside or type(self.size_bytes) is not int or not 0 <= self.size_bytes < _MAX_OFFSET:
            raise CorpusError(f"an object {str(self.name)[:60]!r} of {self.size_bytes} bytes")


@dataclass(frozen=True)
class SlideIndex:
    """What is known of one slide without opening it.

    `uri` is where its bytes are; `token` (ETag, or size-mtime) tells whether they are still the
    same. `content_hash` is a reader's own fingerprint of the pixels, where it has one.
    `container` is svs, tiff, ome-tiff, philips-tiff, ndpi, dicom, ome-zarr, zarr, or the fallback
    reader's name (openslide, tiffslide). `mpp_source` says where µm/px came from.

    A slide may lie in several `objects` below its URI. Tile rows then hold addresses: the objects laid
    one after another in this order, so that object k begins where those before it end. No tile crosses
    objects. Without `objects` everything lies in `uri` itself, and an address is an offset in it.
    Where they lie `beside` it, `uri` is one of them (a DICOM series named by one of its files).
    """

    slide_id: str
    uri: str = field(repr=False)  # may carry a signature
    container: str
    vendor: str
    mpp_x: float
    mpp_y: float
    mpp_source: str
    levels: tuple[Level, ...]
    size_bytes: int = 0
    token: str = ""
    content_hash: str = ""
    objects: tuple[SlideObject, ...] = field(default=(), repr=False)
    beside: bool = False

    def __post_init__(self) -> None:
        check_mpp(self.uri, self.mpp_x, self.mpp_y, self.mpp_source)
        if not self.levels:
            raise CorpusError(f"{self.uri}: an index needs at least one level")

    @property
    def dimensions(self) -> tuple[int, int]:
        """Width and height in level-0 pixels."""
        return self.levels[0].width_px, self.levels[0].height_px

    @property
    def mpp(self) -> float:
        """Mean µm/px of level 0."""
        return (self.mpp_x + self.mpp_y) / 2

    @property
    def fallback(self) -> bool:
        """Whether the slide is read through another library instead of by byte ranges."""
        return self.container in ("openslide", "tiffslide")

    @property
    def codec(self) -> str:
        """The codec's name, for a table."""
        codec = self.levels[0].codec
        if codec.kind == "chunk":
            names = [str(f.get("id") or f.get("name")) for f in codec.filters]
            return "+".join(names) or "raw"
        return f"{codec.kind} {codec.colour}" if codec.kind.startswith("jpeg") else codec.kind

    @property
    def n_tiles(self) -> int:
        """Tiles of all levels together."""
        return sum(level.n_tiles for level in self.levels)

    @cached_property
    def object_starts(self) -> NDArray[np.int64]:
        """Address of each object's first byte, and the one past the last object; (0,) without objects."""
        return np.cumsum([0, *(item.size_bytes for item in self.objects)], dtype=np.int64)

    def object_key(self, number: int) -> str:
        """The URI of an object."""
        base = self.uri.rstrip("/")
        return f"{base.rpartition('/')[0] if self.beside else base}/{self.objects[number].name}"

    def locate(self, start: int, stop: int) -> tuple[str, int, int, str]:
        """Key, start, stop and token of the bytes start..stop of the slide, which lie in one object."""
        if not self.objects:
            return self.uri, start, stop, self.token
        number = int(np.searchsorted(self.object_starts, start, side="right")) - 1
        if not 0 <= number < len(self.objects) or stop > self.object_starts[number + 1]:
            raise CorpusError(f"{self.uri}: bytes {start:,}-{stop:,} lie in no object of the slide")
        base = int(self.object_starts[number])
        return self.object_key(number), start - base, stop - base, self.objects[number].token

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides pixels: not the URI, so that a copy has the same."""
        header = self._header()
        for name in ("uri", "token", "slide_id", "beside"):
            header.pop(name)
        header["objects"] = [size for _, size, _ in header["objects"]]
        hasher = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        for level in self.levels:
            if level.rows is not None:
                hasher.update(level.rows.astype("<u8").tobytes())
        return hasher.hexdigest()

    def with_mpp(self, mpp_x: float, mpp_y: float, source: str) -> SlideIndex:
        """The same slide with other µm/px."""
        levels = tuple(
            replace(lv, mpp_x=mpp_x * lv.downsample_x, mpp_y=mpp_y * lv.downsample_y)
            for lv in self.levels
        )
        return replace(self, mpp_x=mpp_x, mpp_y=mpp_y, mpp_source=source, levels=levels)

    def _header(self, keep_secrets: bool = False) -> dict[str, Any]:
        left_out = ("levels", "digest", "object_starts")
        fields = {k: v for k, v in self.__dict__.items() if k not in left_out}
        fields["objects"] = [astuple(item) for item in self.objects]
        fields["uri"] = self.uri if keep_secrets else redact(self.uri)
        fields["levels"] = [_level_to_json(level) for level in self.levels]
        return fields

    def to_bytes(self, keep_secrets: bool = False) -> tuple[bytes, NDArray[np.uint64]]:
        """The JSON header, and the tile rows of all levels one after another.

        Credentials and http(s) queries in the URI are left out unless the bytes stay in memory.
        """
        rows = [level.rows for level in self.levels if level.rows is not None]
        packed = np.concatenate(rows) if rows else np.empty(0, np.uint64)
        return json.dumps(self._header(keep_secrets)).encode(), packed.astype("<u8")

    @classmethod
    def from_bytes(cls, header: bytes, rows: NDArray[np.uint64]) -> SlideIndex:
        """The index whose `to_bytes` gave these; `rows` may be a view of a mapped file.

        Anything else raises CorpusError: sizes, scales and counts are checked, since whoever plans a
        read trusts them. Where tiles lie is checked when they are read.
        """
        try:
            fields = json.loads(header)
            levels, start = [], 0
            for entry in fields.pop("levels"):
                count = entry.pop("n_rows")
                if type(count) is not int or not 0 <= count <= len(rows) - start:
                    raise ValueError(f"a level names {count} tiles; {len(rows) - start} are left")
                found = rows[start : start + count] if count else None
                levels.append(_checked(_level_from_json(entry, found)))
                start += count
            if start != len(rows):
                raise ValueError(f"it names {start} tiles and holds {len(rows)}")
            fields["objects"] = tuple(SlideObject(*item) for item in fields["objects"])
            return cls(levels=tuple(levels), **fields)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MppError) as error:
            why = " ".join(str(error).split())[:200]  # a hostile name may hold line ends
            raise CorpusError(f"not a slide index ({type(error).__name__}: {why})") from None

    def save(self, path: str | Path) -> None:
        """Write the index atomically: magic, header length, JSON header, tile rows."""
        header, rows = self.to_bytes()
        atomic_write_bytes(
            path, INDEX_MAGIC + struct.pack("<Q", len(header)) + header + rows.tobytes()
        )

    @classmethod
    def load(cls, path: str | Path) -> SlideIndex:
        """Read what `save` wrote; anything else raises CorpusError."""
        try:
            data = Path(path).read_bytes()
            if data[:8] != INDEX_MAGIC:
                raise ValueError("it does not start as a slide index does")
            (length,) = struct.unpack("<Q", data[8:16])
            if length > min(_MAX_HEADER_BYTES, len(data) - 16):
                raise ValueError("its header is longer than the file")
            rows = np.frombuffer(data, "<u8", offset=16 + length)
            return cls.from_bytes(data[16 : 16 + length], rows)
        except (OSError, ValueError, struct.error, CorpusError) as error:
            raise CorpusError(
                f"{path}: not a readable slide index ({error}). Index the slide again."
            ) from None


def check_mpp(uri: str, mpp_x: float, mpp_y: float, source: str) -> None:
    """Refuse µm/px that no scanner makes, or that differ too much between the axes.

    µm/px that a person gave as two values (source MPP_OVERRIDE) may differ: each axis is resampled.
    """
    low, high = MPP_SANE_RANGE
    for mpp in (mpp_x, mpp_y):
        if not low <= mpp <= high:
            raise MppError(
                uri,
                f"{mpp:g} µm/px ({source}) is outside {low:g} to {high:g}. "
                "Give the right value in the µm/px override table.",
                "bad_mpp",
            )
    if source != MPP_OVERRIDE and abs(mpp_x - mpp_y) > MPP_AXES_TOLERANCE * max(mpp_x, mpp_y):
        raise MppError(
            uri,
            f"µm/px differ by axis: {mpp_x:g} and {mpp_y:g} ({source}), more than "
            f"{MPP_AXES_TOLERANCE:.0%}. Give the right value in the µm/px override table, or "
            "mpp=(x, y) if they do differ.",
            "bad_mpp",
        )


def _level_to_json(level: Level) -> dict[str, Any]:
    fields = {k: v for k, v in level.__dict__.items() if k not in ("rows", "codec", "keys")}
    fields["codec"] = level.codec.to_json()
    fields["keys"] = asdict(level.keys) if level.keys else None
    fields["n_rows"] = 0 if level.rows is None else len(level.rows)
    return fields


def _level_from_json(fields: dict[str, Any], rows: NDArray[np.uint64] | None) -> Level:
    keys = ChunkKeys(**fields["keys"]) if fields["keys"] else None
    overflow = tuple((int(a), int(b)) for a, b in fields["overflow"])
    codec = Codec.from_json(fields["codec"])
    return Level(**{**fields, "rows": rows, "keys": keys, "overflow": overflow, "codec": codec})


def _checked(level: Level) -> Level:
    """The level, unless it holds what no index of ours does."""
    sides = (level.width_px, level.height_px, level.tile_width_px, level.tile_height_px)
    scales = (level.downsample_x, level.downsample_y, level.mpp_x, level.mpp_y)
    if not all(type(n) is int and 0 < n < 2**31 for n in (*sides, level.parts)):
        raise ValueError(f"a level of sizes {sides} in {level.parts} parts")
    if not all(type(v) in (int, float) and 0 < v < 1e12 for v in scales):
        raise ValueError(f"a level of scales {scales}")
    codec = level.codec
    numbers = (codec.predictor, codec.samples, codec.fill, codec.reductions)
    if codec.kind not in CODEC_KINDS or not all(type(n) is int and 0 <= n < 2**16 for n in numbers):
        raise ValueError(f"a codec {codec.kind!r} of {numbers}")
    if level.rows is not None and len(level.rows) != level.n_tiles * level.parts:
        raise ValueError(f"{len(level.rows)} rows for {level.n_tiles} tiles cannot be right")
    return level
