"""`pathfm check-data`: what is wrong with a data set, told and counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathfm.check_data import CheckDataConfig, run
from pathfm.cli import help_text, main
from pathfm.datasets import DATASETS
from tests.datasets_mini import MAKERS, Painter


def test_without_data_every_public_set_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data"]) == 0
    told = capsys.readouterr().out
    for name, entry in DATASETS.items():
        assert name in told
        assert entry.facts.licence in told
        assert entry.facts.page in told
    assert "107,180" not in told
    assert "100,000" in told


def test_a_whole_copy_is_told_to_be_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = MAKERS["bach"](tmp_path / "bach")
    assert main(["check-data", f"bach={root}", "--read", "True"]) == 0
    told = capsys.readouterr().out
    assert "bach: nothing is wrong" in told
    assert "268" in told


def test_damaged_pictures_and_masks_are_each_named_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paint = Painter(0)
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png"):
        paint.save(tmp_path / "d" / name)
    for name in ("a/2.png", "b/1.png"):
        (tmp_path / "d" / name).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    result = run(CheckDataConfig(data=str(tmp_path / "d"), read=True))
    assert result.samples == 4
    assert result.exit_code == 2
    assert [line.split(":")[0] for line in result.wrong] == [
        str(tmp_path / "d" / name) for name in ("a/2.png", "b/1.png")
    ]
    masks = MAKERS["consep"](tmp_path / "consep")
    (masks / "Test/Labels/test_2.mat").write_bytes(b"no mask")
    capsys.readouterr()
    told = run(CheckDataConfig(data=f"consep={masks}", read=True)).wrong
    assert len([line for line in told if "test_2.mat" in line]) == 1
    assert "wrong: " in capsys.readouterr().out


def test_what_was_not_read_is_not_said_to_be_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg"):
        file = tmp_path / "d" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:-200])
    assert main(["check-data", str(tmp_path / "d")]) == 0
    told = capsys.readouterr().out
    assert "nothing is wrong" not in told
    assert (
        "d: names, counts and splits are right; pictures were not read: --read True reads them all"
        in told
    )
    assert main(["check-data", str(tmp_path / "d"), "--read", "True"]) == 2
    assert f"wrong: {file}: not a readable picture" in capsys.readouterr().out
    assert "--read True" in help_text()


def test_pictures_of_equal_bytes_in_two_splits_are_counted(tmp_path: Path) -> None:
    paint = Painter(0)
    for split in ("train", "test"):
        for name in ("a/1.png", "a/2.png", "b/1.png"):
            paint.save(tmp_path / "d" / split / name)
    config = CheckDataConfig(data=str(tmp_path / "d"), read=True)
    assert run(config).wrong == ()
    pixels = (tmp_path / "d/train/a/2.png").read_bytes()
    for copy in ("train/a/3.png", "test/a/3.png", "test/b/4.png"):
        (tmp_path / "d" / copy).write_bytes(pixels)
    (line,) = run(config).wrong
    assert line.startswith("2 of 9 samples have the very bytes of a sample in another split, first")
    assert "test/a/3.png those of train/a/2.png" in line


def test_what_lacks_of_the_published_set_is_told_not_raised(tmp_path: Path) -> None:
    root = MAKERS["mhist"](tmp_path / "mhist")
    result = run(CheckDataConfig(data=f"mhist={root}"))
    assert "train has 3 samples, published are 2,175" in result.wrong
    assert result.exit_code == 2


def test_a_name_without_a_folder_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data", "bach"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: bach is a public data set")
    assert told.count("\n") == 1
