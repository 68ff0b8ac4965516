"""Balanced batches of a labelled patch folder: our feed against torch's ImageFolder and DataLoader.

    python benchmarks/folder_feed.py ../shared/data/patches/colorectal5 --out benchmarks/results/folder_feed_DATE.txt

Same work: pictures drawn balanced by class, read from the page cache, decoded to RGB, shrunk where a
smaller patch is wanted (triangle filter, antialiased), stacked as uint8 batches. Ours orders each class
anew every epoch; torch's WeightedRandomSampler, the usual recipe, draws with replacement. Everything on
one core, blocks in turn, rates of the same block compared; block 0 warms up. Nobody reads ahead
(num_workers=0, prefetch=1): what was read while another had its turn would not be counted, and on one core
there is nothing to be won by it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Work, about_this_run, in_turns, last_core, paired, pin, write_out
from torch.utils.data import DataLoader, WeightedRandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from pathfm.labels import LabelsConfig
from pathfm.labels.picture_feed import PictureFeed
from pathfm.labels.pictures import PictureSampler, open_patches

BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 112], help="patch sides, px")
    parser.add_argument("--blocks", type=int, default=9)
    parser.add_argument("--batches", type=int, default=6, help="batches of 64 a block")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    core = last_core()
    pin(core)
    torch.set_num_threads(1)
    lines = [
        about_this_run("torch", "torchvision", "pillow", "simplejpeg"),
        f"{args.folder.name}, core {core} alone, batches of {BATCH}, {args.blocks} blocks of {args.batches} in turn",
    ]
    for size_px in args.sizes:
        lines += ["", *report(args.folder, size_px, args.blocks, args.batches)]
    write_out(lines, args.out)


def report(folder: Path, size_px: int, blocks: int, batches: int) -> list[str]:
    """Ratios first, then patches a second of each."""
    works: dict[str, Work] = {
        "ours": taking(ours(folder, size_px), batches),
        "ImageFolder + DataLoader": taking(theirs(folder, size_px), batches),
    }
    found = in_turns(works, blocks)
    rates = {name: series.rates for name, series in found.items()}
    lines = [f"patches of {size_px} px"]
    lines += [
        f"  ours / {name:<26} {paired(rates['ours'], r)}"
        for name, r in rates.items()
        if name != "ours"
    ]
    lines += [f"  {name:<33} {statistics.median(r):7.0f} patches/s" for name, r in rates.items()]
    return lines


def taking(stream: Iterator[Any], batches: int) -> Work:
    """The next batches of a stream, as one array a block."""
    return lambda _: np.concatenate([np.asarray(pixels) for pixels in islice(stream, batches)])


def ours(folder: Path, size_px: int) -> Iterator[Any]:
    """Batches of our feed, one thread."""
    config = LabelsConfig(patches=folder)
    sampler = PictureSampler(open_patches(config, with_classes=True), config, 0, balanced=True)
    feed = PictureFeed(sampler, BATCH, size_px=size_px, threads=1, prefetch=1)
    while True:
        batch = feed.next_batch()
        assert batch.pixels.shape == (BATCH, size_px, size_px, 3)
        yield batch.pixels


def theirs(folder: Path, size_px: int) -> Iterator[Any]:
    """Batches of torch's, balanced by the usual weights, channels first as it makes them."""
    shrink = transforms.Resize(size_px, transforms.InterpolationMode.BILINEAR, antialias=True)
    data = ImageFolder(
        str(folder),
        transforms.Compose([shrink, transforms.CenterCrop(size_px), transforms.PILToTensor()]),
    )
    counts = np.bincount(data.targets)
    weights = 1.0 / counts[data.targets]
    sampler = WeightedRandomSampler(weights.tolist(), num_samples=10**6)
    loader = DataLoader(data, BATCH, sampler=sampler, num_workers=0)
    for pixels, _ in loader:
        assert pixels.dtype == torch.uint8
        yield pixels


if __name__ == "__main__":
    main()
