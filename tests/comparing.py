"""Result files made by hand, in the very form the stages write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pathfm.compare.gathering import Gathered, from_files, gather
from pathfm.embeddings.info import RESIZED, describe_transform

DIGESTS = {"init": "a" * 64, "long": "b" * 64, "short": "c" * 64}


def scores(
    mean: float, interval: tuple[float, float] | None = None, n: int = 5
) -> dict[str, object]:
    return {
        "values": [mean] * n,
        "mean": mean,
        "sd": 0.01,
        "recall": [mean, mean],
        "confusion": [[8, 2], [1, 9]],
        "c": [],
        "interval": list(interval or ()),
        "interval_of": "groups" if interval else "",
        "learning_rate": None,
    }


def backbone(name: str, **probes: dict[str, object]) -> dict[str, object]:
    return {
        "name": name,
        "backbone": "vit",
        "backbone_digest": DIGESTS.get(name, "d" * 64),
        "weights_note": "",
        "dim": 24,
        "precision": "fp32",
        "rankme": 3.0,
        "probes": probes,
        "few_shot": {},
        "pooling": "cls",
        "transform": describe_transform(RESIZED, 224, [0.5] * 3, [0.5] * 3),
    }


def probe(backbones: list[dict[str, object]], **more: object) -> dict[str, Any]:
    return {
        "key": "k",
        "data": "mini",
        "data_digest": "e" * 64,
        "input_px": 224,
        "classes": ["a", "b"],
        "n": 40,
        "n_per_class": [20, 20],
        "n_train": 20,
        "n_test": 20,
        "n_seeds": 5,
        "seed": 0,
        "test_share": 0.5,
        "k": 20,
        "backbones": backbones,
        "paired": [],
        "caveats": [],
        "own_splits": False,
        "n_val": 0,
        "reported_on": "test",
        "also": [],
    } | more


def paired(baseline: str, other: str, mean: float, interval: list[float]) -> dict[str, object]:
    return {
        "baseline": baseline,
        "other": other,
        "probe": "logistic",
        "differences": [mean],
        "mean": mean,
        "sd": 0.0,
        "no_worse": True,
        "interval": interval,
        "p": 0.03,
    }


def corrupted(name: str, ce: list[float | None]) -> dict[str, object]:
    def figure(value: float) -> dict[str, float | None]:
        return {"value": value, "low": value - 1, "high": value + 1, "sd": None}

    kinds = zip(("jpeg", "defocus"), ce, strict=True)
    return {
        "name": name,
        "backbone": "vit",
        "backbone_digest": "",
        "weights_note": "",
        "clean_error": figure(0.1),
        "mean_corrupted_error": figure(0.3),
        "mce": figure(90.0),
        "relative_mce": None,
        "clean_ece": 0.1,
        "mean_corrupted_ece": 0.1,
        "corruptions": [
            {"name": k, "errors": [0.1, 0.3], "ece": [0.1, 0.1], "ce": v, "relative_ce": None}
            for k, v in kinds
        ],
        "noisy_labels": [],
        "site": None,
        "c": [0.1],
    }


def robustness(models: list[dict[str, object]]) -> dict[str, Any]:
    return {
        "data": "mini",
        "data_digest": "e" * 64,
        "classes": ["a", "b"],
        "n": 40,
        "n_groups": 4,
        "interval_of": "groups",
        "sizes": [[20, 20]],
        "n_tested": 20,
        "own_splits": False,
        "selected_on": "train",
        "reported_on": "test",
        "shots": 0,
        "n_splits": 1,
        "seed": 0,
        "input_px": 64,
        "precision": "fp32",
        "severities": [1, 5],
        "reference": str(models[0]["name"]),
        "models": models,
        "caveats": [],
    }


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def found_in(folder: Path) -> Gathered:
    return gather(from_files([folder]))


def two_models() -> dict[str, object]:
    a = backbone("init", logistic=scores(0.8, (0.75, 0.84)), knn=scores(0.7))
    b = backbone("long", logistic=scores(0.85, (0.81, 0.9)), knn=scores(0.69))
    return probe([a, b], paired=[paired("init", "long", 0.05, [0.01, 0.09])])
