"""The instances of a folder sorted into slides: which are levels, which belong together.

PS3.3 A.32.8 and C.8.12.4. Only VOLUME images are levels. The pixels of LABEL, OVERVIEW, LOCALIZER and
THUMBNAIL images are never read; the first two can show a patient's name.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from online_patching.errors import (
    DamagedSlideError,
    ShortReadError,
    SlideError,
    UnsupportedSlideError,
)
from online_patching.formats import dicom_attributes as tags
from online_patching.formats.dicom_attributes import (
    Attributes,
    BadDicomError,
    PastEndError,
    StoredOtherwiseError,
)
from online_patching.formats.dicom_tags import Source, read_attributes
from online_patching.fragments import BadItemsError
from online_patching.stores import Listed

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_BRIGHTFIELD, _EPIFLUORESCENCE = "111744", "111743"
_MAX_PARTS = 1024


@dataclass(frozen=True)
class Instance:
    """One file: where it is, what its attributes say, and its bytes by position."""

    name: str
    uri: str = field(repr=False)
    size_bytes: int
    token: str
    found: Attributes = field(repr=False)
    source: Source = field(repr=False)
    is_level: bool
    slide: tuple[str, str]
    """Which slide of a folder it belongs to: its series, and its pyramid where it names one."""
    width: int
    height: int
    tile: tuple[int, int]
    frames: int
    offset: int
    """Frames of the concatenation before this part."""
    parts: int
    samples: int
    bits: tuple[int, int, int]
    """Allocated, stored, and whether they are signed."""
    optical_paths: int
    focal_planes: int
    """Of a frame each; 0 where the file does not say."""

    @classmethod
    def read(cls, name: str, at: Listed, source: Source, until: int = tags.PIXELS) -> Instance:
        """The instance in a file, as far as `until`; BadDicomError when its attributes cannot be read."""
        found = read_attributes(source, is_level, until)
        number, allocated = found.number, found.number(tags.ALLOCATED, 8)
        return cls(
            name, at.uri, at.size_bytes, at.token, found, source, is_level(found),
            (found.text(tags.SERIES), found.text(tags.PYRAMID)),
            number(tags.MATRIX_COLUMNS), number(tags.MATRIX_ROWS),
            (number(tags.COLUMNS), number(tags.ROWS)), number(tags.FRAMES, 1),
            number(tags.FRAME_OFFSET), number(tags.PARTS), number(tags.SAMPLES, 1),
            (allocated, number(tags.STORED, allocated), number(tags.SIGNED)),
            number(tags.N_PATHS, 1), number(tags.N_PLANES),
        )  # fmt: skip

    @property
    def kind(self) -> str:
        """VOLUME, LABEL, ... for messages."""
        whole_slide = self.found.text(tags.SOP_CLASS) == WHOLE_SLIDE
        return _third(self.found) or "unknown" if whole_slide else "unknown"

    @property
    def shown(self) -> str:
        """Its name in a message."""
        return " ".join(self.name.split())[:100]

    @property
    def paths(self) -> set[str]:
        """Identifiers of its optical paths."""
        return self.found.paths | self.found.words((tags.OPTICAL_PATHS, tags.PATH_ID))


def is_level(found: Attributes) -> bool:
    """Whether attributes are those of a VOLUME image: of the functional groups nothing is needed.

    Without an ImageType it is one when it has several frames and no label is said to be in it.
    """
    if found.text(tags.SOP_CLASS) != WHOLE_SLIDE:
        return False
    if tags.IMAGE_TYPE not in found.values:
        frames = found.number(tags.FRAMES, 1)
        return frames > 1 and found.text(tags.LABEL_IN_IMAGE) != "YES"
    return _third(found) == "VOLUME"


def says_no_level(head: bytes, size_bytes: int) -> bool:
    """Whether a file's first bytes say that it is no level: its pixels are not even to be fetched."""

    def no_more(ranges: list[tuple[int, int]]) -> list[bytes]:
        raise PastEndError(*ranges[0])

    try:
        found = read_attributes(Source(no_more, size_bytes, head), is_level, tags.IMAGE_TYPE + 1)
    except BadDicomError:
        return False
    return _third(found) not in ("", "VOLUME")


def _third(found: Attributes) -> str:
    """The value of ImageType that says what is seen."""
    parts = found.text(tags.IMAGE_TYPE).split("\\")
    known = ("VOLUME", "LABEL", "OVERVIEW", "LOCALIZER", "THUMBNAIL")
    return parts[2].strip() if len(parts) > 2 and parts[2].strip() in known else ""


