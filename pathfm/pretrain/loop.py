"""The training loop: `train` is the story of a run, `train_step` what happens in each step.

Nothing random is drawn here: patches and views are functions of (seed, draw), schedules of the
step. A checkpoint therefore holds weights, moments, the loss's centre and the next draw, and a
resumed run repeats the uninterrupted one.
"""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from online_patching import Corpus, PatchBatch, PatchLoader
from online_patching.stores.local import atomic_write_text
from pathfm.checkpoint import load_newest
from pathfm.methods import MicroBatch
from pathfm.pretrain import PretrainConfig, PretrainResult, sampler_of
from pathfm.pretrain.bookends import begin, finish, read_monitor
from pathfm.pretrain.records import SAMPLED, SampledLog
from pathfm.pretrain.trainer import (
    Trainer,
    build_trainer,
    describe,
    refuse_another_run,
    refuse_other_inputs,
    save,
)
from pathfm.runtime import (
    PathfmError,
    as_dict,
    autocast,
    make_folder,
    progress,
    provenance,
    save_config,
)
from pathfm.schedules import cosine, warmup_cosine
from pathfm.tracking import open_run
from pathfm.views.render import make_views

N_GLOBAL = 2


def train(config: PretrainConfig) -> PretrainResult:
    """Run `config` from the start, or from the newest valid checkpoint in its folder, to the end."""
    out = make_folder(config.out)
    checkpoint = load_newest(out / "checkpoints")
    refuse_another_run(config, checkpoint)
    corpus = Corpus.open(config.corpus)
    refuse_other_inputs(config, checkpoint, corpus)
    sampler = sampler_of(config, corpus)
    trainer = build_trainer(config, checkpoint)
    done = trainer.done
    if done.step == config.steps and (out / "summary.json").exists():
        print(f"pretrain: {out} is up to date ({done.step:,} steps)")
        return PretrainResult(out, done.step, finished=True)
    print(f"pretrain: {done.init_note}; {describe(trainer)}")
    save_config(config, out)
    until = min(config.steps, config.stop_after_steps or config.steps)
    seen = done.step * config.batch_size
    total = config.steps * config.batch_size
    rows = checkpoint.state["sampled_rows"] if checkpoint else 0
    tags = provenance() | {"stage": "pretrain"}
    with (
        stop_signal() as stopping,
        open_run(config.tracking, out, as_dict(config), tags, done.run_id) as run,
        SampledLog(out / SAMPLED, seen, rows, config.max_sampled_rows) as sampled,
        PatchLoader(sampler, config.batch_size, **config.loader.model_dump()) as loader,
        progress(total, "patches", "pretrain", seen) as bar,
    ):
        run.cohort(config.corpus.name, corpus.digest)
        run.truncate(done.step - 1)
        monitor = read_monitor(sampler, config)
        if checkpoint is None:
            begin(trainer, run, monitor)
        else:
            loader.load_state_dict(checkpoint.state["loader"])
            print(f"pretrain: goes on after step {done.step:,} of {config.steps:,}")
        while done.step < until:
            began_s = time.perf_counter()
            batch = next(loader)
            wait_s = time.perf_counter() - began_s
            metrics = train_step(trainer, batch)
            step_s = time.perf_counter() - began_s
            speed = {"patches_per_s": len(batch.refs) / step_s, "wait_share": wait_s / step_s}
            sampled.append(batch.refs)
            run.log(done.step, **metrics, **speed)
            done.count(metrics, step_s, wait_s)
            waited = f"{100 * done.wait_s / done.train_s:.0f}%"
            bar.advance(len(batch.refs), step=str(done.step), loss=metrics["loss"], wait=waited)
            stop = stopping.is_set()  # asked once: what stops the loop has been saved
            if stop or done.step == until or done.step % config.checkpoint_every_steps == 0:
                sampled.sync()
                save(trainer, loader, run, sampled.rows)
            if stop:
                break
        print(f"pretrain: {loader.stats.told()}")
        for slide_id, draw in loader.quarantined.items():
            print(f"pretrain: {slide_id} is not read any more since draw {draw:,}: too many failed")
        loader.close()  # it reads ahead, and what follows wants the cores
        if done.step == config.steps:
            finish(trainer, run, monitor, sampler)
        else:
            print(f"pretrain: stopped after step {done.step:,}; the same command goes on")
    return PretrainResult(out, done.step, finished=done.step == config.steps)


def train_step(trainer: Trainer, batch: PatchBatch) -> dict[str, float]:
    """One optimizer step on one batch; returns what there is to log.

    Raises PathfmError before the optimizer moves when the loss or the gradient is not finite.
    """
    config, method, step = trainer.config, trainer.method, trainer.done.step
    lr, weight_decay = schedule(config, step)
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
    pixels = torch.from_numpy(batch.pixels).to(trainer.device, non_blocking=True)
    backbone = method.exported
    views = make_views(
        pixels,
        batch.draws,
        config.views.specs,
        seed=config.seed,
        mean=backbone.mean,
        std=backbone.std,
    )
    micro = MicroBatch(views, N_GLOBAL, batch.draws, None, config.seed, step)
    with autocast(trainer.device, trainer.precision):
        method.look(micro)
        method.settle(step)
        loss = method.loss(micro)
    check_finite("loss", loss, trainer, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    method.before_update(step)
    norm = nn.utils.clip_grad_norm_(method.trained().parameters(), config.optim.clip_grad_norm)
    check_finite("gradient norm", norm, trainer, batch)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    method.after_update(step)
    logged = {"loss": loss.detach(), "grad_norm": norm, **method.diagnostics()}
    return {name: float(value) for name, value in logged.items()} | {
        "lr": lr,
        "weight_decay": weight_decay,
    }


def schedule(config: PretrainConfig, step: int) -> tuple[float, float]:
    """Learning rate and weight decay of an optimizer step."""
    optim, steps = config.optim, config.steps
    lr = warmup_cosine(optim.lr, optim.min_lr, step, steps, optim.warmup_steps)
    return lr, cosine(*optim.weight_decay, step, steps)


def check_finite(name: str, value: Tensor, trainer: Trainer, batch: PatchBatch) -> None:
    """Raises PathfmError, with the batch's draws kept in a file, unless `value` is finite."""
    number = float(value.detach())
    if math.isfinite(number):
        return
    step = trainer.done.step
    path = trainer.config.out / f"nonfinite_step_{step}.json"
    refs = [{"draw": r.draw, "slide_id": r.slide_id, "mpp": r.mpp} for r in batch.refs]
    atomic_write_text(path, json.dumps({"step": step, name: str(number), "batch": refs}, indent=1))
    raise PathfmError(
        f"the {name} of step {step:,} is {number}; the weights were not touched. Its patches are "
        f"listed in {path}. Lower optim.lr, lengthen optim.warmup_steps or use precision fp32"
    )


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM sets: the loop ends its step, saves and leaves.

    Only the main thread may catch signals; elsewhere the event is never set.
    """
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)
