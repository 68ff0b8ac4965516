"""Tables of samples, labelled folders, and how a data set is named."""

from __future__ import annotations

import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from online_patching import open_slide
from pathfm.datasets import LabelledFolder, open_dataset, scan_folder
from pathfm.datasets.preparing import fit, prepare
from pathfm.runtime import PathfmError
from tests.datasets_mini import Painter, small_slide
from tests.servers import FaultServer


def table(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples.csv").write_text(text)
    return folder / "samples.csv"


def pictures(folder: Path, *names: str) -> None:
    paint = Painter(0)
    for name in names:
        paint.save(folder / name, 20, 30)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_slide(tmp_path_factory.mktemp("slides") / "a.tif", 5)


# --- pictures -------------------------------------------------------------------------------------


def test_a_table_of_pictures_has_its_rows_in_its_order(tmp_path: Path) -> None:
    pictures(tmp_path, "x/2.png", "1.png", "3.png")
    path = table(
        tmp_path,
        "\ufeffpath, label, split, group, mpp, note\n"
        "x/2.png,tumour,train,p1,0.5,\n1.png, stroma ,val,p2,,hm\n3.png,tumour,test,p3,1.0,\n",
    )
    found = open_dataset(path)
    assert (found.name, found.classes, found.facts.reported) == (
        "samples",
        ("stroma", "tumour"),
        "test",
    )
    assert found.paths == ("x/2.png", "1.png", "3.png")
    assert found.labels.tolist() == [1, 0, 1]
    assert found.splits == ("train", "val", "test")
    assert found.groups == ("p1", "p2", "p3")
    np.testing.assert_array_equal(found.mpp, [0.5, math.nan, 1.0])
    np.testing.assert_array_equal(found.read(1), np.asarray(Image.open(tmp_path / "1.png")))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\n", "a header and no rows"),
        ("path,label\n1.png,a\n2.png,a\n", "all 2 rows are of class 'a'"),
        ("path,label\n1.png,a\n2.png,\n", "1 of 2 rows have no label, first row 2"),
        ("path,class\n1.png,a\n", "no column label"),
        ("file,label\n1.png,a\n2.png,b\n", "wants a column path, or slide"),
        ("path,label,label\n1.png,a,b\n", "comes twice"),
        ("path,label\n1.png,a\n9.png,b\n", r"no file .*9\.png"),
        ("path,label\n1.png,a\n../1.png,b\n", "no path inside"),
        ("path,label\n1.png,a\nsub/../../1.png,b\n", "no path inside"),
        ("path,label\n/etc/hostname,a\n2.png,b\n", "no path inside"),
        ("path,label\n1.png,a\nout.png,b\n", "is a link out of"),
        ("path,label,split\n1.png,a,train\n2.png,b,dev\n", "split 'dev'; wanted train, val, test"),
        ("path,label,split\n1.png,a,train\n2.png,b,\n", "1 rows have no split"),
        (
            "path,label,split,group\n1.png,a,train,p\n2.png,b,test,p\n",
            "1 groups are in more than one",
        ),
        ("path,label,mpp\n1.png,a,half\n2.png,b,1\n", "row 1: mpp 'half' is no number"),
        ("path,label,mpp\n1.png,a,inf\n2.png,b,1\n", "row 1: mpp 'inf' is not finite"),
        ("path,label\n1.png,a,b\n", "has not 2 cells"),
        ('path,label\n"1.png,a\n', "has not 2 cells"),
    ],
)
def test_a_wrong_table_is_named_with_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    pictures(folder, "1.png", "2.png")
    pictures(tmp_path, "1.png")
    (folder / "out.png").symlink_to(tmp_path / "1.png")
    with pytest.raises(PathfmError, match=message) as refused:
        open_dataset(table(folder, text))
    assert "\n" not in str(refused.value)


def test_a_damaged_picture_is_named_when_it_is_read(tmp_path: Path) -> None:
    pictures(tmp_path, "1.png")
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    found = open_dataset(table(tmp_path, "path,label\n1.png,a\n2.png,b\n"))
    with pytest.raises(PathfmError, match=r"2\.png: not a readable picture"):
        found.read(1)


