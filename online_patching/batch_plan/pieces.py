"""Where the stored pieces of tiles lie: which object, which bytes. For many pieces of many slides at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from online_patching.batch_plan.tables import FILE, WHOLE
from online_patching.corpus import Corpus
from online_patching.corpus.records import READERS, mtime_of
from online_patching.errors import CorpusError
from online_patching.slide_index import SlideIndex

Ints = NDArray[np.int64]

CHUNKS = READERS.index("chunks")
FALLBACK = READERS.index("fallback")

_LENGTH = np.uint64(2**24 - 1)


@dataclass(frozen=True, eq=False)
class Pieces:
    """Byte range of each piece within file number `file`; -1 for a piece that may lie nowhere.

    `keys` and `tokens` are the URIs and version tokens of the files, `files` their records.
    """

    start: Ints
    length: Ints
    file: Ints
    files: NDArray[np.void]
    keys: tuple[str, ...]
    tokens: tuple[str, ...]


def locate(corpus: Corpus, slide: Ints, level: Ints, tile: Ints, part: Ints) -> Pieces:
    """Where part `part` of tile `tile` of a level (a row of corpus.levels) lies, one a row."""
    records = corpus.records
    rows, file = np.unique(slide, return_inverse=True)
    own = records[rows]
    chunked = own["reader"] == CHUNKS
    start, length = _ranges(
        corpus, slide, level, tile * corpus.levels["parts"][level] + part, chunked[file]
    )
    found = _Files(
        [corpus.uri(row) for row in rows.tolist()],
        [corpus.token(row) for row in rows.tolist()],
        np.stack([own["size_bytes"], own["mtime_ns"], np.zeros_like(own["mtime_ns"])], 1).tolist(),
    )
    for number in np.flatnonzero(chunked | (own["n_objects"] > 0)).tolist():
        mine = np.flatnonzero(file == number)
        index = corpus.index(int(rows[number]))
        if chunked[number]:
            at = level[mine] - own["first_level"][number]
            file[mine] = found.chunks(index, at, tile[mine], part[mine])
        else:
            file[mine], start[mine] = found.objects(index, start[mine], length[mine])
    files = np.zeros(len(found.keys), FILE)
    stamps = np.asarray(found.stamps, np.int64).reshape(-1, 3).T
    files["size_bytes"], files["mtime_ns"], files["base"] = stamps
    files["fd"] = -1
    return Pieces(start, length, file, files, tuple(found.keys), tuple(found.tokens))


class _Files:
    """The objects that pieces lie in; grows by those of slides that lie in several."""

    def __init__(self, keys: list[str], tokens: list[str], stamps: list[list[int]]) -> None:
        self.keys, self.tokens, self.stamps = keys, tokens, stamps

    def chunks(self, index: SlideIndex, level: Ints, tile: Ints, part: Ints) -> Ints:
        """A file for each chunk of a Zarr array."""
        first = len(self.keys)
        for lv, number, channel in zip(level.tolist(), tile.tolist(), part.tolist(), strict=True):
            found = index.levels[lv]
            assert found.keys is not None
            row, column = divmod(number, found.columns)
            name = found.keys.key(row, column, channel)
            self.keys.append(f"{index.uri.rstrip('/')}/{name}")
            self.stamps.append([0, 0, (lv << 48) + number * found.parts + channel])
        self.tokens += [""] * len(level)
        return np.arange(first, first + len(level))

    def objects(self, index: SlideIndex, address: Ints, length: Ints) -> tuple[Ints, Ints]:
        """Number of the file of each piece of a slide of several objects, and where it begins there."""
        edges = index.object_starts
        number = np.searchsorted(edges, address, side="right") - 1
        stored = length > 0
        inside = (number < len(index.objects)) & (number >= 0)
        inside &= address + length <= edges[np.minimum(number + 1, len(edges) - 1)]
        if not inside[stored].all():
            raise CorpusError(
                f"{index.slide_id}: a tile of its index lies in no object of the slide"
            )
        used, at = np.unique(number[stored], return_inverse=True)
        file = np.full(len(address), -1, np.int64)
        file[stored] = len(self.keys) + at
        for one in used.tolist():
            item = index.objects[one]
            self.keys.append(index.object_key(one))
            self.tokens.append(item.token)
            mtime_ns = mtime_of(item.token, item.size_bytes)
            self.stamps.append([item.size_bytes, mtime_ns, int(edges[one])])
        return file, np.where(stored, address - edges[np.where(stored, number, 0)], 0)


def _ranges(
    corpus: Corpus, slide: Ints, level: Ints, piece: Ints, chunked: NDArray[np.bool_]
) -> tuple[Ints, Ints]:
    """Address and length of pieces; the few that do not fit into a packed row are looked up one by one."""
    if chunked.any():
        start, length = np.zeros(len(piece), np.int64), np.full(len(piece), WHOLE, np.int64)
        rest = np.flatnonzero(~chunked)
        start[rest], length[rest] = _ranges(
            corpus, slide[rest], level[rest], piece[rest], chunked[rest]
        )
        return start, length
    row = corpus.tiles[corpus.levels["first_tile"][level] + piece]
    start = (row >> np.uint64(24)).astype(np.int64)
    length = (row & _LENGTH).astype(np.int64)
    for i in np.flatnonzero(length == int(_LENGTH)):
        own = level[i] - corpus.records["first_level"][slide[i]]
        begin, stop = corpus.index(int(slide[i])).levels[int(own)].byte_range(int(piece[i]))
        start[i], length[i] = begin, stop - begin
    return start, length
