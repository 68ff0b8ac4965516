"""Whole-slide images in, patches out: random coordinates at exact magnifications, from byte ranges.

To read the package in the order in which a patch is made:

  slide_index.py   a slide as a table of byte ranges       formats/   headers -> SlideIndex
  mask.py          where the tissue is                     corpus/    many slides, on disk
  philox.py        random words of (seed, draw)            sampling/  draw number -> which patch
  plan.py          one patch -> level, tiles, byte ranges  batch_plan/    a batch of them, as arrays
  stores/          where bytes come from                   fetch.py   runs a plan
  canvases.py      bytes -> patches, natively (native/) or portably (decode/, resample.py)
  loading/         the stream of batches                   torch_dataset.py  for torch
  slide.py         one slide, by hand                      testing/   synthetic slides
  geometry.py, bitmaps.py, errors.py, stats.py             shared words
"""

from online_patching import errors
from online_patching.corpus import Corpus, CorpusView
from online_patching.formats import find_slides, read_slide_index
from online_patching.geometry import PatchRef
from online_patching.loading import PatchBatch, PatchLoader
from online_patching.mask import ForegroundMask
from online_patching.sampling import (
    BalancedSampler,
    BlurFilter,
    Continuous,
    EpochSampler,
    GridSampler,
    HsvFilter,
    MaxAvg,
    MinMax,
    PatchSampler,
)
from online_patching.slide import Slide, open_slide
from online_patching.slide_index import Level, SlideIndex

__all__ = [
    "BalancedSampler",
    "BlurFilter",
    "Continuous",
    "Corpus",
    "CorpusView",
    "EpochSampler",
    "ForegroundMask",
    "GridSampler",
    "HsvFilter",
    "Level",
    "MaxAvg",
    "MinMax",
    "PatchBatch",
    "PatchLoader",
    "PatchRef",
    "PatchSampler",
    "Slide",
    "SlideIndex",
    "errors",
    "find_slides",
    "open_slide",
    "read_slide_index",
]
