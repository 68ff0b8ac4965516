"""MoNuSAC: 294 pictures of four organs with a class a pixel, drawn as polygons in XML."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from xml.etree.ElementTree import Element, ParseError  # names only; defusedxml parses

import defusedxml.ElementTree as SafeXml
import numpy as np
from defusedxml.common import DefusedXmlException
from numpy.typing import NDArray

from pathfm.datasets.benchmark import Benchmark, Facts, SplitName
from pathfm.datasets.folder import picture_size, read_picture
from pathfm.datasets.listing import files_under, lacking
from pathfm.datasets.polygons import fill_polygon
from pathfm.datasets.sources import assemble, file_digest
from pathfm.runtime import PathfmError

FACTS = Facts(
    name="monusac",
    title="MoNuSAC 2020",
    task="segmentation",
    classes=("Background", "Epithelial", "Lymphocyte", "Neutrophil", "Macrophage", "Ambiguous"),
    mpp=0.25,
    counts={"train": 209, "val": 85},
    licence="CC BY-NC-SA 4.0",
    page="https://monusac-2020.grand-challenge.org/Data/",
    layout=(
        "'MoNuSAC_images_and_annotations/<patient>/*.tif' with an .xml each, and "
        "'MoNuSAC Testing Data and Annotations/<patient>/*.tif' likewise"
    ),
    ignored=(5,),
)

_FOLDERS: dict[SplitName, str] = {
    "train": "MoNuSAC_images_and_annotations",
    "val": "MoNuSAC Testing Data and Annotations",  # eva selects and reports on it
}
_MAX_XML_BYTES = 64 << 20
_MAX_VERTICES = 2_000_000
_AMBIGUOUS = FACTS.classes.index("Ambiguous")


@dataclass(frozen=True)
class PolygonMasks:
    """Pictures (tif) with masks drawn as polygons (xml), paths relative to the root."""

    root: Path
    paths: tuple[str, ...]

    def read(self, i: int) -> NDArray[np.uint8]:
        """The picture as uint8 (height, width, 3)."""
        return np.asarray(read_picture(self.root / self.paths[i]))

    def mask(self, i: int) -> NDArray[np.uint8]:
        """The six classes, uint8 (height, width); a later polygon covers an earlier one."""
        height, width = picture_size(self.root / self.paths[i])
        mask = np.zeros((height, width), np.uint8)
        for label, vertices in _polygons(self.root / _annotation(self.paths[i])):
            fill_polygon(mask, vertices, label)
        return mask

    def content(self, i: int) -> str:
        """SHA-256 of the picture and of its annotation."""
        files = (self.root / self.paths[i], self.root / _annotation(self.paths[i]))
        return "".join(file_digest(file) for file in files)


def open_monusac(root: Path) -> Benchmark:
    """The pictures in the order of their paths; the group is the patient (TCGA-5P-A9K0)."""
    paths: list[str] = []
    splits: list[str] = []
    for split, folder in _FOLDERS.items():
        if not (root / folder).is_dir():
            raise lacking(FACTS, root, f"there is no folder {folder!r}")
        found = sorted(files_under(root, folder, (".tif",)))
        without = [path for path in found if not (root / _annotation(path)).is_file()]
        if without or not found:
            what = f"{_annotation(without[0])} is missing" if without else f"{folder!r} has no .tif"
            raise lacking(FACTS, root, what)
        paths += found
        splits += [split] * len(found)
    patients = ["-".join(PurePosixPath(path).name.split("-")[:3]) for path in paths]
    source = PolygonMasks(root, tuple(paths))
    return assemble(FACTS, root, paths, [-1] * len(paths), splits, patients, source)


def _annotation(path: str) -> str:
    return f"{path[:-4]}.xml"


def _polygons(file: Path) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Class and vertices (n, 2) as x, y in px of every region, in the file's order.

    A class that is none of the four is Ambiguous, as in eva.
    """
    left = _MAX_VERTICES
    for annotation in _parsed(file):
        names = [item.get("Name") for item in annotation.iterfind("Attributes/Attribute")]
        regions = annotation.findall("Regions/Region")
        if regions and not names:
            raise PathfmError(f"{file}: regions without the name of their class")
        for region in regions:
            drawn = region.findall("Vertices/Vertex")
            left -= len(drawn)
            if left < 0:
                raise PathfmError(f"{file}: more than {_MAX_VERTICES:,} vertices")
            try:
                points = [(float(v.get("X", "")), float(v.get("Y", ""))) for v in drawn]
            except ValueError:
                raise PathfmError(f"{file}: a vertex without numbers X and Y") from None
            vertices = np.asarray(points, np.float64).reshape(-1, 2)
            if not np.isfinite(vertices).all():
                raise PathfmError(f"{file}: a vertex that is no finite place")
            yield (
                FACTS.classes.index(names[0]) if names[0] in FACTS.classes else _AMBIGUOUS,
                vertices,
            )


def _parsed(file: Path) -> list[Element]:
    """The annotations of a file; entities and the like are refused."""
    try:
        if file.stat().st_size > _MAX_XML_BYTES:
            raise PathfmError(f"{file}: larger than {_MAX_XML_BYTES >> 20} MiB")
        top = SafeXml.parse(file).getroot()
    except (OSError, ParseError, DefusedXmlException, ValueError, LookupError) as error:
        reason = " ".join(str(error).split())
        raise PathfmError(f"{file}: not a readable annotation ({reason})") from None
    return [] if top is None else list(top)
