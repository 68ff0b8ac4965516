"""Views a second on one core: 2 x 224 + 8 x 96 px from patches of 256 px, against lightly and torchvision.

    python benchmarks/views_speed.py [--batch 32] [--rounds 9] [--device cpu|cuda] [--out FILE]

"equal definition" is lightly's DINOTransform as it comes: bicubic crops, flips, no turns, colour at 0.8, grey
at 0.2, blur at 100, 10 and 50 %, solarise at 20 % of second crops. It starts from PIL pictures; torchvision's
is the same list of v2 transforms on uint8 tensors, patch by patch. Neither stacks its views into a batch, ours
are stacked. One thread each, pinned to one core, in turns: ratios are of the same round, by CPU time (other
work on the machine moves clocks, not that) and by the clock. Then what options cost, in the same form, then
the rows a block, then how far antialiasing moves pixels. With --device cuda: whole matrices there, eager
and compiled, against lightly on one core of that machine, by the clock.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Series, Work, about_this_run, in_turns, last_core, paired, pin, write_out
from lightly.transforms.dino_transform import DINOTransform
from PIL import Image
from torchvision.transforms import v2

from online_patching.testing import SyntheticSlide
from pathfm.pretrain.settings import ViewsConfig
from pathfm.views import HED_LIGHT, ViewSpec, resampling
from pathfm.views.render import Engine, make_views

PATCH_PX, VIEWS = 256, 10
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OURS, LIGHTLY, TORCHVISION = "ours, equal definition", "lightly, PIL", "torchvision v2, tensors"


def main() -> None:
    """Measure, print, and write the tables where asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--batch", type=int, default=32, help="patches a batch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu", help="where our views are made")
    parser.add_argument("--out", type=Path, help="also write the tables here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pin(last_core())
    pixels = tissue_patches(args.batch)
    lines = [about_this_run("torch", "lightly", "torchvision", "pillow"), ""]
    lines += [f"one thread on one core, batches of {args.batch} patches, {args.rounds} rounds", ""]
    if args.device != "cpu":
        lines += on_a_gpu(pixels, args.rounds, args.device)
    else:
        lines += [*against_peers(pixels, args.rounds), "", *options(pixels, args.rounds), ""]
        lines += [*rows_a_block(pixels, args.rounds), "", *antialiasing(pixels)]
    write_out([line.rstrip() for line in lines], args.out)


def tissue_patches(batch: int) -> torch.Tensor:
    """uint8 (batch, 256, 256, 3) of synthetic tissue."""
    slide = SyntheticSlide(3, 8192, 8192, 0.5)
    rng = np.random.default_rng(0)
    places = rng.integers(0, 8192 - PATCH_PX, (batch, 2)).tolist()
    patches = [slide.render(x, y, PATCH_PX, PATCH_PX) for x, y in places]
    return torch.from_numpy(np.stack(patches))


def specs(**changes: Any) -> list[ViewSpec]:
    """DINO's views as our configs have them, with some fields changed."""
    return [spec.model_copy(update=changes) for spec in ViewsConfig().specs]


LIKE_LIGHTLY: dict[str, Any] = {"interpolation": "bicubic", "turn": 0.0}


def ours(
    pixels: torch.Tensor, views: list[ViewSpec], engine: Engine = "auto"
) -> Callable[[int], range]:
    """A round of our views: new draws every time."""

    def work(k: int) -> range:
        n = len(pixels)
        make_views(pixels, np.arange(n) + k * n, views, seed=0, mean=MEAN, std=STD, engine=engine)
        if pixels.device.type == "cuda":
            torch.cuda.synchronize()
        return range(n * VIEWS)

    return work


def peer(pictures: list[Any], transform: Callable[[Any], object], k: int) -> range:
    """A round of another's views."""
    for picture in pictures:
        transform(picture)
    return range(len(pictures) * VIEWS)


def lightly(pixels: torch.Tensor) -> Callable[[int], range]:
    """lightly's own, from PIL pictures."""
    pictures = [Image.fromarray(patch) for patch in pixels.cpu().numpy()]
    return partial(peer, pictures, DINOTransform(n_local_views=8))


def torchvision(pixels: torch.Tensor) -> Callable[[int], range]:
    """The same transforms from torchvision v2, on uint8 tensors (3, 256, 256)."""

    def view(size: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Transform:
        return v2.Compose([
            v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=blur),
            v2.RandomSolarize(128, p=solarize),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ])  # fmt: skip

    views = [view(224, (0.4, 1.0), 1.0, 0.0), view(224, (0.4, 1.0), 0.1, 0.2)]
    views += [view(96, (0.05, 0.4), 0.5, 0.0)] * 8
    pictures = [patch.permute(2, 0, 1).contiguous() for patch in pixels]
    return partial(peer, pictures, lambda picture: [one(picture) for one in views])


def cpu_rates(series: Series) -> list[float]:
    """Views a second of CPU time, by round."""
    return [1e6 / us for us in series.cpu_us]


def row(name: str, series: Series, reference: Series) -> str:
    """One line: views a second of CPU, ms a patch, the reference's ratio by CPU time and by the clock."""
    rate = statistics.median(cpu_rates(series))
    by_cpu = paired(cpu_rates(reference), cpu_rates(series))
    by_clock = paired(reference.rates, series.rates)
    return f"{name:40}{by_cpu:28}{by_clock:28}{rate:8.0f}{VIEWS / rate * 1e3:9.2f}"


HEADER = f"{'':40}{'by CPU time':28}{'by the clock':28}{'views/s':>8}{'ms/patch':>9}"


def table(works: dict[str, Work], reference: str, rounds: int) -> list[str]:
    """One line a work, in turns."""
    done = in_turns(works, rounds)
    return [HEADER, *(row(name, series, done[reference]) for name, series in done.items())]


def against_peers(pixels: torch.Tensor, rounds: int) -> list[str]:
    """Ours, lightly's and torchvision's at equal definition."""
    works: dict[str, Work] = {
        OURS: ours(pixels, specs(**LIKE_LIGHTLY)),
        LIGHTLY: lightly(pixels),
        TORCHVISION: torchvision(pixels),
    }
    return [f"how many times as fast {OURS!r} is:", "", *table(works, OURS, rounds)]


def options(pixels: torch.Tensor, rounds: int) -> list[str]:
    """What our own options cost, against our default."""
    works: dict[str, Work] = {
        "ours, as our DINO config has them": ours(pixels, specs()),
        "  bicubic": ours(pixels, specs(interpolation="bicubic")),
        "  bicubic, no turns": ours(pixels, specs(**LIKE_LIGHTLY)),
        "  with stain jitter (HED-light)": ours(pixels, specs(hed=HED_LIGHT)),
        "  without antialiasing": ours(pixels, specs(antialias=False)),
        "  whole matrices (engine dense)": ours(pixels, specs(), "dense"),
        "  whole matrices, compiled": ours(pixels, specs(), "compiled"),
    }
    title = "how many times as fast our default is as its variants (compiled: the compiling is in round 0):"
    return [title, "", *table(works, next(iter(works)), rounds)]


def rows_a_block(pixels: torch.Tensor, rounds: int) -> list[str]:
    """CPU ms a patch by the rows that a block of a matrix has."""
    default = resampling.BLOCK_ROWS

    def with_rows(rows: int, k: int) -> range:
        resampling.BLOCK_ROWS = rows
        return ours(pixels, specs())(k)

    works: dict[str, Work] = {
        f"{rows} rows a block": partial(with_rows, rows) for rows in (16, 24, 32, 48, 64, 112)
    }
    lines = table(works, f"{default} rows a block", rounds)
    resampling.BLOCK_ROWS = default
    return [f"how many times as fast {default} rows a block are:", "", *lines]


def antialiasing(pixels: torch.Tensor) -> list[str]:
    """How far views without antialiasing are from those with, in grey levels, by group of views."""
    lines = ["grey levels between views with and without antialiasing, same draws:", ""]
    lines.append(f"{'':12}{'of views shrink':>16}{'mean |difference|':>20}{'99th percentile':>17}")
    for name, spec in (("224 px", ViewsConfig().global_1), ("96 px", ViewsConfig().local)):
        bare = spec.model_copy(update={"jitter": 0.0, "blur": 0.0, "gray": 0.0})
        plain = bare.model_copy(update={"antialias": False})
        draws = np.arange(len(pixels))
        with_it, without = (
            make_views(pixels, draws, [one], seed=0, mean=(0.0,) * 3, std=(1.0,) * 3)[0]
            for one in (bare, plain)
        )
        away = (with_it - without).abs().flatten(1) * 255
        drawn = resampling.Shape.of(bare).longest * PATCH_PX / bare.size_px
        shrunk = away.amax(1) > 0.5
        some = away[shrunk] if shrunk.any() else away
        sample = some.flatten()[:: max(1, some.numel() // 1_000_000)]
        lines.append(
            f"{name:12}{shrunk.float().mean():16.2f}{some.mean():20.2f}"
            f"{sample.quantile(0.99):17.1f}   (up to {drawn:.2f} input px an output px)"
        )
    return lines


def on_a_gpu(pixels: torch.Tensor, rounds: int, device: str) -> list[str]:
    """Ours there, eager and compiled, against lightly on one core, by the clock."""
    there = pixels.to(device)
    works: dict[str, Work] = {
        LIGHTLY: lightly(pixels),
        "ours, equal definition, eager": ours(there, specs(**LIKE_LIGHTLY), "dense"),
        "ours, equal definition, compiled": ours(there, specs(**LIKE_LIGHTLY), "compiled"),
        "ours with stain jitter, compiled": ours(there, specs(hed=HED_LIGHT), "compiled"),
    }
    done = in_turns(works, rounds)
    lines = [f"{torch.cuda.get_device_name()}: how many times as fast as lightly on one core:", ""]
    return lines + [
        f"{name:40}{paired(series.rates, done[LIGHTLY].rates):28}"
        f"{statistics.median(series.rates):10.0f} views/s"
        for name, series in done.items()
    ]


if __name__ == "__main__":
    main()