# --- places in slides -----------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["um", "px0"])
def test_places_are_centres_of_patches_whatever_the_mpp(unit: str, slide: Path) -> None:
    scale = 0.2431 if unit == "um" else 1.0
    x, y = 211 * scale, 150 * scale
    path = table(slide.parent, f"slide,x_{unit},y_{unit},label\na.tif,{x},{y},a\na.tif,60,50,b\n")
    with open_slide(str(slide)) as opened:
        for mpp, size_px in ((0.2431, 32), (0.4862, 32), (0.9, 20)):
            found = open_dataset(path, mpp=mpp, size_px=size_px)
            corner = (211 * 0.2431 - size_px * mpp / 2, 150 * 0.2431 - size_px * mpp / 2)
            wanted = opened.read_patch(x_um=corner[0], y_um=corner[1], mpp=mpp, size_px=size_px)
            np.testing.assert_array_equal(found.read(0), wanted)
            assert found.mpp.tolist() == [mpp, mpp]
        whole = opened.read_region((0, 0), 0, opened.dimensions)
    at_native = open_dataset(path, mpp=0.2431, size_px=32).read(0)
    np.testing.assert_array_equal(at_native, whole[150 - 16 : 150 + 16, 211 - 16 : 211 + 16])


def test_each_row_may_have_its_own_mpp_and_its_slides(slide: Path) -> None:
    path = table(
        slide.parent,
        "slide,x_um,y_um,label,mpp,slide_mpp\na.tif,40,30,a,0.5,\na.tif,40,30,b,1.0,0.5\n",
    )
    found = open_dataset(path, size_px=16)
    with open_slide(str(slide), mpp=0.5) as opened:
        wanted = opened.read_patch(x_um=40 - 8, y_um=30 - 8, mpp=1.0, size_px=16)
    np.testing.assert_array_equal(found.read(1), wanted)
    assert found.mpp.tolist() == [0.5, 1.0]
    assert found.digest != open_dataset(path, size_px=17).digest
    assert found.digest == open_dataset(path, size_px=16).digest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,x_um,y_um,label\na.tif,1,2,a\na.tif,3,4,b\n", "no µm/px for its patches"),
        ("slide,x_um,y_um,label,mpp\na.tif,,2,a,1\na.tif,3,4,b,1\n", "row 1: x_um '' is no number"),
        ("slide,x_um,y_um,label,mpp\nno.tif,1,2,a,1\na.tif,3,4,b,1\n", r"no file .*no\.tif"),
        ("slide,x_um,y_um,label,mpp\n../a.tif,1,2,a,1\na.tif,3,4,b,1\n", "no path inside"),
    ],
)
def test_wrong_places_are_told(text: str, message: str, slide: Path) -> None:
    with pytest.raises(PathfmError, match=message):
        open_dataset(table(slide.parent, text))


def test_a_slide_that_is_none_is_told_when_read(slide: Path) -> None:
    (slide.parent / "text.tif").write_text("no slide")
    path = table(slide.parent, "slide,x_um,y_um,label\ntext.tif,9,8,a\na.tif,9,8,b\na.tif,9,9,c\n")
    found = open_dataset(path, mpp=0.5, size_px=16)
    with pytest.raises(PathfmError, match=r"patch at \(9, 8\): .*text\.tif"):
        found.read(0)
    with pytest.raises(PathfmError, match="upscale"):
        open_dataset(path, mpp=0.05, size_px=16).read(1)


def test_slides_behind_a_server_are_read_by_several_threads_as_local_ones(
    slide: Path, fault_server: FaultServer, tmp_path: Path
) -> None:
    shutil.copy(slide, fault_server.root / "far.tif")
    places = [(float(x), float(y)) for x in (20, 45, 80) for y in (12, 31, 60)]
    text = "slide,x_um,y_um,label\n" + "".join(
        f"{{}},{x},{y},{'ab'[i % 2]}\n" for i, (x, y) in enumerate(places)
    )
    near = open_dataset(table(slide.parent, text.replace("{}", "a.tif")), mpp=0.5, size_px=32)
    uri = f"{fault_server.url}/far.tif"
    far = open_dataset(table(tmp_path, text.replace("{}", uri)), mpp=0.5, size_px=32)
    with ThreadPoolExecutor(4) as pool:
        for i, pixels in enumerate(pool.map(far.read, range(len(far)))):
            np.testing.assert_array_equal(pixels, near.read(i))
    assert far.paths[0] == f"{uri}#20,12 um"
    one = far.subset(np.arange(1)).digest
    signed = open_dataset(
        table(tmp_path, text.replace("{}", f"{uri}?sig=SECRET")), mpp=0.5, size_px=32
    )
    assert one == signed.subset(np.arange(1)).digest  # a signature lasts an hour, the data stay
    gone = text.replace("{}", f"{fault_server.url}/none.tif?sig=SECRET")
    with pytest.raises(PathfmError, match=r"none\.tif") as refused:
        open_dataset(table(tmp_path, gone), mpp=0.5, size_px=32).read(0)
    assert "SECRET" not in str(refused.value)


