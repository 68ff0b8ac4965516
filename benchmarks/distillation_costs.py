"""What iBOT's masks cost, and a step of DINOv2 beside one of DINO.

    python benchmarks/distillation_costs.py [--grids 14 16 32] [--blocks 7] [--out FILE]

First masks of 64 views, half of them masked, 0.1 to 0.5 of their patches: ours against lightly's
`random_block_mask` (the algorithm of BEiT and DINOv2, a view at a time), one thread, in turns within
each block; and how often the masks of each hide fewer patches than wanted. Then whole steps (teacher,
student forward and backward, averaging; ViT-Ti/16, 16 samples in two views of 96 and four of 48 px,
4,096 prototypes). CPU time; medians of the blocks; ratios are medians of each block's ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from common import about_this_run, last_core, pin, write_out
from lightly.models.utils import random_block_mask

from pathfm.backbone import load_backbone
from pathfm.methods import Method, MicroBatch, build_method
from pathfm.methods.masks import block_masks
from pathfm.methods.settings import DinoSettings, Dinov2Settings

VIEWS, SAMPLES = 64, 16
HEAD = {"out_dim": 4096}


def main() -> None:
    """Measure, print, and write the tables where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--grids", type=int, nargs="+", default=[14, 16, 32])
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the tables here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pin(last_core())
    lines = [about_this_run("torch", "lightly"), ""]
    lines += [f"masks of {VIEWS} views         times ours   µs/view"]
    for side in args.grids:
        lines += table(masks(side), f"{side} x {side}, ours", args.blocks, 1e6 / VIEWS)
    lines += ["", "hide fewer patches than wanted (share of masked views)"]
    lines += [
        f"{side} x {side}: ours {ours:.3f}, lightly {theirs:.3f}"
        for side, ours, theirs in (short_of(side) for side in args.grids)
    ]
    lines += ["", "one step                   times DINO        ms"]
    lines += table(steps(), "DINO", args.blocks, 1e3)
    write_out([line.rstrip() for line in lines], args.out)


def masks(side: int) -> dict[str, Callable[[], object]]:
    """Masks of as many views by either."""
    draws = np.arange(VIEWS)
    return {
        f"{side} x {side}, ours": lambda: block_masks(draws, (side, side), seed=0, view=0),
        f"{side} x {side}, lightly": lambda: random_block_mask((VIEWS, side, side)),
    }


def short_of(side: int) -> tuple[int, float, float]:
    """(side, ours, lightly's): the share of 512 masks of half the patches that hide fewer."""
    size, wanted = (512, side, side), side * side // 2
    ours = block_masks(
        np.arange(512), (side, side), seed=0, view=0, probability=1.0, ratio=(0.5, 0.5)
    )
    theirs = random_block_mask(
        size, batch_mask_ratio=1.0, min_image_mask_ratio=0.5, max_image_mask_ratio=0.5
    )
    counts = theirs.flatten(1).sum(1)
    return side, float((ours.sum(1) < wanted).mean()), float((counts < wanted).float().mean())


def steps() -> dict[str, Callable[[], object]]:
    """Steps of DINO and of DINOv2 in its forms."""
    softmax = {"centring": "softmax", "separate_ibot_head": False, "regulariser_weight": 0.0}
    made = {
        "DINO": ("dino", DinoSettings(**HEAD), 1),
        "DINOv2": ("dinov2", Dinov2Settings(**HEAD), 1),
        "DINOv2, centres, one head": ("dinov2", Dinov2Settings(**HEAD, **softmax), 1),
        "DINOv2 in 2 parts": ("dinov2", Dinov2Settings(**HEAD), 2),
    }
    return {label: runner(*of) for label, of in made.items()}


def runner(name: str, settings: DinoSettings, count: int) -> Callable[[], object]:
    """One step of a method on the same batch, in `count` micro-batches."""
    backbone = load_backbone("vit_tiny_patch16_224", "random")
    backbone.plain_attention()
    method = build_method(name, backbone, settings, steps=100, seed=0)
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(SAMPLES, 3, s, s, generator=generator) for s in (96, 96, *[48] * 4)]
    rows = np.array_split(np.arange(SAMPLES), count)
    micros = [
        MicroBatch([view[r] for view in views], 2, r, None, 0, 1, index, count)
        for index, r in enumerate(rows)
    ]
    return lambda: step(method, micros)


def step(method: Method, micros: list[MicroBatch]) -> None:
    """All of a step but the optimizer."""
    for micro in micros:
        method.look(micro)
    method.settle(1)
    for micro in micros:
        method.loss(micro).backward()  # type: ignore[no-untyped-call]
    method.before_update(1)
    for parameter in method.trained().parameters():
        parameter.grad = None
    method.after_update(1)


def table(
    runs: Mapping[str, Callable[[], object]], first: str, blocks: int, unit: float
) -> list[str]:
    """Lines of label, median ratio to `first`, median time."""
    times: dict[str, list[float]] = {label: [] for label in runs}
    for run in runs.values():
        run()
    for _ in range(blocks):
        for label, run in runs.items():
            began = time.process_time()
            run()
            times[label].append(time.process_time() - began)
    return [
        f"{label:<26} {statistics.median(a / b for a, b in zip(of, times[first], strict=True)):10.2f}"
        f" {statistics.median(of) * unit:9.1f}"
        for label, of in times.items()
    ]


if __name__ == "__main__":
    main()
