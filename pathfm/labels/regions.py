"""A class a region: annotations drawn in QuPath, cut with the slide's tissue, as masks of their own."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from online_patching import Corpus, CorpusView, ForegroundMask
from pathfm.geojson import Polygon, rasterise, read_geojson
from pathfm.labels import LabelsConfig
from pathfm.labels.rows import LabelledRows, chosen_classes
from pathfm.labels.tables import drawable
from pathfm.runtime import PathfmError

Bits = NDArray[np.bool_]
Areas = dict[str, list[Polygon]]
"""Class name -> its polygons on one slide."""


def region_labels(config: LabelsConfig, corpus: Corpus, folder: Path) -> LabelledRows:
    """A view of the corpus with a row a slide and class: the slide's tissue inside the class's regions.

    Tissue cells (of the slide's foreground mask) whose centres lie in regions of two classes are of
    neither. Regions without a class, or of a class that ends in "*" (QuPath: to be ignored), are left out
    unless `config.classes` names it. With `config.unlabelled`, slides without any annotated region come
    last, whole, with label -1. PathfmError when no slide of the corpus has a file, or fewer than two
    classes have tissue.
    """
    assert config.regions is not None
    usable = drawable(config, corpus, folder)
    files = _files(config.regions)
    of_slide: dict[int, Areas] = {}
    for row, slide_id in enumerate(corpus.slide_ids):
        if usable[row] and slide_id in files:
            of_slide[row] = _areas(files[slide_id], config)
    if not of_slide:
        raise PathfmError(
            f"labels.regions {config.regions}: none of its {len(files)} .geojson files is called as a slide of "
            f"the corpus that may be drawn; wanted {corpus.slide_id(0)}.geojson"
        )
    found = [name for areas in of_slide.values() for name in areas]
    classes = chosen_classes(config, found, f"the regions in {config.regions}")
    cut = _Cut(corpus, of_slide, classes)
    rows, labels = cut.rows, cut.labels
    without = [k for k, name in enumerate(classes) if k not in labels]
    if without:
        raise PathfmError(
            f"labels.regions {config.regions}: class {classes[without[0]]!r} has no tissue of its own "
            f"({cut.shared_mm2:.3g} mm² lie in two classes). Draw its regions on tissue, or leave it out of "
            "labels.classes"
        )
    masks = list(cut.masks)
    if config.unlabelled:
        whole = [row for row in np.flatnonzero(usable).tolist() if not of_slide.get(row)]
        rows, labels = rows + whole, labels + [-1] * len(whole)
        masks += [corpus.mask(row) for row in whole]
    view = CorpusView(corpus, rows, masks)
    number = np.asarray(labels, np.int64)
    return LabelledRows(view, number, np.ones(len(rows), bool), classes, cut.notes(config))


class _Cut:
    """Regions rasterised on their slides' masks: rows, labels and masks in step, by slide and class."""

    def __init__(
        self, corpus: Corpus, of_slide: Mapping[int, Areas], classes: tuple[str, ...]
    ) -> None:
        self.rows: list[int] = []
        self.labels: list[int] = []
        self.masks: list[ForegroundMask] = []
        self.classes = classes
        self.area_mm2 = np.zeros(len(classes))
        self.shared_mm2 = 0.0
        for row, areas in of_slide.items():
            for number, mask in self._masks(corpus.mask(row), areas):
                self.rows.append(row)
                self.labels.append(number)
                self.masks.append(mask)
                self.area_mm2[number] += mask.tissue_area_um2 / 1e6

    def _masks(self, tissue: ForegroundMask, areas: Areas) -> Iterator[tuple[int, ForegroundMask]]:
        """The mask of each class that has tissue on a slide."""
        bits, (width, height) = tissue.bits, tissue.size_px0
        scale = (tissue.width / width, tissue.height / height)
        inside: dict[int, Bits] = {
            number: rasterise(areas[name], bits.shape, scale) & bits
            for number, name in enumerate(self.classes)
            if name in areas
        }
        times = np.zeros(bits.shape, np.uint16)
        for one in inside.values():
            times += one
        shared = times > 1
        cell_mm2 = tissue.tissue_area_um2 / 1e6 / max(1, tissue.tissue_cells)
        self.shared_mm2 += float(shared.sum()) * cell_mm2
        for number, one in inside.items():
            own = one & ~shared
            if own.any():
                yield number, ForegroundMask.from_array(own, tissue.size_px0, tissue.mpp_px0)

    def notes(self, config: LabelsConfig) -> tuple[str, ...]:
        """What there is, in one line."""
        slides = [len({r for r, n in zip(self.rows, self.labels, strict=True) if n == k})
                  for k in range(len(self.classes))]  # fmt: skip
        each = ", ".join(
            f"{name} {area:.3g} mm² on {n:,} slide(s)"
            for name, area, n in zip(self.classes, self.area_mm2.tolist(), slides, strict=True)
        )
        both = f"; {self.shared_mm2:.3g} mm² in two classes, so in none" if self.shared_mm2 else ""
        return (f"labels of regions in {config.regions}: {each}{both}",)


def _files(folder: Path) -> dict[str, Path]:
    """Slide id -> file, of a folder's .geojson files."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(".geojson")]
    except OSError as error:
        raise PathfmError(f"labels.regions {folder}: {error.strerror}") from None
    return {name.removesuffix(".geojson"): folder / name for name in sorted(names)}


def _areas(path: Path, config: LabelsConfig) -> Areas:
    areas: Areas = defaultdict(list)
    for polygon in read_geojson(path):
        name = polygon.name
        if name in config.classes or (name and not name.endswith("*") and not config.classes):
            areas[name].append(polygon)
    return dict(areas)