def test_a_table_of_slides_is_a_slide_task(slide: Path) -> None:
    path = table(slide.parent, "slide,label,group\na.tif,a,p1\ns3://bucket/b.svs,b,p2\n")
    found = open_dataset(path)
    assert found.facts.task == "slide"
    assert found.slide(0) == str(slide)
    assert found.slide(1) == "s3://bucket/b.svs"


# --- folders --------------------------------------------------------------------------------------


def test_a_labelled_folder_opens_with_its_groups_and_no_splits(tmp_path: Path) -> None:
    pictures(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    (tmp_path / "groups.csv").write_text("path,group\na/1.png,p\na/2.png,q\nb/1.png,p\n")
    found, listed = open_dataset(tmp_path), scan_folder(tmp_path)
    assert found.paths == listed.paths
    assert found.labels.tolist() == listed.labels.tolist()
    assert found.groups == ("p", "q", "p")
    assert set(found.splits) == {""}
    assert isinstance(listed, LabelledFolder)
    np.testing.assert_array_equal(found.read(2), listed.read(2))


def test_a_folder_of_splits_has_the_classes_of_train(tmp_path: Path) -> None:
    pictures(tmp_path, "train/a/1.png", "train/b/1.png", "train/c/1.png")
    pictures(tmp_path, "test/c/1.png", "test/a/1.png")
    found = open_dataset(str(tmp_path))
    assert found.classes == ("a", "b", "c")
    assert found.splits == ("train",) * 3 + ("test",) * 2
    assert found.labels.tolist() == [0, 1, 2, 0, 2]
    assert found.facts.reported == "test"
    pictures(tmp_path, "val/a/1.png", "val/d/1.png")
    with pytest.raises(PathfmError, match=r"class 'd' is not in .*train"):
        open_dataset(tmp_path)


def test_a_group_in_two_splits_of_a_folder_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        pictures(tmp_path, f"{split}/a/1.png", f"{split}/b/1.png")
        (tmp_path / split / "groups.csv").write_text("path,group\na/1.png,p\nb/1.png,q\n")
    with pytest.raises(PathfmError, match="2 groups are in more than one split, first 'p'"):
        open_dataset(tmp_path)


def test_a_folder_called_test_can_be_a_class(tmp_path: Path) -> None:
    pictures(tmp_path, "test/1.png", "train/1.png", "x/1.png")
    with pytest.raises(PathfmError, match="the folder 'x' is no split"):
        open_dataset(tmp_path)  # train and test without classes: told, not guessed
    pictures(tmp_path / "y", "test/1.png", "x/1.png")
    assert open_dataset(tmp_path / "y").classes == ("test", "x")


# --- names ----------------------------------------------------------------------------------------


def test_names_are_told_apart_from_folders(tmp_path: Path) -> None:
    with pytest.raises(
        PathfmError, match="bach is a public data set: say where it lies, bach=FOLDER"
    ):
        open_dataset("bach")
    with pytest.raises(PathfmError, match="did you mean breakhis"):
        open_dataset("breakhist")
    with pytest.raises(PathfmError, match="neither a folder"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(PathfmError, match="there is no such file"):
        open_dataset(tmp_path / "nowhere.csv")
    with pytest.raises(PathfmError, match="mpp is for a table of places"):
        open_dataset(tmp_path, mpp=0.5)
    with pytest.raises(PathfmError, match=r"mhist at .*no such folder"):
        open_dataset(f"mhist={tmp_path / 'nowhere'}")


def test_pixels_are_fitted_as_files_are(tmp_path: Path) -> None:
    paint = Painter(3)
    for height, width in ((50, 71), (71, 50), (16, 16), (9, 30)):
        file = paint.save(tmp_path / f"{height}.png", height, width)
        np.testing.assert_array_equal(fit(np.asarray(Image.open(file)), 16), prepare(file, 16))
    with pytest.raises(PathfmError, match="empty"):
        fit(np.zeros((0, 4, 3), np.uint8), 16)
