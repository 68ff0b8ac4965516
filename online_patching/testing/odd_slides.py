"""JPEG pyramids as scanners, converters and bad days leave them: small, exact, the same everywhere.

The picture is made of integers and the files of raw_tiff.py, so that equal versions of the JPEG
encoder write equal bytes on any machine: what golden tests stand on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from online_patching.philox import words
from online_patching.testing.raw_tiff import (
    RawImage,
    Value,
    ascii_text,
    build_tiff,
    longs,
    rational,
    shorts,
)
from online_patching.testing.writers import Picture, encode_jpeg, pyramid, split_tables, tiles

_STREAM = 9002
_JPEG, _RAW = 7, 1
_PHOTOMETRIC = {"rgb": 2, "ycbcr": 6}
_RED = (255, 0, 0)
"""Every associated image is pure red: a patch with red in it has shown what it must not."""


@dataclass(frozen=True)
class OddSlide:
    """How a slide is stored.

    flavour     aperio: µm/px in the description; generic: in the resolution tags; ome: in OME-XML,
                with the levels below the first in its SubIFDs.
    component_ids, subsampling, photometric: as encode_jpeg takes them.
    tables      quantisation and Huffman tables once in JPEGTables, and none in the tiles.
    empty       tiles of level 0 (by number) stored with length 0.
    associated  images beside the pyramid: "strips" (a thumbnail, a label and a macro in strips), "tiled"
                (the same in tiles, told apart by flag, description and shape), or "" for none.
    """

    size_px: tuple[int, int] = (700, 500)
    tile_px: int = 96
    mpp: float = 0.2743
    flavour: Literal["aperio", "generic", "ome"] = "generic"
    photometric: Literal["ycbcr", "rgb"] = "ycbcr"
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = "4:2:0"
    component_ids: tuple[int, int, int] | None = None
    tables: bool = True
    downsamples: tuple[float, ...] = (3.0,)
    empty: tuple[int, ...] = ()
    associated: Literal["", "strips", "tiled"] = ""
    big: bool = False
    order: Literal["<", ">"] = "<"
    seed: int = 0


ODD_SLIDES = {
    "aperio": OddSlide(flavour="aperio", downsamples=(3.9995,), associated="strips"),
    "aperio_rgb": OddSlide(flavour="aperio", photometric="rgb", tile_px=80, associated="strips"),
    "rgb_ids_of_ycbcr": OddSlide(photometric="rgb", component_ids=(1, 2, 3), tables=False),
    "ycbcr_ids_of_rgb": OddSlide(component_ids=(82, 71, 66), subsampling="4:4:4"),
    "ycbcr_ids_of_nobody": OddSlide(component_ids=(7, 9, 200), tables=False),
    "chroma_422": OddSlide(subsampling="4:2:2", tables=False),
    "chroma_422_tables": OddSlide(subsampling="4:2:2", order=">"),
    "chroma_444": OddSlide(subsampling="4:4:4", tables=False, order=">"),
    "chroma_420_whole_streams": OddSlide(tables=False, tile_px=128),
    "empty_tiles": OddSlide(empty=(0, 3, 9, 47), flavour="aperio"),
    "empty_tiles_big": OddSlide(empty=(1, 20), big=True, order=">"),
    "odd_downsamples": OddSlide(downsamples=(2.37, 6.91), size_px=(1013, 611)),
    "narrow": OddSlide(size_px=(97, 1203), downsamples=(2.5,), tile_px=64),
    "sub_directories": OddSlide(flavour="ome", downsamples=(2.0, 4.0)),
    "sub_directories_big": OddSlide(flavour="ome", big=True, photometric="rgb", downsamples=(2.0,)),
    "tiled_associates": OddSlide(flavour="aperio", associated="tiled", downsamples=(2.0, 4.0)),
    "tiled_associates_generic": OddSlide(associated="tiled", big=True),
}
"""One of each kind, by name."""


def write_odd_slide(path: Path | str, slide: OddSlide) -> Path:
    """The slide's file at `path`; returns the path."""
    levels = pyramid(odd_picture(*slide.size_px, slide.seed), slide.downsamples)
    stored = [_level(slide, number, picture) for number, picture in enumerate(levels)]
    beside = _associated(slide) if slide.associated else []
    if slide.flavour == "ome":
        first = RawImage(**{**stored[0].__dict__, "sub_images": stored[1:]})
        images = [first, *beside]
    else:  # between the levels, where Aperio has its thumbnail
        images = [stored[0], *beside[:1], *stored[1:], *beside[1:]]
    target = Path(path)
    target.write_bytes(build_tiff(images, big=slide.big, order=slide.order))
    return target


