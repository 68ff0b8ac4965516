"""Labels of slides and of regions: who has which class, and what a person is told instead of a traceback."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from online_patching import Corpus, CorpusView
from pathfm.geojson import Polygon, write_geojson
from pathfm.labels import LabelsConfig
from pathfm.labels.regions import region_labels
from pathfm.labels.rows import LabelledRows
from pathfm.labels.tables import slide_labels
from pathfm.runtime import PathfmError
from tests.sampling import index, mask_of


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Five slides: a, b, c of 2,000 x 1,000 px at 0.5 µm/px, d and e half as wide; tissue from x = 200 on."""
    slides, masks = [], []
    for name in "abcde":
        width = 1000 if name in "de" else 2000
        slides.append(index(name, width, 1000, 0.5))
        tissue = np.ones((50, width // 20), bool)
        tissue[:, :10] = False  # cells of 20 px
        masks.append(mask_of(slides[-1], tissue))
    return Corpus.from_slides(slides, masks)


def parquet(folder: Path, **columns: list[str]) -> Path:
    pq.write_table(pa.table({"slide_id": list("abcde"), **columns}), folder / "slides.parquet")
    return folder


def labels_of(rows: LabelledRows) -> list[str]:
    return ["" if k < 0 else rows.class_names[k] for k in rows.labels.tolist()]


def box(x0: float, y0: float, x1: float, y1: float, name: str) -> Polygon:
    return Polygon((np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]], float),), name)


# --- a class a slide ---


def test_a_column_of_the_corpus_gives_each_slide_its_class(corpus, tmp_path):
    folder = parquet(tmp_path, Grade=["low", "high", "low", "", "high"])
    rows = slide_labels(LabelsConfig(column="grade"), corpus, folder)
    assert rows.class_names == ("high", "low")
    assert labels_of(rows) == ["low", "high", "low", "", "high"]
    assert "high 2, low 2 slides; 1 without a class" in rows.notes[0]


def test_only_slides_of_the_training_split_have_labels_or_are_drawn(corpus, tmp_path):
    folder = parquet(
        tmp_path, label=["x", "y", "x", "y", ""], split=["train", "train", "test", "val", "train"]
    )
    rows = slide_labels(LabelsConfig(column="label", unlabelled=1), corpus, folder)
    assert labels_of(rows) == ["x", "y", "", "", ""]
    assert rows.usable.tolist() == [True, True, False, False, True]
    sampler = rows.sampler(LabelsConfig(column="label", unlabelled=1), size_px=32, mpp=1.0)
    d = sampler.draw_batch(np.arange(300))
    assert set(d.slide.tolist()) == {0, 1, 4}
    assert ((d.slide == 4) == (sampler.labels(d.draw) == -1)).all()


def test_a_class_that_only_other_splits_have_is_none(corpus, tmp_path):
    folder = parquet(
        tmp_path, label=["x", "y", "z", "z", "x"], split=["train", "train", "test", "test", "train"]
    )
    assert slide_labels(LabelsConfig(column="label"), corpus, folder).class_names == ("x", "y")
    with pytest.raises(PathfmError, match=r"no 'z' in column 'label'.*there: x, y"):
        slide_labels(LabelsConfig(column="label", classes=("x", "z")), corpus, folder)


def test_other_splits_can_be_asked_for(corpus, tmp_path):
    folder = parquet(tmp_path, label=list("xyxyx"), split=["a", "a", "b", "b", "c"])
    rows = slide_labels(LabelsConfig(column="label", splits=("a", "b")), corpus, folder)
    assert labels_of(rows) == ["x", "y", "x", "y", ""]
    with pytest.raises(
        PathfmError, match=r"in the split train; there: a, b, c\. Set labels\.splits"
    ):
        slide_labels(LabelsConfig(column="label"), corpus, folder)


def test_a_table_beside_the_corpus_is_found_by_slide_id(corpus, tmp_path):
    table = tmp_path / "mine.csv"
    table.write_text("slide_id,label\nb,tumour\nelsewhere,normal\na,normal\nb,tumour\n")
    rows = slide_labels(LabelsConfig(table=table), corpus, tmp_path)
    assert labels_of(rows) == ["normal", "tumour", "", "", ""]


