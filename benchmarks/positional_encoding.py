"""Mix-FFN against interpolated position embeddings in one encoder: trained at one size, tested at others.

    python benchmarks/positional_encoding.py [--pictures FOLDER ...] [--steps N] [--seeds N]
        [--out FILE] [--plot docs/pictures/positional_encoding.png]

A SegFormer of half B0's widths, three times: its Mix-FFNs with their depth-wise convolution ("mix_ffn");
those left out and learned position embeddings added in each stage, interpolated bicubically to other
sizes ("embedding"); neither ("none"). Everything else is equal: crops of 160 px from pictures made 640 px
long, the same crops in the same order for all three, BCE + Dice, AdamW.

Tested on drawn evaluation pictures in two ways, mean Dice over pictures:
  tiles   the picture 640 px long, cut into squares of 80 to 640 px that go through the network alone. The
          same pixels at the same scale: only the size of the input differs from training.
  whole   the picture made 80 to 640 px long, in one piece: its scale differs too, as in the paper.

Without --pictures both sides are synthetic, and the table says so.
"""

from __future__ import annotations

import argparse
import io
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from common import about_this_run, last_core, pin, write_out
from numpy.typing import NDArray
from PIL import Image

from online_patching.stores.local import atomic_write_bytes
from pathfm.runtime import torch_generator
from pathfm.segmentation.crops import CropSettings, CropSource, TrainingPicture
from pathfm.segmentation.losses import LossTerm, build_loss
from pathfm.segmentation.models import init_weights
from pathfm.segmentation.scores import count
from pathfm.segmentation.segformer import PRESETS, SegFormer
from pathfm.segmentation.segformer.mit import MixSettings
from pathfm.segmentation.synthetic import draw_thumbnail
from pathfm.segmentation.truth import read_pictures

LONG_PX, TRAIN_PX = 640, 160
SIZES_PX = (80, 112, 160, 224, 320, 448, 640)
HALF_B0 = replace(PRESETS["b0"], widths=(16, 32, 80, 128), embedding_px=TRAIN_PX)
KINDS = ("mix_ffn", "embedding", "none")
LR, WARM_UP = 1e-3, 30
HELD_OUT_FROM = 1_000_000
Seen = list[TrainingPicture]


