"""Polygons: which pixels are inside, outlines that give the mask back, files as QuPath has them."""

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.path import Path as MplPath
from scipy import ndimage

from pathfm.geojson import (
    Polygon,
    contours,
    files,
    rasterise,
    read_geojson,
    simplified,
    write_geojson,
)
from pathfm.runtime import PathfmError

MASKS = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12))


def _polygon(*rings: list[tuple[float, float]], name: str = "") -> Polygon:
    return Polygon(tuple(np.array(ring, np.float64) for ring in rings), name)


def _inside_by_loop(polygon: Polygon, x: float, y: float) -> bool:
    """Even-odd by counting the crossings of a ray to the left, edge by edge."""
    inside = False
    for ring in polygon.rings:
        for (x0, y0), (x1, y1) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
            if (y0 > y) != (y1 > y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x:
                inside = not inside
    return inside


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(-20, 90), st.integers(-20, 70)),
            min_size=3,
            max_size=7,
            unique=True,
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=60, deadline=None)
def test_a_pixel_is_inside_when_its_centre_is_by_even_odd(rings):
    # quarters: some centres lie on edges and vertices
    polygon = _polygon(*[[(x / 4, y / 4) for x, y in ring] for ring in rings])
    got = rasterise([polygon], (13, 17))
    wanted = [[_inside_by_loop(polygon, c + 0.5, r + 0.5) for c in range(17)] for r in range(13)]
    assert (got == np.array(wanted)).all()


@pytest.mark.parametrize("scale", [1.0, 0.37, (0.25, 0.61)])
def test_smooth_polygons_agree_with_matplotlib(scale):
    angles = np.linspace(0, 2 * np.pi, 91, endpoint=False)
    radius = 60 + 17 * np.sin(5 * angles)
    ring = np.stack([80.3 + radius * np.cos(angles), 71.7 + radius * np.sin(angles)], axis=1)
    sx, sy = scale if isinstance(scale, tuple) else (scale, scale)
    shape = (round(140 * sy), round(150 * sx))
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    wanted = MplPath(ring * (sx, sy)).contains_points(np.stack([x.ravel(), y.ravel()], axis=1))
    assert (rasterise([Polygon((ring,))], shape, scale) == wanted.reshape(shape)).all()


def test_holes_are_out_and_polygons_that_overlap_are_joined():
    square = [(1.0, 1.0), (9.0, 1.0), (9.0, 7.0), (1.0, 7.0)]
    hole = [(3.0, 3.0), (3.0, 5.0), (6.0, 5.0), (6.0, 3.0)]
    wanted = np.zeros((8, 11), bool)
    wanted[1:7, 1:9] = True
    wanted[3:5, 3:6] = False
    assert (rasterise([_polygon(square, hole)], (8, 11)) == wanted).all()
    wanted[3:5, 3:6] = True
    assert (rasterise([_polygon(square, hole), _polygon(square)], (8, 11)) == wanted).all()


def test_polygons_that_share_an_edge_neither_overlap_nor_leave_a_gap():
    rng = np.random.default_rng(3)
    middle = rng.uniform(2, 18, 2)
    corners = [(0.0, 0.0), (20.0, 0.0), (20.0, 15.0), (0.0, 15.0)]
    around = [*corners, corners[0]]
    parts = [_polygon([a, b, tuple(middle)]) for a, b in itertools.pairwise(around)]
    assert (sum(rasterise([part], (15, 20)).astype(int) for part in parts) == 1).all()


def test_what_lies_outside_is_cut_off_and_many_crossings_are_worked_on_in_parts(monkeypatch):
    ring = np.array([[-1e9, -1e9], [1e9, -1e9], [1e9, 1e9], [-1e9, 1e9]])
    assert rasterise([Polygon((ring,))], (5, 7)).all()
    assert not rasterise([Polygon((ring + np.array([3e9, 0]),))], (5, 7)).any()
    zigzag = np.random.default_rng(1).uniform(0, 60, (500, 2))
    whole = rasterise([Polygon((zigzag,))], (60, 61))
    monkeypatch.setattr("pathfm.geojson.raster._CROSSINGS_AT_ONCE", 100)
    assert (rasterise([Polygon((zigzag,))], (60, 61)) == whole).all()


@given(MASKS, st.sampled_from([1.0, 16.13, (7.1, 31.7)]))
@settings(max_examples=150, deadline=None)
def test_rasterised_outlines_give_the_mask_back_bit_for_bit(mask, scale):
    back = (1 / scale[0], 1 / scale[1]) if isinstance(scale, tuple) else 1 / scale
    assert (rasterise(contours(mask, scale), mask.shape, back) == mask).all()


