"""JPEG 2000 streams that imagecodecs' and Pillow's encoders cannot make: subsampled components.

Aperio's compression 33003 stores YCbCr with half as many chroma columns. OpenJPEG writes such streams; it is
called through ctypes, as decode/openjpeg.py calls it to read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from online_patching.decode import openjpeg

_POINTER, _SIZE, _U32, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint32, ctypes.c_int
_WRITE = ctypes.CFUNCTYPE(_SIZE, _POINTER, _SIZE, _POINTER)
_SKIP = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, _POINTER)
_SEEK = ctypes.CFUNCTYPE(_INT, ctypes.c_int64, _POINTER)
_PARAMETERS_BYTES = 65536  # opj_cparameters_t has 18,692 bytes; its defaults are lossless


class _ComponentParameters(ctypes.Structure):
    """opj_image_cmptparm_t."""

    _fields_ = [(name, _U32) for name in "dx dy w h x0 y0 prec bpp sgnd".split()]


def encode_planes(
    planes: Sequence[NDArray[np.uint8]], subsampling: Sequence[tuple[int, int]]
) -> bytes:
    """A lossless codestream (5/3 wavelet, six resolutions, no colour transform) of planes as they are.

    Each plane holds every `across`-th column and `down`-th row of the picture, whose size is that of the first.
    """
    height, width = planes[0].shape
    out = bytearray()
    position = [0]

    def write(data: int, count: int, _: object) -> int:
        out[position[0] : position[0] + count] = ctypes.string_at(data, count)
        position[0] += count
        return count

    def skip(count: int, _: object) -> int:
        position[0] += count
        out.extend(bytes(max(0, position[0] - len(out))))
        return count

    def seek(place: int, _: object) -> int:
        position[0] = place
        return 1

    callbacks = (_WRITE(write), _SKIP(skip), _SEEK(seek))
    opj = _functions()
    image = _image(opj, planes, subsampling, (width, height))
    codec, stream = opj.opj_create_compress(0), opj.opj_stream_create(1 << 20, 0)
    try:
        parameters = ctypes.create_string_buffer(_PARAMETERS_BYTES)
        opj.opj_set_default_encoder_parameters(parameters)
        opj.opj_stream_set_write_function(stream, callbacks[0])
        opj.opj_stream_set_skip_function(stream, callbacks[1])
        opj.opj_stream_set_seek_function(stream, callbacks[2])
        done = (
            opj.opj_setup_encoder(codec, parameters, image)
            and opj.opj_start_compress(codec, image, stream)
            and opj.opj_encode(codec, stream)
            and opj.opj_end_compress(codec, stream)
        )
    finally:
        opj.opj_stream_destroy(stream)
        opj.opj_destroy_codec(codec)
        opj.opj_image_destroy(image)
    if not done:
        raise RuntimeError("OpenJPEG does not encode these planes")
    return bytes(out)


def _image(
    opj: ctypes.PyDLL,
    planes: Sequence[NDArray[np.uint8]],
    subsampling: Sequence[tuple[int, int]],
    size_px: tuple[int, int],
) -> int:
    """An opj_image_t with the planes in it."""
    parts = (_ComponentParameters * len(planes))()
    for part, plane, (across, down) in zip(parts, planes, subsampling, strict=True):
        part.dx, part.dy, part.h, part.w = across, down, *plane.shape
        part.prec = part.bpp = 8
    address = int(opj.opj_image_create(len(planes), parts, 1))
    image = openjpeg.Image.from_address(address)
    image.x0, image.y0, (image.x1, image.y1) = 0, 0, size_px
    for number, plane in enumerate(planes):
        values = np.ascontiguousarray(plane, np.int32)
        ctypes.memmove(image.comps[number].data, values.ctypes.data, values.nbytes)
    return address


def _functions() -> ctypes.PyDLL:
    """The library's encoder."""
    loaded = ctypes.PyDLL(openjpeg.library_path())
    for name, result, arguments in (
        ("create_compress", _POINTER, [_INT]),
        ("stream_create", _POINTER, [_SIZE, _INT]),
        ("image_create", _POINTER, [_U32, _POINTER, _INT]),
        ("set_default_encoder_parameters", None, [_POINTER]),
        ("stream_set_write_function", None, [_POINTER, _WRITE]),
        ("stream_set_skip_function", None, [_POINTER, _SKIP]),
        ("stream_set_seek_function", None, [_POINTER, _SEEK]),
        ("setup_encoder", _INT, [_POINTER, _POINTER, _POINTER]),
        ("start_compress", _INT, [_POINTER, _POINTER, _POINTER]),
        ("encode", _INT, [_POINTER, _POINTER]),
        ("end_compress", _INT, [_POINTER, _POINTER]),
        ("stream_destroy", None, [_POINTER]),
        ("destroy_codec", None, [_POINTER]),
        ("image_destroy", None, [_POINTER]),
    ):
        function = getattr(loaded, f"opj_{name}")
        function.restype, function.argtypes = result, arguments
    return loaded
