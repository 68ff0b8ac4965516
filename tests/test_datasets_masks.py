"""A folder of pictures and masks: what it means, and what is told of a wrong one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathfm import cli
from pathfm.datasets import open_dataset
from pathfm.runtime import PathfmError

SIZE = (9, 14)  # height, width


def put(file: Path, values: np.ndarray, mode: str = "L") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values)
    if mode == "P":
        image = image.convert("L")
        image.putpalette([255, 0, 0] * 256)
        paletted = Image.new("P", image.size)
        paletted.putdata(list(values.ravel().tolist()))
        paletted.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        image = paletted
    image.save(file)


def make(root: Path, names: str = "abc", classes: int = 3) -> None:
    """Pictures of which each names its mask's numbers in its red channel."""
    rng = np.random.default_rng(0)
    for name in names:
        numbers = rng.integers(0, classes, SIZE).astype(np.uint8)
        numbers[0, 0] = classes - 1
        put(root / "images" / f"{name}.jpg", np.repeat(numbers[..., None] * 50, 3, axis=2))
        put(root / "masks" / f"{name}.png", numbers)


def test_pictures_and_masks_of_one_name_are_one_sample_and_numbers_are_classes(
    tmp_path: Path,
) -> None:
    make(tmp_path)
    data = open_dataset(tmp_path)
    assert data.facts.task == "segmentation"
    assert data.classes == ("background", "class 1", "class 2")
    assert data.paths == ("images/a.jpg", "images/b.jpg", "images/c.jpg")
    assert set(data.splits) == {""}
    for i, name in enumerate("abc"):
        with Image.open(tmp_path / "masks" / f"{name}.png") as image:
            assert np.array_equal(data.mask(i), np.asarray(image))
        assert data.read(i).shape == (*SIZE, 3)


def test_folders_of_splits_and_groups_are_the_data_s_own(tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        make(tmp_path / split, "ab")
    rows = [f"{s}/images/{n}.jpg,{s} patient" for s in ("train", "val", "test") for n in "ab"]
    (tmp_path / "groups.csv").write_text("path,group\n" + "\n".join(rows) + "\n")
    data = open_dataset(tmp_path)
    assert data.splits == ("train", "train", "val", "val", "test", "test")
    assert data.groups[0] == "train patient"
    assert data.facts.reported == "test"
    (tmp_path / "groups.csv").write_text(
        "path,group\n" + "\n".join(row.split(",")[0] + ",one" for row in rows) + "\n"
    )
    with pytest.raises(PathfmError, match="1 groups are in more than one split, first 'one'"):
        open_dataset(tmp_path)
    (tmp_path / "groups.csv").write_text("path,group\ntrain/images/a.jpg,x\n")
    with pytest.raises(PathfmError, match="5 of 6 pictures have no group"):
        open_dataset(tmp_path)


def test_pictures_and_groups_that_nobody_would_read_are_refused(tmp_path: Path) -> None:
    for split in ("train", "test", "valid"):
        make(tmp_path / split, "ab")
    with pytest.raises(PathfmError, match=r"the folder 'valid' is no split .* Rename it val"):
        open_dataset(tmp_path)
    (tmp_path / "valid").rename(tmp_path / "val")
    (tmp_path / "notes").mkdir()
    assert len(open_dataset(tmp_path)) == 6
    (tmp_path / "train" / "groups.csv").write_text("path,group\nimages/a.jpg,p\n")
    with pytest.raises(PathfmError, match=r"train/groups\.csv is not read; write its rows into"):
        open_dataset(tmp_path)
    make(tmp_path)
    with pytest.raises(PathfmError, match="pictures lie in images and in test/images"):
        open_dataset(tmp_path)  # a whole set and splits of it: which is meant is not guessed


def test_classes_csv_says_what_numbers_mean_and_which_are_ignored(tmp_path: Path) -> None:
    numbers = np.array([[0, 255, 7, 300]], np.int32).repeat(20, axis=0)
    put(tmp_path / "images" / "a.png", np.zeros((20, 4, 3), np.uint8))
    put(tmp_path / "masks" / "a.png", numbers.astype(np.uint16))
    table = tmp_path / "classes.csv"
    table.write_text("number,name,ignored\n7,glass,\n0,fold,yes\n255,tissue,no\n300,fat,\n")
    data = open_dataset(tmp_path)
    assert data.classes == ("glass", "tissue", "fat", "ignored")
    assert data.facts.ignored == (3,)
    assert data.mask(0)[5].tolist() == [3, 1, 0, 2]
    before = data.digest
    table.write_text("number,name,ignored\n7,glass,\n0,fold,yes\n300,tissue,no\n255,fat,\n")
    assert open_dataset(tmp_path).digest != before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("number,name\n0,a\n", "1 classes, wants 2 to 255"),
        ("number,name\n0,a\n0,b\n", "line 3: number '0' is none of 0..65535, or twice"),
        ("number,name\n0,a\n-1,b\n", "line 3: number '-1'"),
        ("number,name\n0,a\n1,a\n", "line 3: name 'a' is empty, or there twice"),
        ("number,name,ignored\n0,a,\n1,b,maybe\n", "ignored is 'maybe', wants yes or no"),
        ("n,name\n0,a\n", "no column number"),
    ],
)
def test_a_wrong_table_of_classes_is_told_by_its_line(tmp_path: Path, text: str, told: str) -> None:
    make(tmp_path)
    (tmp_path / "classes.csv").write_text(text)
    with pytest.raises(PathfmError, match=told):
        open_dataset(tmp_path)


