"""OpenJPEG through ctypes: a codestream's planes, at fewer resolutions, of a region. Releases the GIL.

The wheels of imagecodecs and Pillow, and systems, ship the library, whose interface (libopenjp2.so.7) is frozen;
what the two make of it neither cuts out a region nor (imagecodecs) leaves out resolutions, and
Pillow decodes under the GIL. `docs/decisions/0017-tiff-codecs.md` has the measurements.

Only opj_decode is called without the GIL: the other calls take microseconds, and to get it back from a busy
thread takes milliseconds.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import numpy as np
from numpy.typing import NDArray

from online_patching.decode.bad_tile import BadTileError

_POINTER, _SIZE, _U32, _I32 = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_int32
_READ = ctypes.CFUNCTYPE(_SIZE, _POINTER, _SIZE, _POINTER)
_SKIP = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, _POINTER)
_SEEK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int64, _POINTER)
_MESSAGE = ctypes.CFUNCTYPE(None, ctypes.c_char_p, _POINTER)
_NOTHING_READ = _SIZE(-1).value
_J2K = 0
_PARAMETERS_BYTES = (
    16384  # opj_dparameters_t has 8,252 bytes; defaults are filled in by the library
)


class Component(ctypes.Structure):
    """opj_image_comp_t."""

    _fields_ = [
        *[(name, _U32) for name in "dx dy w h x0 y0 prec bpp sgnd resno_decoded factor".split()],
        ("data", _POINTER),
        ("alpha", ctypes.c_uint16),
    ]


class Image(ctypes.Structure):
    """opj_image_t."""

    _fields_ = [
        *[(name, _U32) for name in "x0 y0 x1 y1 numcomps".split()],
        ("color_space", ctypes.c_int),
        ("comps", ctypes.POINTER(Component)),
        ("icc_profile_buf", _POINTER),
        ("icc_profile_len", _U32),
    ]


_IMAGE = ctypes.POINTER(Image)
_QUICK: dict[str, tuple[Any, list[Any]]] = {
    "opj_version": (ctypes.c_char_p, []),
    "opj_stream_create": (_POINTER, [_SIZE, ctypes.c_int]),
    "opj_stream_destroy": (None, [_POINTER]),
    "opj_stream_set_user_data_length": (None, [_POINTER, ctypes.c_uint64]),
    "opj_stream_set_read_function": (None, [_POINTER, _READ]),
    "opj_stream_set_skip_function": (None, [_POINTER, _SKIP]),
    "opj_stream_set_seek_function": (None, [_POINTER, _SEEK]),
    "opj_create_decompress": (_POINTER, [ctypes.c_int]),
    "opj_destroy_codec": (None, [_POINTER]),
    "opj_set_error_handler": (ctypes.c_int, [_POINTER, _MESSAGE, _POINTER]),
    "opj_set_default_decoder_parameters": (None, [_POINTER]),
    "opj_setup_decoder": (ctypes.c_int, [_POINTER, _POINTER]),
    "opj_read_header": (ctypes.c_int, [_POINTER, _POINTER, ctypes.POINTER(_IMAGE)]),
    "opj_set_decoded_resolution_factor": (ctypes.c_int, [_POINTER, _U32]),
    "opj_set_decode_area": (ctypes.c_int, [_POINTER, _IMAGE, _I32, _I32, _I32, _I32]),
    "opj_image_destroy": (None, [_IMAGE]),
}
_SLOW: dict[str, tuple[Any, list[Any]]] = {
    "opj_decode": (ctypes.c_int, [_POINTER, _POINTER, _IMAGE])
}


class _Reading(threading.local):
    """What this thread decodes: the callbacks below are told nothing but this."""

    data = b""
    address = 0
    position = 0
    message = ""


_reading = _Reading()


def _read(target: int, count: int, _: object) -> int:
    size = min(count, len(_reading.data) - _reading.position)
    if size <= 0:
        return _NOTHING_READ
    ctypes.memmove(target, _reading.address + _reading.position, size)
    _reading.position += size
    return size


def _skip(count: int, _: object) -> int:
    before = _reading.position
    _reading.position = min(max(before + count, 0), len(_reading.data))
    moved = _reading.position - before
    return moved if moved or not count else -1


def _seek(position: int, _: object) -> int:
    if not 0 <= position <= len(_reading.data):
        return 0
    _reading.position = position
    return 1


def _say(text: bytes, _: object) -> None:
    _reading.message = _reading.message or text.decode("latin-1").strip()


_CALLBACKS = (_READ(_read), _SKIP(_skip), _SEEK(_seek), _MESSAGE(_say))


class _Library:
    """The library's functions; the quick ones keep the GIL."""

    def __init__(self, path: str) -> None:
        for loader, table in ((ctypes.PyDLL, _QUICK), (ctypes.CDLL, _SLOW)):
            loaded = loader(path)
            for name, (result, arguments) in table.items():
                function = getattr(loaded, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("opj_"), function)

    def __getattr__(self, name: str) -> Any:  # what __init__ sets, for the type checker
        raise AttributeError(name)


