"""Runs to export, made without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from pathfm.backbone import export_backbone, load_backbone

NAME = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def backbone(seed=1, side_px=32):
    made = load_backbone(NAME, f"random:{seed}", side_px, **TINY)
    made.mean, made.std = (0.7, 0.6, 0.5), (0.1, 0.2, 0.3)
    return made


def finished_run(folder: Path) -> Path:
    """A run folder as pretrain leaves it."""
    made = backbone()
    export_backbone(made, folder / "backbone")
    settings = {
        "corpus": "/secret/hospital/corpus",
        "out": "/secret/runs/mine",
        "method": "dino",
        "backbone": NAME,
        "weights": "/secret/weights/first.safetensors",
        "patch_px": 64,
        "mpp": [0.5, 1.0],
        "batch_size": 8,
        "steps": 1200,
        "dino": {"out_dim": 64},
        "dinov2": {"out_dim": 99},
        "tracking": {"uri": "https://mlflow.secret.org"},
        "seed": 7,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    summary = {
        "steps": 1200,
        "patches_seen": 9600,
        "distinct_patches": 9000,
        "slides_seen": 3,
        "loss_first": 4.2,
        "loss_last": 3.9,
        "rankme_start": 10.0,
        "rankme_end": 12.5,
        "init": "weights from /secret secret/first/backbone, 30 of 30 tensors",
        "precision": "fp32",
        "device": "cpu",
        "backbone_digest": made.digest,
        "corpus_digest": "c0ffee" * 10,
        "slide_share": {"PATIENT-0815": 1.0},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def probe_file(
    path: Path, digest: str, input_px: int = 32, name: str = "mine|<b>", **changes: object
) -> Path:
    def row(name, digest, mean):
        scores = {
            "mean": mean,
            "sd": 0.011,
            "values": [mean - 0.01, mean + 0.01],
            "recall": [],
            "confusion": [],
            "c": [],
        }
        return {
            "name": name,
            "backbone": NAME,
            "backbone_digest": digest,
            "weights_note": "weights from /secret/place, all tensors",
            "dim": 24,
            "precision": "fp32",
            "rankme": 11.1,
            "probes": {"logistic": scores, "knn": scores},
        }

    probe = {
        "key": "k",
        "n_per_class": [100, 100],
        "seed": 0,
        "test_share": 0.3,
        "paired": [],
        "data": "colorectal5",
        "data_digest": "d1d1d1d1d1d1d1d1",
        "input_px": input_px,
        "classes": ["a", "b"],
        "n": 200,
        "n_train": 140,
        "n_test": 60,
        "n_seeds": 5,
        "k": 20,
        "backbones": [row("init", "0" * 64, 0.789), row(name, digest, 0.851)],
        "caveats": ["No slide ids."],
    }
    path.write_text(json.dumps(probe | changes))
    return path
