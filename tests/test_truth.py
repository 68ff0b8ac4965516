"""Drawn truth: what a drawing means, pixel by pixel, and what is refused."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathfm.runtime import PathfmError
from pathfm.segmentation.training_data import permitted
from pathfm.segmentation.truth import COLUMNS, DRAWN, read_pictures, read_table

SQUARE = [[2, 1], [10, 1], [10, 7], [2, 7], [2, 1]]


def box(x0: float, y0: float, x1: float, y1: float) -> list[list[float]]:
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]


def feature(name: str, *rings: list[list[float]]) -> dict:
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": list(rings)},
        "properties": {"objectType": "annotation", "classification": {"name": name}},
    }


def write_drawn(
    folder: Path, name: str, rgb: np.ndarray, features: list[dict], again=None, **row: str
) -> tuple[Path, Path]:
    """Adds a picture and its drawing to `folder`; returns (pictures' root, drawn folder)."""
    root, drawn = folder / "pictures", folder / "drawn"
    (drawn / "again").mkdir(parents=True, exist_ok=True)
    root.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG")
    (root / f"{name}.png").write_bytes(buffer.getvalue())
    sha = hashlib.sha256(buffer.getvalue()).hexdigest()
    height, width = rgb.shape[:2]
    told = {"file": f"{name}.png", "sha256": sha, "width_px": width, "height_px": height}
    for part, drawing in (("", features), ("again", again)):
        if drawing is not None:
            text = json.dumps({"type": "FeatureCollection", "picture": told, "features": drawing})
            (drawn / part / f"{name}.geojson").write_text(text)
    known = {
        **dict.fromkeys(COLUMNS, "x"),
        "name": name,
        **told,
        "split": "evaluation",
        "stain_group": "H&E",
        "source": name,
        "hard": "ink fat",
        **row,
    }
    table = drawn / "pictures.csv"
    new = not table.exists()
    with table.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow({column: known[column] for column in COLUMNS})
    return root, drawn


def test_what_a_drawing_means(tmp_path: Path) -> None:
    rgb = np.zeros((12, 20, 3), np.uint8)
    features = [
        feature("Tissue", box(2, 2, 14, 10), box(8, 4, 10, 6)),
        feature("Fat", box(2, 2, 4, 10)),
        feature("Pale stroma", box(12, 2, 16, 4)),  # reaches out of tissue: cut
        feature("Pen", box(5, 0, 6, 12)),
        feature("Bubble", box(13, 8, 18, 11)),
        feature("Edge", box(0, 11, 20, 12)),
        feature("Ignore", box(2, 9, 4, 10)),
    ]
    root, drawn = write_drawn(tmp_path, "a", rgb, features, again=features[:1])
    (picture,) = read_pictures([root], "evaluation", drawn)
    assert picture.tissue.sum() == 12 * 8 - 4 - 8 - 2
    assert picture.ignore.sum() == 2
    counts = {name: int(mask.sum()) for name, mask in picture.kinds.items()}
    assert counts == {"fat": 14, "pale": 4, "pen": 12, "bubble": 5 * 3 - 1 * 2, "edge": 19}
    assert picture.again is not None
    assert picture.again.tissue.sum() == 12 * 8 - 4
    assert picture.hard == ("ink", "fat")


def test_missing_pictures_are_named_with_their_origin(tmp_path: Path) -> None:
    rgb = np.zeros((8, 12, 3), np.uint8)
    root, drawn = write_drawn(tmp_path, "a", rgb, [], origin="some/where")
    write_drawn(tmp_path, "b", rgb, [], origin="else/where")
    elsewhere = tmp_path / "second"
    elsewhere.mkdir()
    (root / "a.png").rename(elsewhere / "a.png")
    assert len(read_pictures([root, elsewhere], "evaluation", drawn)) == 2
    with pytest.raises(PathfmError, match=r"1 of 2 .*a\.png \(from some/where\)"):
        read_pictures([root], "evaluation", drawn)
    with pytest.raises(PathfmError, match="no such folder"):
        read_pictures([tmp_path / "none"], "evaluation", drawn)
    with pytest.raises(PathfmError, match="no split 'test'"):
        read_pictures([root], "test", drawn)


def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    _, drawn = write_drawn(tmp_path, "a", np.zeros((8, 12, 3), np.uint8), [])
    table = drawn / "pictures.csv"
    table.write_text(table.read_text().replace("a.png", "a" * 5000))
    with pytest.raises(PathfmError, match="too long"):
        read_pictures([tmp_path], "evaluation", drawn)


def test_a_changed_picture_is_refused(tmp_path: Path) -> None:
    root, drawn = write_drawn(tmp_path, "a", np.zeros((8, 12, 3), np.uint8), [])
    Image.new("RGB", (12, 8), "red").save(root / "a.png")
    with pytest.raises(PathfmError, match="not the picture that was drawn on"):
        read_pictures([root], "evaluation", drawn)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["picture"].update(width_px=13), "another picture"),
        (lambda d: d["features"].append(feature("Tisue", SQUARE)), "class 'Tisue'"),
        (lambda d: d["features"].append(feature("Fat", SQUARE[:2])), "feature 1"),
        (lambda d: d["features"].append(feature("Fat", [[0, float("nan")]] * 4)), r"a\.geojson"),
        (lambda d: d["features"].append({"type": 3}), "feature 1"),
        (lambda d: d.pop("picture"), "not a drawing"),
        (lambda d: d.update(features=3), r"a\.geojson"),
    ],
)
def test_a_damaged_drawing_is_refused(tmp_path: Path, change, told: str) -> None:
    root, drawn = write_drawn(tmp_path, "a", np.zeros((8, 12, 3), np.uint8), [])
    path = drawn / "a.geojson"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(PathfmError, match=told):
        read_pictures([root], "evaluation", drawn)


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff\xfe", b"", b"{}"])
def test_no_drawing_at_all_is_refused(tmp_path: Path, text: bytes) -> None:
    root, drawn = write_drawn(tmp_path, "a", np.zeros((8, 12, 3), np.uint8), [])
    (drawn / "a.geojson").write_bytes(text)
    with pytest.raises(PathfmError, match=r"a\.geojson"):
        read_pictures([root], "evaluation", drawn)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"file": "../a.png"}, "does not lie inside"),
        ({"file": "/etc/passwd"}, "does not lie inside"),
        ({"name": "../a"}, "letters, digits"),
        ({"split": "test"}, "split 'test'"),
        ({"stain_group": "HE"}, "stain_group 'HE'"),
        ({"licence": ""}, "must be given"),
        ({"name": "b"}, "a second row"),
        ({"source": "b", "split": "training"}, "source 'b' is in two splits"),
        ({"source": "b", "split": "training", "origin": "x@4f2 IHC.dzi"}, "source 'b' is in two"),
        ({"split": "training", "sha256": "{b}"}, "the same file is in two splits"),
    ],
)
def test_a_wrong_row_of_the_table_is_refused(tmp_path: Path, row: dict, told: str) -> None:
    rgb = np.zeros((8, 12, 3), np.uint8)
    _, drawn = write_drawn(tmp_path, "b", rgb, [])
    known = {**dict(zip(COLUMNS, "cfswhevtlopx", strict=True)), "split": "evaluation"}
    known |= {"stain_group": "IHC", "origin": "x", **row}
    if known["sha256"] == "{b}":
        known["sha256"] = read_table(drawn / "pictures.csv")[0]["sha256"]
    with (drawn / "pictures.csv").open("a") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(known)
    with pytest.raises(PathfmError, match=told):
        read_table(drawn / "pictures.csv")


