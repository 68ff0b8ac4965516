"""Masks drawn by hand, one GeoJSON a slide, taken in place of a method's."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from online_patching.slide_index import SlideIndex
from pathfm.foreground import ForegroundConfig
from pathfm.geojson import MAX_BYTES, Polygon, rasterise, read_geojson
from pathfm.runtime import PathfmError

CUT_AWAY = ("background", "ignore", "ignore*", "pen")
"""Classes (in small letters) whose areas are no tissue, whatever lies under them."""


@dataclass(frozen=True)
class Drawings:
    """Which slides have a drawing, and where."""

    files: dict[str, Path]

    def digest(self, slide_id: str) -> str:
        """SHA-256 of a slide's drawing; empty when it has none. ``PathfmError`` for an unreadable
        one."""
        path = self.files.get(slide_id)
        if path is None:
            return ""
        try:
            if (size := path.stat().st_size) > MAX_BYTES:
                raise PathfmError(f"{path}: {size:,} bytes, a drawing has {MAX_BYTES:,} at most")
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise PathfmError(f"{path}: {error.strerror}") from None

    def mask(self, index: SlideIndex, shape: tuple[int, int]) -> NDArray[np.bool_] | None:
        """The slide's drawn tissue in an array that spans the slide; None when it has no drawing."""
        path = self.files.get(index.slide_id)
        if path is None:
            return None
        polygons = read_geojson(path)
        (width_px0, height_px0), (height, width) = index.dimensions, shape
        scale = (width / width_px0, height / height_px0)
        tissue = [p for p in polygons if is_tissue(p)]
        if not tissue:
            named = sorted({p.name or "(no class)" for p in polygons})
            raise PathfmError(
                f"{path}: none of its {len(polygons)} areas is tissue (classes: "
                f"{', '.join(named[:5]) or 'none'}). Give them the class Tissue, or none"
            )
        cut = [p for p in polygons if p.name.lower() in CUT_AWAY]
        return rasterise(tissue, shape, scale) & ~rasterise(cut, shape, scale)


def is_tissue(polygon: Polygon) -> bool:
    """Whether an annotation counts as tissue: without a class, or of the class Tissue."""
    return polygon.name.lower() in ("", "tissue")


def drawings_of(config: ForegroundConfig, slide_ids: Set[str]) -> Drawings:
    """The drawings of ``config.drawn`` by slide; names that no slide has are told on stderr.

    Raises ``PathfmError`` when the folder is missing, or is the one contours are written to.
    """
    folder = config.drawn
    if folder is None:
        return Drawings({})
    if not folder.is_dir():
        raise PathfmError(f"drawn: {folder} is no folder. Give one of <slide_id>.geojson files")
    if folder.resolve() == (config.corpus / "contours").resolve():
        raise PathfmError(
            f"drawn: {folder} is where contours are written: a drawing there would be replaced. "
            "Move the files you changed into a folder of their own."
        )
    files = {path.name.removesuffix(".geojson"): path for path in sorted(folder.glob("*.geojson"))}
    if not files:
        print(
            f"drawn: no <slide_id>.geojson in {folder}: the method makes all masks", file=sys.stderr
        )
    strangers = sorted(files.keys() - slide_ids)
    if strangers:
        names = ", ".join(strangers[:5]) + (" ..." if len(strangers) > 5 else "")
        print(
            f"drawn: {len(strangers)} of {len(files)} files in {folder} are named after no slide: {names}",
            file=sys.stderr,
        )
    return Drawings({name: path for name, path in files.items() if name in slide_ids})