@given(MASKS)
@settings(max_examples=100, deadline=None)
def test_outlines_are_one_polygon_a_piece_of_simple_rings_that_turn_at_every_vertex(mask):
    polygons = contours(mask)
    assert len(polygons) == ndimage.label(mask)[1]
    areas = []
    for polygon in polygons:
        for k, ring in enumerate(polygon.rings):
            assert len({tuple(v) for v in ring.tolist()}) == len(ring)
            steps = np.roll(ring, -1, axis=0) - ring
            assert ((steps == 0).sum(axis=1) == 1).all()
            assert ((steps == 0) != (np.roll(steps, 1, axis=0) == 0)).all()
            x, y = ring.T
            area = (x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
            assert (area > 0) == (k == 0)
            areas.append(area)
    assert sum(areas) == mask.sum()


def test_an_outline_worked_out_by_hand_has_its_hole_and_its_pinch():
    mask = np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 1, 0, 1]], bool)
    ring, lone = contours(mask)
    assert [_from_first(r) for r in lone.rings] == [[[3, 2], [4, 2], [4, 3], [3, 3]]]
    assert _from_first(ring.rings[0]) == [[0, 0], [3, 0], [3, 2], [2, 2], [2, 3], [0, 3]]
    assert sorted(ring.rings[1].tolist()) == [[1, 1], [1, 2], [2, 1], [2, 2]]


def _from_first(ring: np.ndarray) -> list:
    first = np.lexsort((ring[:, 0], ring[:, 1]))[0]
    return np.roll(ring, -first, axis=0).tolist()


@pytest.mark.parametrize("tolerance", [0.75, 3.0])
def test_simplified_outlines_stay_within_the_tolerance(tolerance):
    rng = np.random.default_rng(5)
    mask = ndimage.gaussian_filter(rng.random((90, 131)), 5) > 0.5
    exact, fewer = contours(mask), contours(mask, tolerance_px=tolerance)
    assert sum(p.vertices for p in fewer) < 0.5 * sum(p.vertices for p in exact)
    for a, b in zip(exact, fewer, strict=True):
        for ring, kept in zip(a.rings, b.rings, strict=True):
            starts, ends = kept, np.roll(kept, -1, axis=0)
            for vertex in ring:  # the distance to the nearest edge, one edge after the other
                nearest = min(
                    np.hypot(*(vertex - (p + t * (q - p))))
                    for p, q in zip(starts, ends, strict=True)
                    for t in [np.clip((vertex - p) @ (q - p) / ((q - p) @ (q - p)), 0, 1)]
                )
                assert nearest <= tolerance + 1e-9


def test_a_ring_that_would_lose_its_area_stays_as_it_is():
    ring = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    assert simplified(ring, 50.0) is ring


@pytest.mark.parametrize("rings", [(), (np.zeros((2, 2)),), (np.full((3, 2), np.nan),)])
def test_a_polygon_cannot_be_built_wrong(rings):
    with pytest.raises(ValueError, match="ring"):
        Polygon(rings)


# --- files ----------------------------------------------------------------------------------------

SQUARE = [[0, 0], [4, 0], [4, 3], [0, 3], [0, 0]]


