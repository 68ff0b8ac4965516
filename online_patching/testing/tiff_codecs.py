"""Tiled TIFFs in every way of storing a tile that readers meet: compression x photometric x details.

Each is written tag by tag from the same pixels, so that readers can be held against each other and
against what went in.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from online_patching.testing.jpeg2000 import encode_planes
from online_patching.testing.raw_tiff import RawImage, Value, build_tiff, rational, shorts
from online_patching.testing.writers import Picture, encode_jpeg, split_tables, tiles

Subsampling = Literal["4:4:4", "4:2:2", "4:2:0"]
Marker = Literal["none", "jfif", "adobe rgb", "adobe ycbcr"]

_MARKERS: Mapping[str, bytes] = {
    "none": b"",
    "jfif": b"\xff\xe0\x00\x10JFIF\0\x01\x01\0\0\x01\0\x01\0\0",
    "adobe rgb": b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0\0",
    "adobe ycbcr": b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0\x01",
}
_GRAY, _RGB, _YCBCR = 1, 2, 6
_PACKED: Mapping[int, Callable[..., bytes | bytearray]] = {
    1: bytes,
    5: imagecodecs.lzw_encode,
    32773: imagecodecs.packbits_encode,
    50000: imagecodecs.zstd_encode,
}
_STEPS = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}


@dataclass(frozen=True)
class Coding:
    """How a TIFF stores its tiles. `compression` and `photometric` are the tags' numbers.

    `marker` is what a JPEG stream says of its colours, right or wrong; `tables` puts its tables into a tag.
    `level` is JPEG's and WebP's quality (0: WebP without loss) and JPEG 2000's PSNR in dB (0: without loss).
    """

    compression: int
    photometric: int = _RGB
    samples: int = 3
    predictor: int = 1
    planar: bool = False
    subsampling: Subsampling = "4:4:4"
    tables: bool = False
    marker: Marker = "none"
    level: int = 90
    boxed: bool = False

    @property
    def tags(self) -> dict[int, Value | None]:
        """What has to be said in tags beyond the usual."""
        tags: dict[int, Value | None] = {}
        if self.predictor != 1:
            tags[317] = shorts(self.predictor)
        if self.planar:
            tags[284] = shorts(2)
        if self.samples == 4:
            tags[338] = shorts(2)
        if self.photometric == _YCBCR and self.compression == 7:
            tags[530] = shorts(*_STEPS[self.subsampling])
        return tags

    def encode(self, tile: Picture) -> bytes:
        """One stored piece: a tile, or a plane of it."""
        if self.compression == 7:
            return self._jpeg(tile)
        if self.compression in (33003, 33005, 34712):
            return self._jpeg2000(tile)
        if self.compression == 50001:
            lossless = self.level == 0
            quality = None if lossless else self.level
            return bytes(imagecodecs.webp_encode(tile, level=quality, lossless=lossless))
        if self.predictor == 2:
            tile = np.diff(tile, axis=1, prepend=np.uint8(0))
        data = np.ascontiguousarray(tile).tobytes()
        if self.compression in (8, 32946):
            return zlib.compress(data)
        return bytes(_PACKED[self.compression](data))

    def _jpeg(self, tile: Picture) -> bytes:
        if self.photometric == _GRAY:
            buffer = io.BytesIO()
            Image.fromarray(tile[:, :, 0]).save(buffer, "JPEG", quality=self.level)
            stream = buffer.getvalue()
        else:
            colours = "rgb" if self.photometric == _RGB else "ycbcr"
            stream = encode_jpeg(tile, colours, self.level, self.subsampling)
        return stream[:2] + _MARKERS[self.marker] + stream[2:]

    def _jpeg2000(self, tile: Picture) -> bytes:
        if self.subsampling != "4:4:4" or self.compression == 33003:
            across, down = _STEPS[self.subsampling]
            ycbcr = to_ycbcr(tile)
            planes = [ycbcr[:, :, 0], *(_means(ycbcr[:, :, k], across, down) for k in (1, 2))]
            return encode_planes(planes, [(1, 1), (across, down), (across, down)])
        pixels = tile[:, :, 0] if self.samples == 1 else tile
        return bytes(
            imagecodecs.jpeg2k_encode(
                pixels,
                level=self.level or None,
                reversible=self.level == 0,
                mct=self.samples == 3,
                codecformat="jp2" if self.boxed else "j2k",
            )
        )


def to_ycbcr(pixels: Picture) -> Picture:
    """JFIF's YCbCr of RGB pixels."""
    return np.asarray(Image.fromarray(pixels).convert("YCbCr"))


