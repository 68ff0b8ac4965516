"""Help for tests and demonstrations: slides whose truth is known.

layout.py       what lies where on a synthetic slide
drawing.py      its pixels at any place and µm/px
textures.py     what it is woven from
writers.py      the same as SVS and generic TIFF
ome_zarr.py     the same as OME-Zarr, and Zarr of every other kind that is read
demo.py         the demo's slides, their truth, and patches of known class
raw_tiff.py     TIFFs tag by tag, right or wrong
tiff_codecs.py  TIFFs in every way of storing a tile   jpeg2000.py       streams no other encoder makes
vendor_tiffs.py Philips, Leica and Ventana
odd_slides.py   JPEG slides of every odd kind, the same bytes everywhere
hostile.py      files that lie, by number              hostile_seeds.py  what they are made from
hostile_codecs.py  the same beyond JPEG, and single tiles
"""

from online_patching.testing.demo import (
    DemoSlide,
    demo_slides,
    write_demo_slides,
    write_labelled_patches,
)
from online_patching.testing.drawing import StainLook, SyntheticSlide
from online_patching.testing.layout import CLASS_NAMES
from online_patching.testing.ome_zarr import Storage, write_ome_zarr, write_zarr_array
from online_patching.testing.writers import write_tiff

__all__ = [
    "CLASS_NAMES",
    "DemoSlide",
    "StainLook",
    "Storage",
    "SyntheticSlide",
    "demo_slides",
    "write_demo_slides",
    "write_labelled_patches",
    "write_ome_zarr",
    "write_tiff",
    "write_zarr_array",
]
