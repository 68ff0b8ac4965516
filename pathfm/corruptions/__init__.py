"""Corruptions that happen to slides: ten kinds, five severities, uint8 patches in and out.

Nine kinds are those of Zhang et al., "Benchmarking the Robustness of Deep Neural Networks to Common
Corruptions in Digital Pathology" (MICCAI 2022, arXiv 2206.14973); the tenth is a shift of stain. What
is done to a picture follows from (seed, picture number, corruption, severity) and nothing else.

    coding.py    jpeg, pixelate                    optics.py    defocus, motion
    colour.py    brightness, saturation, hue       objects.py   mark (a pen), bubble (of air)
    staining.py  stain                             apply.py     the table of them, `corrupt`

Numpy, scipy and PIL only.
"""

from pathfm.corruptions.apply import (
    CORRUPTIONS,
    SEVERITIES,
    Corruption,
    corrupt,
    picture_numbers,
)

__all__ = ["CORRUPTIONS", "SEVERITIES", "Corruption", "corrupt", "picture_numbers"]
