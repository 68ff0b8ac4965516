"""A tile's bytes -> uint8 pixels (tile height, tile width, channels). Releases the GIL.

Damage is an error, not a grey rectangle: JPEG streams are decoded strictly (libjpeg's warnings
raise), and every frame must be as large as the tile it fills before anything is allocated. Flipped
bytes inside entropy-coded data can pass any decoder; no more than that is promised.
"""

from __future__ import annotations

import struct
import zlib
from functools import lru_cache
from typing import Any

import imagecodecs
import numpy as np
import simplejpeg
from numpy.typing import NDArray

from online_patching.slide_index import CODEC_KINDS, Codec

DECODER = (
    f"simplejpeg {simplejpeg.__version__} (libjpeg-turbo), imagecodecs {imagecodecs.__version__}"
)

_APP0, _APP14, _SOS = 0xE0, 0xEE, 0xDA
_EOI_SEARCH_BYTES = 1024
_FRAMES = frozenset({0xC0, 0xC1})
# Progressive ones too: what they show while a scan is missing is a guess. DHT, JPG and DAC are no frames.
_OTHER_FRAMES = frozenset(range(0xC2, 0xD0)) - {0xC4, 0xC8, 0xCC}
# These have no length: to read one would leave libjpeg to see other segments than we do.
_BARE = frozenset({0x00, 0x01, 0xFF, *range(0xD0, 0xDA)})
_ADOBE_TRANSFORM = {"rgb": 0, "ycbcr": 1}


class BadTileError(Exception):
    """Why a tile does not decode; the caller adds which slide, level and tile."""


def decode_tile(
    codec: Codec, data: bytes | None, width_px: int, height_px: int, scale: int = 1
) -> NDArray[np.uint8]:
    """Pixels of one stored tile, always (height_px / scale, width_px / scale, channels).

    `data` of None is a tile that was never stored: it comes out as the codec's fill value.
    Channels are 3, or the 1 that a chunk of a channel-separated Zarr array holds. `scale` (2, 4
    or 8, dividing the sides) is for JPEG: libjpeg inverts only the low frequencies of each block.
    """
    wanted = (height_px // scale, width_px // scale)
    if data is None:
        return np.full((*wanted, min(codec.samples, 3)), codec.fill, np.uint8)
    if not data:
        raise BadTileError("it is empty")
    try:
        if scale > 1:
            pixels = _jpeg(codec, data, width_px, height_px, scale)
        else:
            pixels = _DECODERS[codec.kind](codec, data, width_px, height_px)
    except (BadTileError, MemoryError):
        raise
    except Exception as error:  # decoders raise types of their own; all mean the same here
        raise BadTileError(f"{type(error).__name__}: {str(error)[:120]}") from None
    if pixels.shape[:2] != wanted:
        raise BadTileError(
            f"it holds {pixels.shape[1]} x {pixels.shape[0]} px, not {wanted[1]} x {wanted[0]}"
        )
    return pixels


def _jpeg(codec: Codec, data: bytes, width: int, height: int, scale: int = 1) -> NDArray[np.uint8]:
    stream = rebuild_jpeg(codec, data, width, height)
    # A truncated tile has lost its end marker; nothing inside a scan looks like one.
    if b"\xff\xd9" not in data[-_EOI_SEARCH_BYTES:]:
        raise BadTileError("it ends before its picture does")
    pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        stream, "RGB", min_height=height // scale, min_width=width // scale, strict=True
    )
    return pixels


def rebuild_jpeg(codec: Codec, data: bytes, width: int, height: int) -> bytes:
    """A complete JPEG stream whose colour space is what the container says.

    Tables are spliced in after SOI. JFIF and Adobe markers, and component ids, are what libjpeg
    guesses the colour space from, and scanners get them wrong (Aperio stores RGB without a word):
    the markers are replaced by one Adobe marker that says what the TIFF's photometric tag says.
    """
    if data[:2] != b"\xff\xd8":
        raise BadTileError("it is not a JPEG stream")
    pieces = [b"\xff\xd8"]
    if codec.tables:
        pieces.append(_only_tables(codec.tables))
    if codec.colour in _ADOBE_TRANSFORM:
        pieces.append(
            b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
            + bytes([_ADOBE_TRANSFORM[codec.colour]])
        )
    position = 2
    while True:
        marker, length = _segment(data, position)
        if marker in _OTHER_FRAMES:
            raise BadTileError(
                f"its frame is of a kind (SOF{marker - 0xC0}) that slides do not use"
            )
        if marker in _FRAMES:
            found = struct.unpack(">HH", data[position + 5 : position + 9])
            if found != (height, width):
                raise BadTileError(
                    f"its frame says {found[1]} x {found[0]} px, not {width} x {height}"
                )
            allowed = (1,) if codec.colour == "gray" else (1, 3)
            if data[position + 9] not in allowed:
                raise BadTileError(
                    f"it has {data[position + 9]} components, not {' or '.join(map(str, allowed))}"
                )
        if marker == _SOS:
            pieces.append(data[position:])
            return b"".join(pieces)
        if marker not in (_APP0, _APP14) or codec.colour == "gray":
            pieces.append(data[position : position + 2 + length])
        position += 2 + length


@lru_cache(maxsize=64)
def _only_tables(tables: bytes) -> bytes:
    """The segments of an abbreviated stream, without SOI and EOI; a frame among them is refused."""
    position = 2
    while position + 4 <= len(tables) - 2:
        marker, length = _segment(tables, position)
        if marker in _FRAMES | _OTHER_FRAMES or marker == _SOS:
            raise BadTileError("its JPEG tables hold a picture")
        position += 2 + length
    return tables[2:-2]