def test_another_column_of_a_table(corpus, tmp_path):
    table = tmp_path / "mine.tsv"
    table.write_text("slide_id\tlabel\tstage\na\tx\tI\nb\tx\tII\n")
    rows = slide_labels(LabelsConfig(table=table, column="stage"), corpus, tmp_path)
    assert rows.class_names == ("I", "II")


def test_a_table_cannot_bring_back_what_the_corpus_holds_out(corpus, tmp_path):
    folder = parquet(tmp_path, split=["train", "train", "test", "test", "train"])
    table = tmp_path / "mine.csv"
    table.write_text("slide_id,label,split\na,x,train\nb,y,train\nc,x,train\nd,y,train\ne,x,test\n")
    rows = slide_labels(LabelsConfig(table=table), corpus, folder)
    assert labels_of(rows) == ["x", "y", "", "", ""]
    assert rows.usable.tolist() == [True, True, False, False, False]


def test_labels_beyond_the_chosen_classes_are_none_and_the_order_is_the_persons(corpus, tmp_path):
    folder = parquet(tmp_path, label=["x", "y", "z", "y", "x"])
    rows = slide_labels(LabelsConfig(column="label", classes=("z", "x")), corpus, folder)
    assert rows.class_names == ("z", "x")
    assert rows.labels.tolist() == [1, -1, 0, -1, 1]


@pytest.mark.parametrize(
    ("labels", "config", "told"),
    [
        (["x"] * 5, {}, "only the class 'x'; labels need at least two classes"),
        ([""] * 5, {}, "no class; labels need at least two"),
        (list("xyxyx"), {"column": "grade"}, "no column 'grade'; found: label, slide_id"),
        (list("xyxyx"), {"classes": ("x", "q")}, "no 'q' in column 'label'"),
        (list("xyxyx"), {"classes": ("y",)}, "only the class 'y'"),
    ],
)
def test_useless_columns_are_told_in_one_line(corpus, tmp_path, labels, config, told):
    folder = parquet(tmp_path, label=labels)
    with pytest.raises(PathfmError, match=told) as caught:
        slide_labels(LabelsConfig(**({"column": "label"} | config)), corpus, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("slide_id,label\nz,x\n", "none of its 1 rows is of a slide of the corpus .5 slides, such as 'a'"),
        ("slide,label\na,x\n", "no column 'slide_id'; found: label, slide"),
        ("slide_id,label\na,x\na,y\n", "row 3: slide a is there before as 'x', now as 'y'"),
        ("", "none of its 0 rows"),
        ("slide_id,label\na,\xff\n", "not a UTF-8 text file"),
    ],
)  # fmt: skip
def test_useless_tables_are_told_in_one_line(corpus, tmp_path, text, told):
    table = tmp_path / "mine.csv"
    table.write_bytes(text.encode("latin-1"))
    with pytest.raises(PathfmError, match=told):
        slide_labels(LabelsConfig(table=table), corpus, tmp_path)


def test_a_table_that_is_missing_or_of_another_kind(corpus, tmp_path):
    with pytest.raises(PathfmError, match=r"nowhere\.csv"):
        slide_labels(LabelsConfig(table=tmp_path / "nowhere.csv"), corpus, tmp_path)
    with pytest.raises(PathfmError, match=r"no \.csv, \.tsv or \.parquet"):
        slide_labels(LabelsConfig(table=tmp_path / "a.xlsx"), corpus, tmp_path)
    with pytest.raises(PathfmError, match=r"slides\.parquet"):
        slide_labels(LabelsConfig(column="label"), corpus, tmp_path)


def test_unlabelled_draws_want_unlabelled_slides(corpus, tmp_path):
    folder = parquet(tmp_path, label=list("xyxyx"))
    config = LabelsConfig(column="label", unlabelled=1)
    with pytest.raises(
        PathfmError, match="every slide of the corpus that may be drawn has a class"
    ):
        slide_labels(config, corpus, folder).sampler(config, size_px=32, mpp=1.0)


