"""Draws patches of a slide and their views as the network gets them: docs/pictures/views.jpg.

    python tools/views_sheet.py SLIDE --out docs/pictures/views.jpg [--seed 0] [--draws 1 5 9]

Two rows a patch: views of the DINO config, then the same draws with strong stain jitter and no other colour.
In each row the patch (256 px), both global views (224 px) and six local ones (96 px), unnormalised.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from online_patching import ForegroundMask, PatchLoader, PatchSampler, Slide, read_slide_index
from pathfm.pretrain.settings import ViewsConfig
from pathfm.views import HED_STRONG, ViewSpec
from pathfm.views.render import make_views

N_LOCAL, MARGIN_PX, PATCH_PX, MPP = 6, 4, 256, 0.5


def main() -> None:
    """Read patches, make views, write the sheet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("slide")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    index = read_slide_index(args.slide)
    with Slide(index) as slide:
        hsv = np.asarray(Image.fromarray(slide.thumbnail(8.0)).convert("HSV"))
    mask = ForegroundMask.from_array(hsv[..., 1] > 25, slide.dimensions, (index.mpp_x, index.mpp_y))
    sampler = PatchSampler([index], [mask], size_px=PATCH_PX, mpp=MPP, seed=args.seed)
    with PatchLoader(sampler, max(args.draws) + 1) as loader:
        pixels = torch.from_numpy(next(loader).pixels[args.draws])
    config = ViewsConfig(n_local=N_LOCAL).specs
    plain = {"jitter": 0.0, "gray": 0.0, "blur": 0.0, "solarize": 0.0}
    stained = [spec.model_copy(update={**plain, "hed": HED_STRONG}) for spec in config]
    rows = [
        row
        for n in range(len(pixels))
        for row in (drawn(pixels, args, config, n), drawn(pixels, args, stained, n))
    ]
    gap = np.full((MARGIN_PX, *rows[0].shape[1:]), 255, np.uint8)
    sheet = np.concatenate([part for row in rows for part in (row, gap)][:-1])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(args.out, quality=88)


def drawn(
    pixels: torch.Tensor, args: argparse.Namespace, specs: list[ViewSpec], n: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """One row: the patch, its views at the patch's height, local ones in two rows of three."""
    mean, std = (0.0,) * 3, (1.0,) * 3
    draws = np.asarray(args.draws[n : n + 1])
    made = make_views(pixels[n : n + 1], draws, specs, seed=args.seed, mean=mean, std=std)
    pictures = [pixels[n].numpy()]
    pictures += [(view[0].permute(1, 2, 0) * 255).round().byte().numpy() for view in made]
    row = np.full((PATCH_PX, PATCH_PX + 2 * 228 + 3 * 100 + MARGIN_PX, 3), 255, np.uint8)
    x = 0
    for picture in pictures[:3]:
        side = len(picture)
        row[:side, x : x + side] = picture
        x += side + MARGIN_PX
    for k, picture in enumerate(pictures[3:]):
        left, top = x + k % 3 * 100, k // 3 * 100
        row[top : top + 96, left : left + 96] = picture
    return row


if __name__ == "__main__":
    main()
