"""Trains the foreground U-Net on synthetic thumbnails of known truth; minutes on one CPU core.

    python -m pathfm.segmentation.train --out pathfm/segmentation/weights/unet_thumbnail.safetensors

Writes the weights as fp16 safetensors and, beside them, a JSON file that says how they were made
and how they do on held-out synthetic thumbnails, next to Otsu + saturation. The same seed gives
the same thumbnails everywhere and, on one machine with one thread, the same weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from online_patching.philox import integers, uniform, words
from online_patching.stores import atomic_write_bytes
from pathfm.segmentation.losses import bce_dice_loss
from pathfm.segmentation.otsu import otsu_mask
from pathfm.segmentation.thumbnails import draw_thumbnail
from pathfm.segmentation.unet import (
    ThumbnailUNet,
    load_unet,
    multiply_adds_per_pixel,
    tissue_probability,
)

HELD_OUT_FROM = 1_000_000  # draw numbers from here on are never trained on
_BATCH_STREAM, _INIT_STREAM = 7201, 7202


@dataclass(frozen=True)
class TrainSettings:
    """Everything the weights depend on."""

    seed: int = 0
    thumbnails: int = 1000
    thumbnail_px: int = 384
    crop_px: int = 224
    batch_size: int = 8
    steps: int = 1700
    warmup_steps: int = 40
    lr: float = 3e-3
    weight_decay: float = 1e-4
    held_out: int = 120
    bf16: bool = True


def new_unet(seed: int) -> ThumbnailUNet:
    """A U-Net with He-normal weights drawn from the seed alone."""
    generator = torch.Generator().manual_seed(int(words(seed, [0], 0, _INIT_STREAM, 1)[0, 0]))
    model = ThumbnailUNet()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def batches(
    pictures: NDArray[np.uint8], truths: NDArray[np.bool_], settings: TrainSettings
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (rgb (B, 3, c, c) in 0..1, truth (B, c, c)); step and row key every choice."""
    size, crop = settings.batch_size, settings.crop_px
    room = pictures.shape[1] - crop + 1
    step = 0
    while True:
        w = words(settings.seed, np.arange(step * size, (step + 1) * size), 0, _BATCH_STREAM, 12)
        which, top, left = (
            integers(w[:, 0], len(pictures)),
            integers(w[:, 1], room),
            integers(w[:, 2], room),
        )
        u = uniform(w)
        rgb, truth = [], []
        for k in range(size):
            window = np.s_[top[k] : top[k] + crop, left[k] : left[k] + crop]
            turns, flip = int(u[k, 3] * 4), u[k, 4] < 0.5
            a, b = (
                np.rot90(pictures[which[k]][window], turns),
                np.rot90(truths[which[k]][window], turns),
            )
            rgb.append(a[:, ::-1] if flip else a)
            truth.append(b[:, ::-1] if flip else b)
        x = torch.from_numpy(np.stack(rgb)).permute(0, 3, 1, 2).float() / 255
        yield _recoloured(x, u[:, 5:]), torch.from_numpy(np.stack(truth))
        step += 1


def _recoloured(rgb: Tensor, u: NDArray[np.float64]) -> Tensor:
    """Gain per channel, gamma, and now and then two channels swapped: other stains, other lamps."""
    numbers = torch.from_numpy(u).float()[:, :, None, None, None]
    gain = 1 + 0.12 * (numbers[:, :3, 0].reshape(-1, 3, 1, 1) - 0.5)
    gamma = torch.exp(0.5 * (numbers[:, 3] - 0.5))
    out = (rgb * gain).clamp(0, 1) ** gamma
    swapped = torch.from_numpy(u[:, 4] < 0.06)
    out[swapped] = out[swapped][:, [2, 1, 0]]
    return out


