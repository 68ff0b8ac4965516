"""A pretraining run small enough for tests, and what makes two runs equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pathfm.backbone import load_backbone
from pathfm.pretrain import PretrainConfig

TINY: dict[str, Any] = {
    "backbone": "test_vit",  # timm's own toy: 0.4 M parameters, patches of 16 px
    "weights": "random:3",
    "patch_px": 64,
    "mpp": [0.5, 1.0],
    "min_foreground": 0.0,
    "batch_size": 4,
    "steps": 6,
    "checkpoint_every_steps": 2,
    "monitor_patches": 8,
    "precision": "fp32",
    "optim": {"warmup_steps": 2, "lr": 1e-3},
    "dino": {"out_dim": 64, "hidden_dim": 32, "bottleneck_dim": 16},
    "views": {
        "global_1": {"size_px": 32},
        "global_2": {"size_px": 32},
        "local": {"size_px": 16},
        "n_local": 2,
    },
    "tracking": {"enabled": False},
    "watch": {"curves": False},  # dearer than all the rest of such a run
}


def config(corpus: Path, out: Path, **changes: Any) -> PretrainConfig:
    """`TINY` with changes."""
    return PretrainConfig(**(TINY | {"corpus": corpus, "out": out} | changes))


def losses(out: Path) -> list[tuple[int, float]]:
    """(step, loss) of every row of a run's metrics."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def assert_same_run(out: Path, undisturbed: Path) -> None:
    """Losses, sampled patches, failures and exported weights are equal to the last bit."""
    assert losses(out) == losses(undisturbed)
    for name in ("sampled.jsonl", "failures.jsonl"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes()
    ours, theirs = (load_backbone("", str(folder)).digest for folder in (out, undisturbed))
    assert ours == theirs
