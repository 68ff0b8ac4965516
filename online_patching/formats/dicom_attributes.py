"""The DICOM attributes that we ask for, by name and tag (PS3.6), and what a file said of them.

Nothing that names a patient is among them, so that nothing of the kind can get further.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

UNDEFINED = 0xFFFFFFFF

IMAGE_TYPE, SOP_CLASS, SOP_INSTANCE, PYRAMID = 0x00080008, 0x00080016, 0x00080018, 0x00080019
MANUFACTURER, SERIES, CONCATENATION = 0x00080070, 0x0020000E, 0x00209161
IN_CONCATENATION, PARTS, FRAME_OFFSET = 0x00209162, 0x00209163, 0x00209228
ORGANIZATION, SAMPLES, PHOTOMETRIC, PLANAR = 0x00209311, 0x00280002, 0x00280004, 0x00280006
FRAMES, ROWS, COLUMNS, ALLOCATED = 0x00280008, 0x00280010, 0x00280011, 0x00280100
STORED, SIGNED, VOLUME_WIDTH, VOLUME_HEIGHT = 0x00280101, 0x00280103, 0x00480001, 0x00480002
MATRIX_COLUMNS, MATRIX_ROWS, LABEL_IN_IMAGE = 0x00480006, 0x00480007, 0x00480010
OPTICAL_PATHS, N_PATHS, N_PLANES = 0x00480105, 0x00480302, 0x00480303
ILLUMINATION, CODE_VALUE, PATH_ID = 0x00220016, 0x00080100, 0x00480106
SHARED, PER_FRAME = 0x52009229, 0x52009230
MEASURES, SPACING = 0x00289110, 0x00280030
PLACE, FRAME_PATH = 0x0048021A, 0x00480207
FRAME_COLUMN, FRAME_ROW, FRAME_HEIGHT = 0x0048021E, 0x0048021F, 0x0040074A
OFFSETS, LENGTHS, PIXELS = 0x7FE00001, 0x7FE00002, 0x7FE00010

Wanted = Mapping[int, "Wanted | None"]
"""Tags to read; those of a sequence name what is read of its items."""

_MEASURES: Wanted = {MEASURES: {SPACING: None}}
WANTED: Wanted = {
    **dict.fromkeys(
        (IMAGE_TYPE, SOP_CLASS, SOP_INSTANCE, PYRAMID, MANUFACTURER, SERIES, CONCATENATION,
         IN_CONCATENATION, PARTS, FRAME_OFFSET, ORGANIZATION, SAMPLES, PHOTOMETRIC, PLANAR, FRAMES,
         ROWS, COLUMNS, ALLOCATED, STORED, SIGNED, VOLUME_WIDTH, VOLUME_HEIGHT, MATRIX_COLUMNS,
         MATRIX_ROWS, LABEL_IN_IMAGE, N_PATHS, N_PLANES)
    ),
    OPTICAL_PATHS: {PATH_ID: None, ILLUMINATION: {CODE_VALUE: None}},
    SHARED: _MEASURES,
}  # fmt: skip
WANTED_PER_FRAME: Wanted = {
    PLACE: {FRAME_COLUMN: None, FRAME_ROW: None, FRAME_HEIGHT: None},
    FRAME_PATH: {PATH_ID: None},
    **_MEASURES,
}


class BadDicomError(Exception):
    """Why a file's attributes cannot be read; the caller adds which file."""


class PastEndError(BadDicomError):
    """Attributes, a table or a frame lie past the end: most likely the file was cut."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__(f"bytes {start:,}-{stop:,} of it lie past its end")
        self.start, self.stop = start, stop


class StoredOtherwiseError(BadDicomError):
    """A sound file in an encoding that we do not read."""


@dataclass
class Attributes:
    """What was read of one file. `values` maps a tag to its bytes, or to a list of such maps."""

    syntax: str
    values: dict[int, Any]
    columns: array[int] = field(default_factory=lambda: array("q"))
    rows: array[int] = field(default_factory=lambda: array("q"))
    """Each frame's place in the total pixel matrix, counted from 1: empty without per-frame groups."""
    heights: array[float] = field(default_factory=lambda: array("d"))
    """Each frame's height over the glass (ZOffsetInSlideCoordinateSystem); 0 where it has none."""
    paths: set[str] = field(default_factory=set)
    """Identifiers of the optical paths that frames name."""
    tables: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Start and bytes of the extended offset tables."""
    pixels: tuple[int, int] | None = None
    """Start and bytes (UNDEFINED: encapsulated) of the pixel data."""

    def text(self, tag: int) -> str:
        """A text without its padding; "" where there is none."""
        value = self.values.get(tag, b"")
        return value.decode("latin-1").strip(" \0") if isinstance(value, bytes) else ""

    def words(self, path: tuple[int, ...], values: dict[int, Any] | None = None) -> set[str]:
        """The texts at the end of a path of sequences, in all their items."""
        here = self.values if values is None else values
        value = here.get(path[0], b"")
        if isinstance(value, list):
            return (
                {text for item in value for text in self.words(path[1:], item)}
                if path[1:]
                else set()
            )
        return {value.decode("latin-1").strip(" \0")} if value and not path[1:] else set()

    def number(self, tag: int, default: int = 0) -> int:
        """An unsigned integer of 2 or 4 bytes, or one written in digits (FRAMES)."""
        value = self.values.get(tag, b"")
        if not value:
            return default
        if tag == FRAMES:
            digits = self.text(tag)
            if not (digits.isascii() and digits.isdigit() and len(digits) <= 12):
                raise BadDicomError(f"its number of frames is {digits[:20]!r}")
            return int(digits)
        if len(value) not in (2, 4):
            raise BadDicomError(f"{name_of(tag)} takes {len(value)} bytes, not 2 or 4")
        return int.from_bytes(value, "little")

    def spacing_mm(self) -> tuple[float, float] | None:
        """Pixel spacing (down, across) in mm; None when the file says nothing usable."""
        for item in self.values.get(SHARED, []):
            for measures in item.get(MEASURES, []):
                found = decimals(measures.get(SPACING, b""))
                if len(found) == 2 and min(found) > 0:
                    return found[0], found[1]
        return None

    def volume_mm(self) -> tuple[float, float] | None:
        """Width and height of the imaged volume in mm."""
        sides = [self.values.get(tag, b"") for tag in (VOLUME_WIDTH, VOLUME_HEIGHT)]
        if not all(len(side) == 4 for side in sides):
            return None
        width, height = (struct.unpack("<f", side)[0] for side in sides)
        return (width, height) if width > 0 and height > 0 else None


def decimals(value: bytes) -> list[float]:
    """The numbers of a decimal string; [] when it is none."""
    try:
        return [float(part) for part in value.decode("ascii").strip(" \0").split("\\")]
    except ValueError:
        return []


def name_of(tag: int) -> str:
    """A tag as DICOM writes it."""
    return f"({tag >> 16:04X},{tag & 0xFFFF:04X})"