def slides_of(instances: Iterable[Instance]) -> dict[tuple[str, str], list[Instance]]:
    """Instances by the slide they belong to; those that name no pyramid join their series' only one."""
    groups: dict[tuple[str, str], list[Instance]] = {}
    for item in instances:
        groups.setdefault(item.slide, []).append(item)
    for series, pyramid in list(groups):
        named = [key for key in groups if key[0] == series and key[1]]
        if not pyramid and len(named) == 1:
            groups[named[0]] = sorted(
                groups[named[0]] + groups.pop((series, "")), key=lambda item: item.name
            )
    return groups


def parts_of_levels(uri: str, instances: list[Instance]) -> list[list[Instance]]:
    """The levels of one slide, largest first, each as its parts in order. Checks what a part may be."""
    levels: dict[str, list[Instance]] = {}
    seen: set[str] = set()
    for item in instances:
        uid = item.found.text(tags.SOP_INSTANCE)
        if uid and uid in seen:  # a second copy of a file
            continue
        seen.add(uid)
        _check(uri, item)
        whole = item.found.text(tags.CONCATENATION)
        levels.setdefault(f"c{whole}" if whole else f"i{item.name}", []).append(item)
    parts = [_in_order(uri, found) for found in levels.values()]
    parts.sort(key=lambda found: (-found[0].width, -found[0].height, found[0].name))
    for one, other in itertools.pairwise(parts):
        if (one[0].width, one[0].height) == (other[0].width, other[0].height):
            raise UnsupportedSlideError(
                uri,
                f"{one[0].shown} and {other[0].shown} are both {one[0].width} x {one[0].height} px: several "
                "focal planes or stains in files of their own, not one pyramid. Leave one of them there.",
                "multiplex" if len(one[0].paths | other[0].paths) > 1 else "unsupported",
            )
    return parts


def _in_order(uri: str, parts: list[Instance]) -> list[Instance]:
    """The parts of a concatenation by their first frame; DamagedSlideError when one is missing."""
    parts = sorted(parts, key=lambda part: (part.offset, part.name))
    first = parts[0]
    if not first.found.text(tags.CONCATENATION):
        return parts
    expected, shape = 0, _shape(first)
    for number, part in enumerate(parts, 1):
        if part.offset != expected or _shape(part) != shape:
            raise DamagedSlideError(
                uri,
                f"part {number} of a concatenation ({part.shown}) begins at frame {part.offset:,}, not "
                f"{expected:,}: a part is missing or another's. Copy all of its files.",
            )
        expected += part.frames
    total = max(part.parts for part in parts)
    if total not in (0, len(parts)) or len(parts) > _MAX_PARTS:
        raise DamagedSlideError(
            uri,
            f"{len(parts)} of {total} parts of a concatenation are there. Copy all of its files.",
        )
    return parts


def _shape(part: Instance) -> tuple[object, ...]:
    """What all parts of a concatenation have in common."""
    return part.width, part.height, part.tile, part.samples, part.found.syntax


def _check(uri: str, item: Instance) -> None:
    """Refuse what is no picture of a stained slide in 8-bit colours."""
    found = item.found
    paths = max(
        item.optical_paths,
        len(item.paths),
        len(found.values.get(tags.OPTICAL_PATHS, [])),
    )
    light = found.words((tags.OPTICAL_PATHS, tags.ILLUMINATION, tags.CODE_VALUE))
    if paths > 1:
        raise UnsupportedSlideError(
            uri,
            f"{paths} optical paths ({item.shown}): many stains, not an RGB image.",
            "multiplex",
        )
    gray = item.samples == 1 and _BRIGHTFIELD not in light
    if _EPIFLUORESCENCE in light or gray:
        why = (
            "epifluorescence"
            if _EPIFLUORESCENCE in light
            else "gray and not said to be brightfield"
        )
        raise UnsupportedSlideError(
            uri, f"{why} ({item.shown}): not a stained slide.", "fluorescence"
        )
    if item.samples not in (1, 3) or item.bits != (8, 8, 0):
        raise UnsupportedSlideError(
            uri,
            f"{item.samples} sample(s) of {item.bits[1]} bits a pixel ({item.shown}): not 8-bit RGB.",
        )
    if found.text(tags.LABEL_IN_IMAGE) == "YES":
        raise UnsupportedSlideError(
            uri,
            f"the slide's label is said to be in its picture ({item.shown}): it may show a name.",
        )


def slide_error(
    uri: str, name: str, size_bytes: int, error: BadDicomError | BadItemsError
) -> SlideError:
    """What a caller is told about a file that cannot be read."""
    shown = " ".join(name.split())[:100]
    if isinstance(error, StoredOtherwiseError):
        return UnsupportedSlideError(uri, f"{shown}: {error}.")
    if isinstance(error, PastEndError):
        own = uri if uri.endswith(f"/{shown}") else f"{uri.rstrip('/')}/{shown}"
        return ShortReadError(own, error.start, error.stop, size_bytes)
    return DamagedSlideError(uri, f"{shown}: its DICOM attributes cannot be read: {error}.")
