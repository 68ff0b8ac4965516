"""Asked of kaiko-eva in a process of its own: what its data set classes make of our miniatures.

python -c "from tests.eva_datasets import main; main()" FOLDER -> JSON: name -> split -> samples, each
[file, target, digest of the pixels, digest of the mask].
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def digest(array: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, np.uint8).tobytes()).hexdigest()


def pictures(dataset: Any) -> list[list[Any]]:
    """Samples of a data set of pictures: file, class, pixels (h, w, 3), no mask."""
    found = []
    for i in range(len(dataset)):
        pixels = np.asarray(dataset.load_data(i)).transpose(1, 2, 0)
        found.append([dataset.filename(i), int(dataset.load_target(i)), digest(pixels), ""])
    return found


def masked(dataset: Any) -> list[list[Any]]:
    """Samples of MoNuSAC: whole pictures with their masks."""
    found = []
    for i in range(len(dataset)):
        pixels = np.asarray(dataset.load_data(i)).transpose(1, 2, 0)
        mask = np.asarray(dataset.load_target(i))
        found.append([dataset.filename(i), -1, digest(pixels), digest(mask)])
    return found


def tiled(dataset: Any) -> list[list[Any]]:
    """Samples of CoNSeP: tiles of the pictures, file@x,y."""
    found = []
    for i in range(len(dataset)):
        image, mask, told = dataset[i]
        pixels = np.asarray(image).transpose(1, 2, 0)
        x, y = told["coords"].split(",")[:2]
        found.append([f"{dataset.filename(i)}@{x},{y}", -1, digest(pixels), digest(mask)])
    return found


def slides(dataset: Any, grade: bool) -> list[list[Any]]:
    """Slides of a data set: file and class; nothing is opened."""
    found = []
    for path in dataset._file_paths:
        if grade:
            label = int(dataset._get_target_from_path(path))
        else:
            label = dataset.class_to_idx[dataset.annotations[dataset._get_id_from_path(path)]]
        found.append([path, label, "", ""])
    return found


def main() -> None:
    """Reads FOLDER/<name> by every class of eva's and prints the samples."""
    from eva.vision.data import datasets as eva
    from eva.vision.data.wsi.patching import samplers

    root = Path(sys.argv[1])
    found: dict[str, dict[str, list[list[Any]]]] = {}
    plain = {
        "bach": (eva.BACH, {"train": "train", "val": "val"}),
        "bracs": (eva.BRACS, {"train": "train", "val": "val", "test": "test"}),
        "breakhis": (eva.BreaKHis, {"train": "train", "val": "val"}),
        "crc": (eva.CRC, {"train": "train", "val": "val"}),
        "gleason": (eva.GleasonArvaniti, {"train": "train", "val": "val", "test": "test"}),
        "mhist": (eva.MHIST, {"train": "train", "val": "test"}),
        "patch_camelyon": (eva.PatchCamelyon, {"train": "train", "val": "val", "test": "test"}),
        "unitopatho": (eva.UniToPatho, {"train": "train", "val": "val"}),
    }
    for name, (kind, splits) in plain.items():
        found[name] = {}
        for ours, theirs in splits.items():
            dataset = kind(str(root / name), split=theirs)
            dataset.prepare_data()
            dataset.configure()
            found[name][ours] = pictures(dataset)
    found["monusac"] = {}
    for ours, theirs in {"train": "train", "val": "test"}.items():
        dataset = eva.MoNuSAC(str(root / "monusac"), split=theirs, export_masks=False)
        dataset.prepare_data()
        dataset.configure()
        found["monusac"][ours] = masked(dataset)
    found["consep"] = {}
    for split in ("train", "val"):
        dataset = eva.CoNSeP(
            str(root / "consep"), samplers.GridSampler(), split=split, width=20, height=20
        )
        dataset.prepare_data()
        dataset.configure()
        found["consep"][split] = tiled(dataset)
    found["camelyon16"] = {
        split: slides(
            eva.Camelyon16(str(root / "camelyon16"), samplers.GridSampler(), split=split), False
        )
        for split in ("train", "val", "test")
    }
    for name, kind in (("panda", eva.PANDA), ("panda_small", eva.PANDASmall)):
        kind._download_resources = lambda self: None  # the table is in our miniature
        here = str(root / name)
        found[name] = {
            split: slides(kind(here, samplers.GridSampler(), split=split, download_dir=here), True)
            for split in ("train", "val", "test")
        }
    print(json.dumps({"samples": found, "classes": classes(eva), "counts": counts(eva)}))


def classes(eva: Any) -> dict[str, list[str]]:
    """Class names in the order of their numbers."""
    kinds = {
        "bach": eva.BACH,
        "bracs": eva.BRACS,
        "breakhis": eva.BreaKHis,
        "crc": eva.CRC,
        "gleason": eva.GleasonArvaniti,
        "mhist": eva.MHIST,
        "unitopatho": eva.UniToPatho,
        "patch_camelyon": eva.PatchCamelyon,
        "camelyon16": eva.Camelyon16,
        "panda": eva.PANDA,
        "consep": eva.CoNSeP,
        "monusac": eva.MoNuSAC,
    }
    return {name: list(kind.classes.fget(None)) for name, kind in kinds.items()}


def counts(eva: Any) -> dict[str, dict[str, int]]:
    """Samples a split, where a class keeps them as data."""
    kept = {
        "bracs": eva.BRACS._expected_dataset_lengths,
        "breakhis": eva.BreaKHis._expected_dataset_lengths,
        "gleason": eva.GleasonArvaniti._expected_dataset_lengths,
        "patch_camelyon": eva.PatchCamelyon._expected_length,
        "unitopatho": eva.UniToPatho._expected_dataset_lengths,
        "consep": eva.CoNSeP._expected_dataset_lengths,
    }
    found = {name: {k: v for k, v in of.items() if k} for name, of in kept.items()}
    monusac = eva.MoNuSAC._expected_dataset_lengths
    found["monusac"] = {"train": monusac["train"], "val": monusac["test"]}
    return found