def _feature(kind: str = "Polygon", coordinates: object = None, **properties: object) -> dict:
    coordinates = [SQUARE] if coordinates is None else coordinates
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def _file(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "drawn.geojson"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_what_is_written_reads_back_and_is_what_qupath_opens(tmp_path):
    mask = np.random.default_rng(2).random((9, 14)) < 0.6
    polygons = contours(mask, scale=(3.25, 4.5))
    path = tmp_path / "a.geojson"
    write_geojson(path, polygons)
    again = read_geojson(path)
    assert [p.name for p in again] == ["Tissue"] * len(polygons)
    assert again[0].colour == (0, 200, 83)
    assert (rasterise(again, mask.shape, (1 / 3.25, 1 / 4.5)) == mask).all()
    read = json.loads(path.read_text())
    assert read["type"] == "FeatureCollection"
    ids = [feature["id"] for feature in read["features"]]
    assert len(set(ids)) == len(ids)
    assert all(len(i) == 36 for i in ids)
    for feature in read["features"]:
        assert feature["properties"]["objectType"] == "annotation"
        assert feature["properties"]["classification"]["name"] == "Tissue"
        assert len(feature["properties"]["classification"]["color"]) == 3
        assert all(ring[0] == ring[-1] for ring in feature["geometry"]["coordinates"])
    before = path.read_bytes()
    write_geojson(path, polygons)
    assert path.read_bytes() == before


def test_all_shapes_of_file_that_qupath_has_written_are_read(tmp_path):
    hole = [[1, 1], [2, 1], [2, 2], [1, 1]]
    features = [
        _feature(classification={"name": "Tissue", "colorRGB": -3140401}),
        _feature("MultiPolygon", [[SQUARE, hole], [[[9, 9], [10, 9], [9, 12]]]]),
        _feature(
            coordinates=[[[x, y, 0.0] for x, y in SQUARE]], classification={"names": ["A", "b"]}
        ),
        _feature("Point", [3, 4]),
        _feature("LineString", [[1, 2], [3, 4]]),
        {"type": "Feature", "geometry": None, "properties": None},
    ]
    for content in ({"type": "FeatureCollection", "features": features}, features):
        got = read_geojson(_file(tmp_path, content))
        assert [p.name for p in got] == ["Tissue", "", "", "A: b"]
        assert [len(p.rings) for p in got] == [1, 2, 1, 1]
        assert all(len(p.rings[0]) in (3, 4) for p in got)
    assert len(read_geojson(_file(tmp_path, features[0]))) == 1


@pytest.mark.parametrize(
    ("coordinates", "said"),
    [
        ([[[0, 0], [1, 0]]], "2 vertices"),
        ([[[0, 0], [1, 0], [0, 0]]], "2 vertices"),
        ([[[0, 0], [1, 0], ["2", 3]]], "no list of"),
        ([[["0", "0"], ["1", "0"], ["2", "3"]]], "no list of"),
        ([[[0, 0], [1, 0], [1]]], "no list of"),
        ([[0, 0], [1, 0], [1, 1]], "no list of"),
        ([[[[0, 0], [1, 0], [1, 1]]]], "no list of"),
        ([[[0, 0], [1, 0], [None, 1]]], "no list of"),
        ([[[0, 0], [1, 0], [10**400, 1]]], "no list of"),
        ([[[0, 0], [1, 0], [2e9, 1]]], "beyond 1e\\+09"),
        ([[True, False]], "no list of"),
        ([[]], "no list of"),
        ([{}], "ring 0 is"),
        ([], "list of rings"),
        ({}, "list of rings"),
        ("0 0, 1 1", "list of rings"),
    ],
)
def test_a_bad_feature_is_named_by_file_and_number(tmp_path, coordinates, said):
    path = _file(tmp_path, [_feature(), _feature(coordinates=coordinates)])
    with pytest.raises(PathfmError, match=rf"drawn\.geojson: feature 2: .*{said}") as caught:
        read_geojson(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "feature", [3, None, {}, _feature("Circle"), _feature("MultiPolygon", 7), _feature(["Polygon"]),
                {"type": "Feature", "geometry": [1]}]
)  # fmt: skip
def test_what_is_no_feature_of_polygons_is_refused(tmp_path, feature):
    with pytest.raises(PathfmError, match="feature 1: "):
        read_geojson(_file(tmp_path, [feature]))


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "3", "{}", '{"features": {}}', '[NaN]', "[1" + "0" * 5000 + "]",
        '{"type": "FeatureCollection", "features": [{"x": Infinity}]}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_file_that_is_no_geojson_is_refused_in_one_line(tmp_path, content):
    with pytest.raises(PathfmError, match=r"drawn\.geojson: ") as caught:
        read_geojson(_file(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_an_overflowing_number_is_no_infinity(tmp_path):
    text = json.dumps([_feature()]).replace("[4, 3]", "[1e999, 3]")
    with pytest.raises(PathfmError, match="feature 1: ring 0 has a coordinate beyond"):
        read_geojson(_file(tmp_path, text))


def test_files_are_bounded_in_bytes_and_vertices(tmp_path, monkeypatch):
    path = _file(tmp_path, [_feature(), _feature()])
    monkeypatch.setattr(files, "MAX_VERTICES", 7)
    with pytest.raises(PathfmError, match="feature 2: more than 7 vertices"):
        read_geojson(path)
    monkeypatch.setattr(files, "MAX_BYTES", 100)
    with pytest.raises(PathfmError, match="are more than 100"):
        read_geojson(path)
    with pytest.raises(PathfmError, match="No such file"):
        read_geojson(tmp_path / "none.geojson")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PathfmError, match="no regular file"):
        read_geojson(tmp_path / "pipe")
