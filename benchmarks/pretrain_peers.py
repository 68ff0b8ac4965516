"""Pretraining end to end: our feed and views against wsistream with lightly's DINOTransform, one model.

    python benchmarks/pretrain_peers.py SLIDE.svs [SLIDE ...]

Both arms draw random 256 px patches of tissue from the same slides at the same µm/px (the finest level of each,
which is what wsistream reads without resizing), make 2 x 224 + 8 x 96 views, and take the same DINO step on the same
network in the same precision. wsistream reads through OpenSlide, its faster backend; lightly's transform
works on PIL pictures, one at a time. Everything runs in one process on one core, so that patches a
second are comparable whatever one would do with more of them; blocks of both arms take turns.

"feed" is reading and views without a step: what a GPU waits for. It needs the `bench` extra.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import about_this_run, last_core, pin, tissue
from peers import wsistream_reader
from PIL import Image
from torch import Tensor

from online_patching import PatchLoader, PatchSampler, Slide, open_slide
from online_patching.errors import MppError
from pathfm.backbone import load_backbone
from pathfm.methods import MicroBatch, build_method
from pathfm.methods.settings import DinoSettings
from pathfm.pretrain import ViewsConfig
from pathfm.runtime import autocast, plan_precision
from pathfm.views.render import make_views

PATCH_PX, N_GLOBAL = 256, 2
Views = tuple[list[Tensor], np.ndarray]
Feed = Iterator[Views]


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slides", type=Path, nargs="+")
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="steps of a block")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each arm, in turn")
    args = parser.parse_args()
    pin(last_core())
    torch.set_num_threads(1)
    print(about_this_run("wsistream", "lightly", "torch", "timm", "openslide-bin"))
    print(
        f"{len(args.slides)} slides, {args.backbone}, batches of {args.batch}, 2 x 224 + 8 x 96 px views, "
        f"one core; {args.blocks} blocks of {args.steps} steps of each arm in turn"
    )
    step = stepper(args.backbone)
    feeds = {
        "pathfm": ours(args.slides, args.batch),
        "wsistream + lightly": theirs(args.slides, args.batch),
    }
    for name, work in (
        ("feed alone", next),
        ("with the DINO step", lambda feed: step(next(feed))),
    ):
        rates = in_turn(feeds, work, args)
        report(name, rates)


def in_turn(
    feeds: dict[str, Feed], work: Callable[[Feed], object], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Patches a CPU second of every block, a block of each arm after the other; the first is a warm-up."""
    rates: dict[str, list[float]] = {name: [] for name in feeds}
    for block in range(args.blocks + 1):
        for name, feed in feeds.items():
            began_s = time.process_time()
            for _ in range(args.steps):
                work(feed)
            if block:
                passed_s = time.process_time() - began_s
                rates[name].append(args.steps * args.batch / passed_s)
    return rates


def report(what: str, rates: dict[str, list[float]]) -> None:
    """Ratio of the medians first, with the range of the blocks' ratios."""
    mine, other = rates.values()
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    print(f"\n{what}: {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})")
    for name, found in rates.items():
        print(f"  {name:20} {statistics.median(found):8.2f} patches per CPU second")


def ours(paths: list[Path], batch: int) -> Feed:
    """Our loader (one decode thread) and batched views."""
    slides = opened(paths)
    backbone = load_backbone("vit_tiny_patch16_224", "random")
    finest = sorted({round(slide.mpp, 4) for slide in slides})
    sampler = PatchSampler(
        [slide.index for slide in slides],
        [tissue(slide) for slide in slides],
        size_px=PATCH_PX,
        mpp=finest,
        seed=0,
    )
    specs = ViewsConfig().specs
    with PatchLoader(sampler, batch, threads=1, prefetch=1) as loader:
        for got in loader:
            pixels = torch.from_numpy(got.pixels)
            views = make_views(
                pixels, got.draws, specs, seed=0, mean=backbone.mean, std=backbone.std
            )
            yield views, got.draws


def opened(paths: list[Path]) -> list[Slide]:
    """The slides; one that does not say its µm/px is taken for 0.5, which changes no work."""
    slides = []
    for path in paths:
        try:
            slides.append(open_slide(str(path)))
        except MppError:
            slides.append(open_slide(str(path), mpp=0.5))
    return slides


def theirs(paths: list[Path], batch: int) -> Feed:
    """wsistream's pipeline a slide, taking turns, and lightly's DINOTransform a patch."""
    transform = import_module("lightly.transforms").DINOTransform()
    readers = [
        wsistream_reader(path, tissue(slide), PATCH_PX, PATCH_PX)
        for path, slide in zip(paths, opened(paths), strict=True)
    ]
    number = 0
    while True:
        rows: list[list[Any]] = []
        for _ in range(batch):
            (patch,) = readers[number % len(readers)]([(0, 0)], PATCH_PX)
            rows.append(transform(Image.fromarray(patch)))
            number += 1
        views = [torch.stack(list(column)) for column in zip(*rows, strict=True)]
        yield views, np.arange(number - batch, number)


def stepper(name: str) -> Callable[[Views], None]:
    """One DINO step of forward, backward, clipping, AdamW and teacher, as the training loop takes it."""
    device = torch.device("cpu")
    precision = plan_precision("auto", device)
    backbone = load_backbone(name, "random")
    backbone.plain_attention()
    method = build_method("dino", backbone, DinoSettings(), steps=1000, seed=0)
    optimizer = torch.optim.AdamW(method.trained().parameters(), lr=1e-4, fused=True)
    done = 0

    def step(given: Views) -> None:
        nonlocal done
        views, draws = given
        micro = MicroBatch(views, N_GLOBAL, draws, None, 0, done)
        with autocast(device, precision):
            method.look(micro)
            method.settle(done)
            loss = method.loss(micro)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(method.trained().parameters(), 3.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_update(done)
        done += 1

    return step


if __name__ == "__main__":
    main()
