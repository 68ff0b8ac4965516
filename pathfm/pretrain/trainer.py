"""What a run carries from step to step, how it is built, saved and taken up again."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pathfm.backbone import Backbone, export_backbone, load_backbone
from pathfm.checkpoint import (
    Checkpoint,
    Computing,
    digest_of,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from pathfm.methods import METHODS, Method, build_method
from pathfm.pretrain import PretrainConfig
from pathfm.pretrain.optim import parameter_groups
from pathfm.pretrain.parallel import like, prepare, refuse_split_batchnorm, spread, whole
from pathfm.ranks import Ranks, together
from pathfm.runtime import PathfmError, Precision, as_dict, pick_device, plan_precision

if TYPE_CHECKING:
    from pathfm.pretrain.feed import Feed
    from pathfm.pretrain.records import Records

_METHOD = "method."


@dataclass
class Progressed:
    """What a run has been through, beyond its weights; saved with them."""

    step: int = 0
    run_id: str | None = None
    init_note: str = ""
    init_weights: str = ""
    init_digest: str = ""
    train_s: float = 0.0
    wall_s: float = 0.0
    wait_s: float = 0.0
    loss_first: float = math.nan
    loss_highest: float = -math.inf
    loss_highest_step: int = 0
    loss_last: float = math.nan
    teacher_entropy: float = math.nan

    def count(self, metrics: Mapping[str, float], train_s: float, wait_s: float) -> None:
        """One more optimizer step."""
        loss = metrics["loss"]
        if self.step == 0:
            self.loss_first = loss
        if loss > self.loss_highest:
            self.loss_highest, self.loss_highest_step = loss, self.step
        self.loss_last, self.teacher_entropy = loss, metrics.get("teacher_entropy", math.nan)
        self.step += 1
        self.train_s += train_s
        self.wait_s += wait_s

    def count_wall(self, since_s: float) -> float:
        """The time since a moment of time.perf_counter is this run's; returns the moment it is now."""
        now_s = time.perf_counter()
        self.wall_s += now_s - since_s
        return now_s


@dataclass(frozen=True)
class Trainer:
    """Everything a step needs; `done` is what changes besides the weights.

    method: the objective itself; module: what to call for its loss, which on several ranks makes
    the gradients meet. micro_size, n_micros: how a rank's part of a batch is worked on.
    """

    config: PretrainConfig
    ranks: Ranks
    device: torch.device
    precision: Precision
    method: Method
    module: nn.Module
    optimizer: torch.optim.Optimizer
    micro_size: int
    n_micros: int
    done: Progressed
    twin: Backbone | None = None
    """On rank 0, a whole backbone to export where the method's own lies in shards."""

    @property
    def sharded(self) -> bool:
        """Whether no rank has all weights."""
        return self.config.parallel == "fsdp" and self.ranks.world > 1


def build_trainer(
    config: PretrainConfig,
    checkpoint: Checkpoint | None,
    ranks: Ranks | None = None,
    class_names: tuple[str, ...] = (),
) -> Trainer:
    """Method and optimizer on their device: new ones, or as the checkpoint left them.

    Raises PathfmError for what does not go together: batch and ranks, views and backbone, BatchNorm
    and micro-batches.
    """
    ranks = ranks or Ranks()
    micro_size, n_micros = split_batch(config, ranks)
    device = device_of(config, ranks)
    precision = plan_precision(config.precision, device)
    backbone = _backbone(config, checkpoint)
    check_views_fit(config, backbone)
    if device.type == "cpu":
        backbone.plain_attention()
    done = Progressed(
        init_note=backbone.weights_note,
        init_weights=initial_weights(config),
        init_digest=backbone.digest if checkpoint is None else "",
    )
    method = build_method(
        config.method, backbone, _settings(config, class_names), config.steps, config.seed
    )
    refuse_split_batchnorm(method, n_micros)
    if checkpoint is not None:
        method.load_state_dict(_of_method(checkpoint.tensors))
        done = Progressed(**checkpoint.state["done"])
    sharded = config.parallel == "fsdp" and ranks.world > 1
    twin = copy.deepcopy(method.exported) if sharded and ranks.first else None
    method.to(device)
    prepare(method, config.parallel, config.compile, precision, ranks, device)
    groups = parameter_groups(method.trained(), config.optim)
    optimizer = torch.optim.AdamW(groups, lr=config.optim.lr, fused=True)
    if checkpoint is not None:
        unpack_optimizer(optimizer, checkpoint.tensors, checkpoint.state["optimizer"], like)
    module = spread(method, config.parallel, ranks)
    return Trainer(
        config,
        ranks,
        device,
        precision,
        method,
        module,
        optimizer,
        micro_size,
        n_micros,
        done,
        twin,
    )


def save(trainer: Trainer, feed: Feed, records: Records, watched: Mapping[str, Any]) -> None:
    """A checkpoint of this moment: the step done, the next draw, every tensor.

    Every rank calls it at the same step; rank 0 writes. Raises PathfmError on all where it cannot.
    """
    config, done, ranks = trainer.config, trainer.done, trainer.ranks
    reading = feed.state_dict()
    weights = _gathered(trainer)
    gathered = whole if trainer.sharded else _itself
    moments, groups = pack_optimizer(trainer.optimizer, gathered, keep=ranks.first)
    done.run_id = records.run_id
    state = {
        "config": as_dict(config),
        "done": asdict(done),
        "loader": reading,
        "optimizer": groups,
        "computing": asdict(Computing.here(ranks.world, trainer.device)),
        "watch": dict(watched),
        **records.state,
    }

    def beside(folder: Path) -> None:
        export_backbone(_exported(trainer, weights), folder / "backbone")
        records.save_seen(folder / "backbone", done.step * config.batch_size)

    with together():
        if ranks.first:
            path = save_checkpoint(
                config.out / "checkpoints",
                done.step,
                weights | moments,
                state,
                keep_last=config.keep_checkpoints,
                write_more=beside,
            )
            records.checkpoint(path, digest_of(path))