def test_class_weights_go_by_name(corpus, tmp_path):
    folder = parquet(tmp_path, label=list("xyxyx"))
    config = LabelsConfig(column="label", class_weights={"y": 3})
    sampler = slide_labels(config, corpus, folder).sampler(config, size_px=32, mpp=1.0)
    assert np.bincount(sampler.labels(np.arange(40))).tolist() == [10, 30]
    wrong = LabelsConfig(column="label", class_weights={"q": 3})
    with pytest.raises(PathfmError, match="'q' is no class; classes are x, y"):
        slide_labels(wrong, corpus, folder).sampler(wrong, size_px=32, mpp=1.0)


# --- a class a region ---


def regions(folder: Path, **of_slide: list[Polygon]) -> LabelsConfig:
    for name, polygons in of_slide.items():
        write_geojson(folder / f"{name}.geojson", polygons)
    return LabelsConfig(regions=folder)


def test_a_regions_mask_is_the_region_within_the_tissue(corpus, tmp_path):
    """A region from x = 100 to 600 and y = 200 to 500: 20 x 15 cells of 20 px lie in tissue (x >= 200)."""
    config = regions(
        tmp_path, a=[box(100, 200, 600, 500, "T"), box(1000, 0, 1400, 1000, "N")], b=[box(0, 0, 400, 100, "T")]
    )  # fmt: skip
    rows = region_labels(config, corpus, tmp_path)
    assert isinstance(rows.slides, CorpusView)
    assert rows.class_names == ("N", "T")
    by_row = list(zip(rows.slides.slide_ids, labels_of(rows), strict=True))
    assert by_row == [("a", "N"), ("a", "T"), ("b", "T")]
    tumour = rows.slides.mask(1).bits
    assert tumour.sum() == 20 * 15
    assert tumour[10:25, 10:30].all()
    # 15 x 20 and 5 x 10 cells of 10 x 10 µm
    assert "T 0.035 mm² on 2 slide(s)" in rows.notes[0]


def test_cells_in_regions_of_two_classes_are_of_neither(corpus, tmp_path):
    config = regions(tmp_path, a=[box(400, 0, 800, 200, "T"), box(600, 0, 1000, 200, "N")])
    rows = region_labels(config, corpus, tmp_path)
    normal, tumour = rows.slides.mask(0).bits, rows.slides.mask(1).bits
    assert not (normal & tumour).any()
    assert tumour.sum() == normal.sum() == 10 * 10  # 200 x 200 px each
    assert "0.01 mm² in two classes, so in none" in rows.notes[0]


def test_overlapping_regions_of_one_class_and_holes(corpus, tmp_path):
    ring = Polygon(
        tuple(box(x, y, x + s, y + s, "").rings[0] for x, y, s in ((400, 0, 400), (500, 100, 200))), "T"
    )  # fmt: skip
    config = regions(tmp_path, a=[ring, box(700, 0, 900, 200, "T"), box(1600, 0, 1700, 100, "N")])
    rows = region_labels(config, corpus, tmp_path)
    assert rows.slides.mask(1).tissue_cells == 400 - 100 + 100 - 50


def test_regions_without_a_class_or_to_be_ignored_are_left_out_unless_named(corpus, tmp_path):
    names = ("T", "", "Ignore*", "N")
    shapes = [box(400 + 200 * k, 0, 600 + 200 * k, 200, name) for k, name in enumerate(names)]
    config = regions(tmp_path, a=shapes)
    assert region_labels(config, corpus, tmp_path).class_names == ("N", "T")
    named = config.model_copy(update={"classes": ("Ignore*", "N")})
    assert region_labels(named, corpus, tmp_path).class_names == ("Ignore*", "N")


def test_slides_of_other_splits_are_not_drawn_whatever_was_drawn_on_them(corpus, tmp_path):
    folder = parquet(tmp_path, split=["train", "test", "train", "train", "train"])
    both = [box(400, 0, 600, 200, "T"), box(600, 0, 900, 200, "N")]
    rows = region_labels(regions(tmp_path, a=both, b=both), corpus, folder)
    assert set(rows.slides.slide_ids) == {"a"}


