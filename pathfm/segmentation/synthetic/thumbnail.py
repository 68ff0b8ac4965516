"""Synthetic thumbnails of known truth, for training the foreground model.

They hold what real thumbnails hold: glass of every tint, letterboxes and seams; tissue of many
stains, textures and outlines; fat, lung, pale stroma, smears; pen, bubbles, coverslip edges, dust.

Truth: tissue includes fat, alveoli, and holes and inlets narrower than 12 px; wider ones are glass.
Opaque ink is not tissue, also where it lies on tissue; tissue under a dry pen, a bubble, a hair or
a coverslip's edge stays tissue. Folds are tissue, crumbs of less than 45 px are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pathfm.segmentation.synthetic.artefacts import lay_artefacts
from pathfm.segmentation.synthetic.canvas import Canvas, Kind, Mask
from pathfm.segmentation.synthetic.frames import lay_frame
from pathfm.segmentation.synthetic.glass import lay_glass
from pathfm.segmentation.synthetic.outline import draw_outline
from pathfm.segmentation.synthetic.pen import lay_pen
from pathfm.segmentation.synthetic.stains import draw_stain
from pathfm.segmentation.synthetic.tissue import lay_tissue


@dataclass(frozen=True)
class SyntheticThumbnail:
    """A drawn thumbnail: `rgb` (h, w, 3) uint8, `kinds` (h, w) uint8 of `Kind`, stain, µm/px."""

    rgb: NDArray[np.uint8]
    kinds: NDArray[np.uint8]
    stain: str
    mpp: float

    @property
    def tissue(self) -> Mask:
        """(h, w) True where tissue of any kind lies."""
        return (self.kinds >= Kind.TISSUE) & (self.kinds <= Kind.PALE)


def draw_thumbnail(seed: int, draw: int, size_px: int = 384) -> SyntheticThumbnail:
    """Thumbnail number `draw` of a seed, size_px square: a pure function of (seed, draw, size_px).

    `stain` is "" on empty glass.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, draw], np.uint64)))
    shape = (size_px, size_px)
    c = Canvas(rng, size_px, np.zeros((*shape, 3), np.float32), np.zeros(shape, np.uint8))
    mpp = c.span(4, 24)
    lay_glass(c)
    signed, outline = draw_outline(c)
    stain = draw_stain(c)
    if (signed > 0).any():
        lay_tissue(c, signed, outline, stain, 1 / mpp)
    lay_artefacts(c)
    lay_pen(c)
    rgb = _camera(c)
    c.rgb = rgb.astype(np.float32)
    lay_frame(c)
    finished = np.clip(c.rgb + 0.5, 0, 255).astype(np.uint8)
    return SyntheticThumbnail(finished, c.kinds, stain.name if c.tissue.any() else "", mpp)


def _camera(c: Canvas) -> NDArray[np.uint8]:
    """Sensor noise, and focus or sharpening; frames are added by software, after the camera."""
    if c.chance(0.5):
        c.rgb += c.rng.normal(0, c.between(0.3, 3), c.rgb.shape).astype(np.float32)
    picture = Image.fromarray(np.clip(c.rgb + 0.5, 0, 255).astype(np.uint8))
    if c.chance(0.45):
        picture = picture.filter(ImageFilter.GaussianBlur(c.between(0.3, 1.0)))
    elif c.chance(0.3):
        picture = picture.filter(ImageFilter.UnsharpMask(1.0, int(c.between(40, 150)), 0))
    return np.asarray(picture)
