"""What SegFormer costs: parameters, multiply-adds, time, and what shortening keys and values saves.

    python benchmarks/segformer_cost.py [--side-px 512] [--blocks 5] [--out FILE]

First every segmentation model on a picture of side-px x side-px, one thread, fp32: parameters, multiply-adds
(torch's counter, as computed here; "paper's order" is the decoder that upsamples first), CPU seconds. Then
one attention layer of each stage, by sr (keys and values R = sr^2 times fewer, through a convolution of
kernel = stride = sr), in turns, sr = 1 being attention without reduction: multiply-adds, CPU ms, and how
many times fewer than at sr = 1. A star marks the sr of the presets.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import about_this_run, last_core, pin, write_out
from torch import nn

from pathfm.segmentation.models import MODEL_NAMES, build_model, multiply_adds_per_pixel
from pathfm.segmentation.segformer import DECODER_CHANNELS, PRESETS, STRIDES
from pathfm.segmentation.segformer.mit import EfficientAttention


def main() -> None:
    """Measure, print, and write the tables where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--side-px", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the tables here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pin(last_core())
    lines = [about_this_run("torch"), ""]
    lines += models_table(args.side_px, args.blocks)
    lines += ["", "one attention layer, by sr:", ""]
    lines += reduction_table(args.side_px, args.blocks)
    write_out([line.rstrip() for line in lines], args.out)


def models_table(side_px: int, blocks: int) -> list[str]:
    """One line a model."""
    lines = [
        f"{side_px} x {side_px} px     parameters  multiply-adds  paper's order  products of  seconds",
        f"{'':17}{'M':>12}{'G':>15}{'G':>15}{'attention, G':>13}{'':>9}",
    ]
    for name in MODEL_NAMES:
        model = build_model(name).eval()
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        giga = multiply_adds_per_pixel(model, side_px) * side_px**2 / 1e9
        preset = name.removeprefix("segformer_")
        published = products = ""
        if preset in PRESETS:
            published = f"{giga + more_in_the_papers_order(preset, side_px) / 1e9:.2f}"
            products = f"{products_of_attention(preset, side_px) / 1e9:.2f}"
        seconds = seconds_of(model, side_px, blocks if giga < 20 else 2)
        lines.append(
            f"{name:17}{millions:12.3f}{giga:15.2f}{published:>15}{products:>13}{seconds:9.3f}"
        )
        del model
    return lines


def more_in_the_papers_order(preset: str, side_px: int) -> int:
    """Multiply-adds that upsampling before fusing adds to the decoder."""
    channels, widths = DECODER_CHANNELS[preset], PRESETS[preset].widths
    cells = [(side_px // stride) ** 2 for stride in STRIDES]
    there = sum(n * c * channels for n, c in zip(cells, widths, strict=True))
    there += cells[0] * 4 * channels**2
    here = sum((n + channels) * c * channels for n, c in zip(cells, widths, strict=True))
    return there - here - 4 * channels**2


def products_of_attention(preset: str, side_px: int) -> int:
    """Multiply-adds of scores and mixing: 2 N (N / R) C a block."""
    of, total = PRESETS[preset], 0
    for c, depth, sr, stride in zip(of.widths, of.depths, of.reductions, STRIDES, strict=True):
        n = (side_px // stride) ** 2
        total += depth * 2 * n * (n // sr**2) * c
    return total


def seconds_of(model: nn.Module, side_px: int, blocks: int) -> float:
    """Median CPU seconds of a forward pass after one to warm up."""
    rgb = torch.rand(1, 3, side_px, side_px).to(memory_format=torch.channels_last)
    model = model.to(memory_format=torch.channels_last)
    return statistics.median(timed(lambda: model(rgb), blocks + 1)[1:])


def timed(work: Callable[[], Any], times: int) -> list[float]:
    """CPU seconds of each call: on one thread the clock's, less what others take of the core."""
    spent = []
    with torch.inference_mode():
        for _ in range(times):
            began = time.process_time()
            work()
            spent.append(time.process_time() - began)
    return spent


def reduction_table(side_px: int, blocks: int) -> list[str]:
    """Stage by stage, the narrow widths of B0 and the wide ones of B1 to B5."""
    head = ("", "stage", "tokens", "width", "sr", "R", "multiply-adds, M", "fewer", "ms", "faster")
    widths = (-10, 6, 8, 7, 5, 5, 18, 9, 10, 9)
    lines = [
        "".join(f"{h:>{w}}" if w > 0 else f"{h:<{-w}}" for h, w in zip(head, widths, strict=True))
    ]
    for label, preset in (("B0", "b0"), ("B1 to B5", "b1")):
        of = PRESETS[preset]
        for stage, stride in enumerate(STRIDES):
            side = side_px // stride
            ratios = [sr for sr in (1, 2, 4, 8) if sr <= side]
            layers = [
                EfficientAttention(of.widths[stage], of.heads[stage], r).eval() for r in ratios
            ]
            tokens = torch.randn(1, side**2, of.widths[stage])
            spent = in_turns(layers, tokens, side, blocks)
            counted = [multiply_adds(of.widths[stage], side**2, r) for r in ratios]
            for r, seconds, count in zip(ratios, spent, counted, strict=True):
                star = "*" if r == of.reductions[stage] else " "
                lines.append(
                    f"{label:10}{stage + 1:6}{side**2:8,}{of.widths[stage]:7}{r:5}{r * r:5}{count / 1e6:18,.1f}"
                    f"{counted[0] / count:9.1f}{seconds * 1e3:10.2f}{spent[0] / seconds:9.1f} {star}"
                )
    return lines


def in_turns(
    layers: list[EfficientAttention], tokens: torch.Tensor, side: int, blocks: int
) -> list[float]:
    """Median CPU seconds of each layer, all run once a block; block 0 warms up."""
    spent: list[list[float]] = [[] for _ in layers]
    for block in range(blocks + 1):
        for layer, seconds in zip(layers, spent, strict=True):
            once = timed(partial(layer, tokens, side, side), 1)
            if block:
                seconds.extend(once)
    return [statistics.median(seconds) for seconds in spent]


def multiply_adds(width: int, tokens: int, sr: int) -> int:
    """One attention layer: queries and output, keys and values, the two products, the shortening."""
    fewer = tokens // sr**2
    total = 2 * tokens * width**2 + 2 * fewer * width**2 + 2 * tokens * fewer * width
    return total + (fewer * sr**2 * width**2 if sr > 1 else 0)


if __name__ == "__main__":
    main()