def main() -> None:
    """Train, test, print the table, draw the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--pictures", type=Path, nargs="*", default=[], help="folders with the drawn pictures"
    )
    parser.add_argument("--synthetic", type=int, default=80, help="synthetic training thumbnails")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the table here")
    parser.add_argument("--plot", type=Path, help="draw the curves here (PNG)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.threads == 1:
        pin(last_core())
    began = time.process_time()
    training, held_out, told = data(args.pictures, args.synthetic)
    found: dict[tuple[str, str, int], list[float]] = {}
    for seed in range(args.seeds):
        crops = CropSource(training, crop_settings(args.batch), seed)
        for kind in KINDS:
            model = train(kind, crops, args.steps, seed)
            for (way, size_px), dice in tested(model, held_out).items():
                found.setdefault((kind, way, size_px), []).append(dice)
            print(f"seed {seed} {kind}: {time.process_time() - began:.0f} CPU s so far", flush=True)
    lines = [about_this_run("torch"), "", told]
    spent = f"{time.process_time() - began:.0f} CPU s in all"
    lines += [
        f"{args.steps} steps of {args.batch} crops of {TRAIN_PX} px, {args.seeds} seeds, {spent}",
        "",
    ]
    lines += table(found)
    write_out(lines, args.out)
    if args.plot:
        atomic_write_bytes(args.plot, plotted(found))


# --- data -------------------------------------------------------------------------------------------


def data(roots: Sequence[Path], synthetic: int) -> tuple[Seen, Seen, str]:
    """(training pictures, evaluation pictures, what they are), all LONG_PX long."""
    training = [synthetic_picture(number) for number in range(synthetic)]
    if not roots:
        held_out = [synthetic_picture(HELD_OUT_FROM + number) for number in range(24)]
        held_out = [p for p in held_out if p.tissue.any()]
        return (
            training,
            held_out,
            f"synthetic: {synthetic} to train on, {len(held_out)} others to test on",
        )
    drawn = {
        split: [at_length(p.name, p.rgb, p.tissue, p.ignore) for p in read_pictures(roots, split)]
        for split in ("training", "validation", "evaluation")
    }
    taught = [*drawn["training"], *drawn["validation"]]
    # as many crops of drawn pictures as of synthetic ones
    training += [replace(p, weight=synthetic / max(1, len(taught))) for p in taught]
    held_out = [p for p in drawn["evaluation"] if p.tissue.any()]
    told = f"{len(taught)} drawn and {synthetic} synthetic pictures to train on, {len(held_out)} drawn ones to test on"
    return training, held_out, told


def synthetic_picture(number: int) -> TrainingPicture:
    """A synthetic thumbnail as a training picture."""
    made = draw_thumbnail(0, number, LONG_PX)
    return TrainingPicture(f"synthetic {number}", made.rgb, made.tissue, np.zeros_like(made.tissue))


def at_length(
    name: str,
    rgb: NDArray[np.uint8],
    tissue: NDArray[np.bool_],
    ignore: NDArray[np.bool_],
    long_px: int = LONG_PX,
) -> TrainingPicture:
    """A picture and its truth with its longer side at long_px."""
    height, width = rgb.shape[:2]
    size = tuple(max(1, round(side * long_px / max(height, width))) for side in (width, height))
    pixels = np.asarray(
        Image.fromarray(rgb).resize(
            size, Image.Resampling.BOX if size[0] < width else Image.Resampling.BICUBIC
        )
    )
    masks = [
        np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX))
        > 127
        for mask in (tissue, ignore)
    ]
    return TrainingPicture(name, pixels, masks[0], masks[1])


def crop_settings(batch: int) -> CropSettings:
    """Crops about as large on the picture as tiles of the same size."""
    return CropSettings(crop_px=TRAIN_PX, batch_size=batch, unknown_scale=(0.8, 1.25))


# --- training and testing ---------------------------------------------------------------------------


def train(kind: str, crops: CropSource, steps: int, seed: int) -> SegFormer:
    """A network of one kind after `steps` batches; equal weights at the start where kinds share them."""
    settings: MixSettings = replace(HALF_B0, positional=kind)  # type: ignore[arg-type]
    model = start(settings, seed).train()
    loss = build_loss([LossTerm(name="bce"), LossTerm(name="dice", smooth=1.0)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01)
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / WARM_UP) * cosine
        rgb, truth, ignore = crops.batch(step)
        value = loss(model(rgb), truth, ignore)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


def start(settings: MixSettings, seed: int) -> SegFormer:
    """First weights: those of the Mix-FFN network wherever a network has them, so that only what differs differs."""
    whole = init_weights(SegFormer(replace(settings, positional="mix_ffn"), 64), seed).state_dict()
    model = SegFormer(settings, 64)
    extra = [name for name in model.state_dict() if name not in whole]
    shared = {name: tensor for name, tensor in whole.items() if name in model.state_dict()}
    model.load_state_dict(shared, strict=False)
    with torch.no_grad():
        for place, name in enumerate(extra):
            generator = torch_generator(seed, place, 7330)
            model.get_parameter(name).normal_(0, 0.02, generator=generator)
    return model


def tested(model: SegFormer, pictures: Seen) -> dict[tuple[str, int], float]:
    """Mean Dice over pictures for each way and size."""
    found: dict[tuple[str, int], float] = {}
    for size_px in SIZES_PX:
        scores: dict[str, list[float]] = {"tiles": [], "whole": []}
        for picture in pictures:
            mask = by_tiles(model, picture.rgb, size_px)
            scores["tiles"].append(count(mask, picture.tissue, picture.ignore).dice)
            small = at_length(picture.name, picture.rgb, picture.tissue, picture.ignore, size_px)
            mask = predicted(model, small.rgb[None])[0]
            scores["whole"].append(count(mask, small.tissue, small.ignore).dice)
        found |= {(way, size_px): statistics.fmean(values) for way, values in scores.items()}
    return found


def predicted(model: SegFormer, rgb: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """(n, h, w, 3) uint8 -> tissue, (n, h, w) bool, eight at a time."""
    masks = []
    with torch.inference_mode():
        for at in range(0, len(rgb), 8):
            x = torch.from_numpy(np.array(rgb[at : at + 8])).permute(0, 3, 1, 2).float() / 255
            masks.append((model(x) > 0).numpy())
    return np.concatenate(masks)


def by_tiles(model: SegFormer, rgb: NDArray[np.uint8], size_px: int) -> NDArray[np.bool_]:
    """The mask of a picture from squares that see nothing of each other, the last ones padded by repetition."""
    height, width = rgb.shape[:2]
    rows, columns = -(-height // size_px), -(-width // size_px)
    below, right = rows * size_px - height, columns * size_px - width
    x = np.pad(rgb, ((0, below), (0, right), (0, 0)), mode="edge")
    tiles = x.reshape(rows, size_px, columns, size_px, 3).transpose(0, 2, 1, 3, 4)
    masks = predicted(model, tiles.reshape(-1, size_px, size_px, 3))
    whole = masks.reshape(rows, columns, size_px, size_px).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(whole.reshape(rows * size_px, -1)[:height, :width])


# --- results ----------------------------------------------------------------------------------------


def table(found: dict[tuple[str, str, int], list[float]]) -> list[str]:
    """Mean and sd over seeds, and what is lost against the size of training."""
    lines = []
    for way in ("tiles", "whole"):
        lines.append(f"{way:12}" + "".join(f"{size:>8} px      " for size in SIZES_PX))
        for kind in KINDS:
            cells = [found[kind, way, size] for size in SIZES_PX]
            told = [f"{statistics.fmean(c):.4f} ± {spread(c):.4f}" for c in cells]
            lines.append(f"{kind:12}" + "".join(f"{cell:>16} " for cell in told))
        for kind in KINDS:
            at_home = found[kind, way, TRAIN_PX]
            lost = [
                [a - b for a, b in zip(found[kind, way, size], at_home, strict=True)]
                for size in SIZES_PX
            ]
            told = [f"{statistics.fmean(c):+.4f} ± {spread(c):.4f}" for c in lost]
            lines.append(
                f"{'- ' + str(TRAIN_PX) + ' px':12}" + "".join(f"{c:>16} " for c in told) + kind
            )
        lines.append("")
    parameters = {kind: parameter_count(kind) for kind in KINDS}
    return [*lines, "parameters: " + ", ".join(f"{kind} {n:,}" for kind, n in parameters.items())]


def parameter_count(kind: str) -> int:
    """Parameters of the network of one kind."""
    model = SegFormer(replace(HALF_B0, positional=kind), 64)  # type: ignore[arg-type]
    return sum(parameter.numel() for parameter in model.parameters())


def spread(values: list[float]) -> float:
    """Standard deviation over seeds; 0 of one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plotted(found: dict[tuple[str, str, int], list[float]]) -> bytes:
    """Two panels, Dice against the size of the input, bands of one sd."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 3.7), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    colours = dict(zip(KINDS, ("#1f77b4", "#d62728", "#7f7f7f"), strict=True))
    names = {
        "mix_ffn": "Mix-FFN",
        "embedding": "position embeddings, interpolated",
        "none": "neither",
    }
    titles = {
        "tiles": "same scale, larger or smaller input",
        "whole": "whole picture at another scale",
    }
    for axis, way in zip(axes, titles, strict=True):
        for kind in KINDS:
            mean = np.array([statistics.fmean(found[kind, way, size]) for size in SIZES_PX])
            sd = np.array([spread(found[kind, way, size]) for size in SIZES_PX])
            axis.plot(SIZES_PX, mean, "o-", ms=4, color=colours[kind], label=names[kind])
            axis.fill_between(SIZES_PX, mean - sd, mean + sd, color=colours[kind], alpha=0.15, lw=0)
        axis.axvline(TRAIN_PX, color="black", lw=0.8, ls=":")
        axis.set_xscale("log")
        axis.set_xticks(SIZES_PX, [str(size) for size in SIZES_PX], minor=False)
        axis.set_xticks([], minor=True)
        axis.set_xlabel("side of the input, px (trained at the dotted line)")
        axis.set_title(titles[way], fontsize=10)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("mean Dice, drawn evaluation pictures")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    page = io.BytesIO()
    figure.savefig(page, format="png", metadata={"Software": None})
    return page.getvalue()


if __name__ == "__main__":
    main()