def test_every_shipped_drawing_has_its_row_and_fits_it() -> None:
    rows = {row["name"]: row for row in read_table(DRAWN / "pictures.csv")}
    for path in [*DRAWN.glob("*.geojson"), *DRAWN.glob("again/*.geojson")]:
        told = json.loads(path.read_text())["picture"]
        row = rows[path.stem]
        for key in ("file", "sha256", "width_px", "height_px"):
            assert str(told[key]) == row[key]
    assert {path.stem for path in DRAWN.glob("*.geojson")} == set(rows)


@pytest.mark.slow
def test_the_drawn_pictures_at_hand_can_be_read(shared_data: Path, tmp_path: Path) -> None:
    """Some come from elsewhere: those are left out of a copy of the table."""
    roots = [shared_data / "masks", shared_data / "wsi"]
    rows = read_table(DRAWN / "pictures.csv")
    here = [row for row in rows if any((root / row["file"]).is_file() for root in roots)]
    if not here:
        pytest.skip("no drawn picture is at hand (../shared/data)")
    drawn = tmp_path / "drawn"
    shutil.copytree(DRAWN, drawn)
    with (drawn / "pictures.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(here)
    pictures = read_pictures(roots, drawn=drawn)
    assert [p.name for p in pictures] == [row["name"] for row in here]
    for p in pictures:  # one shows ink alone
        assert p.tissue.any() or p.kinds["pen"].any()
        assert not (p.tissue & (p.ignore | p.kinds["pen"])).any()


def test_what_may_be_trained_on_has_a_licence_that_allows_it() -> None:
    for row in read_table(DRAWN / "pictures.csv"):
        assert row["split"] == "evaluation" or permitted(row["licence"]), row["name"]