def _candidates() -> list[str]:
    """Paths of OpenJPEG builds: imagecodecs', Pillow's, the system's (the last float bit may differ)."""
    found = []
    for name in ("imagecodecs", "pillow"):
        try:
            package = distribution(name)
        except PackageNotFoundError:  # pragma: no cover - both are dependencies
            continue
        files = [f for f in package.files or () if f.name.startswith("libopenjp2")]
        found += [str(package.locate_file(f)) for f in files]
    return [*found, "libopenjp2.so.7", "libopenjp2.7.dylib"]


@cache
def library_path() -> str | None:
    """Where the library of this process is, or None when there is none."""
    for path in _candidates():
        try:
            _Library(path)
        except (OSError, AttributeError):
            continue
        return path
    return None


@cache
def library() -> _Library | None:
    """The library of this process, or None when there is none."""
    path = library_path()
    return _Library(path) if path else None


def about() -> str:
    """Which OpenJPEG decodes."""
    found = library()
    return f"OpenJPEG {found.version().decode()}" if found else "no OpenJPEG"


def decode_planes(
    data: bytes, reductions: int = 0, area: tuple[int, int, int, int] | None = None
) -> list[NDArray[np.uint8]]:
    """The components (height, width) of a codestream that was checked, halved `reductions` times.

    `area` (left, top, right, bottom, in pixels of the whole) is all that is decoded; its corners are
    multiples of 2**reductions or the image's own.
    """
    opj = library()
    if opj is None:
        raise BadTileError(
            "no OpenJPEG library is at hand: install imagecodecs' or Pillow's wheel, or libopenjp2"
        )
    with _opened(opj, data) as (stream, codec):
        image = _IMAGE()
        try:
            _must(opj.read_header(stream, codec, ctypes.byref(image)))
            if reductions:
                _must(opj.set_decoded_resolution_factor(codec, reductions))
            if area is not None:
                _must(opj.set_decode_area(codec, image, *area))
            _must(opj.decode(codec, stream, image))
            return [_plane(image.contents.comps[i]) for i in range(image.contents.numcomps)]
        finally:
            if bool(image):  # not a null pointer
                opj.image_destroy(image)


@contextmanager
def _opened(opj: _Library, data: bytes) -> Iterator[tuple[int, int]]:
    """A stream over the data and a decoder, of this thread."""
    _reading.data, _reading.position, _reading.message = data, 0, ""
    _reading.address = ctypes.cast(ctypes.c_char_p(data), _POINTER).value or 0
    stream = codec = None
    try:
        # Its buffer takes in all of the data at the first read: one call back, before decoding.
        stream, codec = opj.stream_create(len(data), 1), opj.create_decompress(_J2K)
        if not stream or not codec:
            raise MemoryError("no memory for a JPEG 2000 decoder")
        opj.stream_set_user_data_length(stream, len(data))
        read, skip, seek, say = _CALLBACKS
        opj.stream_set_read_function(stream, read)
        opj.stream_set_skip_function(stream, skip)
        opj.stream_set_seek_function(stream, seek)
        opj.set_error_handler(codec, say, None)
        parameters = ctypes.create_string_buffer(_PARAMETERS_BYTES)
        opj.set_default_decoder_parameters(parameters)
        _must(opj.setup_decoder(codec, parameters))
        yield stream, codec
    finally:
        _reading.data, _reading.address = b"", 0
        if stream:
            opj.stream_destroy(stream)
        if codec:
            opj.destroy_codec(codec)


def _must(done: int) -> None:
    if not done:
        raise BadTileError(f"OpenJPEG: {_reading.message[:100] or 'it does not decode'}")


def _plane(component: Component) -> NDArray[np.uint8]:
    if not component.data:
        raise BadTileError("OpenJPEG left a component out")
    height, width = component.h, component.w
    values = np.frombuffer(ctypes.string_at(component.data, 4 * width * height), np.int32)
    return values.astype(np.uint8).reshape(height, width)
