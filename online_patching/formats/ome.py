"""What OME-XML says of the images in an OME-TIFF: their sizes, channels, µm/px, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass, field

from online_patching.errors import UnsupportedSlideError
from online_patching.formats.vendors import Mpp
from online_patching.formats.xml_events import StopReadingError, feed

_MICRONS = {
    "µm": 1.0,
    "μm": 1.0,
    "um": 1.0,
    "micrometer": 1.0,
    "mm": 1e3,
    "nm": 1e-3,
    "cm": 1e4,
    "m": 1e6,
}
_MAX_ELEMENTS, _MAX_XML_CHARS = 10_000, 2**20


@dataclass(frozen=True)
class OmeImage:
    """One Pixels element."""

    size_px: tuple[int, int]
    channels: int
    planes: int
    """Focal planes times points in time."""
    mpp: Mpp | None


@dataclass
class OmeFile:
    """All that is kept of a file's OME-XML; no text or name of it is."""

    images: list[OmeImage] = field(default_factory=list)
    files: int = 0
    """How many files its images lie in, as far as it says."""
    elsewhere: bool = False
    """Whether the metadata proper are in a companion file."""

    def image(self, size_px: tuple[int, int]) -> OmeImage | None:
        """What it says of the image of a size; of its only image, when sizes differ."""
        found = [image for image in self.images if image.size_px == size_px]
        return found[0] if found else self.images[0] if len(self.images) == 1 else None


def is_ome(description: str) -> bool:
    """Whether an ImageDescription is OME-XML."""
    return description[-10:].strip().endswith("OME>")


def read_ome(description: str) -> OmeFile:
    """What a description says, as far as it is XML and of reasonable length."""
    reading = _Reading()
    feed(description[:_MAX_XML_CHARS], reading)
    reading.found.files = len(reading.names)
    return reading.found


def refuse_parts(uri: str, ome: OmeFile) -> None:
    """Refuse a file that is only a part of its image."""
    if ome.elsewhere:
        raise UnsupportedSlideError(
            uri, "an OME-TIFF whose metadata lie in a companion file. Export it to one file."
        )
    if ome.files > 1:
        raise UnsupportedSlideError(
            uri, f"one of the {ome.files} files of an OME-TIFF. Export it to one file."
        )


def refuse_planes(uri: str, image: OmeImage | None, samples: int) -> None:
    """Refuse an image of many planes: channels apart, focal planes, points in time."""
    if image is None:
        return
    if samples == 1 and image.channels > 1:
        raise UnsupportedSlideError(
            uri,
            f"{image.channels} channels in planes of their own: fluorescence or multiplex.",
            "multiplex",
        )
    if image.planes > 1:
        raise UnsupportedSlideError(
            uri, f"a stack of {image.planes} planes (focus or time). Export the sharp one."
        )


class _Reading:
    """What a parser tells: no tree is built."""

    def __init__(self) -> None:
        self.found = OmeFile()
        self.names: set[str] = set()
        self._left = _MAX_ELEMENTS

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """An element begins."""
        self._left -= 1
        if not self._left:
            raise StopReadingError
        name = tag.rpartition("}")[2]
        if name == "Pixels":
            self.found.images.append(_image(attributes))
        elif name == "UUID" and "FileName" in attributes:
            self.names.add(attributes["FileName"])
        elif name == "BinaryOnly":
            self.found.elsewhere = True


def _image(attributes: dict[str, str]) -> OmeImage:
    def number(name: str) -> int:
        text = attributes.get(name, "1")
        return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else 1

    planes = number("SizeZ") * number("SizeT")
    return OmeImage((number("SizeX"), number("SizeY")), number("SizeC"), planes, _mpp(attributes))


def _mpp(attributes: dict[str, str]) -> Mpp | None:
    try:
        scale = [_MICRONS[attributes.get(f"PhysicalSize{a}Unit", "µm")] for a in "XY"]
        x, y = (float(attributes[f"PhysicalSize{a}"]) for a in "XY")
    except (KeyError, ValueError):
        return None
    return Mpp(x * scale[0], y * scale[1], "ome metadata")
