"""Folders and tables from strangers: nothing outside is read, nothing is left out unsaid, pixels mean one thing."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pathfm.datasets import open_dataset, scan_folder
from pathfm.datasets.folder import check_picture, read_picture
from pathfm.runtime import PathfmError
from tests.datasets_mini import Painter, small_slide

RGB = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)


def pictures(folder: Path, *names: str) -> None:
    paint = Painter(len(str(folder)))
    for name in names:
        paint.save(folder / name, 20, 30)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(PathfmError, match=message) as told:
        open_dataset(folder)
    assert "\n" not in str(told.value)


def split_folder(root: Path, *splits: str) -> Path:
    pictures(root, *(f"{split}/{name}/1.png" for split in splits for name in "ab"))
    return root


# --- pixels ---------------------------------------------------------------------------------------


def png16(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, RGB, written by hand out of the PNG specification."""
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_pictures_deeper_than_8_bits_are_refused_and_named(tmp_path: Path) -> None:
    grey = np.arange(120, dtype=np.uint16).reshape(12, 10) * 500
    Image.fromarray(grey).save(tmp_path / "grey16.png")
    (tmp_path / "rgb16.png").write_bytes(png16(RGB.astype(np.uint16) * 257))
    tifffile.imwrite(tmp_path / "rgb16.tif", RGB.astype(np.uint16) * 257, photometric="rgb")
    for name in ("grey16.png", "rgb16.png", "rgb16.tif"):
        for look in (read_picture, check_picture):
            with pytest.raises(PathfmError, match=rf"{name}: 16-bit pixels; wanted are 8-bit"):
                look(tmp_path / name)
    Image.fromarray(np.full((12, 10), 0.5, np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(PathfmError, match=r"f\.tif: floating-point pixels"):
        read_picture(tmp_path / "f.tif")
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "c.jpg")
    with pytest.raises(PathfmError, match=r"c\.jpg: CMYK pixels"):
        read_picture(tmp_path / "c.jpg")


def test_transparent_pixels_are_counted_and_refused_and_opaque_ones_are_read(
    tmp_path: Path,
) -> None:
    opaque = np.dstack([RGB, np.full(RGB.shape[:2], 255, np.uint8)])
    Image.fromarray(opaque).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "a.png")), RGB)
    opaque[3, 4:7, 3] = (0, 254, 128)
    Image.fromarray(opaque).save(tmp_path / "b.png")
    Image.fromarray(RGB[..., 0] // 128).convert("P").save(tmp_path / "c.png", transparency=1)
    n = int((np.asarray(Image.open(tmp_path / "c.png")) == 1).sum())
    for name, count in (("b.png", 3), ("c.png", n)):
        with pytest.raises(PathfmError, match=rf"{name}: {count} of 120 px are transparent"):
            read_picture(tmp_path / name)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_modes_with_one_meaning_are_read_as_pillow_reads_them(tmp_path: Path, mode: str) -> None:
    Image.fromarray(RGB).convert(mode).save(tmp_path / "a.png")
    wanted = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    np.testing.assert_array_equal(np.asarray(read_picture(tmp_path / "a.png")), wanted)


def test_other_formats_are_not_opened_whatever_the_file_is_called(tmp_path: Path) -> None:
    (tmp_path / "e.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    )
    Image.fromarray(RGB).save(tmp_path / "g.png", "GIF")
    for name in ("e.png", "g.png"):
        with pytest.raises(PathfmError, match=rf"{name}: not a readable picture \(cannot identify"):
            read_picture(tmp_path / name)


# --- links ----------------------------------------------------------------------------------------


def test_a_split_or_its_groups_behind_a_link_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    outside = split_folder(tmp_path / "outside", "test")
    root = split_folder(tmp_path / "root", "train")
    (root / "test").symlink_to(outside / "test")
    refused(root, "test: a link out of the data set's folder")
    (outside / "groups.csv").write_text("path,group\nsecret,line\n")
    (root / "train" / "groups.csv").symlink_to(outside / "groups.csv")
    refused(root / "train", r"groups\.csv: a link out of")


# --- folders that nobody would read ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (("train", "valid", "test"), "the folder 'valid' is no split .* Rename it val, or move"),
        (("train", "Val", "test"), "the folder 'Val' is no split .* Rename it val"),
        (("train", "validation", "val"), "'validation' is no split .* Rename it, or move"),
        (("train", "test", "extra"), "the folder 'extra' is no split"),
        (("train", "valid"), "the folder 'valid' is no split .* Rename it val"),
        (("Train", "Test"), "the folder 'Test' is no split .* Rename it test"),
    ],
)
def test_a_folder_beside_the_splits_that_is_none_is_refused(
    tmp_path: Path, splits: tuple[str, ...], message: str
) -> None:
    refused(split_folder(tmp_path / "d", *splits), message)


