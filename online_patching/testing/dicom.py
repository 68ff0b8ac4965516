"""DICOM whole-slide images, written byte by byte, in every way that readers must cope with.

    write_dicom("folder", [level0, level1], mpp=0.5, syntax="jpeg", table="basic")

Each level becomes an instance (or the parts of a concatenation). Elements are encoded here, so that what
a test checks was not written by the library it is checked against; wsidicom, pydicom and OpenSlide open it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from online_patching.testing.writers import encode_jpeg

Picture = NDArray[np.uint8]
_ROOT = "1.2.826.0.1.3680043.8.498."
WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
_LONG = frozenset("OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_UNDEFINED = 0xFFFFFFFF

SYNTAXES = {
    "explicit": "1.2.840.10008.1.2.1", "implicit": "1.2.840.10008.1.2", "rle": "1.2.840.10008.1.2.5",
    "jpeg": "1.2.840.10008.1.2.4.50", "jpeg_extended": "1.2.840.10008.1.2.4.51",
    "jpeg2000_lossless": "1.2.840.10008.1.2.4.90", "jpeg2000": "1.2.840.10008.1.2.4.91",
    "htj2k": "1.2.840.10008.1.2.4.201", "jpegls": "1.2.840.10008.1.2.4.80",
}  # fmt: skip

Element = tuple[int, str, "bytes | list[list[Element]]"]
"""Tag, value representation, and value: bytes, or a sequence's items as lists of elements."""


@dataclass(frozen=True)
class Written:
    """How a slide is written. Everything has the value that scanners use most.

    `syntax` is a key of SYNTAXES. `photometric` "" is the usual one of the syntax. `table` says where
    frames are listed; `undefined` writes sequences and items without lengths. `missing` are tiles
    (level, row, column) left out of a sparse slide. `parts` above 1 makes level 0 a concatenation.
    `planes` are focal planes: plane p is the picture with p * 10 added. `extra` elements are added to
    each instance, `shared_spacing` False leaves the spacing to the imaged volume.
    """

    tile_px: tuple[int, int] = (64, 48)
    mpp: float = 0.5
    syntax: str = "jpeg"
    photometric: str = ""
    table: Literal["basic", "extended", "none"] = "basic"
    organization: Literal["TILED_FULL", "TILED_SPARSE", ""] = "TILED_FULL"
    undefined: bool = False
    missing: frozenset[tuple[int, int, int]] = frozenset()
    parts: int = 1
    planes: int = 1
    planar: bool = False
    fragments: int = 1
    series: str = "7"
    pyramid: str = ""
    shared_spacing: bool = True
    label: bool = False
    gray: bool = False
    jpeg: Callable[[Picture], bytes] = encode_jpeg
    transform: bool | None = None
    """JPEG 2000's own colour transform, where it is not the one that the photometric names."""
    extra: Sequence[Element] = ()
    values: Mapping[int, Element] = field(default_factory=dict)
    """Elements that take the place of those of the same tag; a VR of "" leaves the tag out."""


def write_dicom(folder: Path | str, levels: Sequence[Picture], how: Written | None = None) -> Path:
    """A folder of instances: level-<n>.dcm, or level-0-<part>.dcm, and label.dcm and overview.dcm."""
    how = how or Written()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(levels):
        parts = how.parts if number == 0 else 1
        for part in range(parts):
            name = f"level-{number}-{part}.dcm" if parts > 1 else f"level-{number}.dcm"
            (folder / name).write_bytes(
                instance(picture, number, levels[0].shape[1] / picture.shape[1], how, part, parts)
            )
    if how.label:
        red = np.zeros((60, 50, 3), np.uint8)
        red[..., 0] = 255
        for number, kind in enumerate(("LABEL", "OVERVIEW", "THUMBNAIL"), 90):
            image = replace(
                how, tile_px=(50, 60), parts=1, planes=1, missing=frozenset(), organization="TILED_FULL",
                values={**how.values, 0x00080008: text(0x00080008, "CS", f"ORIGINAL\\PRIMARY\\{kind}\\NONE")},
            )  # fmt: skip
            (folder / f"{kind.lower()}.dcm").write_bytes(instance(red, number, 1.0, image, 0, 1))
    return folder


