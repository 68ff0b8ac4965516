"""Packed corpora of any number of slides of 150,000 tiles, written without any slide.

What is real: every record, every level, every string, and `MASKS` masks of full size (slides share
them when there are more slides). What is not: the tile rows. tiles.bin has its full length, 1.2 MB a
slide, and is sparse: a draw is a pure function of its number, so the pages that a benchmark's draws
will touch are known beforehand, and `write_tiles` fills them, and no others.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from online_patching import Corpus, ForegroundMask
from online_patching.bitmaps import PADDING_BYTES
from online_patching.corpus.packing import FILES, LEFT_OUT, VERSION
from online_patching.corpus.records import CODEC_RECORD, KINDS, LEVEL_RECORD, SLIDE_RECORD
from online_patching.slide_index import Codec, pack_rows

WIDTH_PX0, HEIGHT_PX0, TILE_PX = 105_472, 87_808, 256
DOWNSAMPLES = (1, 4, 16)
CELL_PX0 = 32
MASKS = 8192
_SHAPES = 8
_CHUNK = 2**16
_PAGE_ROWS = 4096 // 8


def simulate(folder: Path, slides: int, seed: int = 0) -> None:
    """Write a packed corpus into `folder`."""
    packed = folder / "packed" / hashlib.sha256(f"{slides} {seed}".encode()).hexdigest()[:32]
    packed.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    masks = _write_masks(packed / FILES["masks"], min(slides, MASKS), rng)
    text = _Text()
    with open(packed / FILES["text"], "wb") as file:
        file.write(text.codec)
        chunks = (np.arange(i, min(i + _CHUNK, slides)) for i in range(0, slides, _CHUNK))
        file.writelines(text.of(rows).tobytes() for rows in chunks)
    codec = np.array([(0, len(text.codec))], CODEC_RECORD)
    (packed / FILES["codecs"]).write_bytes(codec.tobytes())
    levels = _levels()
    n_tiles = int(levels["n_rows"].sum())
    with open(packed / FILES["slides"], "wb") as file, open(packed / FILES["levels"], "wb") as more:
        for start in range(0, slides, _CHUNK):
            row = np.arange(start, min(start + _CHUNK, slides))
            mpp = rng.choice([0.2201, 0.2431, 0.2503, 0.2627], len(row))
            file.write(_slide_records(row, mpp, masks, text).tobytes())
            several = np.tile(levels, len(row)).reshape(len(row), -1)
            several["first_tile"] += row[:, None] * n_tiles
            for name in ("mpp_x", "mpp_y", "mpp"):
                several[name] = mpp[:, None] * several["downsample_x"]
            more.write(several.tobytes())
    with open(packed / FILES["tiles"], "wb") as file:
        file.truncate(8 * n_tiles * slides)
    (packed / LEFT_OUT).write_text("[]")
    about: dict[str, Any] = {"version": VERSION, "digest": "simulated", "generation": packed.name}
    about["slides"] = slides
    about["bytes"] = {name: (packed / FILES[name]).stat().st_size for name in KINDS}
    (folder / "corpus.json").write_text(json.dumps(about))


def write_tiles(corpus: Corpus, positions: NDArray[np.int64]) -> int:
    """Fill the pages of tiles.bin that hold these rows with plausible ones; returns how many."""
    assert corpus.folder is not None
    pages = np.unique(positions // _PAGE_ROWS)
    path = next(corpus.folder.glob(f"packed/*/{FILES['tiles']}"))
    with open(path, "r+b") as file:
        for page in pages.tolist():
            number = np.arange(page * _PAGE_ROWS, min((page + 1) * _PAGE_ROWS, len(corpus.tiles)))
            rows, _ = pack_rows(16 + number % 150_000 * 20_000, 12_000 + number * 7919 % 16_000)
            file.seek(page * 4096)
            file.write(rows.astype("<u8").tobytes())
    return len(pages)


def _write_masks(path: Path, n: int, rng: np.random.Generator) -> list[tuple[Any, ...]]:
    """A few drawn shapes, each shifted in many ways; returns what records say of each."""
    height, width = HEIGHT_PX0 // CELL_PX0, WIDTH_PX0 // CELL_PX0
    shapes, out, offset = [], [], 0
    for _ in range(min(n, _SHAPES)):
        coarse = gaussian_filter(rng.random((height // 8, width // 8)), 16)
        tissue = coarse > np.quantile(coarse, rng.uniform(0.65, 0.9))
        tissue = np.kron(tissue, np.ones((8, 8), bool))
        padded = np.zeros((height, width), bool)
        padded[: tissue.shape[0], : tissue.shape[1]] = tissue
        mask = ForegroundMask.from_array(padded, (WIDTH_PX0, HEIGHT_PX0), (0.25, 0.25))
        shapes.append((mask.packed, mask.rich_box_fractions()))
    with open(path, "wb") as file:
        for k in range(n):
            packed, rich = shapes[k % len(shapes)]
            by = int(rng.integers(height)), int(rng.integers(packed.shape[1]))
            packed = np.roll(packed, by, axis=(0, 1))
            counts = np.zeros(height + 1, "<i8")
            np.cumsum(np.bitwise_count(packed).sum(axis=1, dtype=np.int64), out=counts[1:])
            data = counts.tobytes() + packed.tobytes()
            data += bytes(-len(data) % 8)
            file.write(data)
            out.append((offset, width, height, int(counts[-1]), rich))
            offset += len(data)
        file.write(bytes(PADDING_BYTES))
    return out


def _levels() -> NDArray[np.void]:
    levels = np.zeros(len(DOWNSAMPLES), LEVEL_RECORD)
    for level, downsample in zip(levels, DOWNSAMPLES, strict=True):
        width, height = WIDTH_PX0 // downsample, HEIGHT_PX0 // downsample
        columns = -(-width // TILE_PX)
        level["width_px"], level["height_px"], level["columns"] = width, height, columns
        level["tile_width_px"] = level["tile_height_px"] = TILE_PX
        level["downsample_x"] = level["downsample_y"] = downsample
        level["parts"], level["n_rows"] = 1, columns * -(-height // TILE_PX)
    levels["first_tile"] = np.cumsum(levels["n_rows"]) - levels["n_rows"]
    return levels


class _Text:
    """Ids, URIs and tokens of one length, so that columns of them can be written at once."""

    def __init__(self) -> None:
        self.codec = json.dumps(Codec("jpeg", "ycbcr", bytes(600)).to_json()).encode()
        rest = {
            "container": "svs",
            "vendor": "aperio",
            "mpp_source": "vendor tag",
            "content_hash": "",
        }
        extra: list[dict[str, Any]] = [{"keys": None, "overflow": []}] * len(DOWNSAMPLES)
        self.parts = [
            b"slide-########",
            b"/data/cohort/scanner-3/########/slide-########.svs",
            b"1523456789-1763894400########0",
            json.dumps({**rest, "levels": extra}).encode(),
        ]
        self._template = np.frombuffer(b"".join(self.parts), np.uint8)
        self._digits = np.flatnonzero(self._template == ord("#")).reshape(-1, 8)

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The strings of slides, one row a slide."""
        out = np.tile(self._template, (len(rows), 1))
        digits = rows[:, None] // 10 ** np.arange(7, -1, -1) % 10 + ord("0")
        for at in self._digits:
            out[:, at] = digits
        return out


def _slide_records(
    row: NDArray[np.int64], mpp: NDArray[np.float64], masks: list[tuple[Any, ...]], text: _Text
) -> NDArray[np.void]:
    out = np.zeros(len(row), SLIDE_RECORD)
    out["width_px0"], out["height_px0"] = WIDTH_PX0, HEIGHT_PX0
    out["mpp_x"] = out["mpp_y"] = mpp
    out["n_levels"], out["first_level"] = len(DOWNSAMPLES), row * len(DOWNSAMPLES)
    out["size_bytes"], out["mtime_ns"] = 1_523_456_789, 1_763_894_400 * 10**9
    lengths = [len(part) for part in text.parts]
    out["text_offset"] = len(text.codec) + row * sum(lengths)
    for name, length in zip(("slide_id", "uri", "token", "rest"), lengths, strict=True):
        out[f"{name}_bytes"] = length
    which = row % len(masks)
    for i, name in enumerate(("mask_offset", "mask_width", "mask_height", "tissue_cells")):
        out[name] = np.array([mask[i] for mask in masks])[which]
    out["rich_fractions"] = np.stack([mask[4] for mask in masks])[which]
    return out