def test_classes_called_like_splits_stay_classes(tmp_path: Path) -> None:
    pictures(tmp_path, "dev/1.png", "tests/1.png")
    assert open_dataset(tmp_path).classes == ("dev", "tests")


# --- groups.csv -----------------------------------------------------------------------------------


def test_groups_at_the_root_of_splits_are_read(tmp_path: Path) -> None:
    root = split_folder(tmp_path / "d", "train", "test")
    rows = ["train/a/1.png,p", "train/b/1.png,q", "test/a/1.png,r", "test/b/1.png,s"]
    (root / "groups.csv").write_text("path,group\n" + "\n".join(rows) + "\n")
    assert open_dataset(root).groups == ("p", "q", "r", "s")
    rows[2] = "test/a/1.png,p"
    (root / "groups.csv").write_text("path,group\n" + "\n".join(rows) + "\n")
    refused(root, "1 groups are in more than one split, first 'p'")
    (root / "test" / "groups.csv").write_text("path,group\na/1.png,r\nb/1.png,s\n")
    refused(root, r"groups\.csv lies there and in test too")
    (root / "groups.csv").unlink()
    refused(root, r"test has a groups\.csv and train none")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,group\n" + "x" * 200_000 + ",g\n", r"groups\.csv: line \d+ is no CSV"),
        ("path,group\na/1.png,p\na/1.png,q\nb/1.png,p\n", r"groups\.csv: a/1\.png comes twice"),
        ("path,group\na/1.png\nb/1.png,p\n", "line 2 has not 2 cells"),
        ("file,group\na/1.png,p\n", "no column path"),
        (None, r"groups\.csv: cannot be read: Is a directory"),
    ],
)
def test_a_wrong_groups_table_is_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    pictures(tmp_path, "a/1.png", "b/1.png")
    if text is None:
        (tmp_path / "groups.csv").mkdir()
    else:
        (tmp_path / "groups.csv").write_text(text)
    refused(tmp_path, message)
    with pytest.raises(PathfmError, match=message):
        scan_folder(tmp_path)


# --- tables ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for number in (1, 2):
        small_slide(folder / f"s{number}.tif", number)
    return folder


def write(folder: Path, text: str) -> Path:
    (folder / "samples.csv").write_text(text)
    return folder / "samples.csv"


def test_patches_without_a_group_are_grouped_by_their_slide(slides: Path) -> None:
    head = "slide,x_um,y_um,label,mpp"
    rows = ["s1.tif,20,20,a,0.5", "./s1.tif,40,20,b,0.5", "s2.tif,20,20,a,0.5"]
    found = open_dataset(write(slides, "\n".join([head, *rows]) + "\n"))
    assert found.groups == ("s1.tif", "s1.tif", "s2.tif")
    told = [f"{row},{group}" for row, group in zip(rows, ("p", "p", ""), strict=True)]
    found = open_dataset(write(slides, "\n".join([f"{head},group", *told]) + "\n"))
    assert found.groups == ("p", "p", "s2.tif")
    told[1] = f"{rows[1]},"
    refused(
        write(slides, "\n".join([f"{head},group", *told]) + "\n"),
        "row 2 has no group, and other rows of 's1.tif' have one",
    )


