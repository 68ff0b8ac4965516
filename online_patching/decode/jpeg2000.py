"""JPEG 2000 tiles -> RGB: whole, a region, or at a lower resolution."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from online_patching.codestream import BadStreamError, Frame, check_complete, codestream_of
from online_patching.decode.bad_tile import BadTileError
from online_patching.decode.channels import over_white, three_channels, ycbcr_to_rgb
from online_patching.decode.openjpeg import decode_planes
from online_patching.geometry import Box
from online_patching.slide_index import Codec

WORTH_BLOCKS = 2
"""Parts are decoded of tiles more code blocks across than this: their finest bands hold several."""


def decode(
    codec: Codec, data: bytes, width: int, height: int, scale: int = 1, box: Box | None = None
) -> NDArray[np.uint8]:
    """RGB pixels of one codestream, or of a part of it (px of the tile decoded at 1/scale).

    At 1/scale the finest wavelet bands are left out: pixels are the low-pass band of that resolution.
    Only code blocks that a part needs are decoded; its pixels are those of the whole. Where the finest bands
    are no larger than a code block, leaving some out costs more than it saves, and the whole is decoded.
    """
    try:
        data = codestream_of(data)
        frame = check_complete(data)
    except BadStreamError as error:
        raise BadTileError(str(error)) from None
    if (frame.width, frame.height) != (width, height):
        raise BadTileError(
            f"its frame says {frame.width} x {frame.height} px, not {width} x {height}"
        )
    reductions = scale.bit_length() - 1
    if reductions > frame.reductions:
        raise BadTileError(f"it can be halved {frame.reductions} times, not {reductions}")
    whole = Box(0, 0, -(-width // scale), -(-height // scale))
    box = box or whole
    small = max(whole.width, whole.height) <= WORTH_BLOCKS * frame.block_px
    seen = whole if small else _aligned(box, frame, whole)
    area = None
    if seen != whole:
        area = (seen.left * scale, seen.top * scale,
                min(seen.right * scale, width), min(seen.bottom * scale, height))  # fmt: skip
    pixels = _joined(decode_planes(data, reductions, area), frame, seen)
    if codec.colour == "ycbcr" and pixels.shape[2] == 3:
        pixels = ycbcr_to_rgb(pixels)
    elif pixels.shape[2] == 4:
        pixels = over_white(pixels)
    else:
        pixels = three_channels(pixels)
    cut = box.shift(-seen.left, -seen.top)
    return pixels[cut.top : cut.bottom, cut.left : cut.right]


def _aligned(box: Box, frame: Frame, whole: Box) -> Box:
    """A part grown to whole samples of every component."""
    across = max(x for x, _ in frame.subsampling)
    down = max(y for _, y in frame.subsampling)
    left, top = box.left // across * across, box.top // down * down
    right = min(-(-box.right // across) * across, whole.width)
    bottom = min(-(-box.bottom // down) * down, whole.height)
    return Box(left, top, right, bottom)


def _joined(planes: list[NDArray[np.uint8]], frame: Frame, seen: Box) -> NDArray[np.uint8]:
    """Planes as one picture; subsampled ones have their samples repeated, as OpenSlide does."""
    if len(planes) != frame.components:
        raise BadTileError(f"it has {len(planes)} components, not {frame.components}")
    pixels = np.empty((seen.height, seen.width, len(planes)), np.uint8)
    for number, (plane, (across, down)) in enumerate(zip(planes, frame.subsampling, strict=True)):
        grown = plane if across == 1 else np.repeat(plane, across, axis=1)
        grown = grown if down == 1 else np.repeat(grown, down, axis=0)
        if grown.shape[0] < seen.height or grown.shape[1] < seen.width:
            raise BadTileError(f"a component holds {plane.shape[1]} x {plane.shape[0]} px")
        pixels[:, :, number] = grown[: seen.height, : seen.width]
    return pixels
