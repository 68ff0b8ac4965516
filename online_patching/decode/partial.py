"""The first bytes of a Zstandard or deflate stream, or some stretches of a Blosc buffer, without the rest.

libzstd and libblosc (C-Blosc 1) come with the wheels of imagecodecs, whose own functions only decode everything;
they are called through ctypes, without the GIL. Where they are missing everything is decoded. What is not
asked for is left as the memory was, and its damage unseen.
"""

from __future__ import annotations

import ctypes
import threading
import zlib
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from online_patching.decode.bad_tile import BadTileError

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_WINDOW_LOG_MAX_PARAMETER, _WINDOW_LOG_MAX = 100, 26  # 64 MiB, as large as a chunk may be
_RESET_SESSION = 1
_WORTH_STOPPING = 0.85
"""Above this share of a Zstandard stream, decoding straight into place is faster than stopping early."""
_MAX_MEMBERS = 64
_INFLATE_BELOW = 0.55
"""zlib can stop and libdeflate cannot, but takes so much less time for everything."""


class _Buffer(ctypes.Structure):
    """ZSTD_inBuffer and ZSTD_outBuffer."""

    _fields_ = (("at", _POINTER), ("size", _SIZE), ("position", _SIZE))


_ZSTD: dict[str, tuple[Any, list[Any]]] = {
    "ZSTD_createDCtx": (_POINTER, []),
    "ZSTD_freeDCtx": (_SIZE, [_POINTER]),
    "ZSTD_DCtx_setParameter": (_SIZE, [_POINTER, _INT, _INT]),
    "ZSTD_DCtx_reset": (_SIZE, [_POINTER, _INT]),
    "ZSTD_isError": (ctypes.c_uint, [_SIZE]),
    "ZSTD_getErrorName": (ctypes.c_char_p, [_SIZE]),
    "ZSTD_decompressStream": (_SIZE, [_POINTER, _POINTER, _POINTER]),
    "ZSTD_decompressDCtx": (_SIZE, [_POINTER, _POINTER, _SIZE, ctypes.c_char_p, _SIZE]),
}
_BLOSC: dict[str, tuple[Any, list[Any]]] = {
    "blosc_getitem": (_INT, [ctypes.c_char_p, _INT, _INT, _POINTER])
}
_SLOW = frozenset({"ZSTD_decompressStream", "ZSTD_decompressDCtx", "blosc_getitem"})


@cache
def _library(name: str) -> Any:
    """The functions of libzstd or libblosc; None where no build of it is at hand."""
    table = _ZSTD if name == "libzstd" else _BLOSC
    # imagecodecs' own modules know where the libraries that these need are; once loaded, they are found.
    assert imagecodecs.BLOSC.available and imagecodecs.ZSTD.available
    try:
        package = distribution("imagecodecs")
        files = [f for f in package.files or () if f.name.startswith((f"{name}-", f"{name}."))]
        paths = [str(package.locate_file(f)) for f in files]
    except PackageNotFoundError:  # pragma: no cover - a dependency
        paths = []
    for path in [*paths, f"{name}.so.1", f"{name}.1.dylib"]:
        try:
            quick, slow = ctypes.PyDLL(path), ctypes.CDLL(path)
            for function, (result, arguments) in table.items():
                for loaded in (quick, slow):
                    found = getattr(loaded, function)
                    found.restype, found.argtypes = result, arguments
        except (OSError, AttributeError):
            continue
        return {name: getattr(slow if name in _SLOW else quick, name) for name in table}
    return None


class _Context(threading.local):
    """This thread's decompression context: its tables and window are kept from chunk to chunk."""

    def __init__(self) -> None:
        self.zstd = _library("libzstd")
        self.at = self.zstd["ZSTD_createDCtx"]() if self.zstd else None
        if self.at:
            self.zstd["ZSTD_DCtx_setParameter"](self.at, _WINDOW_LOG_MAX_PARAMETER, _WINDOW_LOG_MAX)

    def __del__(self) -> None:
        if getattr(self, "at", None):
            self.zstd["ZSTD_freeDCtx"](self.at)


_context = _Context()