def lr_at(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then half a cosine down to 0."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def train(
    settings: TrainSettings, report: Callable[[str], None] = print
) -> tuple[ThumbnailUNet, list[float]]:
    """The trained network, in eval mode, and the loss of every step."""
    drawn = []
    for number in range(settings.thumbnails):
        drawn.append(draw_thumbnail(settings.seed, number, settings.thumbnail_px))
        if (number + 1) % 200 == 0:
            report(f"drew {number + 1} of {settings.thumbnails} thumbnails")
    pictures, truths = (np.stack(part) for part in zip(*drawn, strict=True))
    model = new_unet(settings.seed).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=settings.weight_decay)
    losses: list[float] = []
    for step, (rgb, truth) in enumerate(batches(pictures, truths, settings)):
        if step == settings.steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, settings)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16):
            logits = model(rgb.contiguous(memory_format=torch.channels_last))
        loss = bce_dice_loss(logits, truth)
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()} at step {step}: lower lr")
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            report(f"step {step + 1}/{settings.steps}: loss {np.mean(losses[-50:]):.4f}")
    return model.eval(), losses


def held_out_scores(model: ThumbnailUNet, settings: TrainSettings) -> dict[str, dict[str, float]]:
    """U-Net and Otsu on thumbnails never trained on: IoU over all pixels, mean IoU of the pictures
    with tissue, and the share of glass called tissue on pictures without any."""
    counted: dict[str, list[tuple[int, int, int, int]]] = {"unet": [], "otsu": []}
    for number in range(settings.held_out):
        picture, truth = draw_thumbnail(
            settings.seed, HELD_OUT_FROM + number, settings.thumbnail_px
        )
        masks = {"unet": tissue_probability(model, picture) > 0.5, "otsu": otsu_mask(picture)}
        for name, mask in masks.items():
            both, either = int((mask & truth).sum()), int((mask | truth).sum())
            counted[name].append((both, either, int(mask.sum()), int(truth.sum())))
    scores = {}
    for name, rows in counted.items():
        table = np.array(rows, np.float64)
        some = table[:, 3] > 0
        scores[name] = {
            "iou_all_pixels": table[:, 0].sum() / table[:, 1].sum(),
            "iou_mean_of_pictures": float((table[some, 0] / table[some, 1]).mean()),
            "false_share_on_empty": float(table[~some, 2].mean() / settings.thumbnail_px**2)
            if (~some).any()
            else 0.0,
        }
    return {name: {k: round(float(v), 4) for k, v in s.items()} for name, s in scores.items()}


def save_weights(model: ThumbnailUNet, path: Path) -> None:
    """fp16 safetensors at `path`, written beside it and renamed."""
    from safetensors.torch import save

    state = {
        key: value.half().contiguous() if value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, save(state))


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="where the weights go")
    parser.add_argument("--seed", type=int, default=TrainSettings.seed)
    parser.add_argument("--steps", type=int, default=TrainSettings.steps)
    parser.add_argument("--thumbnails", type=int, default=TrainSettings.thumbnails)
    parser.add_argument("--held-out", type=int, default=TrainSettings.held_out)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; 1 is reproducible")
    given = vars(parser.parse_args())
    out, threads = given.pop("out"), given.pop("threads")
    torch.set_num_threads(threads)
    settings = TrainSettings(**given)
    started_s, cpu_s = time.perf_counter(), time.process_time()
    model, losses = train(settings)
    spent = time.perf_counter() - started_s, time.process_time() - cpu_s
    save_weights(model, out)
    scores = held_out_scores(load_unet(out), settings)  # the file's own, after fp16
    facts: dict[str, Any] = {
        "command": f"python -m pathfm.segmentation.train --out {out.name} --seed {settings.seed} "
        f"--steps {settings.steps} --thumbnails {settings.thumbnails} --threads {threads}",
        "settings": asdict(settings),
        "sha256": hashlib.sha256(out.read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "multiply_adds_per_pixel": round(multiply_adds_per_pixel(model)),
        "training_data": "synthetic thumbnails only (pathfm/segmentation/thumbnails.py)",
        "wall_s": round(spent[0]),
        "cpu_s": round(spent[1]),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "final_loss": round(float(np.mean(losses[-50:])), 4),
        "held_out_synthetic": scores,
    }
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