def _segment(data: bytes, position: int) -> tuple[int, int]:
    if position + 4 > len(data) or data[position] != 0xFF or data[position + 1] in _BARE:
        raise BadTileError("its JPEG header is damaged")
    length = (data[position + 2] << 8) | data[position + 3]
    if length < 2:
        raise BadTileError("its JPEG header is damaged")
    return data[position + 1], length


def _jpeg2000(codec: Codec, data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    # SIZ is the first segment of a codestream (ISO 15444-1 A.5.1). Exactly these bytes are decoded, so
    # that the size checked is the size allocated.
    data = _codestream(data)
    if data[:4] != b"\xff\x4f\xff\x51" or len(data) < 24:
        raise BadTileError("it is not a JPEG 2000 codestream")
    right, bottom, left, top = struct.unpack(">IIII", data[8:24])
    if (right - left, bottom - top) != (width, height):
        raise BadTileError(
            f"its frame says {right - left} x {bottom - top} px, not {width} x {height}"
        )
    pixels = imagecodecs.jpeg2k_decode(data)
    if codec.colour == "ycbcr":
        return _ycbcr_to_rgb(pixels)
    return _three_channels(pixels)


def _codestream(data: bytes) -> bytes:
    """The codestream of a JP2 file (its jp2c box, ISO 15444-1 I.4), or the data when it is one."""
    if data[4:8] != b"jP  ":
        return data
    position = 0
    while position + 16 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        head = 16 if length == 1 else 8
        if kind == b"jp2c":
            return data[position + head :]
        if length == 1:
            (length,) = struct.unpack(">Q", data[position + 8 : position + 16])
        if length < head:
            break
        position += length
    raise BadTileError("it is a JP2 file without a codestream")


def _raw(codec: Codec, data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    wanted = width * height * codec.samples
    if len(data) != wanted:
        raise BadTileError(f"it holds {len(data):,} bytes, not {wanted:,}")
    pixels = np.frombuffer(data, np.uint8).reshape(height, width, codec.samples)
    if codec.predictor == 2:
        pixels = np.cumsum(pixels, axis=1, dtype=np.uint8)
    return _three_channels(pixels)


def _deflate(codec: Codec, data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    return _raw(codec, _inflate(data, width * height * codec.samples), width, height)


def _lzw(codec: Codec, data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    wanted = width * height * codec.samples
    return _raw(codec, bytes(imagecodecs.lzw_decode(data, out=wanted + 1)), width, height)


def _zstd(codec: Codec, data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    wanted = width * height * codec.samples
    return _raw(codec, bytes(imagecodecs.zstd_decode(data, out=wanted)), width, height)


def _chunk(codec: Codec, data: bytes, width: int, height: int) -> NDArray[np.uint8]:
    wanted = width * height * codec.samples
    for config in reversed(codec.filters):
        data = _undo(config, data, wanted)
    if len(data) != wanted:
        raise BadTileError(f"its chunk holds {len(data):,} bytes, not {wanted:,}")
    flat = np.frombuffer(data, np.uint8)
    if codec.planar:  # stored as (channel, y, x)
        pixels = np.reshape(flat, (codec.samples, height, width)).transpose(1, 2, 0)
    else:
        pixels = np.reshape(flat, (height, width, codec.samples))
    return pixels[:, :, :3]


def _undo(config: dict[str, Any], data: bytes, wanted: int) -> bytes:
    """Undo one Zarr compressor, refusing declared sizes larger than the chunk."""
    name = config.get("id") or config.get("name")
    if name == "blosc":
        declared = struct.unpack("<I", data[4:8])[0] if len(data) >= 16 else -1
        if declared != wanted:
            raise BadTileError(f"its blosc header says {declared:,} bytes, not {wanted:,}")
        return bytes(imagecodecs.blosc_decode(data))
    if name == "zstd":
        return bytes(imagecodecs.zstd_decode(data, out=wanted))
    if name == "zlib":
        return _inflate(data, wanted)
    if name == "gzip":
        return _inflate(data, wanted, gzip=True)
    raise BadTileError(f"codec {name!r} is not known")


def _inflate(data: bytes, wanted: int, gzip: bool = False) -> bytes:
    engine = zlib.decompressobj(31 if gzip else 15)
    out = engine.decompress(data, wanted + 1)
    if len(out) > wanted:
        raise BadTileError(f"it inflates to more than {wanted:,} bytes")
    return out


def _three_channels(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    return pixels[:, :, :3]


def _ycbcr_to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """JFIF's full-range YCbCr (ITU-T T.871) to RGB, rounded to nearest."""
    y, cb, cr = (pixels[:, :, i].astype(np.float32) for i in range(3))
    rgb = np.stack(
        [
            y + 1.402 * (cr - 128),
            y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
            y + 1.772 * (cb - 128),
        ],
        axis=2,
    )
    return np.asarray(np.clip(np.rint(rgb), 0, 255), np.uint8)


_DECODERS = {
    "jpeg": _jpeg,
    "jpeg2000": _jpeg2000,
    "raw": _raw,
    "deflate": _deflate,
    "lzw": _lzw,
    "zstd": _zstd,
    "chunk": _chunk,
}
assert frozenset(_DECODERS) == CODEC_KINDS, "every codec kind has a decoder and the other way round"
