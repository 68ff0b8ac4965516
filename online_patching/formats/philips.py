"""Philips TIFF: what its XML says of µm/px and of the levels, whose sizes the TIFF tags pad to whole tiles.

The description holds names, dates, barcodes and pictures of the label: of all that only pixel spacings
are looked at. Level sizes are derived as OpenSlide derives them (openslide-vendor-philips-tiff.c).
"""

from __future__ import annotations

from dataclasses import dataclass

from online_patching.errors import DamagedSlideError
from online_patching.formats.vendors import Mpp
from online_patching.formats.xml_events import StopReadingError, feed

MAX_TEXT_BYTES = 16 * 2**20
"""Label and macro pictures lie in the description, a megabyte or two."""

_MAX_ELEMENTS, _MAX_DEPTH, _MAX_LEVELS, _MAX_VALUE_CHARS = 100_000, 64, 64, 128
_IMAGES, _LEVELS = "PIM_DP_SCANNED_IMAGES", "PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"
_KIND, _SPACING = "PIM_DP_IMAGE_TYPE", "DICOM_PIXEL_SPACING"

Spacing = tuple[float, float]
"""mm a pixel, across and down."""


@dataclass(frozen=True)
class PhilipsSlide:
    """µm/px of level 0, and by how much each level after it is smaller."""

    mpp: Mpp | None
    downsamples: tuple[int, ...]


def is_philips(software: bytes) -> bool:
    """Whether a TIFF's Software tag is Philips'."""
    return software.startswith(b"Philips")


def read_philips(uri: str, description: str, levels: int) -> PhilipsSlide:
    """What the description says of a file that holds so many tiled images."""
    reading = _Reading()
    feed(description, reading)
    if not reading.is_import or len(reading.slides) != 1:
        raise DamagedSlideError(
            uri, f"Philips metadata that name {len(reading.slides)} slides instead of one."
        )
    own, spacings = reading.slides[0]
    if len(spacings) != levels:
        raise DamagedSlideError(
            uri, f"Philips metadata name {len(spacings)} levels; the file holds {levels}."
        )
    # The level's own spacing is rounded to the whole downsample's: only ratios of it are meant.
    mpp = None if own is None else Mpp(own[0] * 1e3, own[1] * 1e3, "vendor tag")
    return PhilipsSlide(mpp, tuple(_ratio(uri, spacings[0], one) for one in spacings[1:]))


def _ratio(uri: str, first: Spacing, other: Spacing) -> int:
    found = round((other[0] / first[0] + other[1] / first[1]) / 2)
    if not 1 < found < 2**20:
        raise DamagedSlideError(uri, f"Philips metadata name a level {found} times smaller.")
    return found


class _Reading:
    """What a parser tells: pixel spacings of each slide image (type WSI), and of its levels."""

    def __init__(self) -> None:
        self.is_import = False
        self.slides: list[tuple[Spacing | None, list[Spacing]]] = []
        self._names: list[str] = []
        """Names of the Attribute elements that are open, "" for other elements."""
        self._text: list[str] | None = None
        self._kind = ""
        self._own: Spacing | None = None
        self._levels: list[Spacing] = []
        self._left = _MAX_ELEMENTS

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """An element begins."""
        self._left -= 1
        if not self._left or len(self._names) > _MAX_DEPTH:
            raise StopReadingError
        if not self._names:
            self.is_import = tag == "DataObject" and attributes.get("ObjectType") == "DPUfsImport"
            if not self.is_import:
                raise StopReadingError
        self._names.append(attributes.get("Name", "") if tag == "Attribute" else "")
        wanted = self._names[-1] in (_KIND, _SPACING)
        self._text = [] if wanted else None

    def data(self, text: str) -> None:
        """Characters of an element."""
        if self._text is not None and sum(map(len, self._text)) < _MAX_VALUE_CHARS:
            self._text.append(text)

    def end(self, tag: str) -> None:
        """An element ends."""
        name = self._names.pop()
        path = [one for one in self._names if one]
        value = "".join(self._text or ())[:_MAX_VALUE_CHARS].strip()
        self._text = None
        if path == [_IMAGES] and name == _KIND:
            self._kind = value
        elif path == [_IMAGES] and name == _SPACING:
            self._own = _spacing(value)
        elif path == [_IMAGES, _LEVELS] and name == _SPACING:
            found = _spacing(value)
            if found is not None and len(self._levels) < _MAX_LEVELS:
                self._levels.append(found)
        elif path == [_IMAGES] and tag == "DataObject":
            if self._kind == "WSI":
                self.slides.append((self._own, self._levels))
            self._kind, self._own, self._levels = "", None, []


def _spacing(value: str) -> Spacing | None:
    """The two numbers of a DICOM_PIXEL_SPACING, which names the rows' first."""
    try:
        down, across = (float(part) for part in value.replace('"', " ").split())
    except ValueError:
        return None
    return (across, down) if 0 < across < 1e3 and 0 < down < 1e3 else None
