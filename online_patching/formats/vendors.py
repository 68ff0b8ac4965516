"""What vendors write where: µm per pixel, and which images are not to be trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser, ParseError

from online_patching.errors import MppError, UnsupportedSlideError
from online_patching.slide_index import MPP_OVERRIDE, SlideIndex

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
_MAX_ELEMENTS, _MAX_XML_CHARS = 10_000, 2**20  # OME-XML names its pixels near its start
_UNIT_UM = {2: 25_400.0, 3: 10_000.0}
"""TIFF ResolutionUnit: 2 inch, 3 centimetre; 1 means that the numbers carry no unit."""


@dataclass(frozen=True)
class Mpp:
    """µm/px by axis and where it came from: vendor tag, ome metadata, resolution tag, override table.

    Only the override table's two values may differ by more than a scanner's would.
    """

    x: float
    y: float
    source: str

    @classmethod
    def override(cls, mpp: float | tuple[float, float], uri: str = "the override") -> Mpp:
        """µm/px that somebody gave for a slide: one value, or x and y."""
        try:
            x, y = (float(v) for v in (mpp if isinstance(mpp, (tuple, list)) else (mpp, mpp)))
        except (TypeError, ValueError):
            told = f"{mpp!r} is no µm/px: give one number, or two (x, y)."
            raise MppError(uri, told, "bad_mpp") from None
        return cls(x, y, MPP_OVERRIDE)


def aperio_mpp(description: str) -> Mpp | None:
    """`MPP = 0.499` in an Aperio ImageDescription."""
    match = re.search(r"\|\s*MPP\s*=\s*([0-9.eE+-]{1,32})", description)
    try:
        return Mpp(float(match[1]), float(match[1]), "vendor tag") if match else None
    except ValueError:
        return None


def resolution_mpp(x: Any, y: Any, unit: int) -> Mpp | None:
    """TIFF's XResolution, YResolution (rationals) and ResolutionUnit; None when they say nothing."""
    try:
        per_unit = [pair[0] / pair[1] for pair in (x, y)]
        um = _UNIT_UM[int(unit)]
        return Mpp(um / per_unit[0], um / per_unit[1], "resolution tag")
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError):
        return None


def ome_mpp(description: str) -> Mpp | None:
    """PhysicalSizeX and Y of the first image in OME-XML."""
    pixels = _FirstPixels()
    parser = DefusedXMLParser(target=pixels, forbid_dtd=True)
    try:
        parser.feed(description[:_MAX_XML_CHARS])
    except _StopReadingError:
        pass
    except (ParseError, DefusedXmlException, ValueError, LookupError):
        return None  # malformed or hostile XML says nothing about µm/px
    try:
        scale = [_MICRONS[pixels.found.get(f"PhysicalSize{a}Unit", "µm")] for a in "XY"]
        x, y = (float(pixels.found[f"PhysicalSize{a}"]) for a in "XY")
    except (KeyError, ValueError):
        return None
    return Mpp(x * scale[0], y * scale[1], "ome metadata")


class _StopReadingError(Exception):
    """Enough of the XML was seen."""


class _FirstPixels:
    """What a parser tells: no tree is built, and reading ends at the first Pixels element."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        self._left = _MAX_ELEMENTS

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        """An element begins."""
        self._left -= 1
        if tag.rpartition("}")[2] == "Pixels":
            self.found = attributes
        elif self._left:
            return
        raise _StopReadingError


def require_mpp(uri: str, *candidates: Mpp | None) -> Mpp:
    """The first µm/px there is; MppError when the slide carries none."""
    for found in candidates:
        if found is not None:
            return found
    raise MppError(
        uri,
        "carries no µm/px (no vendor tag, no resolution tag with a unit). "
        "Add it to the µm/px override table (columns file,mpp).",
    )


def refuse_fluorescence(uri: str, text: str) -> None:
    """Refuse what vendors mark as fluorescence or multiplex in their own words."""
    if "PerkinElmer-QPI-ImageDescription" in text:
        raise UnsupportedSlideError(
            uri, "multiplex fluorescence (PerkinElmer QPI), not a stained slide.", "multiplex"
        )
    match = re.search(r"ExcitationWaveLength=([0-9]{1,18})", text)
    if match and int(match[1]) > 0:
        raise UnsupportedSlideError(
            uri, f"fluorescence (excitation at {match[1]} nm), not a stained slide.", "fluorescence"
        )


def with_override(index: SlideIndex, override: Mpp | None) -> SlideIndex:
    """The index with the override's µm/px, where there is one."""
    return index if override is None else index.with_mpp(override.x, override.y, override.source)