def test_slides_without_regions_join_as_unlabelled_when_asked(corpus, tmp_path):
    config = regions(tmp_path, a=[box(400, 0, 600, 200, "T"), box(600, 0, 900, 200, "N")], b=[])
    config = config.model_copy(update={"unlabelled": 1})
    rows = region_labels(config, corpus, tmp_path)
    assert rows.slides.slide_ids == ["a", "a", "b", "c", "d", "e"]
    assert rows.labels.tolist() == [0, 1, -1, -1, -1, -1]
    sampler = rows.sampler(config, size_px=32, mpp=1.0, min_foreground=0.5)
    d = sampler.draw_batch(np.arange(300))
    assert (sampler.labels(d.draw)[d.slide == 0] >= 0).all()
    assert (sampler.labels(d.draw)[d.slide > 0] == -1).all()


@pytest.mark.parametrize(
    ("of_slide", "told"),
    [
        ({}, "none of its 0 .geojson files"),
        ({"z": [box(0, 0, 9, 9, "T")]}, r"none of its 1 .geojson files is called as a slide .* wanted a.geojson"),
        ({"a": [box(400, 0, 600, 200, "T")]}, "only the class 'T'"),
        ({"a": [box(400, 0, 600, 200, "")]}, "no class"),
        (
            {"a": [box(400, 0, 600, 200, "T"), box(0, 0, 150, 200, "N")]},
            "class 'N' has no tissue of its own",
        ),
        (
            {"a": [box(400, 0, 600, 200, "T"), box(400, 0, 600, 200, "N")]},
            r"class 'N' has no tissue of its own \(0.01 mm² lie in two classes\)",
        ),
    ],
)  # fmt: skip
def test_useless_regions_are_told_in_one_line(corpus, tmp_path, of_slide, told):
    with pytest.raises(PathfmError, match=told) as caught:
        region_labels(regions(tmp_path, **of_slide), corpus, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_damaged_annotation_file_is_named(corpus, tmp_path):
    (tmp_path / "a.geojson").write_text('{"type": "FeatureCollection", "features": [')
    with pytest.raises(PathfmError, match=r"a\.geojson: not a GeoJSON"):
        region_labels(LabelsConfig(regions=tmp_path), corpus, tmp_path)
    with pytest.raises(PathfmError, match="nowhere: No such file"):
        region_labels(LabelsConfig(regions=tmp_path / "nowhere"), corpus, tmp_path)


# --- settings ---


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"column": "a", "regions": "b"}, "from one place, not from column and regions"),
        ({"table": "a", "patches": "b"}, "from one place, not from table and patches"),
        ({"unlabelled": 1}, "unlabelled is of slides"),
        ({"patches": "a", "unlabelled": 1}, "unlabelled is of slides"),
        ({"column": "a", "balanced": False}, "balanced false is for a folder"),
        ({"column": "a", "classes": ("x", "x")}, "named twice"),
        ({"column": "a", "classes": ("x", "")}, "empty name"),
        (
            {"column": "a", "class_weights": {"x": 0}},
            "'x=0' is not NAME=N, N a whole number from 1 to",
        ),
        ({"column": "a", "class_weights": ["x=1025"]}, "'x=1025' is not NAME=N"),
        ({"column": "a", "class_weights": ["x"]}, "'x' is not NAME=N"),
        ({"column": "a", "class_weights": ["x=1", "x=2"]}, "named twice"),
        ({"min_region": 0}, "greater than 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(given, told):
    with pytest.raises(ValidationError, match=told):
        LabelsConfig(**given)


def test_weights_may_be_a_mapping_or_words():
    words = LabelsConfig(column="a", class_weights=["x=2", "a=b=3"])
    assert words == LabelsConfig(column="a", class_weights={"x": 2, "a=b": 3})
    assert words.weights == {"x": 2, "a=b": 3}


def test_where_labels_come_from():
    assert LabelsConfig().source is None
    assert LabelsConfig(column="a").source == "column"
    assert LabelsConfig(column="a", table="b.csv").source == "table"
    assert LabelsConfig(patches="p").source == "patches"
