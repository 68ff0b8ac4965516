"""What vendors write where: µm per pixel, and which images are not to be trained on."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from online_patching.errors import MppError, UnsupportedSlideError
from online_patching.slide_index import MPP_OVERRIDE

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
