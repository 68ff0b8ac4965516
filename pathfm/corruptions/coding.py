"""What storing does to a picture: JPEG at low quality, and too few pixels."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pathfm.corruptions.rounding import Rgb


def jpeg(picture: Rgb, quality: float, _: NDArray[np.float64]) -> Rgb:
    """The picture after JPEG at this quality (1..95, libjpeg's scale), chroma halved both ways."""
    stored = io.BytesIO()
    Image.fromarray(picture).save(stored, "JPEG", quality=int(quality), subsampling="4:2:0")
    return np.asarray(Image.open(stored).convert("RGB"))


def pixelate(picture: Rgb, share: float, _: NDArray[np.float64]) -> Rgb:
    """The picture reduced to `share` of its sides by area averages, and every pixel drawn large."""
    height, width = picture.shape[:2]
    small = (max(1, int(width * share)), max(1, int(height * share)))
    reduced = Image.fromarray(picture).resize(small, Image.Resampling.BOX)
    return np.asarray(reduced.resize((width, height), Image.Resampling.NEAREST))
