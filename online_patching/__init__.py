"""Whole-slide images in, patches out: random coordinates at exact magnifications, from byte ranges.

To read the package in the order in which a patch is made:

  slide_index.py   a slide as a table of byte ranges       formats/   headers -> SlideIndex
  mask.py          where the tissue is                     corpus.py  many slides, on disk
  philox.py        random words of (seed, draw)            sampler.py draw number -> PatchRef
  plan.py          PatchRef -> level, tiles, byte ranges   stores/    where bytes come from
  fetch.py         runs a plan                             decode.py  tile bytes -> pixels
  resample.py      pixels at the exact µm/px               slide.py   one slide, by hand
  threads.py       batches in one process                  processes.py  in several
  loader.py        the stream of batches                   torch_dataset.py  for torch
  batch.py, geometry.py, errors.py, stats.py  shared words testing/  synthetic slides
"""

from online_patching import errors
from online_patching.batch import PatchBatch
from online_patching.corpus import Corpus
from online_patching.formats import find_slides, read_slide_index
from online_patching.geometry import PatchRef
from online_patching.loader import PatchLoader
from online_patching.mask import ForegroundMask
from online_patching.sampler import PatchSampler
from online_patching.slide import Slide, open_slide
from online_patching.slide_index import Level, SlideIndex

__all__ = [
    "Corpus",
    "ForegroundMask",
    "Level",
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
