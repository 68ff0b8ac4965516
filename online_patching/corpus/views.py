"""Some rows of a corpus, each with a mask of its own: the same slide may be there several times.

What a region of a slide is to a sampler: a slide whose tissue is the region. Slides, levels and tile
rows are the corpus's own, in place; a view adds a record and a mask a row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from online_patching.bitmaps import PADDING_BYTES
from online_patching.corpus.corpus import Corpus
from online_patching.corpus.records import Packed
from online_patching.errors import CorpusError
from online_patching.mask import ForegroundMask


class CorpusView(Corpus):
    """Row i is slide `rows[i]` of `base` with the i-th mask. Masks stay in memory, as bits.

    A sampler of it draws rows of the view; `rows` says which slides of `base` they are, and patches
    are read from `base` (BalancedSampler does). CorpusError for a mask of another slide, an empty
    one, or none at all.
    """

    def __init__(self, base: Corpus, rows: ArrayLike, masks: Iterable[ForegroundMask]) -> None:
        numbers = np.atleast_1d(np.asarray(rows, np.int64))
        base.check(numbers)
        records, bits, digest = base.records[numbers].copy(), bytearray(), hashlib.sha256()
        digest.update(f"{base.digest} {numbers.tolist()}".encode())
        given = 0
        for mask in masks:
            if given < len(numbers):
                _put(records[given], bits, mask, base.slide_id(int(numbers[given])))
            digest.update(mask.digest.encode())
            given += 1
        if given != len(numbers) or not given:
            raise CorpusError(f"{len(numbers)} rows and {given} masks do not make a view")
        bits += bytes(PADDING_BYTES)
        self._open(base, numbers, records, np.frombuffer(bytes(bits), np.uint8), digest.hexdigest())

    def _open(
        self,
        base: Corpus,
        rows: NDArray[np.int64],
        records: NDArray[np.void],
        masks: NDArray[np.uint8],
        digest: str,
    ) -> None:
        records.flags.writeable = False
        self.base, self.rows, self.masks = base, rows, masks
        files = {k: v for k, v in base._files.items() if k not in ("slides", "masks")}
        packed: Packed = base._packed._replace(slides=records, masks=masks)
        super().__init__(packed, digest, files=files)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_view, (self.base, self.rows, self.records, self.masks, self.digest))


def _view(base: Corpus, *arrays: Any) -> CorpusView:
    view = CorpusView.__new__(CorpusView)
    view._open(base, *arrays)
    return view


def _put(record: np.void, bits: bytearray, mask: ForegroundMask, slide_id: str) -> None:
    """Appends a mask to `bits` as packing.py does, and points the record at it."""
    size = int(record["width_px0"]), int(record["height_px0"])
    if mask.size_px0 != size:
        raise CorpusError(
            f"{slide_id}: a mask is for a slide of {mask.size_px0} px, the slide has {size}"
        )
    if not mask.tissue_cells:
        raise CorpusError(f"{slide_id}: a mask of it is empty. Leave its row out.")
    record["mask_offset"] = len(bits)
    record["mask_width"], record["mask_height"] = mask.width, mask.height
    record["tissue_cells"] = mask.tissue_cells
    record["rich_fractions"] = mask.rich_box_fractions()
    bits += mask.row_start.astype("<i8").tobytes() + mask.packed.tobytes()
    bits += bytes(-len(bits) % 8)  # row counts are aligned 64-bit words
