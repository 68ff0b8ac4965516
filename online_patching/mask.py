"""Where the tissue is: a bitmap over the whole slide, a fraction of any box, a random tissue point."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from online_patching import bitmaps
from online_patching.errors import MaskError
from online_patching.slide_index import SlideIndex
from online_patching.stores import atomic_write_bytes

_MAX_CELLS = 64 * 2**20
_MAX_FILE_BYTES = 16 * 2**20
QUANTILE_SIDES_UM = tuple(16.0 * 2 ** (k / 2) for k in range(22))
"""Box sides for which a mask knows how tissue-rich its best boxes are: 16 to 23,170 µm."""


@dataclass(frozen=True, eq=False)
class ForegroundMask:
    """A bitmap of tissue. Cell (row, column) covers level-0 pixels
    [column * W / width, (column + 1) * W / width) x [row * H / height, (row + 1) * H / height).

    `packed` holds the rows' bits (big-endian within bytes, as numpy.packbits makes them) and
    `row_start[r]` the number of tissue cells above row r: a uniform tissue cell is one binary
    search and one row of bits away, in 1/8 of a byte a cell plus 8 bytes a row.
    """

    packed: NDArray[np.uint8]
    row_start: NDArray[np.int64]
    width: int
    size_px0: tuple[int, int]
    mpp_px0: tuple[float, float]

    @classmethod
    def from_array(
        cls, tissue: NDArray[np.bool_], size_px0: tuple[int, int], mpp_px0: tuple[float, float]
    ) -> ForegroundMask:
        """A mask from a boolean array (height, width) that spans the whole slide."""
        if tissue.ndim != 2 or not 0 < tissue.size <= _MAX_CELLS:
            raise MaskError(
                f"a mask is a 2-d array of 1 to {_MAX_CELLS:,} cells, not {tissue.shape}"
            )
        bits = tissue.astype(bool)
        counts = np.concatenate([[0], np.cumsum(bits.sum(axis=1, dtype=np.int64))])
        return cls(np.packbits(bits, axis=1), counts, bits.shape[1], size_px0, mpp_px0)

    @classmethod
    def everything(cls, index: SlideIndex, cell_um: float = 8.0) -> ForegroundMask:
        """A mask that calls the whole slide tissue."""
        w, h = index.dimensions
        shape = (max(1, round(h * index.mpp_y / cell_um)), max(1, round(w * index.mpp_x / cell_um)))
        return cls.from_array(np.ones(shape, bool), (w, h), (index.mpp_x, index.mpp_y))

    @property
    def height(self) -> int:
        """Cells down."""
        return len(self.packed)

    @property
    def bits(self) -> NDArray[np.bool_]:
        """The boolean array (height, width)."""
        return np.unpackbits(self.packed, axis=1, count=self.width).astype(bool)

    @property
    def tissue_cells(self) -> int:
        """How many cells are tissue."""
        return int(self.row_start[-1])

    @property
    def tissue_fraction(self) -> float:
        """Share of the slide's cells that are tissue."""
        return self.tissue_cells / (self.width * self.height)

    @property
    def tissue_area_um2(self) -> float:
        """Tissue area in µm²."""
        (w, h), (mx, my) = self.size_px0, self.mpp_px0
        return self.tissue_fraction * w * mx * h * my

    @cached_property
    def digest(self) -> str:
        """SHA-256 of bits, shape and slide size."""
        head = f"{self.width}x{self.height} over {self.size_px0} at {self.mpp_px0}".encode()
        return hashlib.sha256(head + self.packed.tobytes()).hexdigest()

    def fraction(self, x_px0: float, y_px0: float, w_px0: float, h_px0: float) -> float:
        """Share of a box that is tissue: exact, cells at its edges by the part covered.

        What lies outside the slide counts as background.
        """
        x, y, w, h = (np.array([float(value)]) for value in (x_px0, y_px0, w_px0, h_px0))
        return float(bitmaps.tissue_fractions(self._padded, self._bitmap, x, y, w, h)[0])

    def tissue_point(self, cell: int, u: float, v: float) -> tuple[float, float]:
        """Level-0 position of the point (u, v) in [0, 1) within the `cell`-th tissue cell (row-major)."""
        cells, us, vs = np.array([cell], np.int64), np.array([float(u)]), np.array([float(v)])
        x, y = bitmaps.tissue_points(self.row_start, self._padded, self._bitmap, cells, us, vs)
        return float(x[0]), float(y[0])

    @cached_property
    def _padded(self) -> NDArray[np.uint8]:
        """The packed rows, one after another, and what bitmaps.py wants behind them."""
        return np.concatenate([self.packed.ravel(), np.zeros(bitmaps.PADDING_BYTES, np.uint8)])

    @cached_property
    def _bitmap(self) -> bitmaps.Bitmaps:
        at = (0, 0, self.width, self.height, *self.size_px0)
        return bitmaps.Bitmaps(*(np.array([value], np.int64) for value in at))

    def rich_box_fractions(self, quantile: float = 0.98, n: int = 4096) -> NDArray[np.float32]:
        """For each of QUANTILE_SIDES_UM, the tissue share that the best 2 % of boxes reach.

        Boxes are centred on every k-th tissue cell (at most `n` of them) and pushed inside the
        slide, as the sampler does. Where this lies below the threshold a sampler asks for, a draw
        would mostly fail: the slide cannot serve that field of view.
        """
        if not self.tissue_cells:
            return np.zeros(len(QUANTILE_SIDES_UM), np.float32)
        bits = self.bits
        table = np.zeros((self.height + 1, self.width + 1), np.int64)
        table[1:, 1:] = bits.cumsum(0, dtype=np.int64).cumsum(1)
        rows, columns = np.nonzero(bits)
        step = -(-len(rows) // n)
        cy, cx = rows[::step] + 0.5, columns[::step] + 0.5
        out = []
        for side_um in QUANTILE_SIDES_UM:
            w = side_um / self.mpp_px0[0] * self.width / self.size_px0[0]
            h = side_um / self.mpp_px0[1] * self.height / self.size_px0[1]
            x0, y0 = _inside(cx - w / 2, w, self.width), _inside(cy - h / 2, h, self.height)
            inside = _interpolate(table, y0 + h, x0 + w) - _interpolate(table, y0, x0 + w)
            inside -= _interpolate(table, y0 + h, x0) - _interpolate(table, y0, x0)
            out.append(np.quantile(inside / (w * h), quantile))
        return np.asarray(out, np.float32)

    def save(self, path: str | Path) -> None:
        """Write a 1-bit PNG that any viewer shows, with the slide's size in its text chunks."""
        info = PngImagePlugin.PngInfo()
        info.add_text("size_px0", f"{self.size_px0[0]} {self.size_px0[1]}")
        info.add_text("mpp_px0", f"{self.mpp_px0[0]!r} {self.mpp_px0[1]!r}")
        buffer = io.BytesIO()
        Image.fromarray(self.bits).convert("1").save(buffer, "PNG", pnginfo=info)
        atomic_write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> ForegroundMask:
        """Read what `save` wrote; anything else raises MaskError."""
        try:
            if Path(path).stat().st_size > _MAX_FILE_BYTES:
                raise ValueError(f"more than {_MAX_FILE_BYTES:,} bytes")
            # From memory: Pillow would ask a file for as much as a chunk claims to hold.
            with Image.open(io.BytesIO(Path(path).read_bytes()), formats=["PNG"]) as picture:
                if picture.width * picture.height > _MAX_CELLS:
                    raise ValueError(f"{picture.width} x {picture.height} cells are too many")
                picture.load()
                w, h = (int(v) for v in picture.info["size_px0"].split())
                mx, my = (float(v) for v in picture.info["mpp_px0"].split())
                tissue = np.asarray(picture.convert("1"))
            if not (min(w, h) > 0 and 0 < min(mx, my) <= max(mx, my) < np.inf):
                raise ValueError(f"it lies over {w} x {h} px at {mx} x {my} µm/px")
        except (OSError, ValueError, KeyError, SyntaxError, Image.DecompressionBombError) as error:
            raise MaskError(
                f"{path}: not a readable mask ({error}). Make the masks again."
            ) from None
        return cls.from_array(tissue, (w, h), (mx, my))


def _inside(start: NDArray[np.floating], side: float, limit: int) -> NDArray[np.float64]:
    if side >= limit:
        return np.full_like(start, (limit - side) / 2)
    return np.clip(start, 0, limit - side)


def _interpolate(
    table: NDArray[np.int64], y: NDArray[np.float64], x: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Bilinear look-up in a summed-area table: exact for fractional boxes."""
    h, w = table.shape[0] - 1, table.shape[1] - 1
    y, x = np.clip(y, 0, h), np.clip(x, 0, w)
    r, c = np.minimum(y.astype(int), h - 1), np.minimum(x.astype(int), w - 1)
    fy, fx = y - r, x - c
    top = table[r, c] * (1 - fx) + table[r, c + 1] * fx
    bottom = table[r + 1, c] * (1 - fx) + table[r + 1, c + 1] * fx
    return np.asarray(top * (1 - fy) + bottom * fy)
