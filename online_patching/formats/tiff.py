"""Tiled TIFF -> SlideIndex: Aperio SVS, generic pyramids, OME-TIFF (levels in SubIFDs), Philips.

tiff_tags.py reads the tags, tiff_page.py says how a page is stored, tiff_levels.py reads the tile tables;
here it is decided which pages are the pyramid. Label and macro pages, which can carry a patient's name,
are recognised by what they are not (tiled, and of the slide's shape) and their pixels are never read. Of
descriptions, which hold names of people and files, only numbers are kept.
"""

from __future__ import annotations

from functools import partial

from online_patching.errors import (
    DamagedSlideError,
    NotASlideError,
    ShortReadError,
    UnsupportedSlideError,
)
from online_patching.formats import ndpi, vendors
from online_patching.formats.ome import OmeFile, is_ome, read_ome, refuse_parts, refuse_planes
from online_patching.formats.philips import MAX_TEXT_BYTES, is_philips, read_philips
from online_patching.formats.tiff_levels import Source, read_levels, without_gaps
from online_patching.formats.tiff_page import (
    MACRO_FLAG,
    REDUCED_FLAG,
    Page,
    codec_of,
    refuse_pixels,
)
from online_patching.formats.tiff_tags import (
    BadTagError,
    FarOffsetsError,
    PastEndError,
    TiffTags,
)
from online_patching.formats.vendors import Mpp
from online_patching.slide_index import SlideIndex
from online_patching.stores import Stores, redact

_MAX_SUB_DIRECTORIES = 64
_MAX_TEXT_BYTES = 2**20
_DESCRIPTION, _SOFTWARE, _XMP = 270, 305, 700
_LEICA = "http://www.leica-microsystems.com/scn/"
_XMP_BYTES = 64 * 2**10