def whole_backbone(trainer: Trainer) -> Backbone | None:
    """The backbone to keep, all of it, on rank 0; every rank must ask where weights are sharded."""
    if not trainer.sharded:
        return trainer.method.exported if trainer.ranks.first else None
    weights = _gathered(trainer)
    return _exported(trainer, weights) if trainer.ranks.first else None


def device_of(config: PretrainConfig, ranks: Ranks) -> torch.device:
    """This rank's device: the one with its local number among GPUs."""
    device = pick_device(config.device)
    if device.type == "cuda" and ranks.world > 1:
        return pick_device(f"cuda:{ranks.local_rank}")
    return device


def split_batch(config: PretrainConfig, ranks: Ranks) -> tuple[int, int]:
    """(patches a rank works on at a time, how many times a step): world x both = batch_size.

    Raises PathfmError, with the nearest values that would do, when it does not come out even.
    """
    batch, world = config.batch_size, ranks.world
    if batch % world:
        near = max(world, round(batch / world) * world)
        raise PathfmError(
            f"batch_size {batch:,} does not divide among {world} ranks: give {near:,}, or start "
            f"{_nearest_divisor(batch, world)} ranks"
        )
    own = batch // world
    micro = config.micro_batch_size or own
    if own % micro:
        raise PathfmError(
            f"micro_batch_size {micro:,} does not divide a rank's {own:,} patches (batch_size "
            f"{batch:,} / {world} ranks): give {_nearest_divisor(own, micro):,}"
        )
    return micro, own // micro


def initial_weights(config: PretrainConfig) -> str:
    """Where the run starts; unseeded random weights follow from the run's seed."""
    return f"random:{config.seed}" if config.weights == "random" else config.weights


def describe(trainer: Trainer) -> str:
    """Method, sizes, device, precision and ranks in half a line."""
    trained = sum(p.numel() for p in trainer.method.trained().parameters() if p.requires_grad)
    config, ranks, backbone = trainer.config, trainer.ranks, trainer.method.exported
    words = [
        f"{config.method} on {backbone.name}, {trained / 1e6:.1f} M parameters trained",
        str(trainer.device),
        trainer.precision,
    ]
    if ranks.world > 1:
        words.append(f"{ranks.world} ranks ({config.parallel})")
    if trainer.n_micros > 1:
        words.append(f"{trainer.n_micros} x {trainer.micro_size} patches a step and rank")
    return ", ".join(words)


def without_effect(config: PretrainConfig) -> list[str]:
    """A line for each other method's settings that are not the defaults: nobody reads them."""
    names = [name for name in METHODS if name != config.method]
    fields = type(config).model_fields
    return [
        f"{name}.* is set and has no effect: the method is {config.method}"
        for name in names
        if getattr(config, name) != fields[name].default
    ]


def check_views_fit(config: PretrainConfig, backbone: Backbone) -> None:
    """Raises PathfmError unless every view, and what the run is probed with, can be fed to the backbone."""
    views = config.views
    if config.input_px is not None:
        backbone.check_input(config.input_px, "input_px")
    if config.watch.probe_folder is not None:
        backbone.check_input(config.watch.probe_px, "watch.probe_px")
    backbone.check_input(views.global_1.size_px, "views.global_1.size_px")
    if views.n_local:
        backbone.check_input(views.local.size_px, "views.local.size_px")


def _settings(config: PretrainConfig, class_names: tuple[str, ...]) -> Any:
    """The method's own settings; a classifier has as many outputs as the labels have classes.

    Raises PathfmError where it was given fewer.
    """
    settings, found = getattr(config, config.method), len(class_names)
    n_classes = getattr(settings, "n_classes", found)
    if n_classes is None:
        return settings.model_copy(update={"n_classes": found})
    if n_classes < found:
        raise PathfmError(
            f"{config.method}.n_classes {n_classes} is less than the {found} classes of the labels "
            f"({', '.join(class_names[:8])}{', ...' if found > 8 else ''}). Give {found} or more, or "
            "leave it out"
        )
    return settings


def _backbone(config: PretrainConfig, checkpoint: Checkpoint | None) -> Backbone:
    """The initial backbone; on resume only its architecture matters, and that is at hand."""
    if checkpoint is not None:
        weights = str(checkpoint.path / "backbone")
        return load_backbone(config.backbone, weights, drop_path=config.drop_path)
    weights = initial_weights(config)
    return load_backbone(config.backbone, weights, config.input_px, drop_path=config.drop_path)


def _of_method(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(_METHOD): tensor
        for name, tensor in tensors.items()
        if name.startswith(_METHOD)
    }


def _gathered(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor of the method, whole and on the CPU, on rank 0; {} elsewhere."""
    found = {}
    for name, tensor in trainer.method.state_dict().items():
        one = whole(tensor)  # of shards: every rank takes part
        if trainer.ranks.first:
            found[f"{_METHOD}{name}"] = one.detach().cpu()
    return found


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _exported(trainer: Trainer, weights: Mapping[str, Tensor]) -> Backbone:
    """The backbone to write: the method's own, or its whole twin with the gathered weights."""
    exported = trainer.method.exported
    if trainer.twin is None:
        return exported
    modules = dict(trainer.module.named_modules())
    (prefix,) = (name for name, module in modules.items() if module is exported)
    start = f"{_METHOD}{prefix}."
    state = {name.removeprefix(start): t for name, t in weights.items() if name.startswith(start)}
    trainer.twin.load_state_dict(state)
    return trainer.twin


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
