"""How the frames of a DICOM instance are stored, from its attributes and the head of one frame.

Files contradict themselves about colours: one at hand declares YBR_FULL over frames marked RGB, another RGB
over subsampled YCbCr. Where a stream says what it holds it is believed, as whoever wrote it had to.
"""

from __future__ import annotations

import struct

from online_patching.formats import dicom_attributes as tags
from online_patching.formats.dicom_attributes import Attributes, BadDicomError, StoredOtherwiseError
from online_patching.slide_index import Codec

_SYNTAXES = {
    "1.2.840.10008.1.2": "raw", "1.2.840.10008.1.2.1": "raw", "1.2.840.10008.1.2.5": "rle",
    "1.2.840.10008.1.2.4.50": "jpeg", "1.2.840.10008.1.2.4.51": "jpeg",
    "1.2.840.10008.1.2.4.90": "jpeg2000", "1.2.840.10008.1.2.4.91": "jpeg2000",
    "1.2.840.10008.1.2.4.201": "jpeg2000", "1.2.840.10008.1.2.4.202": "jpeg2000",
    "1.2.840.10008.1.2.4.203": "jpeg2000",
}  # fmt: skip
_REFUSED = {
    "57": "lossless JPEG", "70": "lossless JPEG", "80": "JPEG-LS", "81": "JPEG-LS",
    "92": "JPEG 2000 part 2", "93": "JPEG 2000 part 2", "110": "JPEG XL", "111": "JPEG XL",
    "112": "JPEG XL",
}  # fmt: skip
_YCBCR = ("YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_APP14, _SOS = 0xEE, 0xDA
_COD, _SOT = 0xFF52, 0xFF90
HEAD_BYTES = 64 * 2**10
"""Enough of a frame to read its headers, a colour profile among them."""


def kind_of(found: Attributes) -> str:
    """raw, rle, jpeg or jpeg2000; StoredOtherwiseError names what is none of them."""
    kind = _SYNTAXES.get(found.syntax)
    if kind is None:
        _, four, last = found.syntax.rpartition("1.2.840.10008.1.2.4.")
        name = _REFUSED.get(last, "video" if last.startswith("10") else "") if four else ""
        told = f"{name} ({found.syntax})" if name else found.syntax
        raise StoredOtherwiseError(f"transfer syntax {told} is not read")
    return kind


def codec_of(found: Attributes, frame: bytes) -> Codec:
    """The codec of an instance whose first stored frame begins with these bytes (b"": none is stored)."""
    kind, samples = kind_of(found), found.number(tags.SAMPLES, 1)
    declared = found.text(tags.PHOTOMETRIC)
    if declared not in ("RGB", *_YCBCR, "MONOCHROME2"):
        raise StoredOtherwiseError(f"photometric interpretation {declared[:20]!r} is not read")
    colour = "gray" if samples == 1 else "ycbcr" if declared in _YCBCR else "rgb"
    if kind == "jpeg":
        return Codec("jpeg", _jpeg_colour(frame, samples, colour) if frame else colour)
    if kind == "jpeg2000":
        transformed, reductions = _codestream(frame) if frame else (False, 0)
        # ICT and RCT are undone by the decoder; YBR_FULL without them is YCbCr that nobody undoes.
        if samples == 3 and (transformed or declared in ("YBR_ICT", "YBR_RCT")):
            colour = "rgb"
        return Codec("jpeg2000", colour, samples=samples, reductions=reductions)
    if declared not in ("RGB", "YBR_FULL", "MONOCHROME2"):
        raise StoredOtherwiseError(f"{declared} samples that are not compressed are not read")
    planar = samples > 1 and found.number(tags.PLANAR) == 1
    if kind == "raw" and (planar or colour == "ycbcr"):
        kind = "planes"
    return Codec(kind, colour, samples=samples, planar=planar)


def _jpeg_colour(frame: bytes, samples: int, declared: str) -> str:
    """rgb, ycbcr or gray: by the Adobe marker, components called R, G and B or subsampled ones, or as declared."""
    if frame[:2] != b"\xff\xd8":
        raise BadDicomError("its first frame is no JPEG stream")
    at, adobe, said = 2, None, None
    while at + 4 <= len(frame) and frame[at] == 0xFF and frame[at + 1] != _SOS:
        marker, length = frame[at + 1], (frame[at + 2] << 8) | frame[at + 3]
        body = frame[at + 4 : at + 2 + length]
        if marker == _APP14 and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            said = _frame_colour(marker, body, samples) or declared
        at += max(2, 2 + length)
    if said is None or frame[at : at + 2] != b"\xff\xda":
        raise BadDicomError("its first frame's JPEG headers are damaged")
    if samples == 1:
        return "gray"
    if adobe in (0, 1):
        return "ycbcr" if adobe else "rgb"
    return said


def _frame_colour(marker: int, body: bytes, samples: int) -> str:
    """What a JPEG frame header says of its colours; "" when it says nothing."""
    if marker not in (0xC0, 0xC1):
        raise StoredOtherwiseError(f"JPEG frames of kind SOF{marker - 0xC0} are not read")
    if len(body) < 6 or len(body) < 6 + 3 * body[5]:
        raise BadDicomError("its first frame's JPEG headers are damaged")
    if body[0] != 8:
        raise StoredOtherwiseError(f"JPEG samples of {body[0]} bits are not read")
    if body[5] != samples:
        raise BadDicomError(f"its frames have {body[5]} components, it says {samples}")
    if body[6 : 6 + 3 * body[5] : 3] == b"RGB":
        return "rgb"
    return "ycbcr" if len({*body[7 : 7 + 3 * body[5] : 3]}) > 1 else ""


def _codestream(frame: bytes) -> tuple[bool, int]:
    """Whether colours were transformed inside a JPEG 2000 codestream, and how often it can be halved."""
    if frame[:4] != b"\xff\x4f\xff\x51":
        raise BadDicomError("its first frame is no JPEG 2000 codestream")
    at = 2
    while at + 12 <= len(frame):
        marker, length = struct.unpack_from(">HH", frame, at)
        if marker == _COD:
            return frame[at + 8] == 1, min(frame[at + 9], 32)
        if marker == _SOT or length < 2:
            break
        at += 2 + length
    raise BadDicomError("its first frame's JPEG 2000 headers are damaged")
