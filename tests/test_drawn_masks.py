"""The drawn thumbnails as pictures and masks: `tools/drawn_masks.py`."""

from __future__ import annotations

import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pathfm.datasets import open_dataset
from pathfm.runtime import PathfmError
from pathfm.segmentation.truth import DrawnPicture, Truth

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "drawn_masks.py"))


def drawn(name: str, source: str) -> DrawnPicture:
    tissue, ignore = np.zeros((20, 30), bool), np.zeros((20, 30), bool)
    tissue[5:10, 3:9], ignore[0, :7] = True, True
    rgb = np.full((20, 30, 3), len(name), np.uint8)
    truth = Truth(tissue, ignore, {})
    return DrawnPicture(name, rgb, truth, "training", "H&E", "H&E", "CC0", "made here", source)


def test_the_folder_has_the_masks_the_ignored_pixels_and_the_cases_of_what_was_drawn(tmp_path):
    made = [drawn("one", "s"), drawn("other", "s"), drawn("third", "t")]
    TOOL["write_folder"](made, tmp_path)
    found = open_dataset(str(tmp_path))
    assert found.classes == ("background", "tissue", "ignored")
    assert found.facts.ignored == (2,)
    assert [Path(path).stem for path in found.paths] == ["one", "other", "third"]
    assert found.groups[0] == found.groups[1] != found.groups[2]
    counts = np.bincount(found.source.mask(0).ravel(), minlength=3)
    assert counts.tolist() == [600 - 30 - 7, 30, 7]
    assert found.source.mask(0)[5, 3] == 1
    assert (found.source.read(1) == 5).all()


def test_what_was_drawn_for_training_is_the_training_part(tmp_path):
    made = [replace(drawn(split, split), split=split) for split in TOOL["SPLITS"]]
    TOOL["write_folder"](made, tmp_path, splits=True)
    found = open_dataset(str(tmp_path))
    assert dict(zip(found.splits, (Path(p).stem for p in found.paths), strict=True)) == {
        "train": "training",
        "val": "validation",
        "test": "evaluation",
    }
    assert len({*found.groups}) == 3


@pytest.mark.slow
def test_of_the_real_ones_those_at_hand_are_taken_and_the_named_left_out(shared_data: Path):
    everything = TOOL["pictures_at_hand"]([shared_data / "masks"], ())
    some = TOOL["pictures_at_hand"]([shared_data / "masks"], ("helicobacter", "histoqc_pen"))
    assert {p.name for p in everything} > {p.name for p in some}
    assert not any("helicobacter" in p.name or "histoqc_pen" in p.name for p in some)
    assert all((p.rgb.shape[:2] == p.tissue.shape) for p in some)


def test_a_folder_without_any_of_them_is_refused(tmp_path):
    with pytest.raises(PathfmError, match="none of the drawn pictures"):
        TOOL["pictures_at_hand"]([tmp_path], ())
