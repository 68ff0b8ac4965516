"""Bytes stored as DICOM items one after another (PS3.5 A.4): a frame in several fragments -> the frame."""

from __future__ import annotations

ITEM = b"\xfe\xff\x00\xe0"
_MAX_ITEMS = 2**16


class BadItemsError(Exception):
    """Why items cannot be joined; the caller adds whose they are."""


def joined(data: bytes, cut: bool = False) -> bytes:
    """The contents of the items that `data` consists of, joined.

    BadItemsError when it is anything else. `cut`: the data is only the beginning of it, and so may the last item be.
    """
    parts: list[bytes] = []
    at = 0
    while at < len(data):
        if len(parts) == _MAX_ITEMS:
            raise BadItemsError(f"it is in more than {_MAX_ITEMS:,} fragments")
        if cut and at + 8 > len(data):
            break
        stop = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] != ITEM or (stop > len(data) and not cut):
            raise BadItemsError(f"no whole fragment lies at byte {at:,} of it")
        parts.append(data[at + 8 : stop])
        at = stop
    return b"".join(parts)
