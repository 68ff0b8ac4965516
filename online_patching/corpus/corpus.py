"""Many slides on disk, opened without reading them: fixed-size records, tile rows and masks.

A real slide has about 150,000 tiles, so the offsets of 10^6 slides are 1.2 TB: they stay in
memory-mapped files and a patch reads two short rows of them. A corpus folder holds

    slides/<slide_id>.index    one SlideIndex each (written by indexing)
    masks/<slide_id>.png       one ForegroundMask each (written by the foreground stage)
    corpus.json                which packed generation is current, and its digest
    packed/<generation>/       slides.bin, levels.bin, ... (records.py): what is mapped

`Corpus.build` packs the first two into the last two, one slide in memory at a time; corpus.json is
replaced last, atomically, so that a reader sees the old generation or the new one.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching import bitmaps
from online_patching.corpus.packing import FILES, LEFT_OUT, VERSION, Packer, pack_folder
from online_patching.corpus.paging import MappedFile, Paging
from online_patching.corpus.records import (
    KINDS,
    SLIDE_RECORD,
    Packed,
    check,
    read_codec,
    read_index,
    read_text,
)
from online_patching.errors import CorpusError, MaskError
from online_patching.mask import ForegroundMask
from online_patching.slide_index import Codec, SlideIndex

_BLOCK_ROWS = 32_768
_GRAIN_BYTES = {
    "slides": 0,
    "levels": 2**16,
    "codecs": 0,
    "text": 4096,
    "tiles": 4096,
    "masks": 4096,
}
"""See MappedFile. A sampler reads all slides when it is made, and draws soon touch every 64 KiB of levels."""


class Corpus:
    """Slides and their masks, by row number. Make one with `build`, `open` or `from_slides`.

    `records` (one SLIDE_RECORD a slide), `levels` (LEVEL_RECORD; row s has those from
    first_level[s] on) and `tiles` (packed tile rows) are read in place, from the mapped files:
    `corpus.records["mpp_x"][rows]` touches the pages of these rows and no others. They are checked
    when a row is first looked up by a method; a caller that takes rows from elsewhere calls
    `check(rows)` before it follows an offset.
    """

    def __init__(
        self,
        packed: Packed,
        digest: str,
        folder: Path | None = None,
        generation: Path | None = None,
        files: dict[str, MappedFile] | None = None,
    ) -> None:
        self.records, self.levels = packed.slides, packed.levels
        self._files = files or {}
        self._paging = Paging(self._files.values())
        self.tiles = TileRows(lambda: self._view("tiles"), self._asking("tiles"))
        self.digest, self.folder = digest, folder
        self.codecs: Sequence[Codec] = _Codecs(packed)
        self._packed, self._generation = packed, generation
        self._checked, self._counted = np.zeros((2, len(packed.slides)), bool)
        # Bounded: a row's SlideIndex holds views, but is made of parsed JSON.
        self.index = lru_cache(maxsize=512)(self._index)
        self.mask = lru_cache(maxsize=512)(self._mask)

    @classmethod
    def from_slides(cls, indexes: Sequence[SlideIndex], masks: Sequence[ForegroundMask]) -> Corpus:
        """A corpus in memory, URIs with their secrets. Masks must belong to the slides, in order."""
        if len(indexes) != len(masks) or not indexes:
            raise CorpusError(f"{len(indexes)} slides and {len(masks)} masks do not make a corpus")
        sinks = {name: io.BytesIO() for name in KINDS}
        packer = Packer(sinks, keep_secrets=True)
        for index, mask in zip(indexes, masks, strict=True):
            packer.add(index, mask)
        packer.finish()
        arrays = (_array(sinks[name].getbuffer(), kind) for name, kind in KINDS.items())
        return cls(Packed(*arrays), packer.digest)

    @classmethod
    def build(cls, folder: str | Path) -> Corpus:
        """Pack a folder's slide indexes and masks, and open the result.

        Slides without a mask, with an empty or foreign one, or with a damaged index are left out;
        `left_out` lists them with the reason. CorpusError when nothing is left. Memory: one slide,
        and the names of the index files.
        """
        root = Path(folder)
        pack_folder(root)
        return cls.open(root)

    @classmethod
    def open(cls, folder: str | Path) -> Corpus:
        """Map a packed corpus; CorpusError when it is missing, half-written or of another version.

        Reads nothing but corpus.json, whatever the number of slides.
        """
        root = Path(folder)
        try:
            about = json.loads((root / "corpus.json").read_text())
            if about["version"] != VERSION:
                raise ValueError(f"its version is {about['version']}, this code reads {VERSION}")
            if not re.fullmatch("[0-9a-f]{32}", about["generation"]):
                raise ValueError("the generation it names is none")
            packed = root / "packed" / about["generation"]
            files = {
                name: MappedFile(
                    packed / FILES[name], kind, about["bytes"][name], _GRAIN_BYTES[name]
                )
                for name, kind in KINDS.items()
            }
            arrays = Packed(*(file.array for file in files.values()))
            if len(arrays.slides) != about["slides"] or not len(arrays.slides):
                raise ValueError("it does not hold as many slides as corpus.json says")
            digest = str(about["digest"])
        except FileNotFoundError as error:
            raise CorpusError(
                f"{root}: no packed corpus there ({Path(str(error.filename)).name} is missing). "
                "Run `pathfm index` and `pathfm foreground` first."
            ) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorpusError(
                f"{root}: corpus.json cannot be used ({error}). Run `pathfm foreground` again."
            ) from None
        return cls(arrays, digest, root, packed, files)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def slide_ids(self) -> list[str]:
        """Slide ids by row; reads every record, so meant for tables, not for loops over draws."""
        return [self.slide_id(row) for row in range(len(self))]

    @cached_property
    def left_out(self) -> list[tuple[str, str]]:
        """Slides that `build` could not use, each with the reason."""
        if self._generation is None:
            return []
        try:
            pairs = json.loads((self._generation / LEFT_OUT).read_text())
            return [(str(name), str(reason)) for name, reason in pairs]
        except (OSError, ValueError, TypeError) as error:
            raise CorpusError(
                f"{self.folder}: {LEFT_OUT} cannot be read ({error}). Run `pathfm foreground` again."
            ) from None

    def slide_id(self, row: int) -> str:
        """The slide id of a row."""
        return self._text(row, 0)

    def uri(self, row: int) -> str:
        """Where the bytes of a row's slide are."""
        return self._text(row, 1)

    def token(self, row: int) -> str:
        """What tells whether the bytes of a row's slide are still the indexed ones."""
        return self._text(row, 2)

    def blocks(self, rows: int = _BLOCK_ROWS) -> Iterator[tuple[int, NDArray[np.void]]]:
        """All records, as (first row, records), a block at a time: for what must see every slide.

        On disk they are read into one buffer that is used again, so keep no views; columns of all
        of `records` would leave the whole file mapped into every process instead.
        """
        if self._generation is None:
            yield from ((i, self.records[i : i + rows]) for i in range(0, len(self), rows))
            return
        buffer = np.empty(min(rows, len(self)), SLIDE_RECORD)
        try:
            with open(self._generation / FILES["slides"], "rb") as file:
                for start in range(0, len(self), rows):
                    block = buffer[: len(self) - start]
                    if file.readinto(block.view(np.uint8).data) != block.nbytes:
                        raise CorpusError(f"{self.folder}: slides.bin shrank while it was read.")
                    yield start, block
        except OSError as error:
            raise CorpusError(f"{self.folder}: slides.bin cannot be read ({error}).") from None

    def check(self, rows: ArrayLike) -> None:
        """CorpusError unless the records of these rows can be followed: once a row, then free."""
        asked = np.atleast_1d(np.asarray(rows, np.int64))
        if asked.size and not 0 <= int(asked.min()) <= int(asked.max()) < len(self):
            raise CorpusError(f"the corpus has rows 0 to {len(self) - 1}, not {asked.tolist()[:5]}")
        new = asked[~self._checked[asked]]
        if len(new):
            found, size = self.records[new], self.levels.itemsize
            self._asking("levels")(found["first_level"] * size, found["n_levels"] * size)
            check(self._packed, new)
            self._checked[new] = True

    def tissue_points(
        self, rows: ArrayLike, cells: ArrayLike, u: ArrayLike, v: ArrayLike
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """`ForegroundMask.tissue_point` of many draws, of any slides: level-0 x and y, float64.

        Arrays of one length. The same bits as one call a draw. CorpusError for a cell that a mask
        does not have.
        """
        row = np.asarray(rows, np.int64)
        at = self._bitmaps(row)
        ask = self._asking("masks")
        fresh = np.flatnonzero(~self._counted[row])
        ask(8 * at.counts[fresh], 8 * at.height[fresh])
        self._counted[row] = True
        masks = self._view("masks")
        counts = masks[: len(masks) // 8 * 8].view("<i8")
        cell = np.asarray(cells, np.int64)
        point = np.asarray(u, np.float64), np.asarray(v, np.float64)
        try:
            return bitmaps.tissue_points(counts, masks, at, cell, *point, ask)
        except MaskError as error:
            raise CorpusError(f"{self.folder or 'a corpus in memory'}: {error}") from None

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
        x, y, w, h = (np.asarray(value, np.float64) for value in (x_px0, y_px0, w_px0, h_px0))
        ask = self._asking("masks")
        return bitmaps.tissue_fractions(self._view("masks"), at, x, y, w, h, ask)

    def _view(self, name: str) -> NDArray[Any]:
        """An array to look things up in, here and there."""
        file = self._files.get(name)
        return getattr(self._packed, name) if file is None else file.view()

    def _asking(self, name: str) -> bitmaps.Ask:
        """Has pages of a file read before a look-up needs them, where that pays."""
        file = self._files.get(name)
        if file is None:
            return bitmaps.nobody

        def ask(start: NDArray[np.int64], n_bytes: Any) -> None:
            file.will_look(len(start))
            if self._paging.pays(len(start)):
                file.ask(start, n_bytes)

        return ask

    def _bitmaps(self, rows: NDArray[np.int64]) -> bitmaps.Bitmaps:
        self.check(rows)
        found = self.records[rows]
        width, height = (found[name].astype(np.int64) for name in ("mask_width", "mask_height"))
        offset = found["mask_offset"]
        size = found["width_px0"], found["height_px0"]
        return bitmaps.Bitmaps(offset >> 3, offset + 8 * (height + 1), width, height, *size)

    def _text(self, row: int, which: int) -> str:
        self._check_one(row)
        return read_text(self._packed, row, which)

    def _check_one(self, row: int) -> None:
        if not (0 <= row < len(self) and self._checked[row]):
            self.check(row)

    def _index(self, row: int) -> SlideIndex:
        """The SlideIndex of a row; its tile rows are views of the mapped file."""
        self._check_one(row)
        return read_index(self._packed, self.codecs, row)

    def _mask(self, row: int) -> ForegroundMask:
        """The mask of a row, as views of the mapped file."""
        self._check_one(row)
        record = self.records[row]
        start, height, width = (
            int(record[k]) for k in ("mask_offset", "mask_height", "mask_width")
        )
        bits = start + 8 * (height + 1)
        row_start = self._packed.masks[start:bits].view("<i8")
        packed = self._packed.masks[bits : bits + height * -(-width // 8)].reshape(height, -1)
        size = (int(record["width_px0"]), int(record["height_px0"]))
        return ForegroundMask(
            packed, row_start, width, size, (float(record["mpp_x"]), float(record["mpp_y"]))
        )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folder is not None:
            return (_reopen, (self.folder, self.digest))
        return (Corpus, (self._packed, self.digest))


class TileRows:
    """The tile rows of all slides, by position: give arrays of positions, get uint64 rows."""

    def __init__(self, view: Callable[[], NDArray[np.uint64]], ask: bitmaps.Ask) -> None:
        self._view, self._ask = view, ask

    def __len__(self) -> int:
        return len(self._view())

    def __getitem__(self, where: Any) -> Any:
        """Rows at a position, at many, or of a slice (a view)."""
        if isinstance(where, np.ndarray) and where.dtype.kind == "i":
            self._ask(where.ravel() * 8, 8)
        return self._view()[where]


class _Codecs(Sequence[Codec]):
    """The distinct codecs of a corpus by number, each parsed when it is first asked for."""

    def __init__(self, packed: Packed) -> None:
        self._packed = packed
        self._codec = lru_cache(maxsize=4096)(lambda number: read_codec(packed, number))

    def __len__(self) -> int:
        return len(self._packed.codecs)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return tuple(self[i] for i in range(*number.indices(len(self))))
        return self._codec(range(len(self))[number])


def _reopen(folder: Path, digest: str) -> Corpus:
    corpus = Corpus.open(folder)
    if corpus.digest != digest:
        raise CorpusError(
            f"{folder}: was rebuilt meanwhile ({digest[:12]} is now {corpus.digest[:12]})."
        )
    return corpus


def _array(data: memoryview, kind: np.dtype[Any]) -> NDArray[Any]:
    array = np.frombuffer(data, kind) if len(data) else np.empty(0, kind)
    array.flags.writeable = False
    return array
