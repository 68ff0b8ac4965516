"""What tracking, probes, pictures and checkpoints cost a pretraining run, against the bare loop.

    python benchmarks/pretrain_overhead.py [--backbone vit_tiny_patch16_224] [--batch 16] [--device cuda]

One DINO run on drawn slides in one process. Blocks of bare steps (batch, views, gradients, update)
and of whole ones (with what `pathfm pretrain` does at every step: the journal, the thread that ships
to MLflow, the collapse rules, the progress line) take turns. Then what comes seldom is timed alone, and
given as a share of the run at the default intervals: a checkpoint, RankMe and feature std, the probe, the
pictures.

Costs are CPU seconds of the whole process, all its threads, so that a shipping thread on another
core is counted and neighbours on the machine are not; MLflow writes to SQLite inside this process, which
costs it more than sending to a server. With --device cuda seconds on the clock are compared instead.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch
from common import about_this_run
from PIL import Image

from online_patching import Corpus, ForegroundMask, read_slide_index
from online_patching.testing import SyntheticSlide, write_tiff
from pathfm.pretrain import PretrainConfig
from pathfm.pretrain.feed import Feed, open_feed
from pathfm.pretrain.loop import gradients, update
from pathfm.pretrain.records import Records
from pathfm.pretrain.seen import open_seen
from pathfm.pretrain.taking import take
from pathfm.pretrain.trainer import Trainer, build_trainer, save
from pathfm.pretrain.watch_settings import WatchConfig
from pathfm.pretrain.watching import Watch
from pathfm.ranks import Ranks
from pathfm.runtime import as_dict, progress
from pathfm.tracking import Run, open_run

_FAR = 1 << 40  # an interval that is never reached


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=4, help="steps of a block")
    parser.add_argument("--blocks", type=int, default=5, help="blocks of each arm, in turn")
    parser.add_argument("--pictures", type=int, default=1000, help="of the probe, of five classes")
    parser.add_argument("--monitor", type=int, default=512, help="patches RankMe is measured on")
    args = parser.parse_args()
    logging.disable(logging.INFO)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    clock = time.perf_counter if args.device != "cpu" else time.process_time
    with tempfile.TemporaryDirectory() as name, ExitStack() as opened:
        folder = Path(name)
        config = configured(folder, args)
        feed = opened.enter_context(closing(open_feed(config, Ranks())))
        trainer = build_trainer(config, None, Ranks(), feed.class_names)
        run = opened.enter_context(open_run(config.tracking, config.out, as_dict(config), {}))
        bar = opened.enter_context(progress(config.steps * config.batch_size, "patches", "bench"))
        seen = open_seen(config, feed, None, True)
        records = Records(config, Ranks(), None, run, bar, seen)
        watch = opened.enter_context(Watch(config.watch, config.out, run, Ranks()))
        watch._monitor = feed.first(args.monitor)
        print(about_this_run("torch", "timm", "mlflow"))
        unit = "CPU seconds of all threads" if clock is time.process_time else "seconds"
        print(
            f"DINO, {args.backbone}, batches of {args.batch}, 2 x 224 + 8 x 96 px views, {args.device}, "
            f"{trainer.precision}, {torch.get_num_threads()} compute thread; {unit}; blocks of "
            f"{args.steps} steps, {args.blocks} of each arm, in turn"
        )
        bare = every_step(trainer, feed, records, watch, run, args, clock)
        seldom(trainer, feed, records, watch, args, clock, bare)


def configured(folder: Path, args: argparse.Namespace) -> PretrainConfig:
    """A run over two drawn slides, with a probe on drawn pictures; nothing seldom by itself."""
    corpus = folder / "corpus"
    for seed in (1, 2):
        path = write_tiff(folder / f"{seed}.svs", SyntheticSlide(seed, 3000, 2400, mpp=0.5))
        index = read_slide_index(str(path))
        index.save(corpus / "slides" / f"{index.slide_id}.index")
        ForegroundMask.everything(index).save(corpus / "masks" / f"{index.slide_id}.png")
    Corpus.build(corpus)
    rng = np.random.default_rng(0)
    n_each = -(-args.pictures // 5)
    for name in "abcde":
        (folder / "labelled" / name).mkdir(parents=True)
        for i in range(round(n_each / 0.65)):  # 30 % of them are left for tests
            pixels = rng.integers(0, 255, (8, 8, 3), np.uint8)
            picture = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
            picture.save(folder / "labelled" / name / f"{i}.jpg")
    watch = {
        "every_steps": _FAR,
        "pictures_every_steps": _FAR,
        "probe_every_steps": _FAR,
        "probe_folder": folder / "labelled",
        "probe_max_per_class": n_each,
    }
    return PretrainConfig(
        corpus=corpus,
        out=folder / "run",
        backbone=args.backbone,
        weights="random",
        batch_size=args.batch,
        mpp=(0.5, 1.0),
        min_foreground=0,
        steps=_FAR,
        device=args.device,
        checkpoint_every_steps=_FAR,
        monitor_patches=args.monitor,
        watch=watch,
    )


def every_step(
    trainer: Trainer,
    feed: Feed,
    records: Records,
    watch: Watch,
    run: Run,
    args: argparse.Namespace,
    clock: Callable[[], float],
) -> float:
    """Prints what the whole step costs beside the bare one; returns the bare step's cost."""

    def step(*, whole: bool) -> None:
        given = take(trainer, feed)
        metrics = update(trainer, given, gradients(trainer, given))
        if whole:
            done = trainer.done.step
            metrics |= {"patches_per_s": 1.0, "wait_share": 0.0}
            metrics |= watch.after_step(done, trainer, given.batch, metrics)
            records.step(done, given.batch, metrics, watch.facts())
        trainer.done.step += 1

    def block(*, whole: bool) -> float:
        _settled(run)
        began = clock()
        for _ in range(args.steps):
            step(whole=whole)
        if whole and clock is time.process_time:
            _settled(run)  # what the thread still ships is this block's
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        return (clock() - began) / int(args.steps)

    block(whole=True)  # warm-up: threads, caches, MLflow's tables
    pairs = [(block(whole=False), block(whole=True)) for _ in range(args.blocks)]
    bare = statistics.median(a for a, _ in pairs)
    added = statistics.median(b - a for a, b in pairs)
    ratios = sorted(b / a for a, b in pairs)
    alone = _cost_of_telling(trainer, records, watch, feed, run, clock)
    print(
        f"\na whole step against a bare one: x {statistics.median(ratios):.4f} "
        f"(blocks {ratios[0]:.4f} to {ratios[-1]:.4f}); bare {bare:.3f} s, whole {1000 * added:+.1f} ms\n"
        f"what is told at every step, alone (300 steps without training): {1000 * alone:.2f} ms, "
        f"{100 * alone / bare:.3f} % of this step; 1 % of a step of {100 * alone:.2f} s"
    )
    return float(bare)


