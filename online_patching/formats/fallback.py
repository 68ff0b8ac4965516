"""Containers whose tiles are not independent byte ranges, through OpenSlide, else tiffslide.

Region by region, in child processes that may die (region_pool.py). The index says so: its container is
the reader's name and its levels have no tile rows. Remote objects are tiffslide's: OpenSlide reads only
files. Slides that consist of several files (MIRAX, VMS) are read from disk alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from online_patching.errors import DamagedSlideError, NotASlideError, UnsupportedSlideError
from online_patching.formats.region_pool import workers
from online_patching.formats.vendors import Mpp, refuse_fluorescence, require_mpp
from online_patching.slide_index import Codec, Level, SlideIndex
from online_patching.stores import is_remote, redact

_READERS = ("openslide", "tiffslide")
_SEVERAL_FILES = {
    ".mrxs": "MIRAX", ".vms": "Hamamatsu VMS", ".vmu": "Hamamatsu VMU", ".vsi": "Olympus VSI",
    ".ndpis": "Hamamatsu NDPIS",
}  # fmt: skip


def read_index(
    uri: str, slide_id: str, override: Mpp | None, size_bytes: int = 0, token: str = ""
) -> SlideIndex:
    """The index of whatever OpenSlide or tiffslide opens; NotASlideError with their reasons else.

    Of a remote object `size_bytes` and `token` are those that were found: no other version is read.
    """
    away = is_remote(uri)
    if away:
        _refuse_several_files(uri)
    reasons = []
    for reader in _READERS[1:] if away else _READERS:
        try:
            found = workers().describe(uri, reader, size_bytes, token)
        except DamagedSlideError as error:
            shown = redact(uri)
            why = " ".join(
                error.reason.replace(shown, shown.rpartition("/")[2]).split()
            )  # one line
            reasons.append(f"{reader}: {why[:140]}")
            continue
        return _index(uri, slide_id, reader, found, override)
    remedy = " What only OpenSlide opens must be copied to disk." if away else ""
    raise NotASlideError(uri, f"no reader opens it ({'; '.join(reasons)}).{remedy}")


def _refuse_several_files(uri: str) -> None:
    """Refuse remote slides whose picture is not in the file that names them."""
    kind = _SEVERAL_FILES.get(Path(redact(uri)).suffix.lower())
    if kind:
        raise UnsupportedSlideError(
            uri, f"{kind} lies in several files, which are read from disk only: copy them there."
        )


def _index(
    uri: str, slide_id: str, reader: str, found: dict[str, Any], override: Mpp | None
) -> SlideIndex:
    properties: dict[str, str] = found["properties"]
    if found["overlaps"]:
        raise UnsupportedSlideError(
            uri, "its tiles overlap (BIF, Trestle), which only OpenSlide undoes: copy it to disk."
        )
    refuse_fluorescence(uri, "\n".join(f"{k}={v}" for k, v in properties.items()))
    mpp = require_mpp(uri, override, _vendor_mpp(properties, reader))
    width, height = found["levels"][0]
    levels = []
    for number, (w, h) in enumerate(found["levels"]):
        tile = [
            int(properties.get(f"openslide.level[{number}].tile-{side}", 256))
            for side in ("width", "height")
        ]
        dx, dy = width / w, height / h
        levels.append(Level(w, h, tile[0], tile[1], dx, dy, mpp.x * dx, mpp.y * dy, Codec("raw")))
    return SlideIndex(
        slide_id, uri, reader, properties.get(f"{reader}.vendor", reader), mpp.x, mpp.y, mpp.source,
        tuple(levels), content_hash=properties.get("openslide.quickhash-1", ""),
    )  # fmt: skip


def _vendor_mpp(properties: dict[str, str], reader: str) -> Mpp | None:
    try:
        x, y = (float(properties[f"{reader}.mpp-{axis}"]) for axis in "xy")
        return Mpp(x, y, "vendor tag")
    except (KeyError, ValueError):
        return None