def zstd(data: Any, size: int, needed: int) -> NDArray[np.uint8]:
    """`size` bytes of which the first `needed` are those of a frame that holds `size`."""
    out = np.empty(size, np.uint8)
    lib, context = _context.zstd, _context.at
    if not context:
        whole = imagecodecs.zstd_decode(data, out=out.data)
        _check_length(len(whole), size)
        return out
    data = bytes(data)
    if needed > _WORTH_STOPPING * size:
        done = lib["ZSTD_decompressDCtx"](context, out.ctypes.data, size, data, len(data))
        _check_zstd(lib, done)
        _check_length(done, size)
        return out
    given = _Buffer(ctypes.cast(data, _POINTER), len(data), 0)
    taken = _Buffer(out.ctypes.data, needed, 0)
    lib["ZSTD_DCtx_reset"](context, _RESET_SESSION)
    before = -1
    while taken.position < needed and taken.position + given.position > before:
        before = taken.position + given.position
        _check_zstd(
            lib,
            lib["ZSTD_decompressStream"](context, ctypes.byref(taken), ctypes.byref(given)),
        )
    if taken.position < needed:
        raise BadTileError("its zstd frame ends before its data does")
    return out


def _check_zstd(lib: Any, result: int) -> None:
    if lib["ZSTD_isError"](result):
        raise BadTileError(f"zstd says: {lib['ZSTD_getErrorName'](result).decode()}")


def _check_length(found: int, size: int) -> None:
    if found != size:
        raise BadTileError(f"its chunk holds {found:,} bytes, not {size:,}")


def blosc(data: Any, size: int, spans: list[tuple[int, int]]) -> NDArray[np.uint8]:
    """`size` bytes of which the stretches `spans` (sorted) are those of a Blosc buffer that was checked."""
    out = np.empty(size, np.uint8)
    lib = _library("libblosc")
    data = bytes(data)
    block = int.from_bytes(data[8:12], "little")
    runs = _runs(spans, block, size)
    if lib is None or runs == [(0, size)]:
        _check_length(len(imagecodecs.blosc_decode(data, out=out.data)), size)
        return out
    item = max(1, data[3])
    for start, stop in runs:
        first, count = start // item, -(-stop // item) - start // item
        if start % item or stop % item:
            return blosc(data, size, [(0, size)])
        done = lib["blosc_getitem"](data, first, count, out.ctypes.data + start)
        _check_length(done, stop - start)
    return out


def _runs(spans: list[tuple[int, int]], block: int, size: int) -> list[tuple[int, int]]:
    """Whole blocks that cover the spans, neighbours joined."""
    runs: list[tuple[int, int]] = []
    for start, stop in spans:
        low, high = start // block * block, min(size, -(-stop // block) * block)
        if runs and low <= runs[-1][1]:
            runs[-1] = (runs[-1][0], max(high, runs[-1][1]))
        else:
            runs.append((low, high))
    return runs


def inflate(data: Any, size: int, needed: int, gzip: bool) -> Any:
    """`size` bytes of which the first `needed` are those of a zlib or gzip stream.

    libdeflate is nearly twice as fast as zlib, but can neither stop nor read further gzip members.
    """
    if needed <= _INFLATE_BELOW * size:
        found = zlib.decompressobj(31 if gzip else 15).decompress(data, needed)
        if len(found) == needed:
            out = np.empty(size, np.uint8)
            out[:needed] = np.frombuffer(found, np.uint8)
            return out
    decode = imagecodecs.gzip_decode if gzip else imagecodecs.deflate_decode
    try:
        whole = decode(data, out=np.empty(size, np.uint8).data)
        if len(whole) == size:
            return whole
    except (RuntimeError, ValueError):
        pass  # several members, or damage: zlib tells
    return _members(data, size, 31 if gzip else 15)


def _members(data: Any, size: int, wbits: int) -> bytes:
    """What gzip members one after another hold together."""
    out = b""
    for _ in range(_MAX_MEMBERS):
        engine = zlib.decompressobj(wbits)
        out += engine.decompress(data, size + 1 - len(out))
        if len(out) > size:
            raise BadTileError(f"it inflates to more than {size:,} bytes")
        if not engine.eof:
            raise BadTileError("it ends before its data does")
        data = engine.unused_data
        if wbits == 15 or not data.strip(b"\0"):
            break
    return out