def odd_picture(width: int, height: int, seed: int = 0) -> Picture:
    """(height, width, 3) uint8: blurred blocks of random colour, integer arithmetic throughout."""
    cells = words(seed, np.arange(-(-height // 8) + 4), 0, _STREAM, 3 * (-(-width // 8) + 4))
    blocks = (cells >> 24).astype(np.int64).reshape(len(cells), -1, 3)
    picture = blocks.repeat(8, axis=0).repeat(8, axis=1)
    for axis in (0, 1):
        for shift in (4, 2, 1):
            picture = (picture + np.roll(picture, shift, axis)) // 2
    return picture[16 : 16 + height, 16 : 16 + width].astype(np.uint8)


def _level(slide: OddSlide, number: int, picture: Picture) -> RawImage:
    blobs = [
        encode_jpeg(tile, slide.photometric, 85, slide.subsampling, slide.component_ids)
        for tile in tiles(picture, slide.tile_px)
    ]
    tags: dict[int, Value | None] = {254: longs(int(number > 0 and slide.flavour == "generic"))}
    if slide.tables:
        tags[347] = (7, split_tables(blobs[0])[0])
        blobs = [split_tables(blob)[1] for blob in blobs]
    if slide.photometric == "ycbcr":
        chroma = {"4:4:4": (1, 1), "4:2:2": (2, 1), "4:2:0": (2, 2)}
        tags[530] = shorts(*chroma[slide.subsampling])
    if number == 0:
        blobs = [b"" if k in slide.empty else blob for k, blob in enumerate(blobs)]
    height, width = picture.shape[:2]
    return RawImage(
        (width, height), blobs, (slide.tile_px, slide.tile_px), _PHOTOMETRIC[slide.photometric],
        _JPEG, tags={**tags, **_told(slide, number)},
    )  # fmt: skip


def _told(slide: OddSlide, number: int) -> dict[int, Value | None]:
    """Where the flavour writes µm/px."""
    width, height = slide.size_px
    if slide.flavour == "aperio":
        return {270: ascii_text(
            f"Aperio Image Library v12.0.0 \r\n{width}x{height} JPEG Q=85|AppMag = 40|MPP = {slide.mpp:g}"
        )}  # fmt: skip
    if slide.flavour == "ome" and number == 0:
        return {270: ascii_text(
            '<?xml version="1.0" encoding="UTF-8"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/'
            f'2016-06"><Image ID="Image:0"><Pixels SizeX="{width}" SizeY="{height}" PhysicalSizeX='
            f'"{slide.mpp:g}" PhysicalSizeXUnit="µm" PhysicalSizeY="{slide.mpp:g}" PhysicalSizeYUnit="µm"/>'
            "</Image></OME>"
        )}  # fmt: skip
    if slide.flavour == "generic" and number == 0:
        per_cm = rational(round(1e8 / slide.mpp), 10**4)
        return {282: per_cm, 283: per_cm, 296: shorts(3)}
    return {}


def _associated(slide: OddSlide) -> list[RawImage]:
    """A thumbnail, a label and a macro, in the shapes and with the words that tell them."""
    about = "Aperio Image Library v12.0.0 \r\n"
    width, height = slide.size_px
    kinds: Sequence[tuple[tuple[int, int], int, str]] = (
        ((width // 5, height // 5), 0, f"{about}thumbnail"),
        ((150, 180), 1, f"{about}label 150x180"),
        ((400, 160), 9, f"{about}macro 400x160"),
    )
    if slide.associated == "tiled":  # told by another shape, by a word alone, by the flag alone
        kinds = ((kinds[1][0], 0, kinds[0][2]), ((width // 5, height // 5), 1, kinds[1][2]),
                 ((width // 6, height // 6), 9, about))  # fmt: skip
    out = []
    for (w, h), flag, text in kinds:
        red = np.full((h, w, 3), _RED, np.uint8)
        tags: dict[int, Value | None] = {254: longs(flag), 270: ascii_text(text)}
        if slide.associated == "tiled":
            pieces = [tile.tobytes() for tile in tiles(red, 64)]
            out.append(RawImage((w, h), pieces, (64, 64), compression=_RAW, tags=tags))
        else:
            out.append(RawImage((w, h), [red.tobytes()], None, compression=_RAW, tags=tags))
    return out