def instance(
    picture: Picture, level: int, downsample: float, how: Written, part: int, parts: int
) -> bytes:
    """The bytes of one file."""
    frames = list(_frames(picture, level, how))
    first = part * len(frames) // parts
    mine = frames[first : (part + 1) * len(frames) // parts]
    encoded = [_encode(frame, how) for _, frame in mine]
    syntax = SYNTAXES[how.syntax]
    uid = f"{_ROOT}{how.series}.{level}.{part}"
    elements = _attributes(picture, level, downsample, how, [place for place, _ in mine])
    elements += [text(0x00080016, "UI", WHOLE_SLIDE), text(0x00080018, "UI", uid)]
    if parts > 1:
        elements += [
            text(0x00209161, "UI", f"{_ROOT}{how.series}.99"), _short(0x00209162, part + 1),
            _short(0x00209163, parts), _long(0x00209228, first),
        ]  # fmt: skip
    native = how.syntax in ("explicit", "implicit")
    pixels = b"".join(encoded) if native else b""
    if not native and how.table == "extended":
        starts, lengths = _starts(encoded, how.fragments), [len(_even(frame)) for frame in encoded]
        elements += [(0x7FE00001, "OV", struct.pack(f"<{len(starts)}Q", *starts)),
                     (0x7FE00002, "OV", struct.pack(f"<{len(lengths)}Q", *lengths))]  # fmt: skip
    chosen = {element[0]: element for element in [*elements, *how.extra]} | dict(how.values)
    data = b"".join(
        encode_element(element, how.syntax == "implicit", how.undefined)
        for _, element in sorted(chosen.items())
        if element[1]
    )
    if native:
        data += encode_element((0x7FE00010, "OB", pixels), how.syntax == "implicit")
    else:
        data += _tag(0x7FE00010) + b"OB\0\0" + struct.pack("<I", _UNDEFINED)
        data += _encapsulated(encoded, how)
    meta = b"".join(
        encode_element(element)
        for element in (
            (0x00020001, "OB", b"\0\1"), text(0x00020002, "UI", WHOLE_SLIDE), text(0x00020003, "UI", uid),
            text(0x00020010, "UI", syntax), text(0x00020012, "UI", _ROOT + "1"),
        )
    )  # fmt: skip
    return bytes(128) + b"DICM" + encode_element(_long(0x00020000, len(meta))) + meta + data


def encode_element(element: Element, implicit: bool = False, undefined: bool = False) -> bytes:
    """An element as bytes; a sequence's items with lengths, or without."""
    tag, kind, value = element
    if isinstance(value, list):
        items = b""
        for item in value:
            body = b"".join(encode_element(inner, implicit, undefined) for inner in item)
            if undefined:
                items += _tag(0xFFFEE000) + struct.pack("<I", _UNDEFINED) + body
                items += _tag(0xFFFEE00D) + bytes(4)
            else:
                items += _tag(0xFFFEE000) + struct.pack("<I", len(body)) + body
        value = items + (_tag(0xFFFEE0DD) + bytes(4) if undefined else b"")
        length = _UNDEFINED if undefined else len(items)
    else:
        value += b"\0" * (len(value) % 2)
        length = len(value)
    if implicit:
        return _tag(tag) + struct.pack("<I", length) + value
    if kind in _LONG:
        return _tag(tag) + kind.encode() + b"\0\0" + struct.pack("<I", length) + value
    return _tag(tag) + kind.encode() + struct.pack("<H", length) + value


def text(tag: int, kind: str, value: str) -> Element:
    """An element of characters, padded as its kind wants."""
    data = value.encode()
    return tag, kind, data + (b"\0" if kind == "UI" else b" ") * (len(data) % 2)


def _attributes(
    picture: Picture, level: int, downsample: float, how: Written, places: list[tuple[int, int, int]]
) -> list[Element]:  # fmt: skip
    height, width = picture.shape[:2]
    mm = how.mpp * downsample / 1e3
    kind = (
        "ORIGINAL\\PRIMARY\\VOLUME\\NONE" if level == 0 else "DERIVED\\PRIMARY\\VOLUME\\RESAMPLED"
    )
    samples = 1 if how.gray else 3
    sides = [struct.pack("<f", side * mm) for side in (width, height)]
    spacing: list[Element] = [text(0x00280030, "DS", f"{mm:.10g}\\{mm:.10g}")]
    measures: Element = (0x00289110, "SQ", [[text(0x00180050, "DS", "0.001"), *spacing]])
    light: Element = (0x00220016, "SQ", [[text(0x00080100, "SH", "111744")]])
    out: list[Element] = [
        text(0x00080008, "CS", kind), text(0x00080060, "CS", "SM"), text(0x00080070, "LO", "Synthetic"),
        text(0x0020000D, "UI", _ROOT + "5"), text(0x0020000E, "UI", _ROOT + how.series),
        text(0x00200052, "UI", _ROOT + how.series + ".8"), _short(0x00280002, samples),
        text(0x00280004, "CS", _photometric(how)), _short(0x00280006, int(how.planar)),
        text(0x00280008, "IS", str(len(places))),
        _short(0x00280010, how.tile_px[1]), _short(0x00280011, how.tile_px[0]), _short(0x00280100, 8),
        _short(0x00280101, 8), _short(0x00280102, 7), _short(0x00280103, 0),
        (0x00480001, "FL", sides[0]), (0x00480002, "FL", sides[1]), (0x00480003, "FL", sides[0]),
        _long(0x00480006, width), _long(0x00480007, height),
        (0x00480008, "SQ", [[text(0x0040072A, "DS", "20"), text(0x0040073A, "DS", "40")]]),
        text(0x00480010, "CS", "NO"), text(0x00480102, "DS", "0\\-1\\0\\-1\\0\\0"),
        (0x00480105, "SQ", [[light, text(0x00480106, "SH", "0")]]),
        _long(0x00480302, 1), _long(0x00480303, how.planes),
        (0x52009229, "SQ", [[measures] if how.shared_spacing else []]),
    ]  # fmt: skip
    if how.organization:
        out.append(text(0x00209311, "CS", how.organization))
    if how.pyramid:
        out.append(text(0x00080019, "UI", _ROOT + how.pyramid))
    if how.organization != "TILED_FULL":
        out.append((0x52009230, "SQ", [_place(how, *place) for place in places]))
    return out


def _place(how: Written, row: int, column: int, plane: int) -> list[Element]:
    """One frame's functional groups."""
    at = [
        _signed(0x0048021E, column * how.tile_px[0] + 1),
        _signed(0x0048021F, row * how.tile_px[1] + 1),
    ]
    corner = ((0x0040072A, 20.0), (0x0040073A, 40.0), (0x0040074A, plane * 1.5))
    slide = [text(tag, "DS", str(mm)) for tag, mm in corner]
    return [
        (0x00209111, "SQ", [[(0x00209157, "UL", struct.pack("<2I", column + 1, row + 1))]]),
        (0x00480207, "SQ", [[text(0x00480106, "SH", "0")]]),
        (0x0048021A, "SQ", [sorted([*slide, *at])]),
    ]


def _frames(
    picture: Picture, level: int, how: Written
) -> Iterable[tuple[tuple[int, int, int], Picture]]:
    """((row, column, plane), pixels) in TILED_FULL's order, edges padded by their last pixel."""
    width, height = how.tile_px
    for plane in range(how.planes):
        shown = picture if not plane else np.clip(picture.astype(int) + 10 * plane, 0, 255)
        for row in range(-(-picture.shape[0] // height)):
            for column in range(-(-picture.shape[1] // width)):
                if (level, row, column) in how.missing:
                    continue
                tile = shown[
                    row * height : (row + 1) * height, column * width : (column + 1) * width
                ]
                lack = (0, height - tile.shape[0]), (0, width - tile.shape[1]), (0, 0)
                yield (row, column, plane), np.pad(tile, lack, mode="edge").astype(np.uint8)


def _photometric(how: Written) -> str:
    if how.photometric or how.gray:
        return how.photometric or "MONOCHROME2"
    usual = {"jpeg": "YBR_FULL_422", "jpeg_extended": "YBR_FULL_422", "jpeg2000": "YBR_ICT",
             "jpeg2000_lossless": "YBR_RCT", "htj2k": "YBR_RCT"}  # fmt: skip
    return usual.get(how.syntax, "RGB")


def _encode(frame: Picture, how: Written) -> bytes:
    """One frame as its transfer syntax stores it."""
    if how.gray:
        frame = frame[:, :, :1]
    if how.syntax in ("jpeg", "jpeg_extended"):
        return how.jpeg(frame[:, :, 0] if how.gray else frame)
    if how.syntax == "htj2k":
        return bytes(imagecodecs.htj2k_encode(frame, reversible=True))
    if how.syntax.startswith("jpeg2000"):
        lossless = how.syntax.endswith("lossless")
        mct = (
            how.transform
            if how.transform is not None
            else _photometric(how) in ("YBR_ICT", "YBR_RCT")
        )
        level = 0 if lossless else 60
        shown = frame[:, :, 0] if how.gray else frame
        return bytes(
            imagecodecs.jpeg2k_encode(
                shown, level=level, codecformat="j2k", reversible=lossless, mct=mct, resolutions=4
            )
        )
    if how.syntax == "rle":
        planes = [_even(_packed(frame[:, :, n])) for n in range(frame.shape[2])]
        offsets = 64 + np.cumsum([0, *(len(plane) for plane in planes)])[:-1]
        head = [len(planes), *offsets.tolist(), *[0] * (15 - len(planes))]
        return struct.pack("<16I", *head) + b"".join(planes)
    if how.syntax == "jpegls":
        return bytes(imagecodecs.jpegls_encode(frame))
    return (frame.transpose(2, 0, 1) if how.planar else frame).tobytes()


def _packed(plane: Picture) -> bytes:
    """A plane as runs, each row by itself (PS3.5 G.3.1)."""
    return b"".join(bytes(imagecodecs.packbits_encode(row.tobytes())) for row in plane)


def _encapsulated(encoded: list[bytes], how: Written) -> bytes:
    offsets = _starts(encoded, how.fragments) if how.table == "basic" else []
    out = [_item(struct.pack(f"<{len(offsets)}I", *offsets))]
    for frame in encoded:
        out += [_item(_even(piece)) for piece in _pieces(frame, how.fragments)]
    return b"".join(out) + _tag(0xFFFEE0DD) + bytes(4)


def _pieces(frame: bytes, fragments: int) -> list[bytes]:
    size = 2 * -(-len(frame) // (2 * fragments))
    return [frame[at : at + size] for at in range(0, len(frame), size)] or [b""]


def _starts(encoded: list[bytes], fragments: int) -> list[int]:
    sizes = [sum(8 + len(_even(piece)) for piece in _pieces(frame, fragments)) for frame in encoded]
    return [int(n) for n in np.cumsum([0, *sizes[:-1]])]


def _item(data: bytes) -> bytes:
    return _tag(0xFFFEE000) + struct.pack("<I", len(data)) + data


def _even(data: bytes) -> bytes:
    return data + b"\0" * (len(data) % 2)


def _tag(tag: int) -> bytes:
    return struct.pack("<HH", tag >> 16, tag & 0xFFFF)


def _short(tag: int, value: int) -> Element:
    return tag, "US", struct.pack("<H", value)


def _long(tag: int, value: int) -> Element:
    return tag, "UL", struct.pack("<I", value)


def _signed(tag: int, value: int) -> Element:
    return tag, "SL", struct.pack("<i", value)
