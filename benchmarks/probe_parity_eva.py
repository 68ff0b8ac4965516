"""What kaiko-eva itself does with given embeddings: run in a process of its own by probe_parity.py.

    probe_parity_eva.py TASK_FOLDER STEPS PATIENCE [BATCH]

TASK_FOLDER holds `task.safetensors` (features, labels, train, val, head, bias); a head of one output is that
of two classes, with eva's logistic loss and binary metrics. eva's own classes are
run unchanged: Trainer, HeadModule, DataModule, EmbeddingsClassificationDataset, its metrics and its
session recorder. Left out, all to its advantage: TensorBoard, the progress bar, worker processes, and reading
a .pt file a sample a step (each is read once and kept). Added: what was drawn and lost is written down.
Writes `eva.safetensors` (order, losses, val_accuracy, val_loss, final head) and `eva.json` there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from eva.core import DataModule, HeadModule, Trainer
from eva.core.data import dataloaders, datamodules, datasets
from eva.core.metrics import (
    AverageLoss,
    BinaryClassificationMetrics,
    MulticlassClassificationMetrics,
)
from eva.core.metrics.structs import MetricsSchema
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from safetensors.torch import load_file, save_file

MONITOR = {True: "val/BinaryBalancedAccuracy", False: "val/MulticlassAccuracy"}
"""By whether there are two classes."""


class Kept(datasets.EmbeddingsClassificationDataset):  # type: ignore[misc]
    """eva's dataset that keeps what it read, and notes in which order it was asked."""

    def __init__(self, *words: Any, **named: Any) -> None:
        super().__init__(*words, **named)
        self.kept: dict[int, Any] = {}
        self.order: list[int] = []

    def __getitem__(self, index: int) -> Any:
        self.order.append(int(index))
        if index not in self.kept:
            self.kept[index] = super().__getitem__(index)
        return self.kept[index]


NOTED: dict[str, list[float]] = {"losses": [], "accuracy": [], "loss": [], "fit_s": []}
"""Outside of the callback, of which eva's session trains a copy."""


class Notes(Callback):  # type: ignore[misc]
    """The loss of every step, the scores of every validation of a fit, when it began and ended."""

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor

    def on_fit_start(self, *_: object) -> None:
        """Begins the clock."""
        NOTED["fit_s"].append(time.perf_counter())

    def on_fit_end(self, *_: object) -> None:
        """Stops it."""
        NOTED["fit_s"].append(time.perf_counter())

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: object) -> None:
        """Notes the batch's loss."""
        NOTED["losses"].append(float(outputs["loss"]))

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        """Notes what the callbacks that choose and stop are shown."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            NOTED["accuracy"].append(float(trainer.callback_metrics[self.monitor]))
            NOTED["loss"].append(float(trainer.callback_metrics["val/AverageLoss"]))


def write_embeddings(folder: Path, task: dict[str, torch.Tensor]) -> Path:
    """eva's form on disk: a .pt a sample and a manifest."""
    root = folder / "embeddings"
    root.mkdir(exist_ok=True)
    rows = ["origin,embeddings,target,split"]
    for split in ("train", "val"):
        for i in task[split].tolist():
            torch.save(task["features"][i].clone(), root / f"{i}.pt")
            rows.append(f"{i}.png,{i}.pt,{int(task['labels'][i])},{split}")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    return root


def main(folder: Path, steps: int, patience: int, batch: int = 256) -> None:
    """One session of one run."""
    task = load_file(folder / "task.safetensors")
    root = write_embeddings(folder, task)
    outputs, dim = task["head"].shape
    binary = outputs == 1
    monitor = MONITOR[binary]
    head = torch.nn.Linear(dim, outputs)
    with torch.no_grad():
        head.weight.copy_(task["head"])
        head.bias.copy_(task["bias"])
    targets = {"target_transforms": torch.Tensor.float} if binary else {}
    data = {
        split: Kept(root=str(root), manifest_file="manifest.csv", split=split, **targets)
        for split in ("train", "val")
    }
    loader: dict[str, Any] = {"batch_size": batch, "num_workers": 0, "pin_memory": False}
    loader |= {"persistent_workers": False, "prefetch_factor": None}
    module = DataModule(
        datasets=datamodules.schemas.DatasetsSchema(**data),
        dataloaders=datamodules.schemas.DataloadersSchema(
            train=dataloaders.DataLoader(shuffle=True, **loader),
            val=dataloaders.DataLoader(**loader),
        ),
    )
    own = BinaryClassificationMetrics() if binary else MulticlassClassificationMetrics(outputs)
    model = HeadModule(
        head=head,
        criterion=torch.nn.BCEWithLogitsLoss() if binary else torch.nn.CrossEntropyLoss(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4),
        metrics=MetricsSchema(common=[AverageLoss(), own]),
    )
    trainer = Trainer(
        n_runs=1,
        default_root_dir=str(folder / "logs"),
        max_steps=steps,
        checkpoint_type="best",
        accelerator="cpu",
        callbacks=[
            ModelCheckpoint(filename="best", save_top_k=1, monitor=monitor, mode="max"),
            EarlyStopping(min_delta=0, patience=patience, monitor=monitor, mode="max"),
            Notes(monitor),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    pl.seed_everything(0)
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    trainer.run_evaluation_session(model, module)
    wall_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
    (results,) = (folder / "logs").glob("*/results.json")
    save_file(
        {
            "order": torch.tensor(data["train"].order),
            "losses": torch.tensor(NOTED["losses"]),
            "val_accuracy": torch.tensor(NOTED["accuracy"]),
            "val_loss": torch.tensor(NOTED["loss"]),
        },
        folder / "eva.safetensors",
    )
    said = json.loads(results.read_text())["metrics"]["val"][0]
    fit_s = NOTED["fit_s"][1] - NOTED["fit_s"][0]
    told = {"wall_s": wall_s, "cpu_s": cpu_s, "fit_s": fit_s, "results": said}
    (folder / "eva.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
