"""Philips TIFF, Leica SCN and Ventana BIF, as far as OpenSlide looks at them.

Each carries what must never be read or kept: names in its metadata, and a label whose pixels are pure red.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from online_patching.testing.raw_tiff import RawImage, Value, ascii_text, build_tiff, longs
from online_patching.testing.tiff_codecs import Coding, Layout, coded_image, resolution
from online_patching.testing.writers import Picture, encode_jpeg

PERSON = "Jane-Doe-1955"
"""A name in every file's metadata."""
JPEG = Coding(7, 6, subsampling="4:2:2", tables=True)
SQUARE = Layout((64, 64))
_LEICA = "http://www.leica-microsystems.com/scn/2010/10/01"
_NM = 1000


def write_images(path: Path, images: Sequence[RawImage], *, big: bool = True) -> Path:
    """A TIFF at `path` of what the functions below give; returns the path."""
    path.write_bytes(build_tiff(images, big=big))
    return path


def label(width: int = 60, height: int = 40) -> Picture:
    """Pure red."""
    return np.full((height, width, 3), (255, 0, 0), np.uint8)


def philips_images(
    levels: Sequence[Picture],
    *,
    mpp: tuple[float, float] = (0.25, 0.2502),
    coding: Coding = JPEG,
    layout: Layout = SQUARE,
    names: int | None = None,
) -> list[RawImage]:
    """The directories of a Philips TIFF: every level padded to whole tiles and its tags saying the padded size.

    The first picture's sides are whole tiles already, as Philips' are. Level i's pixel spacing is level 0's
    times the whole downsample; the slide's own is another, more exact one. The label lies in the metadata
    and in a page of its own. `names`: how many levels the metadata name, all by default.
    """
    width = levels[0].shape[1]
    downs = [round(width / picture.shape[1]) for picture in levels]
    text = _philips_xml(mpp, downs[: len(levels) if names is None else names])
    images = []
    for number, picture in enumerate(levels):
        tags: dict[int, Value] = {305: ascii_text("Philips DP v1.0")}
        tags[270 if number == 0 else 254] = ascii_text(text) if number == 0 else longs(1)
        lacks = (
            (0, -picture.shape[0] % layout.tile_px[1]),
            (0, -picture.shape[1] % layout.tile_px[0]),
            (0, 0),
        )
        padded = np.pad(picture, lacks, mode="constant", constant_values=255)
        # Of tiles that are not stored, only level 0's are asked for.
        own = layout if number == 0 else Layout(layout.tile_px)
        images.append(coded_image(padded, coding, own, tags))
    images.append(_strip(label(), {270: ascii_text("Label"), 254: longs(1)}))
    return images


def _philips_xml(mpp: tuple[float, float], downsamples: Sequence[int]) -> str:
    picture = base64.b64encode(encode_jpeg(label())).decode()

    def attribute(name: str, value: str) -> str:
        return f'<Attribute Name="{name}" Group="0x301D" Element="0x0000" PMSVR="IString">{value}</Attribute>'

    def spacing(x_um: float, y_um: float) -> str:  # rows first, as DICOM has it
        return attribute(
            "DICOM_PIXEL_SPACING", f"&quot;{y_um / 1000:.9f}&quot; &quot;{x_um / 1000:.9f}&quot;"
        )

    levels = "".join(
        f'<DataObject ObjectType="PixelDataRepresentation">{spacing(0.25 * d, 0.25 * d)}'
        f"{attribute('PIIM_PIXEL_DATA_REPRESENTATION_NUMBER', str(number))}</DataObject>"
        for number, d in enumerate(downsamples)
    )
    sequence = attribute("PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE", f"<Array>{levels}</Array>")
    images = "".join(
        f'<DataObject ObjectType="DPScannedImage">{body}</DataObject>'
        for body in (
            attribute("PIM_DP_IMAGE_TYPE", "LABELIMAGE") + attribute("PIM_DP_IMAGE_DATA", picture)
            + spacing(9, 9),
            spacing(*mpp) + sequence + attribute("PIM_DP_IMAGE_TYPE", "WSI"),
        )
    )  # fmt: skip
    return (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        + attribute("DICOM_OPERATORS_NAME", PERSON)
        + attribute("PIM_DP_SCANNED_IMAGES", f"<Array>{images}</Array>")
        + "</DataObject>"
    )


