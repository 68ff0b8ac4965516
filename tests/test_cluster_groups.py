"""Groups for pictures without slide ids: `tools/cluster_groups.py`."""

from __future__ import annotations

import csv
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pathfm.datasets import scan_folder
from pathfm.embeddings import Embeddings, EmbeddingsInfo
from pathfm.runtime import PathfmError
from tests.conftest import noise

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "cluster_groups.py"))
INFO = EmbeddingsInfo("a", "vit", "b" * 64, "random", "d", "c" * 64, 32)


def labelled(root, n=12):
    """Pictures of two classes; b/05.png is a/00.png mirrored."""
    for i in range(n):
        place = root / "ab"[2 * i // n] / f"{i % (n // 2):02d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        pixels = noise((64, 64), i) if i < n - 1 else noise((64, 64), 0)[:, ::-1]
        Image.fromarray(np.ascontiguousarray(pixels)).save(place)
    return [f"{c}/{i:02d}.png" for c in "ab" for i in range(n // 2)]


def saved(path, features, paths):
    labels = np.array([p[0] == "b" for p in paths], np.int64)
    Embeddings(features, labels, ("a", "b"), tuple(paths), (), INFO).save(path)
    return path


def groups_of(root):
    with (root / "groups.csv").open() as file:
        return {row["path"]: row["group"] for row in csv.DictReader(file)}


def test_groups_are_the_clouds_of_features_and_a_mirrored_copy_is_in_its_original_s(tmp_path):
    paths = labelled(tmp_path / "data")
    cloud = np.arange(12) % 3  # 0 1 2 0 1 2 ...: neither classes nor order
    angles = 2 * np.pi * cloud / 3 + np.linspace(-0.05, 0.05, 12)
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    at = saved(tmp_path / "a.safetensors", features, paths)
    told = TOOL["write_groups"](at, tmp_path / "data", 3, 0)
    found = groups_of(tmp_path / "data")
    assert [*found] == paths
    assert scan_folder(tmp_path / "data").clustered  # whoever probes them says so
    of_cloud = {
        int(c): {found[p] for p, d in zip(paths[:-1], cloud, strict=False) if d == c} for c in cloud
    }
    assert all(len(names) == 1 for names in of_cloud.values())
    assert len(set.union(*of_cloud.values())) == 3
    assert cloud[-1] != cloud[0]
    assert found[paths[-1]] == found[paths[0]]
    assert (
        told == "12 pictures in 3 groups of 3 to 5; 1 pairs of copies, 1 of them brought together"
    )


def test_the_length_of_a_feature_moves_it_to_no_other_group():
    rng = np.random.default_rng(0)
    away = rng.normal(size=(30, 4)).astype(np.float32)
    away = np.concatenate([away, -away])  # the mean is 0 however the pairs are scaled
    scales = np.tile(rng.uniform(0.5, 4, 30).astype(np.float32), 2)[:, None]
    assert (TOOL["clusters"](away, 4, 0) == TOOL["clusters"](away * scales, 4, 0)).all()


def test_a_copy_of_a_copy_comes_along():
    joined = TOOL["kept_together"](np.array([4, 5, 6]), [(0, 1), (1, 2)])
    assert joined.tolist() == [4, 4, 4]


@pytest.mark.parametrize(("drop", "n"), [(1, 3), (0, 13), (0, 1)])
def test_features_of_other_pictures_and_impossible_numbers_are_refused(tmp_path, drop, n):
    paths = labelled(tmp_path / "data")
    kept = paths[drop:]
    at = saved(tmp_path / "a.safetensors", np.eye(12, dtype=np.float32)[drop:], kept)
    with pytest.raises(PathfmError, match=r"not those of|clusters of 12"):
        TOOL["write_groups"](at, tmp_path / "data", n, 0)
    assert not (tmp_path / "data" / "groups.csv").exists()