def _cost_of_telling(
    trainer: Trainer,
    records: Records,
    watch: Watch,
    feed: Feed,
    run: Run,
    clock: Callable[[], float],
) -> float:
    """Journal, rules, progress line and shipping of one step, without the noise of training."""
    batch = take(trainer, feed).batch
    names = "loss grad_norm lr weight_decay teacher_entropy teacher_marginal_entropy centre_norm"
    metrics = dict.fromkeys([*names.split(), "centre_sd", "patches_per_s", "wait_share"], 1.0)
    _settled(run)
    began = clock()
    for i in range(300):
        told = metrics | watch.after_step(trainer.done.step + i, trainer, batch, metrics)
        records.step(trainer.done.step + i, batch, told, watch.facts())
    _settled(run)
    cost = (clock() - began) / 300
    trainer.done.step += 300
    return cost


def seldom(
    trainer: Trainer,
    feed: Feed,
    records: Records,
    watch: Watch,
    args: argparse.Namespace,
    clock: Callable[[], float],
    bare: float,
) -> None:
    """Prints what each seldom thing costs, at which interval it is how much of the run."""
    default, own = WatchConfig(), PretrainConfig.model_fields
    batch = take(trainer, feed).batch

    def checkpoint() -> None:
        records.flush()
        save(trainer, feed, records, watch.state)

    def curves() -> None:
        watch._curves_stale = True
        watch._draw()

    things: list[tuple[str, Callable[[], object], int]] = [
        ("checkpoint", checkpoint, int(own["checkpoint_every_steps"].default)),
        (f"RankMe, std, {args.monitor}", lambda: watch._measure(trainer), default.every_steps),
        ("curves.png", curves, default.pictures_every_steps),
        (f"probe, {args.pictures}", lambda: watch._score(trainer, 0), default.probe_every_steps),
        (
            "mosaic and views",
            lambda: watch._show(0, trainer, batch),
            default.pictures_every_steps,
        ),
    ]
    print(
        "\nseldom               seconds   steps' worth   every   of the run, %   below 1 % from every"
    )
    total = probe = 0.0
    for name, work, every in things:
        work()  # imports and first files
        costs = []
        for _ in range(3):
            began = clock()
            work()
            if trainer.device.type == "cuda":
                torch.cuda.synchronize()
            costs.append(clock() - began)
        cost = statistics.median(costs)
        share = cost / (every * bare)
        total += share
        probe = cost if name.startswith("probe") else probe
        print(
            f"{name:<20} {cost:8.3f} {cost / bare:14.3f} {every:7,} {100 * share:15.4f} "
            f"{max(1, round(100 * cost / bare)):10,} steps"
        )
    print(f"all of them at the default intervals: {100 * total:.4f} % of the run")
    print(f"the probe every N steps: {100 * probe / bare:.1f} / N % of the run")


def _settled(run: Run) -> None:
    """Waits, without work, until MLflow has everything that was told."""
    while run._journal.pending_rows:
        assert run._shipper is not None
        run._shipper._wake.set()
        time.sleep(1.0)


if __name__ == "__main__":
    main()