def test_masks_in_grey_16_bit_black_and_white_and_palettes_are_read_alike(tmp_path: Path) -> None:
    truth = (np.arange(20 * 6).reshape(20, 6) % 2).astype(np.uint8)
    put(tmp_path / "images" / "x.png", np.zeros((20, 6, 3), np.uint8))
    for mode, values in (("L", truth), ("L", truth.astype(np.uint16)), ("P", truth)):
        put(tmp_path / "masks" / "x.png", values, mode)
        assert np.array_equal(open_dataset(tmp_path).mask(0), truth)
    Image.fromarray(truth.astype(bool)).save(tmp_path / "masks" / "x.png")
    assert np.array_equal(open_dataset(tmp_path).mask(0), truth)


def test_what_is_wrong_with_masks_is_counted_and_the_first_is_named(tmp_path: Path) -> None:
    make(tmp_path, "abcd")
    (tmp_path / "classes.csv").write_text("number,name\n0,glass\n1,tissue\n2,fat\n")
    strange = np.zeros(SIZE, np.uint8)
    strange[:2, :5] = 9
    put(tmp_path / "masks" / "b.png", strange)
    put(tmp_path / "masks" / "c.png", np.zeros((14, 9), np.uint8))
    with pytest.raises(PathfmError) as caught:
        open_dataset(tmp_path)
    told = str(caught.value)
    assert "1 of 4 masks are not of their picture's size" in told
    assert "masks/c.png of 9 x 14 px for a picture of 14 x 9" in told
    assert "1 of 4 masks hold numbers that are no class, first masks/b.png (9 on 10 px)" in told
    assert "\n" not in told


def test_missing_masks_strays_and_colour_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told() -> str:
        code = cli.main(["check-data", str(tmp_path)])
        error = capsys.readouterr().err.strip()
        assert code == 2
        assert "\n" not in error
        return error

    make(tmp_path, "abc")
    (tmp_path / "masks" / "a.png").rename(tmp_path / "masks" / "z.png")
    assert "1 of 3 pictures have no mask, first images/a.jpg; 1 masks have no picture" in told()
    (tmp_path / "masks" / "z.png").unlink()
    put(tmp_path / "masks" / "a.png", np.zeros((*SIZE, 3), np.uint8))
    assert "a mask in colour (RGB)" in told()
    (tmp_path / "masks" / "a.png").write_bytes(b"no picture")
    assert "not a readable picture" in told()
    put(tmp_path / "masks" / "a.png", np.full(SIZE, 255, np.uint8))
    assert "the largest number in its masks is 255; say what numbers mean in classes.csv" in told()
    (tmp_path / "images" / "a.jpg").rename(tmp_path / "a.jpg")
    (tmp_path / "masks" / "a.png").unlink()
    put(tmp_path / "images" / "b.png", np.zeros((*SIZE, 3), np.uint8))
    assert "two pictures have the one mask masks/b.png" in told()
    outside = tmp_path.parent / f"{tmp_path.name} outside.png"
    put(outside, np.zeros(SIZE, np.uint8))
    (tmp_path / "images" / "b.png").unlink()
    (tmp_path / "images" / "q.png").symlink_to(outside)
    assert "a link out of the data set's folder" in told()
