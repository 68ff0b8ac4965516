"""What contrastive losses and gradient caching cost.

    python benchmarks/contrastive_costs.py [--rows 512 2048] [--blocks 7] [--out FILE]

First loss and gradient on random rows of 128 numbers, two views a sample, ten classes where there are
classes: ours against lightly's NTXentLoss and pytorch-metric-learning's SupConLoss, one thread, fp32,
in turns within each block. Then whole steps (forward, loss, backward; ViT-Ti/16 at 64 px, 16 samples in
two views): the batch at once, in four micro-batches by gradient caching, and in four whose losses are
averaged, which is another loss. Medians of the blocks; ratios are medians of each block's ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import about_this_run, last_core, pin, write_out
from lightly.loss import NTXentLoss
from pytorch_metric_learning.losses import SupConLoss

from pathfm.backbone import load_backbone
from pathfm.losses.supcon import supcon_loss
from pathfm.methods import Method, MicroBatch, build_method
from pathfm.methods.settings import SimclrSettings

TAU = 0.1
SAMPLES, PARTS = 16, 4


def main() -> None:
    """Measure, print, and write the tables where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--blocks", type=int, default=7)
    parser.add_argument("--out", type=Path, help="also write the tables here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pin(last_core())
    lines = [about_this_run("torch", "lightly", "pytorch-metric-learning"), ""]
    lines += ["loss and gradient          times ours      ms"]
    for rows in args.rows:
        lines += table(losses(rows), "ours", args.blocks)
    lines += ["", "one step                   times whole     ms"]
    lines += table(steps(), "the batch at once", args.blocks)
    write_out([line.rstrip() for line in lines], args.out)


def losses(rows: int) -> dict[str, Callable[[], object]]:
    """Loss and gradient by everybody, for rows / 2 samples in two views."""
    z = torch.randn(rows, 128, generator=torch.Generator().manual_seed(0))
    z.requires_grad_()
    samples = torch.arange(rows // 2).repeat(2)
    classes = samples % 10
    nt_xent, supcon = NTXentLoss(TAU), SupConLoss(temperature=TAU)

    def run(loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), z)

    return {
        f"NT-Xent {rows}, ours": run(lambda: supcon_loss(F.normalize(z, dim=1), samples, TAU)),
        f"NT-Xent {rows}, lightly": run(lambda: nt_xent(*z.chunk(2))),
        f"SupCon {rows}, ours": run(lambda: supcon_loss(F.normalize(z, dim=1), classes, TAU)),
        f"SupCon {rows}, pytorch-m-l": run(lambda: supcon(z, classes)),
    }


def steps() -> dict[str, Callable[[], object]]:
    """A SimCLR step at once, by gradient caching, and with averaged micro-batches."""
    backbone = load_backbone("vit_tiny_patch16_224", "random")
    backbone.plain_attention()
    method = build_method("simclr", backbone, SimclrSettings(), steps=1, seed=0)
    generator = torch.Generator().manual_seed(0)
    views = [torch.randn(SAMPLES, 3, 64, 64, generator=generator) for _ in range(2)]
    return {
        "the batch at once": lambda: step(method, [part(views, 0, 1)]),
        "4 parts, cached": lambda: step(method, [part(views, k, PARTS) for k in range(PARTS)]),
        "4 parts, averaged": lambda: [
            step(method, [part(views, k, PARTS, alone=True)]) for k in range(PARTS)
        ],
    }


def part(views: list[torch.Tensor], index: int, count: int, *, alone: bool = False) -> MicroBatch:
    """Micro-batch `index` of `count`; `alone`: as if it were the whole batch."""
    rows = np.array_split(np.arange(SAMPLES), count)[index]
    place = {} if alone else {"index": index, "count": count}
    return MicroBatch([view[rows] for view in views], 2, rows, None, 0, 0, **place)


def step(method: Method, micros: list[MicroBatch]) -> int:
    """Everything but the optimizer; how many parts there were."""
    for micro in micros:
        method.look(micro)
    method.settle(0)
    for micro in micros:
        torch.autograd.backward(method.loss(micro))
    return len(micros)


def table(work: Mapping[str, Callable[[], object]], base: str, blocks: int) -> list[str]:
    """A line each: times the last line named `base` before it, and milliseconds of CPU."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for run in work.values():
        run()
    for _ in range(blocks):
        for name, run in work.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    lines, against = [], ""
    for name, taken in seconds.items():
        against = name if name.endswith(base) else against
        ratio = statistics.median(a / b for a, b in zip(taken, seconds[against], strict=True))
        lines.append(f"{name:26}{ratio:11.2f}{1e3 * statistics.median(taken):8.1f}")
    return lines


if __name__ == "__main__":
    main()
