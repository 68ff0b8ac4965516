"""The training loop: `train` is the story of a run, `train_step` what happens in each step.

Nothing random is drawn here: patches and views are functions of (seed, draw), schedules of the
step. A checkpoint therefore holds weights, moments, the loss's centre and the next draw, and a
resumed run repeats the uninterrupted one. Under torchrun every rank runs this same story on its
part of each batch; rank 0 alone writes, prints and tracks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from pathfm.checkpoint import Checkpoint
from pathfm.locks import LOCK, locked
from pathfm.pretrain import PretrainConfig, PretrainResult
from pathfm.pretrain.bookends import finish
from pathfm.pretrain.feed import Feed, open_feed
from pathfm.pretrain.micro import micro_batches, while_worked_on
from pathfm.pretrain.optim import set_schedule
from pathfm.pretrain.parallel import gradients_meet, whole
from pathfm.pretrain.probing import open_probe
from pathfm.pretrain.records import Records
from pathfm.pretrain.resuming import (
    find_checkpoint,
    finished_words,
    refuse_at_once,
    refuse_other_data,
    restore_computing,
)
from pathfm.pretrain.seen import open_seen
from pathfm.pretrain.stopping import Told, device_numbers, listening, refuse_nonfinite
from pathfm.pretrain.taking import Taken, take, take_or_fail
from pathfm.pretrain.trainer import (
    Trainer,
    build_trainer,
    describe,
    device_of,
    save,
    split_batch,
    without_effect,
)
from pathfm.pretrain.waiting import DataWait
from pathfm.pretrain.watching import Watch
from pathfm.ranks import PeerError, Ranks, open_ranks, sum_over_ranks, together
from pathfm.runtime import (
    as_dict,
    autocast,
    make_folder,
    pick_device,
    progress,
    provenance,
    save_config,
)
from pathfm.tracking import open_run, unfinished_run


def train(config: PretrainConfig) -> PretrainResult:
    """Run `config` from the start, or from the newest valid checkpoint in its folder, to the end."""
    kind = pick_device(config.device).type
    with listening() as told, open_ranks(kind) as ranks:
        try:
            refuse_at_once(config, ranks)
            with only_run(config.out, ranks):
                return _train(config, ranks, told)
        except PeerError:
            if ranks.first:
                raise
            return PretrainResult(
                config.out, 0, finished=False, exit_code=2
            )  # told by its own rank


@contextmanager
def only_run(folder: Path, ranks: Ranks) -> Iterator[None]:
    """One run folder, one run: rank 0 holds its lock while this lives. HeldError, on every rank, where another does."""
    told = (
        f"{folder}: another `pathfm pretrain` is running there. Wait for it or end it, or choose "
        "another --out"
    )
    with ExitStack() as held:
        with together():
            if ranks.first:
                held.enter_context(locked(make_folder(folder) / LOCK, told=told))
        yield


def _train(config: PretrainConfig, ranks: Ranks, told: Told) -> PretrainResult:
    """The run of one rank."""
    out, device = config.out, device_of(config, ranks)
    split_batch(config, ranks)  # refuses at once what does not come out even
    checkpoint = find_checkpoint(config, ranks)
    doubt = restore_computing(checkpoint, ranks, device) if checkpoint else ""
    with ExitStack() as opened:
        with together():
            feed = opened.enter_context(closing(open_feed(config, ranks)))
            refuse_other_data(config, checkpoint, feed)
        if words := finished_words(config, checkpoint, ranks):
            if ranks.first:
                print(f"pretrain: {words}")
            return PretrainResult(out, config.steps, finished=True)
        trainer = build_trainer(config, checkpoint, ranks, feed.class_names)
        done = trainer.done
        probe = open_probe(config.watch, ranks)  # a damaged picture is found before a run is begun
        records = opened.enter_context(_open_records(trainer, checkpoint, feed, opened))
        records.say(f"{done.init_note}; {describe(trainer)}", *feed.notes, *without_effect(config))
        watched = checkpoint.state["watch"] if checkpoint else None
        watch = opened.enter_context(Watch(config.watch, out, records.run, ranks, watched, probe))
        watch.begin(trainer, feed.first(config.monitor_patches))
        if checkpoint is not None:
            feed.load_state_dict(checkpoint.state["loader"])
            records.say(f"goes on after step {done.step:,} of {config.steps:,}")
            records.say(*([f"WARNING {doubt}"] if doubt else []))
        stopped_by = _steps(trainer, feed, records, watch, told)
        if records.run is not None:
            records.run.stopped = done.step < config.steps
        records.say(feed.stats.told())
        for slide_id, draw in feed.quarantined.items():
            records.say(f"{slide_id} is not read any more since draw {draw:,}: too many failed")
        feed.close()  # it reads ahead, and what follows wants the cores
        if done.step == config.steps:
            finish(trainer, records, watch, feed)
        else:
            records.say(f"stopped after step {done.step:,}; the same command goes on")
    finished = done.step == config.steps
    code = 0 if finished or not stopped_by else 128 + stopped_by
    return PretrainResult(out, done.step, finished, code)


def _steps(trainer: Trainer, feed: Feed, records: Records, watch: Watch, told: Told) -> int:
    """Steps until the run is done or told to stop; returns the signal that told, or 0."""
    config, done = trainer.config, trainer.done
    until = min(config.steps, config.stop_after_steps or config.steps)
    stopped_by, ahead = 0, None
    waits, counted_s = DataWait(trainer.device), time.perf_counter()
    while done.step < until and not stopped_by:
        began_s = time.perf_counter()
        given = ahead or take(trainer, feed)
        waits.begins()
        loss = gradients(trainer, given)  # on a GPU this only queues the work
        waits.queued()
        stopped_by = told.all_ranks()
        last = bool(stopped_by) or done.step + 1 == until
        saves = last or (done.step + 1) % config.checkpoint_every_steps == 0
        # while the device works, the next batch is read; but not past what a checkpoint speaks of
        ahead, failed = (None, None) if saves else take_or_fail(trainer, feed)
        saves = saves or failed is not None
        metrics = update(trainer, given, loss)
        step_s = time.perf_counter() - began_s
        metrics["patches_per_s"] = config.batch_size / step_s
        wait_s = waits.of_step(began_s, given, ahead)
        metrics["wait_share"] = min(1.0, wait_s / step_s)
        metrics |= watch.after_step(done.step, trainer, given.batch, metrics)
        step = done.step
        done.count(metrics, step_s, wait_s)
        waited = {"wait": f"{100 * done.wait_s / done.train_s:.0f}%"}
        records.step(step, given.batch, metrics, waited | watch.facts())
        counted_s = done.count_wall(counted_s)
        if saves:
            records.flush()
            save(trainer, feed, records, watch.state)
        if failed is not None:
            raise failed
    done.count_wall(counted_s)
    return stopped_by


def gradients(trainer: Trainer, given: Taken) -> Tensor:
    """Forward and backward over the global batch; returns this rank's loss, on the device.

    Look at all micro-batches, settle what couples them, then learn from each; ranks exchange their
    gradients with the last.
    """
    method, step = trainer.method, trainer.done.step
    micros = micro_batches(trainer, given)
    with autocast(trainer.device, trainer.precision):
        for micro in micros:
            with while_worked_on(micro):
                method.look(micro)
        method.settle(step)
    total = torch.zeros((), device=trainer.device)
    for micro in micros:
        now = micro.index == micro.count - 1
        with while_worked_on(micro), gradients_meet(trainer.module, now):
            with autocast(trainer.device, trainer.precision):
                loss = trainer.module(micro)
            loss.backward()
        total += loss.detach()
    return total


def update(trainer: Trainer, given: Taken, loss: Tensor) -> dict[str, float]:
    """The optimizer's step, from the gradients that are there; returns what there is to log.

    Raises PathfmError on every rank, before the optimizer moves, when the loss or the gradient is
    not finite. Reading these numbers is the step's only wait for the device.
    """
    config, method, step = trainer.config, trainer.method, trainer.done.step
    method.before_update(step)
    parameters = [p for p in method.trained().parameters() if p.grad is not None]
    norm = whole(nn.utils.clip_grad_norm_(parameters, config.optim.clip_grad_norm))
    mean = sum_over_ranks(loss) / trainer.ranks.world
    numbers = device_numbers({"loss": mean, "grad_norm": norm, **method.diagnostics()})
    refuse_nonfinite(numbers, step, given.batch, config.out, trainer.ranks, config.seed)
    lr = set_schedule(trainer.optimizer.param_groups, config, step)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    method.after_update(step)
    decay = trainer.optimizer.param_groups[0]["weight_decay"]
    slowest = min(trainer.optimizer.param_groups, key=lambda group: group["lr_factor"])
    rates = {"lr": lr} if slowest["lr_factor"] == 1 else {"lr": lr, "lr_lowest": slowest["lr"]}
    return numbers | rates | {"weight_decay": decay}


def _open_records(
    trainer: Trainer, checkpoint: Checkpoint | None, feed: Feed, opened: ExitStack
) -> Records:
    """Files, bar and tracked run, on rank 0."""
    config, ranks, done = trainer.config, trainer.ranks, trainer.done
    run = bar = None
    if ranks.first:
        save_config(config, config.out)
        params = as_dict(config)
        run_id = done.run_id or unfinished_run(config.out, params)
        tags = provenance() | {"stage": "pretrain", "init": done.init_note}
        run = opened.enter_context(
            open_run(config.tracking, config.out, params, tags, run_id, last_step=done.step - 1)
        )
        run.cohort(feed.name, feed.digest)
        if feed.class_names:
            run.tag("labels.classes", ", ".join(feed.class_names))
        if run.last_step < done.step - 1:
            print(
                f"pretrain: WARNING {config.out / 'metrics.jsonl'} ends before step "
                f"{run.last_step + 1:,}, the checkpoint was made after step {done.step:,}: the rows "
                "between are lost; weights and later steps are not touched by that",
                flush=True,
            )
        patches = done.step * config.batch_size
        bar = opened.enter_context(
            progress(config.steps * config.batch_size, "patches", "pretrain", patches)
        )
    with together():
        seen = open_seen(config, feed, checkpoint, ranks.first)
    return Records(config, ranks, checkpoint, run, bar, seen)
