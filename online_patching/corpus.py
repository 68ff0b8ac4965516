"""Many slides on disk, opened without reading them: fixed-size records, tile rows and masks.

A real slide has about 150,000 tiles, so the offsets of 10^5 slides are 200 GB: they stay in
memory-mapped files and a patch reads two short rows of them. A corpus folder holds

    slides/<slide_id>.index    one SlideIndex each (written by indexing)
    masks/<slide_id>.png       one ForegroundMask each (written by the foreground stage)
    corpus.json                which packed generation is current, and its digest
    packed/<generation>/       slides.bin, headers.bin, tiles.bin, masks.bin: what is mapped

`Corpus.build` packs the first two into the last two; corpus.json is replaced last, atomically, so
that a reader sees the old generation or the new one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching import bitmaps
from online_patching.bitmaps import PADDING_BYTES
from online_patching.errors import CorpusError, PatchingError
from online_patching.mask import QUANTILE_SIDES_UM, ForegroundMask
from online_patching.slide_index import Codec, SlideIndex
from online_patching.stores import atomic_write_bytes, atomic_write_text, is_remote

SLIDE_RECORD = np.dtype(
    [
        ("width_px0", "<i8"), ("height_px0", "<i8"), ("mpp_x", "<f8"), ("mpp_y", "<f8"),
        ("header_offset", "<i8"), ("header_bytes", "<i8"), ("first_tile", "<i8"), ("n_tiles", "<i8"),
        ("mask_offset", "<i8"), ("mask_width", "<i4"), ("mask_height", "<i4"), ("tissue_cells", "<i8"),
        ("rich_fractions", "<f4", (len(QUANTILE_SIDES_UM),)),
        ("first_level", "<i8"), ("n_levels", "<i4"), ("reader", "<i4"),
        ("size_bytes", "<i8"), ("mtime_ns", "<i8"),
    ]
)  # fmt: skip
"""One slide: what a draw needs, and where the rest lies."""

LEVEL_RECORD = np.dtype(
    [
        ("width_px", "<i8"), ("height_px", "<i8"), ("tile_width_px", "<i4"), ("tile_height_px", "<i4"),
        ("columns", "<i8"), ("downsample_x", "<f8"), ("downsample_y", "<f8"), ("mpp", "<f8"),
        ("first_tile", "<i8"), ("codec", "<i4"), ("parts", "<i4"),
    ]
)  # fmt: skip
"""One level of a slide, in the order of its index."""

READERS = ("ranges", "chunks", "fallback")
"""What `records["reader"]` counts: byte ranges of one object, Zarr chunks, another library."""

_VERSION = 2
_FILES = ("slides.bin", "headers.bin", "tiles.bin", "masks.bin")


class Corpus:
    """Slides and their masks, by row number. Make one with `build`, `open` or `from_slides`."""

    def __init__(
        self,
        records: NDArray[np.void],
        headers: NDArray[np.uint8],
        tiles: NDArray[np.uint64],
        masks: NDArray[np.uint8],
        digest: str,
        folder: Path | None = None,
        left_out: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.records, self.digest, self.folder = records, digest, folder
        self.left_out = [tuple(pair) for pair in left_out]
        self._headers, self.tiles, self._masks = headers, tiles, masks
        self._counts = masks[: len(masks) // 8 * 8].view("<i8")
        # Bounded: a row's SlideIndex holds views, but its header is parsed JSON.
        self.index = lru_cache(maxsize=512)(self._index)
        self.mask = lru_cache(maxsize=512)(self._mask)

    @classmethod
    def from_slides(cls, indexes: Sequence[SlideIndex], masks: Sequence[ForegroundMask]) -> Corpus:
        """A corpus in memory. Masks must belong to the slides, in the same order."""
        if len(indexes) != len(masks) or not indexes:
            raise CorpusError(f"{len(indexes)} slides and {len(masks)} masks do not make a corpus")
        records = np.zeros(len(indexes), SLIDE_RECORD)
        headers, tiles, bits = bytearray(), [], bytearray()
        n_tiles, n_levels, hasher = 0, 0, hashlib.sha256()
        for record, index, mask in zip(records, indexes, masks, strict=True):
            if mask.size_px0 != index.dimensions:
                raise CorpusError(
                    f"{index.slide_id}: its mask is for a slide of {mask.size_px0} px, "
                    f"the slide has {index.dimensions}. Make the masks again."
                )
            header, rows = index.to_bytes(keep_secrets=True)  # saved indexes hold none to keep
            _fill_record(record, index, mask)
            record["header_offset"], record["header_bytes"] = len(headers), len(header)
            record["first_tile"], record["n_tiles"] = n_tiles, len(rows)
            record["mask_offset"] = len(bits)
            headers += header
            tiles.append(rows)
            n_tiles += len(rows)
            bits += mask.row_start.astype("<i8").tobytes() + mask.packed.tobytes()
            bits += bytes(-len(bits) % 8)  # row counts are read as aligned 64-bit words
            record["first_level"], n_levels = n_levels, n_levels + len(index.levels)
            hasher.update(f"{index.slide_id} {index.digest} {mask.digest}\n".encode())
        bits += bytes(PADDING_BYTES)
        return cls(
            records,
            np.frombuffer(bytes(headers), np.uint8),
            np.concatenate(tiles),
            np.frombuffer(bytes(bits), np.uint8),
            hasher.hexdigest(),
        )

    @classmethod
    def build(cls, folder: str | Path) -> Corpus:
        """Pack a folder's slide indexes and masks, and open the result.

        Slides without a mask, with an empty or foreign one, or with a damaged index are left out;
        `left_out` lists them with the reason. CorpusError when nothing is left.
        """
        root = Path(folder)
        indexes, masks, left_out = [], [], []
        for path in sorted((root / "slides").glob("*.index")):
            try:
                index = SlideIndex.load(path)
                mask = ForegroundMask.load(root / "masks" / f"{path.stem}.png")
                reason = _unusable(index, mask)
            except PatchingError as error:
                reason = str(error)
            if reason:
                left_out.append((path.stem, reason))
            else:
                indexes.append(index)
                masks.append(mask)
        if not indexes:
            reasons = (
                "; ".join(f"{name}: {why}" for name, why in left_out[:3])
                or "there are no slide indexes"
            )
            raise CorpusError(f"{root}: no slide can be used ({reasons}).")
        corpus = cls.from_slides(indexes, masks)
        corpus._write(root, left_out)
        return cls.open(root)

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Map a packed corpus; CorpusError when it is missing, half-written or of another version."""
        root = Path(folder)
        try:
            about = json.loads((root / "corpus.json").read_text())
            packed = root / "packed" / about["generation"]
            if about["version"] != _VERSION:
                raise ValueError(f"its version is {about['version']}, this code reads {_VERSION}")
            for name in _FILES:
                if (packed / name).stat().st_size != about["bytes"][name]:
                    raise ValueError(f"{name} is not as large as corpus.json says")
            maps = [
                _map(packed / name, kind)
                for name, kind in zip(_FILES, (SLIDE_RECORD, "u1", "<u8", "u1"), strict=True)
            ]
        except FileNotFoundError as error:
            raise CorpusError(
                f"{root}: no packed corpus there ({Path(str(error.filename)).name} is missing). "
                "Run `pathfm index` and `pathfm foreground` first."
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorpusError(
                f"{root}: corpus.json cannot be used ({error}). Run `pathfm foreground` again."
            ) from None
        records, headers, tiles, masks = maps
        return cls(records, headers, tiles, masks, about["digest"], root, about["left_out"])

    def __len__(self) -> int:
        return len(self.records)

    @property
    def slide_ids(self) -> list[str]:
        """Slide ids by row; reads every header, so meant for tables, not for loops over draws."""
        return [self.index(i).slide_id for i in range(len(self))]

    def slide_id(self, row: int) -> str:
        """The slide id of a row."""
        return str(self.index(row).slide_id)

    def uri(self, row: int) -> str:
        """Where the bytes of a row's slide are."""
        return str(self.index(row).uri)

    def token(self, row: int) -> str:
        """What tells whether the bytes of a row's slide are still the indexed ones."""
        return str(self.index(row).token)

    @property
    def levels(self) -> NDArray[np.void]:
        """One LEVEL_RECORD a level: row s has those from first_level[s] on."""
        return self._tables[0]

    @property
    def codecs(self) -> tuple[Codec, ...]:
        """What `levels["codec"]` counts."""
        return self._tables[1]

    def tissue_points(
        self, rows: ArrayLike, cells: ArrayLike, u: ArrayLike, v: ArrayLike
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`ForegroundMask.tissue_point` of many draws, of any slides: level-0 x and y, float64.

        Arrays of one length. The same bits as one call a draw.
        """
        at = self._bitmaps(np.asarray(rows, np.int64))
        cell = np.asarray(cells, np.int64)
        return bitmaps.tissue_points(
            self._counts, self._masks, at, cell, np.asarray(u, float), np.asarray(v, float)
        )

    def tissue_fractions(
        self,
        rows: ArrayLike,
        x_px0: ArrayLike,
        y_px0: ArrayLike,
        w_px0: ArrayLike,
        h_px0: ArrayLike,
    ) -> NDArray[np.float64]:
        """`ForegroundMask.fraction` of many boxes, on any slides, as float64.

        Arrays of one length. The same bits as one call a box.
        """
        at = self._bitmaps(np.asarray(rows, np.int64))
        box = (np.asarray(values, np.float64) for values in (x_px0, y_px0, w_px0, h_px0))
        return bitmaps.tissue_fractions(self._masks, at, *box)

    def _bitmaps(self, rows: NDArray[np.int64]) -> bitmaps.Bitmaps:
        found = self.records[rows]
        width, height, offset = (
            found[name].astype(np.int64) for name in ("mask_width", "mask_height", "mask_offset")
        )
        return bitmaps.Bitmaps(
            offset >> 3,
            offset + 8 * (height + 1),
            width,
            height,
            found["width_px0"],
            found["height_px0"],
        )

    @cached_property
    def _tables(self) -> tuple[NDArray[np.void], tuple[Codec, ...]]:
        rows: list[tuple[Any, ...]] = []
        codecs: dict[str, tuple[int, Codec]] = {}
        for record, row in zip(self.records, range(len(self)), strict=True):
            tile = int(record["first_tile"])
            for level in self.index(row).levels:
                key = json.dumps(level.codec.to_json(), sort_keys=True)
                number, _ = codecs.setdefault(key, (len(codecs), level.codec))
                first = -1 if level.rows is None else tile
                tile += 0 if level.rows is None else len(level.rows)
                rows.append(
                    (level.width_px, level.height_px, level.tile_width_px, level.tile_height_px,
                     level.columns, level.downsample_x, level.downsample_y, level.mpp, first,
                     number, level.parts)
                )  # fmt: skip
        return np.array(rows, LEVEL_RECORD), tuple(codec for _, codec in codecs.values())

    def _index(self, row: int) -> SlideIndex:
        """The SlideIndex of a row; its tile rows are views of the mapped file."""
        record = self.records[row]
        start, first = int(record["header_offset"]), int(record["first_tile"])
        header = self._headers[start : start + int(record["header_bytes"])].tobytes()
        return SlideIndex.from_bytes(header, self.tiles[first : first + int(record["n_tiles"])])

    def _mask(self, row: int) -> ForegroundMask:
        """The mask of a row, as views of the mapped file."""
        record = self.records[row]
        start, height, width = (
            int(record[k]) for k in ("mask_offset", "mask_height", "mask_width")
        )
        bits = start + 8 * (height + 1)
        row_start = self._masks[start:bits].view("<i8")
        packed = self._masks[bits : bits + height * -(-width // 8)].reshape(height, -1)
        size = (int(record["width_px0"]), int(record["height_px0"]))
        return ForegroundMask(
            packed, row_start, width, size, (float(record["mpp_x"]), float(record["mpp_y"]))
        )

    def _write(self, root: Path, left_out: list[tuple[str, str]]) -> None:
        arrays: tuple[NDArray[Any], ...] = (self.records, self._headers, self.tiles, self._masks)
        # Not the digest: a copy of the slides elsewhere has the same one, and other URIs.
        names = self.digest.encode() + self.records.tobytes() + self._headers.tobytes()
        generation = hashlib.sha256(names).hexdigest()[:32]
        folder = root / "packed" / generation
        keep = {generation, _current_generation(root)}  # somebody may be opening the current one
        sizes = {}
        for name, array in zip(_FILES, arrays, strict=True):
            atomic_write_bytes(folder / name, array.tobytes())
            sizes[name] = array.nbytes
        about = {
            "version": _VERSION,
            "digest": self.digest,
            "generation": generation,
            "slides": len(self),
            "bytes": sizes,
            "left_out": left_out,
        }
        atomic_write_text(root / "corpus.json", json.dumps(about, indent=1))
        for old in (root / "packed").iterdir():
            if old.name not in keep:
                shutil.rmtree(old, ignore_errors=True)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is not None:
            return (_reopen, (self.folder, self.digest))
        fields = (
            self.records,
            self._headers,
            self.tiles,
            self._masks,
            self.digest,
            None,
            self.left_out,
        )
        return (Corpus, fields)


def _current_generation(root: Path) -> str:
    try:
        return str(json.loads((root / "corpus.json").read_text())["generation"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _reopen(folder: Path, digest: str) -> Corpus:
    corpus = Corpus.open(folder)
    if corpus.digest != digest:
        raise CorpusError(
            f"{folder}: was rebuilt meanwhile ({digest[:12]} is now {corpus.digest[:12]})."
        )
    return corpus


def _fill_record(record: np.void, index: SlideIndex, mask: ForegroundMask) -> None:
    record["width_px0"], record["height_px0"] = index.dimensions
    record["mpp_x"], record["mpp_y"] = index.mpp_x, index.mpp_y
    record["mask_width"], record["mask_height"] = mask.width, mask.height
    record["tissue_cells"] = mask.tissue_cells
    record["rich_fractions"] = mask.rich_box_fractions()
    record["n_levels"], record["size_bytes"] = len(index.levels), index.size_bytes
    record["mtime_ns"] = _mtime_ns(index)
    record["reader"] = 2 if index.fallback else int(index.levels[0].keys is not None)


def _mtime_ns(index: SlideIndex) -> int:
    """When a local file was last written, as its token says; 0 for anything else."""
    size, _, mtime_ns = index.token.partition("-")
    local = not is_remote(index.uri) and size == str(index.size_bytes) and mtime_ns.isdigit()
    return int(mtime_ns) if local and len(mtime_ns) <= 19 else 0


def _unusable(index: SlideIndex, mask: ForegroundMask) -> str:
    if mask.size_px0 != index.dimensions:
        return f"its mask is for a slide of {mask.size_px0} px, not {index.dimensions}"
    same_mpp = np.allclose(mask.mpp_px0, (index.mpp_x, index.mpp_y))
    if not same_mpp:
        return (
            f"its mask was made at {mask.mpp_px0} µm/px, the slide has {(index.mpp_x, index.mpp_y)}"
        )
    return "" if mask.tissue_cells else "its mask is empty: no tissue was found"


def _map(path: Path, kind: Any) -> NDArray[Any]:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, kind)
    return np.memmap(path, dtype=kind, mode="r")