def leica_images(levels: Sequence[Picture], macro: Picture, mpp: float = 0.5) -> list[RawImage]:
    """The directories of a Leica SCN: first a tiled macro image that spans the glass, then the slide's levels."""
    height, width = levels[0].shape[:2]
    nm = round(mpp * _NM)
    glass = (4 * width * nm, 4 * height * nm)

    def image(pages: Sequence[tuple[int, Picture]], view: str) -> str:
        sizes = "".join(
            f'<dimension sizeX="{p.shape[1]}" sizeY="{p.shape[0]}" r="{r}" ifd="{ifd}"/>'
            for r, (ifd, p) in enumerate(pages)
        )
        settings = (
            "<scanSettings><objectiveSettings><objective>20</objective></objectiveSettings>"
            "<illuminationSettings><illuminationSource>brightfield</illuminationSource>"
            "<numericalAperture>0.4</numericalAperture></illuminationSettings></scanSettings>"
        )
        return f'<image name="{PERSON}"><pixels>{sizes}</pixels>{view}{settings}</image>'

    text = (
        f'<?xml version="1.0"?><scn xmlns="{_LEICA}">'
        f'<collection name="{PERSON}" sizeX="{glass[0]}" sizeY="{glass[1]}">'
        + image([(0, macro)], _view(*glass, 0, 0))
        + image(
            list(enumerate(levels, start=1)),
            _view(width * nm, height * nm, width * nm, height * nm),
        )
        + "</collection></scn>"
    )
    pages = [macro, *levels]
    return [
        coded_image(page, JPEG, Layout((64, 64)), {270: ascii_text(text) if n == 0 else ascii_text("x"),
                                                  **resolution(mpp * width / page.shape[1])})
        for n, page in enumerate(pages)
    ]  # fmt: skip


def _view(width: int, height: int, left: int, top: int) -> str:
    return f'<view sizeX="{width}" sizeY="{height}" offsetX="{left}" offsetY="{top}"/>'


def ventana_images(levels: Sequence[Picture], overlap_px: int = 8) -> list[RawImage]:
    """The directories of a Ventana BIF of one area of interest, whose tiles overlap by a few pixels across.

    Its label comes first, tiled; levels halve. Level 0's pixels are tiles as scanned, not a picture.
    """
    side = 64
    across, down = (-(-n // side) for n in (levels[0].shape[1], levels[0].shape[0]))
    joints = "".join(
        f'<TileJointInfo FlagJoined="1" Confidence="100" Direction="{direction}" Tile1="{a}" '
        f'Tile2="{b}" OverlapX="{overlap_px if direction == "RIGHT" else 0}" OverlapY="0"/>'
        for direction, a, b in _joints(across, down)
    )
    area = (
        f'<EncodeInfo><SlideStitchInfo><ImageInfo AOIScanned="1" AOIIndex="0" Width="{side}" '
        f'Height="{side}" NumRows="{down}" NumCols="{across}" Pos-X="0" Pos-Y="0">{joints}</ImageInfo>'
        '</SlideStitchInfo><AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>'
    )
    scan = f'<iScan Magnification="20" ScanRes="0.465" OperatorID="{PERSON}"><AOI0/></iScan>'
    layout = Layout((side, side))
    images = [
        coded_image(label(256, 192), JPEG, layout, {270: ascii_text("Label_Image"), 700: (1, scan.encode())})
    ]  # fmt: skip
    for number, picture in enumerate(levels):
        tags = {270: ascii_text(f"level={number} mag={20 / 2**number:g} quality=90")}
        if number == 0:
            tags[700] = (1, area.encode())
        images.append(coded_image(picture, JPEG, layout, tags))
    return images


def _joints(across: int, down: int) -> list[tuple[str, int, int]]:
    """Direction and numbers of neighbouring tiles: from the bottom row up, every other row backwards."""

    def number(column: int, row: int) -> int:
        up = down - 1 - row
        return up * across + (across - 1 - column if up % 2 else column) + 1

    right = [
        ("RIGHT", number(c, r), number(c + 1, r)) for r in range(down) for c in range(across - 1)
    ]
    return right + [
        ("UP", number(c, r + 1), number(c, r)) for r in range(down - 1) for c in range(across)
    ]


def _strip(picture: Picture, tags: dict[int, Value]) -> RawImage:
    """A page in one strip: what a label is stored as."""
    return RawImage(
        (picture.shape[1], picture.shape[0]),
        [picture.tobytes()],
        None,
        compression=1,
        tags=dict(tags),
    )
