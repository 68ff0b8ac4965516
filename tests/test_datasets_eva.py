"""Our data sets beside kaiko-eva 0.4.5's own classes: the same files, labels, splits, pixels and masks."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest

from pathfm.datasets import DATASETS, Benchmark, open_dataset
from pathfm.datasets.benchmark import SPLITS
from tests.datasets_mini import MAKERS
from tests.eva_datasets import digest
from tests.eva_folder import run_eva

pytestmark = pytest.mark.slow

Samples = dict[str, dict[str, list[list[Any]]]]

# what eva's `filename` is relative to
BASES = {
    "bach": "ICIAR2018_BACH_Challenge/Photos/",
    "bracs": "BRACS_RoI/latest_version/",
    "mhist": "images/",
    "unitopatho": "800/",
    "crc train": "NCT-CRC-HE-100K/",
    "crc val": "CRC-VAL-HE-7K/",
}
TILE_PX = 20


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("benchmarks")
    for name in MAKERS:
        if not name.endswith(("_10shot", "16_small")):  # the same files as without
            MAKERS[name](root / name)
    return root


@pytest.fixture(scope="module")
def told(copies: Path) -> dict[str, Any]:
    script = "from tests.eva_datasets import main; main()"
    found: dict[str, Any] = json.loads(run_eva(script, str(copies)).stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def eva(told: dict[str, Any]) -> Samples:
    found: Samples = told["samples"]
    return found


def ours(copies: Path, name: str) -> Benchmark:
    return open_dataset(name, copies / name, partial=True)


def test_every_data_set_that_eva_has_is_compared(eva: Samples) -> None:
    same_files = {"patch_camelyon_10shot", "camelyon16_small"}
    assert set(eva) == set(DATASETS) - same_files
    assert all(split for splits in eva.values() for split in splits.values())


def test_names_of_classes_and_published_counts_are_evas(told: dict[str, Any]) -> None:
    assert len(told["classes"]) == 12
    for name, classes in told["classes"].items():
        assert list(DATASETS[name].facts.classes) == classes
    assert len(told["counts"]) == 7
    for name, counts in told["counts"].items():
        assert dict(DATASETS[name].facts.counts) == counts


@pytest.mark.parametrize(
    "name", ["bach", "bracs", "breakhis", "crc", "mhist", "patch_camelyon", "unitopatho"]
)
def test_pictures_labels_and_splits_are_evas_in_evas_order(
    name: str, copies: Path, eva: Samples
) -> None:
    found = ours(copies, name)
    assert {split for split in SPLITS if len(found.rows(split))} == set(eva[name])
    for split, theirs in eva[name].items():
        rows = found.rows(split)  # type: ignore[arg-type]
        base = BASES.get(name, "") or BASES.get(f"{name} {split}", "")
        if name == "patch_camelyon":  # eva counts from 0 in each split
            assert [t[0].rsplit("_", 1)[1] for t in theirs] == [
                found.paths[row].split("#")[1] for row in rows
            ]
        else:
            assert [found.paths[row] for row in rows] == [base + t[0] for t in theirs]
        assert found.labels[rows].tolist() == [t[1] for t in theirs]
        assert [digest(found.read(row)) for row in rows] == [t[2] for t in theirs]


def test_gleasons_files_labels_and_splits_are_evas(copies: Path, eva: Samples) -> None:
    found = ours(copies, "gleason")  # JPEG: two decoders, so pixels are left out
    for split, theirs in eva["gleason"].items():
        rows = found.rows(split)  # type: ignore[arg-type]
        assert [found.paths[row] for row in rows] == [t[0] for t in theirs]
        assert found.labels[rows].tolist() == [t[1] for t in theirs]


@pytest.mark.parametrize("name", ["camelyon16", "panda", "panda_small"])
def test_slides_grades_and_splits_are_evas_in_evas_order(
    name: str, copies: Path, eva: Samples
) -> None:
    found = ours(copies, name)
    for split, theirs in eva[name].items():
        rows = found.rows(split)  # type: ignore[arg-type]
        assert [found.paths[row] for row in rows] == [t[0] for t in theirs]
        assert found.labels[rows].tolist() == [t[1] for t in theirs]
    assert len(found) == sum(map(len, eva[name].values()))


def test_monusacs_polygons_fill_the_very_pixels_that_evas_do(copies: Path, eva: Samples) -> None:
    found = ours(copies, "monusac")
    filled = 0
    for split, theirs in eva["monusac"].items():
        for row, told in zip(found.rows(split), theirs, strict=True):  # type: ignore[arg-type]
            mask = found.mask(row)
            filled += int((mask > 0).sum())
            assert [found.paths[row], -1, digest(found.read(row)), digest(mask)] == told
    assert filled > 500


def test_conseps_classes_are_merged_as_evas_tile_by_tile(copies: Path, eva: Samples) -> None:
    found = ours(copies, "consep")
    for split, theirs in eva["consep"].items():
        rows = {PurePosixPath(found.paths[r]).stem: r for r in found.rows(split)}  # type: ignore[arg-type]
        assert len(theirs) == 6 * len(rows)  # tiles of 20 px in 60 x 40
        for place, _, pixels, mask in theirs:
            file, corner = place.split("@")
            row = rows[file.split(".")[0]]
            x, y = map(int, corner.split(","))
            cut = np.s_[y : y + TILE_PX, x : x + TILE_PX]
            assert digest(found.read(row)[cut]) == pixels
            assert digest(found.mask(row)[cut]) == mask
