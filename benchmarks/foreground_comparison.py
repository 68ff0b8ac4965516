"""Losses, and U-Net against SegFormer-B0, on the thumbnail task at one small budget: one MLflow
experiment, a table, and what the differences are worth.

    python benchmarks/foreground_comparison.py --pictures FOLDER [--pictures ...] --out runs/comparison

Every arm sees the same crops in the same order (batch k is a function of the seed and k) and takes
the same number of steps; what it costs in CPU seconds stands beside it. Judged on the drawn
validation pictures and on held-out synthetic thumbnails; the evaluation pictures are not touched.
An arm that is done is not run again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from common import about_this_run

from pathfm.segmentation.synthetic import SyntheticThumbnail, draw_thumbnail
from pathfm.tracking import make_client

BCE: dict[str, object] = {"name": "bce"}
DICE: dict[str, object] = {"name": "dice", "smooth": 1.0}
ARMS: dict[str, tuple[str, list[dict[str, object]]]] = {
    "bce": ("unet", [BCE]),
    "soft_bce": ("unet", [{"name": "soft_bce"}]),
    "focal": ("unet", [{"name": "focal"}]),
    "dice": ("unet", [DICE]),
    "dice_squared": ("unet", [{"name": "dice", "smooth": 1.0, "squared": True}]),
    "dice_f2": ("unet", [{"name": "dice", "smooth": 1.0, "beta": 2.0}]),
    "jaccard": ("unet", [{"name": "jaccard", "smooth": 1.0}]),
    "tversky": ("unet", [{"name": "tversky", "alpha": 0.3, "beta": 0.7, "smooth": 1.0}]),
    "focal_tversky": ("unet", [{"name": "focal_tversky", "smooth": 1.0}]),
    "mcc": ("unet", [{"name": "mcc"}]),
    "bce+dice": ("unet", [BCE, DICE]),
    "bce+mcc": ("unet", [BCE, {"name": "mcc"}]),
    "bce+dice, stem 4": ("unet_stem4", [BCE, DICE]),
    "bce+dice, SegFormer-B0": ("segformer_b0", [BCE, DICE]),
}
SCORES = ("drawn_dice", "synthetic_dice")


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, action="append", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/foreground_comparison"))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--synthetic", type=int, default=200, help="thumbnails to cut crops from")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="arms at a time, a thread each")
    args = parser.parse_args()
    jobs = [(arm, seed) for seed in range(args.seeds) for arm in ARMS]
    make_client(store(args))  # its tables are made once, before two processes would
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        found = list(pool.map(run, itertools.repeat(args), *zip(*jobs, strict=True)))
    rows = {
        arm: [scores for (name, _), scores in zip(jobs, found, strict=True) if name == arm]
        for arm in ARMS
    }
    tell(args, rows)


def run(args: argparse.Namespace, arm: str, seed: int) -> dict[str, float]:
    """Trains one arm, or finds it done; its validation scores and CPU seconds."""
    import torch

    from pathfm import foreground_train
    from pathfm.segmentation import train

    torch.set_num_threads(1)
    vars(train)["draw_thumbnail"] = _drawn_once
    model, loss = ARMS[arm]
    name = f"{arm} {seed}".replace("+", "_").replace(",", "").replace(" ", "_")
    out = args.out / name
    told = out / "cpu_s.json"
    config = foreground_train.ForegroundTrainConfig.model_validate(
        {
            "out": out, "model": model, "loss": loss, "seed": seed, "steps": args.steps,
            "synthetic": args.synthetic, "pictures": args.pictures,
            "lr": 6e-4 if model.startswith("segformer") else 3e-3, "precision": "bf16",
            "validate_every_steps": args.steps, "checkpoint_every_steps": args.steps,
            "tracking": {"experiment": "foreground-losses", "run_name": arm, "uri": store(args)},
        }
    )  # fmt: skip
    began_s = time.process_time()
    result = foreground_train.run(config)
    if not told.exists():
        told.write_text(json.dumps(time.process_time() - began_s))
    return {**result.facts["validation"], "cpu_s": json.loads(told.read_text())}


@functools.cache
def _drawn_once(seed: int, draw: int, size_px: int) -> SyntheticThumbnail:
    """The same thumbnails for every arm, drawn once a process."""
    return draw_thumbnail(seed, draw, size_px)


def store(args: argparse.Namespace) -> str:
    """The MLflow store of the comparison."""
    return f"sqlite:///{(args.out / 'mlflow.db').resolve()}"


def tell(args: argparse.Namespace, rows: dict[str, list[dict[str, float]]]) -> None:
    """Prints the table, best first by the mean of both Dice coefficients."""
    print(f"{args.steps} steps of 8 crops of 256 px, {args.synthetic} synthetic thumbnails, "
          f"{args.seeds} seed(s), bf16; validation only.")  # fmt: skip
    if args.seeds == 1:
        print(
            "One seed: how far another would move these was not measured; neighbours are not ranked."
        )
    print(about_this_run("torch"))
    print(f"{'arm':<24} {'mean':>7} {'drawn':>16} {'synthetic':>16} {'CPU s':>7}")

    def mean(arm: str) -> float:
        return float(np.mean([r[s] for r in rows[arm] for s in SCORES]))

    for arm in sorted(rows, key=mean, reverse=True):
        parts = []
        for score in SCORES:
            values = [r[score] for r in rows[arm]]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            parts.append(f"{np.mean(values):.4f}{spread}")
        cpu_s = np.mean([r["cpu_s"] for r in rows[arm]])
        print(f"{arm:<24} {mean(arm):7.4f} {parts[0]:>16} {parts[1]:>16} {cpu_s:7.0f}")


if __name__ == "__main__":
    main()