def is_tiff(head: bytes) -> bool:
    """Whether a file starts as a TIFF or BigTIFF does."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def read_index(
    uri: str, slide_id: str, override: Mpp | None, stores: Stores, size: int, token: str
) -> SlideIndex | None:
    """The index of a tiled 8-bit TIFF, or of an NDPI (ndpi.py); None when it needs a fallback reader.

    Takes at most about 64 MiB and a second whatever the file says, and over a network at most
    `tiff_tags.MAX_REQUESTS` requests.
    """
    try:
        tags = TiffTags(partial(_fetch, uri, stores, token), size)
        if tags.directories and ndpi.FLAG in tags.directories[0]:
            return ndpi.read_index(uri, slide_id, override, stores, size, token, tags.reader)
        return _from_tags(tags, uri, slide_id, override)
    except FarOffsetsError:  # beyond 4 GiB only an NDPI says what a classic TIFF's offsets mean
        return ndpi.read_index(uri, slide_id, override, stores, size, token)
    except PastEndError as error:
        raise ShortReadError(redact(uri), error.start, error.stop, size) from None
    except BadTagError as error:
        raise DamagedSlideError(redact(uri), f"its TIFF headers cannot be read: {error}.") from None


def _fetch(uri: str, stores: Stores, token: str, start: int, stop: int) -> bytes:
    return stores.read(uri, start, stop, token)


def _from_tags(tags: TiffTags, uri: str, slide_id: str, override: Mpp | None) -> SlideIndex | None:
    name = redact(uri)
    if not tags.directories:
        raise NotASlideError(
            name,
            "a TIFF without a single image. It is truncated or still uploading: copy it again.",
        )
    pages = [Page.of(directory) for directory in tags.directories]
    first = pages[0]
    if is_philips(first.tags.first_bytes(_SOFTWARE, 64)) and first.is_tiled:
        return _philips(tags, pages, uri, slide_id, override)
    description = first.tags.text(_DESCRIPTION, _MAX_TEXT_BYTES)
    vendors.refuse_fluorescence(name, description)
    if _is_elsewhere(first, description):
        return None
    ome = read_ome(description) if is_ome(description) else None
    carried = None
    if ome is not None:
        refuse_parts(name, ome)
        first = max((page for page in pages if page.is_tiled), key=_area, default=first)
        image = ome.image((first.width, first.height))
        refuse_planes(name, image, first.samples)
        carried = image.mpp if image else None
    refuse_pixels(name, first)
    _refuse_channels(name, first, pages)
    levels = _pyramid(tags, first, pages, ome)
    sources = _sources(name, levels)
    if not sources:
        return None
    svs = description.startswith("Aperio")
    found = vendors.require_mpp(
        name,
        override,
        vendors.aperio_mpp(description) if svs else None,
        carried,
        vendors.resolution_mpp(
            first.tags.rational(282), first.tags.rational(283), first.tags.number(296, 2)
        ),
    )
    rows = read_levels(name, sources, found, tags.reader)
    container, vendor = (
        ("svs", "aperio") if svs else ("ome-tiff", "ome") if ome else ("tiff", "generic")
    )
    return SlideIndex(
        slide_id, uri, container, vendor, found.x, found.y, found.source,
        without_gaps(rows) if svs else rows,
    )  # fmt: skip


def _is_elsewhere(first: Page, description: str) -> bool:
    """Whether tiles overlap, or lie where a vendor's metadata say: Leica SCN, Ventana BIF, Trestle.

    Their first page may look like a slide, and be a macro image.
    """
    return (
        _LEICA in description
        or b"iScan" in first.tags.first_bytes(_XMP, _XMP_BYTES)
        or first.tags.first_bytes(_SOFTWARE, 64).startswith(b"MedScan")
    )


def _area(page: Page) -> int:
    return page.width * page.height


def _refuse_channels(name: str, first: Page, pages: list[Page]) -> None:
    same = sum(1 for p in pages if (p.width, p.height, p.samples) == (first.width, first.height, 1))
    if same > 1:
        raise UnsupportedSlideError(
            name, f"{same} gray channels: fluorescence or multiplex.", "multiplex"
        )


def _pyramid(tags: TiffTags, first: Page, pages: list[Page], ome: OmeFile | None) -> list[Page]:
    """The slide's page and the smaller tiled pages of its shape, largest first; [] when it is not tiled.

    Other pages of an OME-TIFF are images of their own where its levels lie in SubIFDs, or where it names
    several images and does not call them reduced.
    """
    if not first.is_tiled:
        return []
    subs = [Page.of(d) for d in tags.sub_directories(first.tags, _MAX_SUB_DIRECTORIES)]
    others = [page for page in pages if page is not first]
    if ome is not None and subs:
        others = []
    elif ome is not None and len(ome.images) > 1:
        others = [page for page in others if page.tags.number(254) & REDUCED_FLAG]
    levels = {first.width: first}
    for page in (*others, *subs):
        if page.width not in levels and _is_reduction(first, page):
            levels[page.width] = page
    return [levels[width] for width in sorted(levels, reverse=True)]


def _is_reduction(first: Page, page: Page) -> bool:
    if not page.is_tiled or (page.samples, page.pixel) != (first.samples, first.pixel):
        return False
    if page.tags.number(254) & MACRO_FLAG or page.width >= first.width:
        return False
    text = page.tags.text(_DESCRIPTION, _MAX_TEXT_BYTES).lower().rpartition("\n")[2][:40]
    if "label" in text or "macro" in text:
        return False
    rx, ry = first.width / page.width, first.height / page.height
    slack = 2 * max(rx / page.width, ry / page.height)  # sizes are rounded to whole pixels
    return abs(rx - ry) <= max(slack, 0.01 * rx)


def _sources(name: str, levels: list[Page]) -> list[Source]:
    """What the levels are read from; [] when only a fallback reader can tell how one is stored."""
    out = []
    for page in levels:
        refuse_pixels(name, page)
        codec = codec_of(name, page)
        if codec is None:
            return []
        downsample = levels[0].width / page.width, levels[0].height / page.height
        out.append(Source(page, codec, (page.width, page.height), downsample))
    return out


def _philips(
    tags: TiffTags, pages: list[Page], uri: str, slide_id: str, override: Mpp | None
) -> SlideIndex | None:
    """Philips' levels are the tiled pages; all but the first are smaller than their padding says."""
    name, first = redact(uri), pages[0]
    levels = [page for page in pages if page.is_tiled]
    refuse_pixels(name, first)
    slide = read_philips(name, first.tags.text(_DESCRIPTION, MAX_TEXT_BYTES), len(levels))
    sources = []
    for page, downsample in zip(levels, (1, *slide.downsamples), strict=True):
        refuse_pixels(name, page)
        codec = codec_of(name, page)
        if codec is None:
            return None
        size = (first.width // downsample, first.height // downsample)
        if not 0 < size[0] <= page.width or not 0 < size[1] <= page.height:
            raise DamagedSlideError(
                name,
                f"a level {downsample} times smaller is {size[0]} x {size[1]} px; "
                f"its tiles hold {page.width} x {page.height}.",
            )
        sources.append(Source(page, codec, size, (float(downsample), float(downsample))))
    found = vendors.require_mpp(name, override, slide.mpp)
    return SlideIndex(
        slide_id, uri, "philips-tiff", "philips", found.x, found.y, found.source,
        read_levels(name, sources, found, tags.reader),
    )  # fmt: skip
