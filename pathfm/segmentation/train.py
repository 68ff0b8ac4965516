"""The training loop of mask models: crops, loss, AdamW, validation, checkpoints that resume."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from online_patching.stores.local import atomic_write_bytes
from pathfm.checkpoint import load_newest, pack_optimizer, save_checkpoint, unpack_optimizer
from pathfm.pictures import jpeg_bytes
from pathfm.runtime import PathfmError, autocast, pick_device, plan_precision, progress
from pathfm.schedules import warmup_cosine
from pathfm.segmentation.crops import CropSettings, TrainingPicture, batches
from pathfm.segmentation.losses import build_loss
from pathfm.segmentation.models import build_model, init_weights, load_model
from pathfm.segmentation.predict import tissue_probability
from pathfm.segmentation.scores import count
from pathfm.segmentation.synthetic import Kind, draw_thumbnail
from pathfm.segmentation.train_settings import TrainSettings
from pathfm.segmentation.training_data import DrawnData
from pathfm.segmentation.truth import DrawnPicture
from pathfm.tracking import Run

HELD_OUT_FROM = 1_000_000  # draw numbers from here on are never trained on


class Trainer:
    """One training run: where it stands, and how it goes on. Batch k is a function of (seed, k)."""

    def __init__(self, config: TrainSettings, data: DrawnData, key: str) -> None:
        self.config, self.data, self.key = config, data, key
        self.device = pick_device(config.device)
        self.model = build_model(config.model)
        init_weights(self.model, config.seed)
        if config.start is not None:
            start_from(self.model, config.start, config.model)
        self.model.to(self.device).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(_groups(self.model, config.weight_decay))
        self.loss = build_loss(config.loss)
        self.step, self.run_id = 0, ""
        self.scores: dict[str, float] = {}
        self._resume()

    def train(self, tracked: Run) -> None:
        """All steps still to do; ``model`` is in eval mode and ``scores`` filled afterwards."""
        config = self.config
        tracked.truncate(self.step - 1)
        stream = batches(
            self._pictures(), self._crop_settings(), config.seed, self.step, self.data.templates
        )
        losses: list[float] = []
        with progress(config.steps, "steps", f"training {config.model}", self.step) as bar:
            for rgb, truth, ignore in islice(stream, config.steps - self.step):
                if self.step == 0:
                    save_crops(rgb, truth, config.out / "crops.jpg")
                losses.append(self._one(rgb, truth, ignore))
                bar.advance(loss=losses[-1])
                if self.step % 10 == 0:
                    tracked.log(self.step - 1, loss=float(np.mean(losses[-10:])), lr=self._lr())
                if self.step % config.validate_every_steps == 0 or self.step == config.steps:
                    self.scores = self.validate()
                    tracked.log(self.step - 1, **self.scores)
                if self.step % config.checkpoint_every_steps == 0 or self.step == config.steps:
                    self._save(tracked.run_id)
        self.model.eval()

    def _one(self, rgb: Tensor, truth: Tensor, ignore: Tensor) -> float:
        """One optimizer step; its loss. A loss that is no number stops the run before the step."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr()
        self.model.train()
        x = rgb.to(self.device, memory_format=torch.channels_last)
        with autocast(self.device, plan_precision(config.precision, self.device)):
            logits = self.model(x)
        loss = self.loss(logits, truth.to(self.device), ignore.to(self.device))
        if not torch.isfinite(loss):
            raise PathfmError(
                f"the loss is {loss.item()} at step {self.step}: lower --lr ({config.lr:g}) and "
                f"run again; it goes on from the newest checkpoint in {config.out}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_grad_norm)
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _lr(self) -> float:
        c = self.config
        start = c.lr / max(1, c.warmup_steps)
        return warmup_cosine(c.lr, 0.0, self.step, c.steps, c.warmup_steps, start=start)

    def validate(self) -> dict[str, float]:
        """Mean Dice and IoU over validation pictures and held-out synthetic thumbnails."""
        self.model.eval()
        found: dict[str, list[float]] = {}
        for name, rgb, truth, ignore in self._validation():
            mask = tissue_probability(self.model, rgb, self.device) > 0.5
            counts = count(mask, truth, ignore)
            found.setdefault(f"{name}_dice", []).append(counts.dice)
            found.setdefault(f"{name}_iou", []).append(counts.iou)
        return {name: float(np.mean(values)) for name, values in found.items()}

    def _validation(self) -> list[tuple[str, NDArray[np.uint8], NDArray[np.bool_], NDArray[np.bool_]]]:  # fmt: skip
        """(kind, picture, truth, ignore) of everything validated on."""
        drawn = [("drawn", p.rgb, p.tissue, p.ignore) for p in self.data.validation]
        for number in range(self.config.validation_synthetic):
            made = draw_thumbnail(
                self.config.seed, HELD_OUT_FROM + number, self.config.synthetic_px
            )
            nothing = np.zeros(made.tissue.shape, np.bool_)
            drawn.append(("synthetic", made.rgb, made.tissue, nothing))
        return drawn

    def _pictures(self) -> list[TrainingPicture]:
        """Drawn and synthetic pictures with weights that give each kind its share of the crops."""
        c = self.config
        drawn = self.data.training
        share = c.real_share if drawn and c.synthetic else float(bool(drawn))
        pictures = [
            TrainingPicture(
                p.name, p.rgb, p.tissue, p.ignore, None, share / len(drawn), rare_kinds(p)
            )
            for p in drawn
            if share > 0
        ]
        with progress(c.synthetic, "thumbnails", "drawing") as bar:
            for number in range(c.synthetic if share < 1 else 0):
                made = draw_thumbnail(c.seed, number, c.synthetic_px)
                name, weight = f"synthetic {number}", (1 - share) / c.synthetic
                nothing = np.zeros(made.tissue.shape, np.bool_)
                pictures.append(
                    TrainingPicture(
                        name, made.rgb, made.tissue, nothing, made.mpp, weight, made.kinds
                    )
                )
                bar.advance()
        return pictures

    def _crop_settings(self) -> CropSettings:
        c = self.config
        return CropSettings(
            crop_px=c.crop_px,
            batch_size=c.batch_size,
            border_share=c.border_share,
            rare_share=c.rare_share,
            paste_chance=c.paste_chance,
        )

    def _save(self, run_id: str) -> None:
        moments, groups = pack_optimizer(self.optimizer)
        weights = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        state = {"key": self.key, "groups": groups, "run_id": run_id, "scores": self.scores}
        root = self.config.out / "checkpoints"
        save_checkpoint(root, self.step, weights | moments, state, keep_last=2)

    def _resume(self) -> None:
        """Takes up the newest whole checkpoint of the very same run, if there is one."""
        root = self.config.out / "checkpoints"
        saved = load_newest(root, lambda state: state.get("key") == self.key)
        if saved is None:
            return
        weights = {k[6:]: v for k, v in saved.tensors.items() if k.startswith("model.")}
        self.model.load_state_dict(weights)
        unpack_optimizer(self.optimizer, saved.tensors, saved.state["groups"])
        self.step, self.run_id = saved.step, saved.state["run_id"]
        self.scores = saved.state["scores"]


def start_from(model: nn.Module, weights: Path, name: str) -> None:
    """Gives `model`, a `name`, the weights of a file; ``PathfmError`` when they are another network's."""
    state = load_model(weights)[0].state_dict()
    wanted = model.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in wanted.items()}:
        raise PathfmError(
            f"start {weights} holds another network than a {name}: give its own weights"
        )
    model.load_state_dict(state)


def rare_kinds(picture: DrawnPicture) -> NDArray[np.uint8]:
    """(h, w) `Kind` of a drawn picture's pixels, as far as it was drawn: crops look for these."""
    kinds = picture.tissue.astype(np.uint8) * np.uint8(Kind.TISSUE)
    for name, mask in picture.kinds.items():
        kinds[mask] = Kind[name.upper()]
    return kinds


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Parameters with two axes or more decay; biases and scales of norms do not."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def save_crops(rgb: Tensor, truth: Tensor, path: Path, most: int = 16) -> None:
    """A JPEG of the first crops, each above its truth: what the network really sees."""
    n = min(most, len(rgb))
    seen = (rgb[:n].clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    answers = (truth[:n].cpu().numpy()[..., None] * np.uint8(255)).repeat(3, axis=3)
    rows = [np.concatenate([*part], axis=1) for part in (seen, answers)]
    atomic_write_bytes(path, jpeg_bytes(Image.fromarray(np.concatenate(rows, axis=0))))
