"""Polygons: QuPath's GeoJSON in and out, polygons to pixels, and a mask's outline as polygons.

Coordinates are x to the right and y down, in pixels of one picture, whose pixel corners lie at
integers: pixel (row, column) covers [column, column + 1) x [row, row + 1).

raster.py     polygons -> the pixels whose centres lie inside
contours.py   a mask -> polygons with holes along its cells' edges; fewer vertices on request
files.py      GeoJSON files as QuPath writes and opens them
"""

from pathfm.geojson.contours import contours, simplified
from pathfm.geojson.files import MAX_BYTES, MAX_VERTICES, read_geojson, write_geojson
from pathfm.geojson.raster import Polygon, rasterise

__all__ = [
    "MAX_BYTES",
    "MAX_VERTICES",
    "Polygon",
    "contours",
    "rasterise",
    "read_geojson",
    "simplified",
    "write_geojson",
]
