"""GeoJSON files as QuPath writes and opens them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from online_patching.stores.local import atomic_write_text
from pathfm.geojson.raster import Polygon, Ring
from pathfm.runtime import PathfmError, one_line

MAX_BYTES = 64 * 2**20
"""Larger files are not read: a mask's outline has some 100 KB."""
MAX_VERTICES = 2_000_000
MAX_COORDINATE = 1e9
_NO_AREA = {"Point", "MultiPoint", "LineString", "MultiLineString"}
_IDS = uuid.UUID("6c1f7b0e-3a86-5f0b-9c55-b3f7a2f0d4a1")


def read_geojson(path: Path | str) -> list[Polygon]:
    """The polygons of a GeoJSON file, in order; a MultiPolygon gives several of one name.

    Reads a FeatureCollection, a bare list of features (as QuPath 0.2 wrote) and a single feature.
    The name is QuPath's class (``properties.classification``, parts joined by ": "), "" without
    one. Points and lines have no area and are left out, as are features without geometry; rings
    that are not closed are closed; a third coordinate is left out.

    Raises ``PathfmError`` naming the file, and the feature counted from 1, for anything else:
    not JSON, more than `MAX_BYTES` or `MAX_VERTICES`, a coordinate that is no number, not finite
    or beyond 1e9, a ring of fewer than three vertices, nesting that is no polygon's, another
    geometry.
    """
    polygons: list[Polygon] = []
    vertices = 0
    for number, feature in enumerate(_features(path), start=1):
        try:
            for polygon in _polygons_of(feature):
                vertices += polygon.vertices
                if vertices > MAX_VERTICES:
                    raise ValueError(f"more than {MAX_VERTICES:,} vertices up to here")
                polygons.append(polygon)
        except ValueError as error:
            raise PathfmError(
                f"{path}: feature {number}: {one_line(error)}. Draw it again in QuPath or remove it."
            ) from None
    return polygons


def _features(path: Path | str) -> list[Any]:
    try:
        if not Path(path).is_file() and Path(path).exists():
            raise ValueError("no regular file")
        if (size := Path(path).stat().st_size) > MAX_BYTES:
            raise ValueError(f"{size:,} bytes are more than {MAX_BYTES:,}")
        read = json.loads(Path(path).read_bytes(), parse_constant=_no_number)
        if isinstance(read, list):
            return read
        if isinstance(read, dict) and read.get("type") == "Feature":
            return [read]
        if isinstance(read, dict) and isinstance(read.get("features"), list):
            return list(read["features"])
        raise ValueError("neither a FeatureCollection nor a list of features")
    except OSError as error:
        raise PathfmError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise PathfmError(
            f"{path}: not a GeoJSON of polygons ({one_line(error)}). Export annotations from QuPath "
            "with File > Export objects as GeoJSON."
        ) from None


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number")


def _polygons_of(feature: Any) -> Iterator[Polygon]:
    if not isinstance(feature, dict) or feature.get("type") != "Feature":
        raise ValueError(f"{_shown(feature)} is no feature")
    geometry = feature.get("geometry")
    if geometry is None:
        return
    if not isinstance(geometry, dict):
        raise ValueError(f"its geometry is {_shown(geometry)}")
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if isinstance(kind, str) and kind in _NO_AREA:
        return
    if kind not in ("Polygon", "MultiPolygon"):
        raise ValueError(f"{_shown(kind)} is neither Polygon nor MultiPolygon")
    parts = [coordinates] if kind == "Polygon" else coordinates
    if not isinstance(parts, list):
        raise ValueError(f"its coordinates are {_shown(coordinates)}")
    name, colour = _class_of(feature.get("properties"))
    for part in parts:
        if not isinstance(part, list) or not part:
            raise ValueError(f"a polygon is a list of rings, not {_shown(part)}")
        yield Polygon(tuple(_ring(ring, k) for k, ring in enumerate(part)), name, colour)


def _ring(read: Any, number: int) -> Ring:
    """A ring as read, checked, without its closing vertex."""
    if not isinstance(read, list):
        raise ValueError(f"ring {number} is {_shown(read)}")
    if len(read) > MAX_VERTICES:
        raise ValueError(f"ring {number} has more than {MAX_VERTICES:,} vertices")
    try:
        values = np.asarray(read)
    except ValueError:  # vertices of different lengths
        values = np.empty(0, object)
    if values.ndim != 2 or values.shape[1] < 2 or values.dtype.kind not in "iuf":
        raise ValueError(f"ring {number} is no list of [x, y] numbers: {_shown(read)}")
    ring = values[:, :2].astype(np.float64)
    if not (np.abs(ring) <= MAX_COORDINATE).all():
        raise ValueError(f"ring {number} has a coordinate beyond {MAX_COORDINATE:g}")
    if len(ring) > 1 and (ring[0] == ring[-1]).all():
        ring = ring[:-1]
    if len(ring) < 3:
        raise ValueError(f"ring {number} has {len(ring)} vertices; an area needs three")
    return ring


def _class_of(properties: Any) -> tuple[str, tuple[int, int, int] | None]:
    """QuPath's class and its colour, as far as they are what QuPath writes."""
    read = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(read, str):
        return read, None
    if not isinstance(read, dict):
        return "", None
    names = read.get("names")
    if isinstance(names, list) and all(isinstance(n, str) for n in names):
        name = ": ".join(names)
    else:
        name = read["name"] if isinstance(read.get("name"), str) else ""
    colour = read.get("color")
    if isinstance(colour, list) and len(colour) == 3 and all(type(c) is int for c in colour):
        return name, (colour[0] & 255, colour[1] & 255, colour[2] & 255)
    return name, None


def _shown(value: Any) -> str:
    """A value for a message, cut to what fits in one."""
    text = (
        type(value).__name__ if isinstance(value, list | dict) and len(value) > 8 else repr(value)
    )
    return text if len(text) <= 60 else text[:57] + "..."


def write_geojson(path: Path | str, polygons: Sequence[Polygon], decimals: int = 3) -> None:
    """Write polygons as a FeatureCollection that QuPath opens (drag it onto the open image).

    Each becomes an annotation of its class, with a colour and an id that is the same whenever the
    polygon is. Coordinates are rounded to `decimals`. The file is written whole or not at all.
    """
    text = json.dumps(
        {
            "type": "FeatureCollection",
            "features": [_feature(polygon, k, decimals) for k, polygon in enumerate(polygons)],
        },
        separators=(",", ":"),
    )
    atomic_write_text(Path(path), text + "\n")


def _feature(polygon: Polygon, number: int, decimals: int) -> dict[str, Any]:
    coordinates = []
    for ring in polygon.rings:
        numbers = [[_short(x), _short(y)] for x, y in ring.round(decimals).tolist()]
        coordinates.append([*numbers, numbers[0]])
    properties: dict[str, Any] = {"objectType": "annotation"}
    if polygon.name:
        properties["classification"] = {"name": polygon.name}
        if polygon.colour:
            properties["classification"]["color"] = list(polygon.colour)
    name = f"{number} {polygon.name} {json.dumps(coordinates)}"
    return {
        "type": "Feature",
        "id": str(uuid.uuid5(_IDS, name)),
        "geometry": {"type": "Polygon", "coordinates": coordinates},
        "properties": properties,
    }


def _short(value: float) -> float | int:
    return int(value) if value.is_integer() else value
