"""Which pictures have one certain meaning as 8-bit RGB, and why another has not."""

from __future__ import annotations

import numpy as np
from PIL import Image

FORMATS = ("PNG", "JPEG", "TIFF")
"""What is opened, whatever a file is called: Pillow's other readers are more code for strangers' bytes
(an EPS goes to Ghostscript), and no data set here needs them."""

_MODES = ("1", "L", "P", "RGB", "RGBX", "YCbCr", "LA", "PA", "RGBA")
_DEEP = {"F": "floating-point", "I": "32-bit"}


def unfit(image: Image.Image, decode: bool = True) -> str:
    """Why an opened picture is no 8-bit grey, palette or RGB; "" where it is one.

    More than 8 bits a channel, CMYK and Lab have no one way to RGB (Pillow would clip 16-bit grey to
    white), and transparent pixels have no colour until one says what is behind them. An alpha channel
    that is opaque everywhere is fit. decode: look at the alpha channel, which decodes the pixels.
    """
    raw = _raw_mode(image)
    if image.mode not in _MODES or ";16" in raw:
        deep = "16-bit" if "16" in raw + image.mode else _DEEP.get(image.mode, image.mode)
        return f"{deep} pixels; wanted are 8-bit grey, palette or RGB: convert it, and say how"
    if decode and image.has_transparency_data:
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
        if n := int((alpha < 255).sum()):
            return (
                f"{n:,} of {alpha.size:,} px are transparent, and what is behind them is not told; "
                "flatten it, onto white for instance"
            )
    return ""


def _raw_mode(image: Image.Image) -> str:
    """How the file holds its pixels: Pillow calls an RGB of 16 bits a channel "RGB" as well."""
    for _, _, _, details in getattr(image, "tile", ()):
        first = details[0] if isinstance(details, tuple) and details else details
        if isinstance(first, str):
            return first
    return ""