def test_a_slide_in_train_and_in_test_is_refused(slides: Path) -> None:
    head = "slide,x_um,y_um,label,mpp,split\n"
    rows = "s1.tif,20,20,a,0.5,train\ns2.tif,20,20,b,0.5,train\ns2.tif,40,20,b,0.5,test\n"
    refused(write(slides, head + rows), r"1 groups are in more than one split, first 's2\.tif'")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "path,label,split\n0.png,a,train\n1.png,b,train\n./0.png,a,test\n",
            "rows 1 and 3 .*0.png",
        ),
        ("path,label\n0.png,a\n1.png,b\n0.png,b\n", "rows 1 and 3 are one sample, '0.png'"),
        ("slide,label\ns1.tif,a\ns2.tif,b\ns2.tif,a\n", "rows 2 and 3 are one sample, 's2.tif'"),
        (
            "slide,x_um,y_um,label,mpp\ns1.tif,1.0,2,a,1\ns2.tif,1,2,b,1\ns1.tif,1,2,b,1.0\n",
            "rows 1 and 3 are one sample, 's1.tif#1,2 um'",
        ),
        (
            "slide,label\nhttps://h/a.svs?sig=X,a\nhttps://h/a.svs?sig=Y,b\n",
            r"'https://h/a\.svs': .* nothing behind '\?' tells them apart",
        ),
    ],
)
def test_a_sample_that_comes_twice_is_refused(slides: Path, text: str, message: str) -> None:
    pictures(slides, "0.png", "1.png")
    refused(write(slides, text), message)


def test_places_a_tenth_of_a_micron_apart_are_two_samples(slides: Path) -> None:
    rows = "s1.tif,12345.61,2,a,1\ns1.tif,12345.62,2,b,1\n"
    found = open_dataset(write(slides, "slide,x_um,y_um,label,mpp\n" + rows))
    assert found.paths == ("s1.tif#12345.61,2 um", "s1.tif#12345.62,2 um")


@pytest.mark.parametrize(
    "uri",
    [
        "local://{}",
        "FILE://{}",
        "file://{}",
        "simplecache::file://{}",
        "zip://a.tif::file://{}",
        "https::local://{}",
    ],
)
def test_a_uri_that_leads_to_a_local_file_is_refused(
    tmp_path: Path, slides: Path, uri: str
) -> None:
    name = uri.format(slides / "s1.tif")
    for head, tail in (("slide,label", ""), ("slide,x_um,y_um,label,mpp", ",9,9")):
        mpp = ",1" if tail else ""
        text = f"{head}\n{name}{tail},a{mpp}\nhttps://h/b.svs{tail},b{mpp}\n"
        refused(write(tmp_path, text), "slides are read from|no path inside|there is no file")


def test_a_folder_of_a_slide_may_not_link_out(tmp_path: Path, slides: Path) -> None:
    (tmp_path / "in" / "dicom").mkdir(parents=True)
    (tmp_path / "in" / "dicom" / "1.dcm").symlink_to(slides / "s1.tif")
    table = write(tmp_path / "in", "slide,label\ndicom,a\nhttps://h/b.svs,b\n")
    refused(table, r"1\.dcm: a link out of")


def test_passwords_and_signatures_of_uris_are_in_no_path_and_no_digest(tmp_path: Path) -> None:
    secret = "https://user:hunter2@h/a.svs?X-Amz-Signature=SECRET"
    text = "slide,x_um,y_um,label,mpp\n{0},1,1,a,1\n{0},2,2,b,1\ns3://box/b.svs,1,1,a,1\n"
    found = open_dataset(write(tmp_path, text.format(secret)))
    assert found.paths[0] == "https://h/a.svs#1,1 um"
    assert found.groups == ("https://h/a.svs", "https://h/a.svs", "s3://box/b.svs")
    found = open_dataset(write(tmp_path, f"slide,label\n{secret},a\ns3://box/b.svs,b\n"))
    assert found.paths == ("https://h/a.svs", "s3://box/b.svs")
    assert found.slide(0) == secret  # whoever opens it needs it
    refused(
        write(tmp_path, "slide,label\nftp://u:hunter2@h/a.svs,a\ns3://box/b.svs,b\n"),
        r"samples\.csv: 'ftp://h/a\.svs': slides are read from",
    )
