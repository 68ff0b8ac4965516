"""What a run carries from step to step, how it is built, saved and taken up again."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from online_patching import Corpus, PatchLoader
from pathfm.backbone import Backbone, export_backbone, load_backbone
from pathfm.checkpoint import (
    Checkpoint,
    digest_of,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from pathfm.methods import Method, build_method
from pathfm.pretrain import PretrainConfig
from pathfm.runtime import PathfmError, Precision, as_dict, pick_device, plan_precision
from pathfm.tracking import Run

FREE_TO_CHANGE = (
    # where things are, how they are read and recorded: none of it changes what is computed
    *("corpus", "out", "loader", "tracking", "checkpoint_every_steps", "keep_checkpoints"),
    *("stop_after_steps", "max_sampled_rows"),
    "weights",  # read at step 0 only: compared by digest, for files move, and may be gone by now
    "device",  # rounds differently, but a run must outlive its machine
)
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
    wait_s: float = 0.0
    loss_first: float = math.nan
    loss_highest: float = -math.inf
    loss_highest_step: int = 0
    loss_last: float = math.nan
    teacher_entropy: float = math.nan
    rankme_start: float = math.nan

    def count(self, metrics: dict[str, float], train_s: float, wait_s: float) -> None:
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


@dataclass(frozen=True)
class Trainer:
    """Everything a step needs; `done` is what changes besides the weights."""

    config: PretrainConfig
    device: torch.device
    precision: Precision
    method: Method
    optimizer: torch.optim.Optimizer
    done: Progressed


def build_trainer(config: PretrainConfig, checkpoint: Checkpoint | None) -> Trainer:
    """Method and optimizer on their device: new ones, or as the checkpoint left them."""
    device = pick_device(config.device)
    backbone = _backbone(config, checkpoint)
    check_views_fit(config, backbone)
    if device.type == "cpu":
        backbone.plain_attention()
    method = build_method(config.method, backbone, config.dino, config.steps, config.seed)
    if checkpoint is not None:
        state = {
            name.removeprefix(_METHOD): tensor
            for name, tensor in checkpoint.tensors.items()
            if name.startswith(_METHOD)
        }
        method.load_state_dict(state)
    method.to(device)
    optimizer = torch.optim.AdamW(parameter_groups(method.trained()), fused=True)
    done = Progressed(
        init_note=backbone.weights_note,
        init_weights=initial_weights(config),
        init_digest=backbone.digest if checkpoint is None else "",
    )
    if checkpoint is not None:
        unpack_optimizer(optimizer, checkpoint.tensors, checkpoint.state["optimizer"])
        done = Progressed(**checkpoint.state["done"])
    precision = plan_precision(config.precision, device)
    return Trainer(config, device, precision, method, optimizer, done)


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: `decays` True, and False for biases and norms."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if (p.ndim > 1) == decays], "decays": decays}
        for decays in (True, False)
    ]


def refuse_another_run(config: PretrainConfig, checkpoint: Checkpoint | None) -> None:
    """Raises PathfmError when the folder's checkpoint was made with other settings."""
    if checkpoint is None:
        return
    saved, now = checkpoint.state["config"], as_dict(config)
    for name in sorted(saved.keys() | now.keys()):
        if name.partition(".")[0] not in FREE_TO_CHANGE and saved.get(name) != now.get(name):
            raise PathfmError(
                f"{config.out} holds a run with {name} = {saved.get(name)}, asked for is "
                f"{now.get(name)}. Give the saved value to go on, or another --out for a new run"
            )


def refuse_other_inputs(
    config: PretrainConfig, checkpoint: Checkpoint | None, corpus: Corpus
) -> None:
    """Raises PathfmError when the run was begun on another corpus, or from other weights.

    Weights are compared by their tensors. Where they were said the same way and are gone, they are
    taken to be the same.
    """
    if checkpoint is None:
        return
    done, weights = Progressed(**checkpoint.state["done"]), initial_weights(config)
    if not done.init_digest:
        raise PathfmError(
            f"{config.out} holds a run of an earlier pathfm, which did not record its initial "
            "weights. Give another --out"
        )
    saved = checkpoint.state["loader"]["corpus"]
    if saved != corpus.digest:
        raise PathfmError(
            f"{config.out} holds a run on the corpus {saved[:12]}, {config.corpus} is now "
            f"{corpus.digest[:12]}. Give its own corpus to go on, or another --out for a new run"
        )
    try:
        digest = load_backbone(config.backbone, weights).digest
    except PathfmError:
        if weights != done.init_weights:
            raise
        return
    if digest != done.init_digest:
        raise PathfmError(
            f"{config.out} holds a run from {done.init_weights} (digest {done.init_digest[:12]}), "
            f"asked for is {weights} (digest {digest[:12]}). Give the saved weights to go on, or "
            "another --out for a new run"
        )


def initial_weights(config: PretrainConfig) -> str:
    """Where the run starts; unseeded random weights follow from the run's seed."""
    return f"random:{config.seed}" if config.weights == "random" else config.weights


def save(trainer: Trainer, loader: PatchLoader, run: Run, sampled_rows: int) -> Path:
    """A checkpoint of this moment: the step done, the next draw, every tensor."""
    config, done = trainer.config, trainer.done
    done.run_id = run.run_id
    moments, groups = pack_optimizer(trainer.optimizer)
    weights = {f"{_METHOD}{name}": t for name, t in trainer.method.state_dict().items()}
    state = {
        "config": as_dict(config),
        "done": asdict(done),
        "loader": loader.state_dict(),
        "optimizer": groups,
        "sampled_rows": sampled_rows,
    }
    path = save_checkpoint(
        config.out / "checkpoints",
        done.step,
        weights | moments,
        state,
        keep_last=config.keep_checkpoints,
        write_more=lambda folder: export_backbone(trainer.method.exported, folder / "backbone"),
    )
    run.checkpoint(path, digest_of(path))
    return path


def describe(trainer: Trainer) -> str:
    """Method, sizes, device and precision in half a line."""
    trained = sum(p.numel() for p in trainer.method.trained().parameters() if p.requires_grad)
    backbone = trainer.method.exported
    return (
        f"{trainer.config.method} on {backbone.name}, {trained / 1e6:.1f} M parameters trained, "
        f"{trainer.device}, {trainer.precision}"
    )


def _backbone(config: PretrainConfig, checkpoint: Checkpoint | None) -> Backbone:
    """The initial backbone; on resume only its architecture matters, and that is at hand."""
    if checkpoint is not None:
        return load_backbone(config.backbone, str(checkpoint.path / "backbone"))
    return load_backbone(config.backbone, initial_weights(config))


def check_views_fit(config: PretrainConfig, backbone: Backbone) -> None:
    """Raises PathfmError unless every view can be fed to the backbone."""
    for name, spec in (("global_1", config.views.global_1), ("local", config.views.local)):
        backbone.check_input(spec.size_px, f"views.{name}.size_px")
