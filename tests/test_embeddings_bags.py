"""Bags of features: what CLAM and TRIDENT read is there, and no file of theirs is trusted."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from pathfm.embeddings.bags import (
    BagFacts,
    bag_key,
    bag_path,
    find_bags,
    magnification,
    read_bag,
    write_bag,
)
from pathfm.runtime import PathfmError

FACTS = BagFacts("s1", "k" * 64, "vit", "d" * 64, 0.5, 0.25, 224, 16.0, 4000, 3000, dropped=2)
FEATURES = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
COORDS = np.arange(12).reshape(6, 2) * 448


def test_a_bag_comes_back_and_tells_what_it_was_made_of(tmp_path: Path) -> None:
    path = bag_path(tmp_path, "s1")
    write_bag(path, FACTS, FEATURES, COORDS)
    bag = read_bag(path)
    np.testing.assert_array_equal(bag.features, FEATURES)
    np.testing.assert_array_equal(bag.coords_px0, COORDS)
    assert (bag.slide_id, bag.facts, bag_key(path)) == ("s1", FACTS, FACTS.key)
    assert find_bags(tmp_path) == find_bags(tmp_path / "h5_files") == {"s1": path}
    assert [p.name for p in path.parent.iterdir()] == ["s1.h5"]


def test_clam_and_trident_find_what_they_ask_for(tmp_path: Path) -> None:
    """The very reads of CLAM's Generic_MIL_Dataset and of TRIDENT's extract_slide_features."""
    write_bag(bag_path(tmp_path, "s1"), FACTS, FEATURES, COORDS)
    with h5py.File(tmp_path / "h5_files" / "{}.h5".format("s1"), "r") as file:
        features, coords = file["features"][:], file["coords"][:]
        attributes = dict(file["coords"].attrs)
    assert (features.dtype, coords.dtype) == (np.float32, np.int64)
    assert (features.shape, coords.shape) == ((6, 4), (6, 2))
    assert int(attributes["patch_size_level0"]) == 448  # 224 px at 0.5 are 448 at 0.25
    assert (attributes["patch_size"], attributes["overlap"], attributes["name"]) == (224, 16, "s1")
    assert (attributes["level0_magnification"], attributes["target_magnification"]) == (40, 20)
    assert (attributes["level0_width"], attributes["level0_height"]) == (4000, 3000)


@pytest.mark.parametrize(
    ("mpp", "power"),
    [(0.1, 80), (0.17, 60), (0.25, 40), (0.5, 20), (1.0, 10), (2.0, 5), (4.0, 2.5)],
)
def test_powers_are_those_of_trident(mpp: float, power: float) -> None:
    assert magnification(mpp) == power


def test_a_bag_of_others_is_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "t.h5", "w") as file:  # TRIDENT's save_h5, with half precision
        file.create_dataset(
            "features", data=FEATURES.astype(np.float16), chunks=(1, 4), maxshape=(None, 4)
        )
        file.create_dataset("coords", data=COORDS.astype(np.int32)).attrs["patch_size_level0"] = 448
    bag = read_bag(tmp_path / "t.h5")
    np.testing.assert_array_equal(bag.features, FEATURES.astype(np.float16).astype(np.float32))
    assert (bag.slide_id, bag.facts, bag.attributes["patch_size_level0"]) == ("t", None, 448)
    assert bag_key(tmp_path / "t.h5") is None


def test_a_slide_without_patches_is_a_bag_too(tmp_path: Path) -> None:
    write_bag(tmp_path / "e.h5", FACTS, np.zeros((0, 4), np.float32), np.zeros((0, 2), np.int64))
    assert read_bag(tmp_path / "e.h5").features.shape == (0, 4)


def test_what_does_not_belong_together_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(PathfmError, match="do not belong together"):
        write_bag(tmp_path / "e.h5", FACTS, FEATURES, COORDS[:5])
    with pytest.raises(PathfmError, match="not finite"):
        write_bag(tmp_path / "e.h5", FACTS, np.full((6, 4), np.nan, np.float32), COORDS)
    for slide_id in ("../s", "a/b", "", ".hidden"):
        with pytest.raises(PathfmError, match="cannot name a file"):
            bag_path(tmp_path, slide_id)
    assert list(tmp_path.iterdir()) == []


def _external(path: Path) -> None:
    with h5py.File(path.with_name("other.h5"), "w") as other:
        other["features"] = FEATURES
    with h5py.File(path, "w") as file:
        file["features"] = h5py.ExternalLink("other.h5", "features")
        file["coords"] = COORDS


def _raw(path: Path) -> None:
    secret = path.with_name("secret.bin")
    secret.write_bytes(b"\0" * 96)
    with h5py.File(path, "w") as file:
        file.create_dataset("features", (6, 4), "f4", external=[(str(secret), 0, 96)])
        file["coords"] = COORDS


def _huge(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("features", (2**40, 1024), "f4", chunks=(1, 1024))
        file["coords"] = COORDS


def _mismatch(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = FEATURES, COORDS[:3]


def _texts(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = [b"a", b"b"], COORDS


def _nan(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["features"], file["coords"] = np.full((6, 4), np.nan), COORDS


@pytest.mark.parametrize("hostile", [_external, _raw, _huge, _mismatch, _texts, _nan])
def test_a_hostile_bag_is_refused_on_one_line(tmp_path: Path, hostile: object) -> None:
    path = tmp_path / "h.h5"
    hostile(path)
    with pytest.raises(PathfmError, match=r"h\.h5") as caught:
        read_bag(path)
    assert "\n" not in str(caught.value)


def test_no_file_no_hdf5_and_a_cut_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(PathfmError, match="no bag at"):
        read_bag(tmp_path / "none.h5")
    with pytest.raises(PathfmError, match="no bags"):
        find_bags(tmp_path)
    path = tmp_path / "c.h5"
    write_bag(path, replace(FACTS, slide_id="c"), FEATURES, COORDS)
    for content in (b"", b"text", path.read_bytes()[:900]):
        path.write_bytes(content)
        assert bag_key(path) is None
        with pytest.raises(PathfmError, match=r"not a bag of features|no table"):
            read_bag(path)


def test_a_bag_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may lose a bag, but not put an empty one where a whole one was."""
    real, synced = os.fsync, list[bytes]()
    path = tmp_path / "s1.h5"

    def fsync(number: int) -> None:
        assert not path.exists()
        (hidden,) = tmp_path.glob(".s1.h5.*.tmp")
        assert os.fstat(number).st_ino == hidden.stat().st_ino
        synced.append(hidden.read_bytes())
        real(number)

    monkeypatch.setattr("os.fsync", fsync)
    write_bag(path, FACTS, FEATURES, COORDS)
    assert synced == [path.read_bytes()]
    assert [file.name for file in tmp_path.iterdir()] == ["s1.h5"]
    np.testing.assert_array_equal(read_bag(path).features, FEATURES)
