"""Slides as Hamamatsu's scanners write them: each level one JPEG stream with restart markers, 64-bit offsets.

libjpeg itself sets the restart markers, so that nothing here decides where an interval ends. What real
files get wrong can be asked for: no table of markers, a wrong one, only its low halves, frames that say
0 x 0, small levels without markers, several focal planes, strips beyond 4 GiB (in a sparse file).
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from online_patching.testing.writers import shrink

Picture = NDArray[np.uint8]
Values = tuple[int, Sequence[float] | bytes]
"""A TIFF type and the values of a tag; bytes for text."""

Markers = Literal["listed", "absent", "shifted", "few"]
"""The table of restart markers: right, not there, all two bytes off, or one entry short."""

_CODES = {2: "s", 3: "H", 4: "I", 5: "2I", 9: "i", 11: "f"}
_WIDE = 16
"""Here: a number of 8 bytes that is declared as a LONG, as NDPI has it."""
_RED_PX = (60, 120)
_JPEG_MAX_PX = 65_500


@dataclass(frozen=True)
class NdpiImage:
    """One directory: a JPEG `stream`, its size in px, and the tags that are its own."""

    size_px: tuple[int, int]
    stream: bytes = field(repr=False)
    lens: float
    starts: Sequence[int] | None = field(default=None, repr=False)
    with_high: bool = False
    focus_nm: int = 0
    tags: Mapping[int, Values | None] = field(default_factory=dict)
    at_byte: int = 0
    """Where the strip begins, at least; what lies before is a hole of the file."""


def encode(
    picture: Picture,
    interval_mcus: int | None,
    *,
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = "4:4:4",
    quality: int = 80,
    zero_frame: bool = False,
) -> bytes:
    """A JPEG stream with a restart marker every so many MCUs; its frame may claim 0 x 0 px.

    Beyond the 65,500 px that libjpeg writes it is joined from streams of one interval each, as 0 x 0 px.
    """
    if max(picture.shape) > _JPEG_MAX_PX:
        return _joined(picture, interval_mcus or 1, subsampling, quality)
    options = {"restart_marker_blocks": interval_mcus} if interval_mcus else {}
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality, subsampling=subsampling, **options)
    stream = file.getvalue()
    if zero_frame:
        at = stream.index(b"\xff\xc0")
        stream = stream[: at + 5] + bytes(4) + stream[at + 9 :]
    return stream


def _joined(picture: Picture, interval: int, subsampling: Any, quality: int) -> bytes:
    """A stream of any size whose intervals were encoded one by one: they depend on nothing else."""
    wide, high = {"4:4:4": (8, 8), "4:2:2": (16, 8), "4:2:0": (16, 16)}[subsampling]
    height, width = picture.shape[:2]
    codes, head = [], b""
    for top in range(0, height, high):
        for left in range(0, width, wide * interval):
            block = picture[top : top + high, left : left + wide * interval]
            stream = encode(block, None, subsampling=subsampling, quality=quality)
            first = interval_starts(stream)[0]
            head = stream[:first]
            codes.append(stream[first:-2])
    frame, scan = head.index(b"\xff\xc0"), head.index(b"\xff\xda")
    head = (
        head[: frame + 5]
        + bytes(4)
        + head[frame + 9 : scan]
        + (struct.pack(">HHH", 0xFFDD, 4, interval) + head[scan:])
    )
    marked = (code + bytes((0xFF, 0xD0 + k % 8)) for k, code in enumerate(codes[:-1]))
    return head + b"".join(marked) + codes[-1] + b"\xff\xd9"


def interval_starts(stream: bytes) -> list[int]:
    """Where each restart interval of a stream begins."""
    scan = stream.index(b"\xff\xda")
    first = scan + 2 + int.from_bytes(stream[scan + 2 : scan + 4], "big")
    return [first, *(m.end() for m in re.compile(rb"\xff[\xd0-\xd7]").finditer(stream, first))]


def write_ndpi(
    path: Path | str,
    pictures: Sequence[Picture],
    *,
    mpp: float = 0.2283,
    lens: float = 40.0,
    interval_mcus: int = 16,
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"] = "4:4:4",
    quality: int = 80,
    markers: Markers = "listed",
    with_high: bool = False,
    zero_frame: bool = False,
    plain_below_px: int = 0,
    planes_nm: Sequence[int] = (0,),
    associated: bool = True,
    tags: Mapping[int, Values | None] | None = None,
    at_byte: int = 0,
) -> Path:
    """An NDPI at `path` with these levels, the largest first; returns the path.

    `interval_mcus` holds for every level at least that wide, else a row of MCUs is one interval. Levels
    narrower than `plain_below_px` have no markers at all. `planes_nm` are the focal planes of every level;
    those off 0 are black. `associated` adds the macro, pure red, and the map. `tags` are added to level 0, or
    left out of it (None). `at_byte` is where the first strip begins, at least: beyond 2**32 for 64-bit
    offsets.
    """
    images = []
    for picture in pictures:
        height, width = picture.shape[:2]
        across = -(-width // (8 if subsampling == "4:4:4" else 16))
        interval = None if width < plain_below_px else min(interval_mcus, across)
        for focus in planes_nm:
            shown = picture if focus == 0 else np.zeros_like(picture)
            stream = encode(
                shown, interval, subsampling=subsampling, quality=quality,
                zero_frame=zero_frame and interval is not None,
            )  # fmt: skip
            starts = _listed(stream, markers) if interval else None
            images.append(
                NdpiImage(
                    (width, height),
                    stream,
                    lens * width / pictures[0].shape[1],
                    starts,
                    with_high,
                    focus,
                    tags or {} if picture is pictures[0] else {},
                    at_byte if picture is pictures[0] else 0,
                )
            )
    if associated:
        red = np.zeros((*_RED_PX, 3), np.uint8)
        red[..., 0] = 255
        images.append(NdpiImage((_RED_PX[1], _RED_PX[0]), encode(red, None), -1.0))
        gray: dict[int, Values | None] = {
            259: (3, (1,)), 277: None, 258: (3, (8,)), 262: (3, (1,)), 65424: None,
        }  # fmt: skip
        images.append(NdpiImage((30, 20), bytes(600), -2.0, tags=gray))
    return write_images(path, images, mpp)


def _listed(stream: bytes, markers: Markers) -> list[int] | None:
    starts = interval_starts(stream)
    if markers == "absent":
        return None
    if markers == "few":
        return starts[:-1]
    return [start + 2 for start in starts] if markers == "shifted" else starts


def write_images(path: Path | str, images: Sequence[NdpiImage], mpp: float) -> Path:
    """An NDPI of these directories, in this order. Not atomic."""
    path = Path(path)
    with open(path, "wb") as file:
        file.write(struct.pack("<2sHQ", b"II", 42, 0))
        link = 4
        for image in images:
            if image.at_byte > file.tell():
                file.seek(image.at_byte)
            place, behind = _add(file, image, mpp * images[0].size_px[0] / image.size_px[0])
            file.seek(link)
            file.write(struct.pack("<Q", place))
            file.seek(0, io.SEEK_END)
            link = behind
    return path


def _add(file: BinaryIO, image: NdpiImage, mpp: float) -> tuple[int, int]:
    """Write an image; returns the places of its directory and of its link to the next."""
    start = file.tell()
    file.write(image.stream)
    entries = []
    for tag, (kind, values) in _tags(image, start, mpp).items():
        text = isinstance(values, bytes)
        count = len(values) if text else len(values) // (2 if kind == 5 else 1)
        data = bytes(values) if isinstance(values, bytes) else _pack(kind, count, values)
        # Text is never kept in the entry; a number that has outgrown its 4 bytes goes on in the high half.
        inside = not text and (len(data) <= 4 or kind == _WIDE)
        value = int.from_bytes(data, "little") if inside else _put(file, data)
        entries.append((tag, 4 if kind == _WIDE else kind, count, value))
    place = file.seek(file.tell() + file.tell() % 2)
    file.write(struct.pack("<H", len(entries)))
    for tag, kind, count, value in entries:
        file.write(struct.pack("<HHII", tag, kind, count, value & 0xFFFFFFFF))
    link = file.tell()
    file.write(struct.pack("<Q", 0))
    file.write(struct.pack(f"<{len(entries)}I", *(value >> 32 for *_, value in entries)))
    return place, link


def _tags(image: NdpiImage, start: int, mpp: float) -> dict[int, Values]:
    width, height = image.size_px
    tags: dict[int, Values | None] = {
        256: (4, (width,)),
        257: (4, (height,)),
        258: (3, (8, 8, 8)),
        259: (3, (7,)),
        262: (3, (6,)),
        271: (2, b"Hamamatsu\0"),
        272: (2, b"C13210\0"),
        273: (_WIDE, (start,)),
        277: (3, (3,)),
        278: (4, (height,)),
        279: (_WIDE, (len(image.stream),)),
        282: (5, (round(1e7 / mpp), 1000)),
        283: (5, (round(1e7 / mpp), 1000)),
        296: (3, (3,)),
        65420: (3, (1,)),
        65421: (11, (image.lens,)),
        65422: (9, (12_538_720,)),
        65423: (9, (-96_063,)),
        65424: (9, (image.focus_nm,)),
    }
    if image.starts is not None:
        tags[65426] = (4, [start & 0xFFFFFFFF for start in image.starts])
        if image.with_high:
            tags[65432] = (4, [start >> 32 for start in image.starts])
    return {tag: value for tag, value in {**tags, **image.tags}.items() if value is not None}


def _pack(kind: int, count: int, values: Sequence[float]) -> bytes:
    if kind == _WIDE:
        return struct.pack("<Q", *values)
    return struct.pack("<" + _CODES[kind] * count, *values)


def _put(file: BinaryIO, data: bytes) -> int:
    start = file.tell()
    file.write(data)
    return start


def write_vms(
    folder: Path | str, picture: Picture, mpp: float = 0.5, interval_mcus: int = 16
) -> Path:
    """A Hamamatsu VMS of one JPEG file and its map, in a folder that exists; returns the .vms file."""
    folder = Path(folder)
    height, width = picture.shape[:2]
    (folder / "slide.jpg").write_bytes(encode(picture, interval_mcus))
    (folder / "slide_map.jpg").write_bytes(encode(shrink(picture, 16), width // 128))
    keys = {
        "NoLayers": 1, "NoJpegColumns": 1, "NoJpegRows": 1, "ImageFile": "slide.jpg",
        "MapFile": "slide_map.jpg", "SourceLens": 20, "PhysicalWidth": round(width * mpp * 1000),
        "PhysicalHeight": round(height * mpp * 1000),
    }  # fmt: skip
    lines = ["[Virtual Microscope Specimen]", *(f"{key}={value}" for key, value in keys.items())]
    path = folder / "slide.vms"
    path.write_text("\n".join(lines) + "\n")
    return path
