"""Synthetic slides as Aperio SVS and generic tiled TIFF.

Containers look like the ones scanners write where readers stumble: abbreviated JPEG streams with
their tables in a tag, RGB kept in JPEG without a marker that says so, padded edge tiles, associated
images (thumbnail, label, macro) between the levels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from online_patching.testing.drawing import SyntheticSlide

Picture = NDArray[np.uint8]
Progress = Callable[[float], None]
"""Told the share done, 0..1."""

_STRIP_PX = 1024


def draw_level0(slide: SyntheticSlide, progress: Progress | None = None) -> Picture:
    """All of level 0, (height_px0, width_px0, 3) uint8, drawn in strips."""
    out = np.empty((slide.height_px0, slide.width_px0, 3), np.uint8)
    for top in range(0, slide.height_px0, _STRIP_PX):
        height = min(_STRIP_PX, slide.height_px0 - top)
        out[top : top + height] = slide.render(0, top, slide.width_px0, height)
        if progress:
            progress((top + height) / slide.height_px0)
    return out


def shrink(picture: Picture, downsample: float) -> Picture:
    """Area average to floor(size / downsample), as scanners do; any downsample >= 1."""
    height, width = (max(1, int(n / downsample)) for n in picture.shape[:2])
    box = (
        0,
        0,
        min(width * downsample, picture.shape[1]),
        min(height * downsample, picture.shape[0]),
    )
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BOX, box))


def pyramid(level0: Picture, downsamples: Sequence[float]) -> list[Picture]:
    """Level 0 and one level for each downsample (all relative to level 0, ascending)."""
    levels = [level0]
    for previous, downsample in zip([1.0, *downsamples], downsamples, strict=False):
        # From the level before when that is exact: an area average of area averages.
        exact = (downsample / previous).is_integer() and float(previous).is_integer()
        source, factor = (levels[-1], downsample / previous) if exact else (level0, downsample)
        levels.append(shrink(source, factor))
    return levels


def default_downsamples(slide: SyntheticSlide) -> tuple[float, ...]:
    """4, 16, ... until the longest side is below 1,024 px."""
    longest = max(slide.width_px0, slide.height_px0)
    made: list[float] = []
    while longest / 4 ** len(made) > 1024:
        made.append(4.0 ** (len(made) + 1))
    return tuple(made)


def write_tiff(
    path: Path | str,
    slide: SyntheticSlide,
    *,
    tile_px: int = 256,
    photometric: Literal["ycbcr", "rgb"] = "ycbcr",
    flavour: Literal["aperio", "generic"] = "aperio",
    downsamples: Sequence[float] | None = None,
    quality: int = 80,
    tables: bool = True,
    with_mpp: bool = True,
    appmag: int = 40,
    associated: bool = False,
    bigtiff: bool = False,
    level0: Picture | None = None,
    progress: Progress | None = None,
) -> Path:
    """A tiled-JPEG pyramid at `path`; returns the path.

    photometric  "ycbcr": 4:2:0 YCbCr. "rgb": RGB inside JPEG with no marker saying so (Aperio's).
    flavour      "aperio": `Aperio ... |AppMag = 40|MPP = 0.25` and no resolution tags;
                 "generic": no description, resolution tags in px/cm.
    tables       abbreviated streams, quantisation and Huffman tables once in JPEGTables.
    with_mpp     False leaves the µm/px out, as real slides often do.
    associated   adds a thumbnail page, a label and a macro. The label's pixels are pure red: a
                 reader that ever shows red has read what it must not.
    level0       pixels to use instead of drawing the slide.
    The write is not atomic: a caller that keeps files writes elsewhere and renames.
    """
    path = Path(path)
    level0 = draw_level0(slide, progress) if level0 is None else level0
    scales = default_downsamples(slide) if downsamples is None else tuple(downsamples)
    levels = pyramid(level0, scales)
    about = _aperio_text(slide, appmag, with_mpp) if flavour == "aperio" else None
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as tif:
        for number, picture in enumerate(levels):
            options: dict[str, Any] = {}
            if flavour == "generic" and with_mpp:
                mpp = slide.mpp * level0.shape[1] / picture.shape[1]
                options = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
            if number and flavour == "generic":
                options["subfiletype"] = 1
            _write_level(tif, picture, tile_px, photometric, quality, tables, about, options)
            if number == 0 and associated:
                _write_page(tif, shrink(level0, max(level0.shape[:2]) / 512), about, 0)
        if associated:
            label = np.zeros((180, 150, 3), np.uint8)
            label[..., 0] = 255
            _write_page(tif, label, _first_line(about, "label 150x180"), 1)
            _write_page(
                tif, np.full((160, 400, 3), 90, np.uint8), _first_line(about, "macro 400x160"), 9
            )
    return path


def _aperio_text(slide: SyntheticSlide, appmag: int, with_mpp: bool) -> str:
    size = f"{slide.width_px0}x{slide.height_px0}"
    mpp = f"|MPP = {slide.mpp:g}" if with_mpp else ""
    return (
        f"Aperio Image Library v12.0.0 \r\n{size} [0,0 {size}] (256x256) JPEG/RGB Q=80"
        f"|AppMag = {appmag}{mpp}|Filename = synthetic-{slide.seed}"
    )


def _first_line(about: str | None, rest: str) -> str | None:
    return None if about is None else f"Aperio Image Library v12.0.0 \r\n{rest}"


def _write_page(tif: Any, picture: Picture, about: str | None, subfiletype: int) -> None:
    """A page in strips: what a label, macro or thumbnail is stored as."""
    tif.write(
        picture, photometric="rgb", compression="zlib", rowsperstrip=16, metadata=None,
        description=about, subfiletype=subfiletype, software=False,
    )  # fmt: skip


def _write_level(
    tif: Any,
    picture: Picture,
    tile_px: int,
    photometric: str,
    quality: int,
    tables: bool,
    about: str | None,
    options: Mapping[str, Any],
) -> None:
    blobs = [encode_jpeg(tile, photometric, quality) for tile in tiles(picture, tile_px)]
    shared = None
    if tables:
        shared = split_tables(blobs[0])[0]
        # Same quality, standard Huffman codes: every tile carries the very same tables.
        blobs = [split_tables(blob)[1] for blob in blobs]
    chroma: dict[str, Any] = {"subsampling": (2, 2)}
    if photometric == "rgb":  # else tifffile writes YCbCr into the tag
        chroma = {"compressionargs": {"outcolorspace": "rgb"}}
    tif.write(
        iter(blobs), shape=picture.shape, dtype=np.uint8, tile=(tile_px, tile_px),
        photometric=photometric, compression="jpeg", jpegtables=shared, metadata=None,
        description=about, software=False, **chroma, **options,
    )  # fmt: skip


def tiles(picture: Picture, tile_px: int) -> Iterator[Picture]:
    """The tiles of a picture in storage order; ragged ones padded by repeating the last pixel."""
    height, width = picture.shape[:2]
    for top in range(0, height, tile_px):
        for left in range(0, width, tile_px):
            tile = picture[top : top + tile_px, left : left + tile_px]
            missing = (0, tile_px - tile.shape[0]), (0, tile_px - tile.shape[1]), (0, 0)
            yield np.pad(tile, missing, mode="edge") if missing[0][1] or missing[1][1] else tile


def encode_jpeg(
    tile: Picture,
    photometric: str = "ycbcr",
    quality: int = 80,
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = "4:2:0",
    component_ids: tuple[int, int, int] | None = None,
) -> bytes:
    """One baseline JPEG without application segments, so that nothing in it says which colours it holds.

    `subsampling` is that of YCbCr; RGB is never subsampled. `component_ids` default to 1, 2, 3 (JFIF's)
    for YCbCr and 0, 1, 2 (Aperio's) for RGB; libjpeg guesses the colours from them.
    """
    buffer = io.BytesIO()
    rgb = photometric == "rgb"
    chroma = "4:4:4" if rgb else subsampling
    Image.fromarray(tile).save(buffer, "JPEG", quality=quality, subsampling=chroma, keep_rgb=rgb)
    ids = component_ids or ((0, 1, 2) if rgb else (1, 2, 3))
    out = bytearray(b"\xff\xd8")
    for marker, body in _segments(buffer.getvalue()):
        if 0xE0 <= marker <= 0xEF:  # JFIF or Adobe: Aperio writes neither
            continue
        out += bytes((0xFF, marker)) + _renumbered(marker, body, ids)
    return bytes(out)


def _segments(jpeg: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, bytes from the length field on) of each segment; the scan runs to the end."""
    at = 2
    while True:
        marker, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if marker == 0xDA:
            yield marker, jpeg[at + 2 :]
            return
        yield marker, jpeg[at + 2 : at + 2 + length]
        at += 2 + length


def _renumbered(marker: int, body: bytes, ids: tuple[int, int, int]) -> bytes:
    """The component ids in frame and scan headers made others."""
    first, step = {0xC0: (8, 3), 0xDA: (3, 2)}.get(marker, (0, 0))
    changed = bytearray(body)
    if step:
        for number, component in enumerate(ids):
            changed[first + number * step] = component
    return bytes(changed)


def split_tables(jpeg: bytes) -> tuple[bytes, bytes]:
    """(tables-only stream, abbreviated stream without them): TIFF's JPEGTables and a tile."""
    tables, rest = bytearray(b"\xff\xd8"), bytearray(b"\xff\xd8")
    for marker, body in _segments(jpeg):
        (tables if marker in (0xDB, 0xC4) else rest).extend(bytes((0xFF, marker)) + body)
    return bytes(tables + b"\xff\xd9"), bytes(rest)