def _means(plane: NDArray[np.uint8], across: int, down: int) -> NDArray[np.uint8]:
    height, width = plane.shape
    blocks = plane.reshape(height // down, down, width // across, across).astype(np.uint16)
    return np.asarray((blocks.sum(axis=(1, 3)) + across * down // 2) // (across * down), np.uint8)


@dataclass(frozen=True)
class Layout:
    """What besides its coding a file is like. `missing` tiles of level 0 are not stored."""

    tile_px: tuple[int, int] = (64, 48)
    big: bool = False
    order: Literal["<", ">"] = "<"
    mpp: float = 0.4991
    description: str = ""
    missing: frozenset[int] = field(default_factory=frozenset)


def coded_image(
    picture: Picture,
    coding: Coding,
    layout: Layout = Layout(),
    tags: Mapping[int, Value] | None = None,
) -> RawImage:
    """One directory holding a picture, (height, width, samples) or RGB of which gray takes the mean."""
    if coding.samples == 1 and picture.shape[2] != 1:
        picture = np.asarray(Image.fromarray(picture).convert("L"))[:, :, None]
    pieces, shared = [], None
    for plane in _planes(picture, coding):
        for number, tile in enumerate(_tiles(plane, layout.tile_px)):
            stored = b"" if number in layout.missing else coding.encode(tile)
            if stored and coding.tables:
                shared, stored = split_tables(stored)
            pieces.append(stored)
    more: dict[int, Value | None] = {**coding.tags, **(tags or {})}
    if shared is not None:
        more[347] = (7, shared)
    return RawImage(
        (picture.shape[1], picture.shape[0]), pieces, layout.tile_px,
        photometric=coding.photometric, compression=coding.compression, samples=coding.samples,
        tags=more,
    )  # fmt: skip


def _planes(picture: Picture, coding: Coding) -> Iterator[Picture]:
    if not coding.planar:
        yield picture
        return
    for channel in range(coding.samples):
        yield picture[:, :, channel : channel + 1]


def _tiles(picture: Picture, tile_px: tuple[int, int]) -> Iterator[Picture]:
    """Tiles of any shape, in storage order."""
    width, height = tile_px
    if width == height:
        yield from tiles(picture, width)
        return
    for top in range(0, picture.shape[0], height):
        for left in range(0, picture.shape[1], width):
            tile = picture[top : top + height, left : left + width]
            lacks = ((0, height - tile.shape[0]), (0, width - tile.shape[1]), (0, 0))
            yield np.pad(tile, lacks, mode="edge")


def resolution(mpp: float) -> dict[int, Value]:
    """Resolution tags that say µm/px."""
    per_cm = rational(round(1e4 / mpp * 1000), 1000)
    return {282: per_cm, 283: per_cm, 296: shorts(3)}


def write_coded_tiff(
    path: Path, levels: Sequence[Picture], coding: Coding, layout: Layout = Layout()
) -> Path:
    """A pyramid at `path`; its µm/px in resolution tags, or in its description where that names an MPP."""
    images = []
    for number, picture in enumerate(levels):
        tags: dict[int, Value] = {} if number == 0 else {254: (4, (1,))}
        if layout.description:
            tags[270] = (2, layout.description.encode() + b"\0")
        else:
            tags |= resolution(layout.mpp * levels[0].shape[1] / picture.shape[1])
        images.append(coded_image(picture, coding, layout, tags))
    path.write_bytes(build_tiff(images, big=layout.big, order=layout.order))
    return path
