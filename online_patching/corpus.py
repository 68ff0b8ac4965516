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
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching.errors import CorpusError, PatchingError
from online_patching.mask import QUANTILE_SIDES_UM, ForegroundMask
from online_patching.slide_index import SlideIndex
from online_patching.stores import atomic_write_bytes, atomic_write_text

SLIDE_RECORD = np.dtype(
    [
        ("width_px0", "<i8"), ("height_px0", "<i8"), ("mpp_x", "<f8"), ("mpp_y", "<f8"),
        ("header_offset", "<i8"), ("header_bytes", "<i8"), ("first_tile", "<i8"), ("n_tiles", "<i8"),
        ("mask_offset", "<i8"), ("mask_width", "<i4"), ("mask_height", "<i4"), ("tissue_cells", "<i8"),
        ("rich_fractions", "<f4", (len(QUANTILE_SIDES_UM),)),
    ]
)  # fmt: skip
"""One slide: what a draw needs, and where the rest lies. 152 bytes."""

_VERSION = 1
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
        self._headers, self._tiles, self._masks = headers, tiles, masks
        # Bounded: a row's SlideIndex holds views, but its header is parsed JSON.
        self.index = lru_cache(maxsize=512)(self._index)
        self.mask = lru_cache(maxsize=512)(self._mask)

    @classmethod
    def from_slides(cls, indexes: Sequence[SlideIndex], masks: Sequence[ForegroundMask]) -> Corpus:
        """A corpus in memory. Masks must belong to the slides, in the same order."""
        if len(indexes) != len(masks) or not indexes:
            raise CorpusError(f"{len(indexes)} slides and {len(masks)} masks do not make a corpus")
        records = np.zeros(len(indexes), SLIDE_RECORD)
        headers, tiles, bitmaps = bytearray(), [], bytearray()
        n_tiles, hasher = 0, hashlib.sha256()
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
            record["mask_offset"] = len(bitmaps)
            headers += header
            tiles.append(rows)
            n_tiles += len(rows)
            bitmaps += mask.row_start.astype("<i8").tobytes() + mask.packed.tobytes()
            bitmaps += bytes(-len(bitmaps) % 8)  # row counts are read as aligned 64-bit words
            hasher.update(f"{index.slide_id} {index.digest} {mask.digest}\n".encode())
        return cls(
            records,
            np.frombuffer(bytes(headers), np.uint8),
            np.concatenate(tiles),
            np.frombuffer(bytes(bitmaps), np.uint8),
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

    def _index(self, row: int) -> SlideIndex:
        """The SlideIndex of a row; its tile rows are views of the mapped file."""
        record = self.records[row]
        start, first = int(record["header_offset"]), int(record["first_tile"])
        header = self._headers[start : start + int(record["header_bytes"])].tobytes()
        return SlideIndex.from_bytes(header, self._tiles[first : first + int(record["n_tiles"])])

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
        arrays: tuple[NDArray[Any], ...] = (self.records, self._headers, self._tiles, self._masks)
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
            self._tiles,
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
