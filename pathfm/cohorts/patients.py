"""Whose slide it is, by a DICOM header: PatientID, to be hashed at once and never written or told."""

from __future__ import annotations

import struct

from online_patching import SlideIndex
from online_patching.errors import PatchingError
from online_patching.stores import Stores

_PATIENT_ID = 0x00100020
_SYNTAX, _IMPLICIT = 0x00020010, b"1.2.840.10008.1.2"
_ITEM, _ITEM_END, _SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_LONG = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_UNDEFINED = 0xFFFFFFFF
_HEAD_BYTES = 256 * 2**10
"""The patient module comes before anything long."""


def patient_in(index: SlideIndex, stores: Stores) -> str:
    """The PatientID of a DICOM slide; "" where its first instance says none, and for other containers."""
    if index.container != "dicom":
        return ""
    try:
        if index.objects:
            key, token = index.object_key(0), index.objects[0].token
            size = index.objects[0].size_bytes
        else:
            key, token, size = index.uri, index.token, index.size_bytes
        return patient_id(stores.read(key, 0, min(size, _HEAD_BYTES), token))
    except PatchingError:
        return ""


def patient_id(head: bytes) -> str:
    """The PatientID in the beginning of a DICOM file; "" where it has none or cannot be followed."""
    try:
        return _walk(head)
    except (struct.error, IndexError):
        return ""  # past what was read: there is none before


def _walk(head: bytes) -> str:
    if head[128:132] != b"DICM":
        return ""
    at, depth, implicit = 132, 0, False
    while True:
        group, element = struct.unpack_from("<HH", head, at)
        tag = group << 16 | element
        kind, length, at = _header(head, at, implicit and group != 2)
        if tag in (_ITEM_END, _SEQUENCE_END):
            depth -= 1
        elif length == _UNDEFINED and (tag == _ITEM or kind in (b"SQ", b"UN", b"")):
            depth += 1
            continue
        elif depth == 0 and tag >= _PATIENT_ID:
            value = (
                head[at : at + length] if tag == _PATIENT_ID and at + length <= len(head) else b""
            )
            return value.decode("utf-8", "replace").strip(" \0")
        if tag == _SYNTAX:
            implicit = head[at : at + length].strip(b" \0") == _IMPLICIT
        at += length


def _header(head: bytes, at: int, implicit: bool) -> tuple[bytes, int, int]:
    """Value representation, length, and where the value begins."""
    kind = head[at + 4 : at + 6]
    if implicit or head[at : at + 2] == b"\xfe\xff":
        return b"", struct.unpack_from("<I", head, at + 4)[0], at + 8
    if kind in _LONG:
        return kind, struct.unpack_from("<I", head, at + 8)[0], at + 12
    return kind, struct.unpack_from("<H", head, at + 6)[0], at + 8
