"""A tile's bytes -> uint8 pixels (tile height, tile width, channels). Releases the GIL.

Damage is an error, not a grey rectangle: JPEG streams are decoded strictly (libjpeg's warnings
raise), and every frame must be as large as the tile it fills before anything is allocated. Flipped
bytes inside entropy-coded data can pass any decoder; no more than that is promised.
"""

from __future__ import annotations

from collections.abc import Callable

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from online_patching.decode import chunk, jpeg, jpeg2000, openjpeg, packed, planes
from online_patching.decode.bad_tile import BadTileError
from online_patching.fragments import joined
from online_patching.geometry import Box
from online_patching.slide_index import CODEC_KINDS, Codec

__all__ = ["DECODER", "BadTileError", "decode_tile"]

DECODER = (
    f"simplejpeg {simplejpeg.__version__} (libjpeg-turbo), imagecodecs {imagecodecs.__version__}, "
    f"{openjpeg.about()}"
)
_SCALED = {"jpeg": jpeg.decode, "jpeg2000": jpeg2000.decode}
"""(codec, data, width, height, scale) -> the whole tile at 1/scale."""
_WHOLE = {
    "raw": packed.raw,
    "deflate": packed.deflate,
    "lzw": packed.lzw,
    "zstd": packed.zstd,
    "packbits": packed.packbits,
    "webp": packed.webp,
    "rle": planes.rle,
    "planes": planes.planes,
    "chunk": chunk.decode,
}
"""(codec, data, width, height) -> the whole tile."""
_BOXES: dict[str, Callable[[Codec, bytes, int, int, int, Box], NDArray[np.uint8]]] = {
    "jpeg2000": jpeg2000.decode,
    "chunk": chunk.decode_box,
    "raw": packed.raw,
    "deflate": packed.deflate,
    "lzw": packed.lzw,
    "packbits": packed.packbits,
    "zstd": packed.zstd,
}
"""(codec, data, width, height, scale, box) -> the pixels of the box: of kinds that save work by it, asked
when less than the tile is wanted. Damage that lies beyond the box need not be seen."""
assert frozenset(_SCALED | _WHOLE) == CODEC_KINDS, "every codec kind has a decoder, and vice versa"


def decode_tile(
    codec: Codec,
    data: bytes | None,
    width_px: int,
    height_px: int,
    scale: int = 1,
    box: Box | None = None,
) -> NDArray[np.uint8]:
    """Pixels of one stored tile, (height_px / scale, width_px / scale, channels), or of a box of them.

    `data` of None is a tile that was never stored: it comes out as the codec's fill value.
    Channels are 3, or the 1 that a chunk of a channel-separated Zarr array holds. `scale` (a
    power of 2 dividing the sides) is for JPEG, up to 8 (libjpeg inverts only the low frequencies of each
    block), and for JPEG 2000, up to 2**codec.reductions (the low-pass band of that resolution).
    `box`, px of the tile at 1/scale and inside it, is all that comes back where it is given.
    """
    whole = Box(0, 0, width_px // scale, height_px // scale)
    wanted = whole if box is None else box
    if data is None:
        return np.full((wanted.height, wanted.width, min(codec.samples, 3)), codec.fill, np.uint8)
    if not data:
        raise BadTileError("it is empty")
    decoded = wanted if codec.kind in _BOXES else whole
    try:
        if codec.fragments:
            data = joined(data)
        if decoded != whole:
            pixels = _BOXES[codec.kind](codec, data, width_px, height_px, scale, wanted)
        elif codec.kind in _SCALED:
            pixels = _SCALED[codec.kind](codec, data, width_px, height_px, scale)
        else:
            pixels = _WHOLE[codec.kind](codec, data, width_px, height_px)
    except (BadTileError, MemoryError):
        raise
    except Exception as error:  # decoders raise types of their own; all mean the same here
        raise BadTileError(f"{type(error).__name__}: {str(error)[:120]}") from None
    if pixels.shape[:2] != (decoded.height, decoded.width):
        raise BadTileError(
            f"it holds {pixels.shape[1]} x {pixels.shape[0]} px, not {decoded.width} x {decoded.height}"
        )
    if decoded == wanted:
        return pixels
    return pixels[wanted.top : wanted.bottom, wanted.left : wanted.right]
