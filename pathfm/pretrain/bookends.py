"""What a run does once before its first step and once after its last: look at itself."""

from __future__ import annotations

import json
import math
import shlex

import numpy as np
import torch
from numpy.typing import NDArray

from online_patching import PatchBatch, PatchLoader, PatchSampler
from online_patching.stores.local import atomic_write_text
from pathfm.backbone import export_backbone
from pathfm.metrics import rankme
from pathfm.pretrain import PretrainConfig
from pathfm.pretrain.records import (
    SAMPLED,
    print_shares,
    read_sampled,
    sampling_facts,
    save_mosaic,
    save_views,
)
from pathfm.pretrain.trainer import Trainer
from pathfm.runtime import autocast
from pathfm.tracking import Run
from pathfm.views import ViewSpec
from pathfm.views.render import make_views

_EMBED_BATCH = 32


def read_monitor(sampler: PatchSampler, config: PretrainConfig) -> PatchBatch:
    """The first `monitor_patches` draws: pictures are made of them, RankMe is measured on them."""
    reading = config.loader.model_dump() | {"workers": 0, "prefetch": 1}
    with PatchLoader(sampler, config.monitor_patches, **reading) as loader:
        return next(loader)


def begin(trainer: Trainer, run: Run, monitor: PatchBatch) -> None:
    """Pictures of what is going to be seen, and RankMe of the initial backbone."""
    config = trainer.config
    pictures = config.out / "pictures"
    save_mosaic(pictures / "mosaic.jpg", monitor)
    save_views(pictures / "views.jpg", monitor, config.views.specs, config.seed)
    for name in ("mosaic.jpg", "views.jpg"):
        run.picture(pictures / name)
    run.tag("init", trainer.done.init_note)
    trainer.done.rankme_start = rankme(embed_patches(trainer, monitor))
    run.summary(rankme_start=trainer.done.rankme_start)


def finish(trainer: Trainer, run: Run, monitor: PatchBatch, sampler: PatchSampler) -> None:
    """The backbone exported, summary.json written (last: it says that all else is there)."""
    config, done = trainer.config, trainer.done
    export_backbone(trainer.method.exported, config.out / "backbone")
    rows = read_sampled(config.out / SAMPLED)
    shares = sampling_facts(rows)
    seen = done.step * config.batch_size
    summary = {
        "steps": done.step,
        "patches_seen": seen,
        "distinct_patches": shares["distinct_patches"],
        "slides_seen": len(shares["slide_share"]),
        "patches_per_s": seen / done.train_s if done.train_s else math.nan,
        "wait_share": done.wait_s / done.train_s if done.train_s else math.nan,
        "loss_first": done.loss_first,
        "loss_highest": done.loss_highest,
        "loss_highest_step": done.loss_highest_step,
        "loss_last": done.loss_last,
        "teacher_entropy": done.teacher_entropy,
        "log_k": math.log(config.dino.out_dim),
        "rankme_start": done.rankme_start,
        "rankme_end": rankme(embed_patches(trainer, monitor)),
    }
    run.summary(**summary)
    words = {
        "init": done.init_note,
        "device": str(trainer.device),
        "precision": trainer.precision,
        "backbone_digest": trainer.method.exported.digest,
        "corpus_digest": sampler.corpus.digest,
    }
    if seen > len(rows):
        words["note"] = f"distinct patches and shares are of the first {len(rows):,} draws"
    text = json.dumps(summary | words | shares, indent=1)
    atomic_write_text(config.out / "summary.json", text + "\n")
    run.artifact(config.out / "summary.json")
    print_shares(shares, sampler.corpus.slide_ids, config.mpp)
    print(
        f"pretrain: {seen:,} patches, {shares['distinct_patches']:,} distinct, "
        f"{summary['patches_per_s']:.1f} patches/s, {100 * summary['wait_share']:.1f} % waiting "
        f"for data\n"
        f"loss {done.loss_first:.3f} at first, {done.loss_highest:.3f} at most (step "
        f"{done.loss_highest_step:,}), {done.loss_last:.3f} at last; teacher entropy "
        f"{done.teacher_entropy:.2f} of log K {summary['log_k']:.2f}; "
        f"RankMe {done.rankme_start:.1f} -> {summary['rankme_end']:.1f}\n"
        f"next: pathfm embed --backbone {trainer.method.exported.name} --weights "
        f"{shlex.quote(str(config.out))} "
        "--data LABELLED_PATCHES --name mine"
    )


@torch.no_grad()
def embed_patches(trainer: Trainer, batch: PatchBatch) -> NDArray[np.float32]:
    """Features (n, D) of whole patches, shrunk to the global views' size, by the kept backbone."""
    backbone, config = trainer.method.exported, trainer.config
    whole = ViewSpec(
        size_px=config.views.global_1.size_px,
        scale=(1.0, 1.0),
        ratio=(1.0, 1.0),
        flip=0,
        turn=0,
        jitter=0,
        gray=0,
        blur=0,
    )
    features = []
    for start in range(0, len(batch.refs), _EMBED_BATCH):
        rows = slice(start, start + _EMBED_BATCH)
        pixels = torch.from_numpy(batch.pixels[rows]).to(trainer.device)
        (view,) = make_views(
            pixels, batch.draws[rows], [whole], seed=0, mean=backbone.mean, std=backbone.std
        )
        with autocast(trainer.device, trainer.precision):
            features.append(backbone.embed(view).float().cpu().numpy())
    return np.concatenate(features)
