"""Our ABMIL run beside kaiko-eva's own: the same bags, first head and batch order; losses and seconds.

    python benchmarks/slide_probe_parity.py [--out FILE] [--epochs 10] [--blocks 3]

Bags are drawn: 160 slides of 40 to 1,000 patches (log-uniform), 192 features each (ViT-Ti's). eva reads them
from memory, padded to 1,000 patches (its Camelyon16-small), and trains in a process of its own (tests/eva_folder.py);
what it drew is given to ours. Blocks in turn, eva first; seconds of `fit` alone, no imports. One thread each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from common import about_this_run, write_out
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent))
from pathfm.probing.parts import Parts
from pathfm.slide_probe import Bags, bags_of
from pathfm.slide_probe.abmil import AbMil
from pathfm.slide_probe.fit import SlideProtocol, SlideRun, fit_run
from tests.eva_folder import run_eva

EVA_NAMES = {
    "project": "projector.0",
    "value": "gated_attention.attention_a.0",
    "gate": "gated_attention.attention_b.0",
    "score": "gated_attention.attention_c",
    "classify.0": "classifier._network.0",
    "classify.2": "classifier._network.2",
    "classify.4": "classifier._network.4",
}
EVA = r"""
import sys, tempfile, time, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from lightning.pytorch import callbacks
from torch import nn
from eva.core import DataLoader, DataModule, DataloadersSchema, DatasetsSchema, HeadModule, Trainer
from eva.core.data import datasets
from eva.core.data.transforms.padding import Pad2DTensor
from eva.core.metrics import structs
from eva.core.metrics.defaults import MulticlassClassificationMetrics
from eva.vision.models.networks import ABMIL

given, out, read, losses = np.load(sys.argv[1]), {}, [], []
bags, ends, labels = given["bags"], given["ends"], given["labels"]
starts, pad = np.concatenate([[0], ends[:-1]]), Pad2DTensor(pad_size=int(given["pad"]))

class Rows(datasets.TorchDataset):
    def __init__(self, rows, told): self.rows, self.told = rows, told
    def __len__(self): return len(self.rows)
    def __getitem__(self, i):
        row = int(self.rows[i])
        if self.told: read.append(row)
        return pad(torch.from_numpy(bags[starts[row]:ends[row]])), int(labels[row])
    def prepare_data(self): pass
    def setup(self): pass
    def configure(self): pass
    def validate(self): pass
    def teardown(self): pass

class Told(callbacks.Callback):
    def on_fit_start(self, trainer, module):
        for key, value in module.head.state_dict().items(): out[f"initial/{key}"] = value.clone().numpy()
    def on_train_batch_end(self, trainer, module, outputs, *rest): losses.append(float(outputs["loss"]))

torch.manual_seed(int(given["seed"]))
head = ABMIL(input_size=bags.shape[1], output_size=3, projected_input_size=128)
module = HeadModule(head=head, criterion=nn.CrossEntropyLoss(),
                    optimizer=lambda p: torch.optim.AdamW(p, lr=0.001, betas=(0.9, 0.999)),
                    metrics=structs.MetricsSchema(common=MulticlassClassificationMetrics(num_classes=3)))
best = callbacks.ModelCheckpoint(dirpath=tempfile.mkdtemp(), monitor="val/MulticlassAccuracy", mode="max")
trainer = Trainer(default_root_dir=tempfile.mkdtemp(), callbacks=[Told(), best], logger=False, accelerator="cpu",
                  enable_progress_bar=False, enable_model_summary=False, max_epochs=int(given["epochs"]))
loader = lambda shuffle=False: DataLoader(batch_size=32, shuffle=shuffle, num_workers=0, prefetch_factor=None,
                                          persistent_workers=False, pin_memory=False)
data = DataModule(datasets=DatasetsSchema(train=Rows(given["train"], True), val=Rows(given["val"], False)),
                  dataloaders=DataloadersSchema(train=loader(True), val=loader()))
wall, cpu = time.perf_counter(), time.process_time()
trainer.fit(module, datamodule=data)
out["wall"], out["cpu"] = time.perf_counter() - wall, time.process_time() - cpu
np.savez(sys.argv[2], read=np.array(read), losses=np.array(losses), best=float(best.best_model_score), **out)
"""

Arrays = dict[str, NDArray[np.generic]]


def drawn_bags() -> tuple[Bags, Arrays]:
    """160 slides of which one patch in twenty tells the class."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.uniform(np.log(40), np.log(1000), 160)).astype(int)
    labels = rng.permutation(np.arange(160) % 3)
    bags = [rng.normal(size=(size, 192)).astype(np.float32) for size in sizes]
    for bag, label in zip(bags, labels, strict=True):
        bag[: len(bag) // 20, label] += 3
    arrays = {"bags": np.concatenate(bags), "ends": sizes.cumsum(), "labels": labels}
    return bags_of(bags, labels, ["a", "b", "c"]), arrays


def theirs(arrays: Arrays, epochs: int, seed: int) -> Arrays:
    """One run of eva's trainer."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.npz", Path(folder) / "found.npz"
        extra = {"pad": np.array(1000), "epochs": np.array(epochs), "seed": np.array(seed)}
        rows = {"train": np.arange(128), "val": np.arange(128, 160)}
        np.savez(given, **arrays, **extra, **rows)  # type: ignore[arg-type]
        run_eva(EVA, str(given), str(found), timeout_s=3000)
        with np.load(found) as held:
            return dict(held)


def ours(bags: Bags, eva: Arrays, epochs: int) -> tuple[SlideRun, float, float]:
    """The same run by our code, its wall and CPU seconds."""
    head = AbMil(192, 3)
    kinds = ("weight", "bias")
    state = {
        f"{a}.{k}": torch.from_numpy(eva[f"initial/{b}.{k}"])
        for a, b in EVA_NAMES.items()
        for k in kinds
    }
    head.load_state_dict(state)
    parts = Parts(np.arange(128), np.arange(128, 160), np.array([], np.int64))
    read = eva["read"].astype(np.int64)
    protocol = SlideProtocol(max_epochs=epochs, patience_epochs=epochs + 1)
    wall, cpu = time.perf_counter(), time.process_time()
    found = fit_run(
        bags, parts, protocol, head=head, order=lambda epoch: read[128 * epoch : 128 * (epoch + 1)]
    )
    return found, time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    bags, arrays = drawn_bags()
    rows, ratios, cpu_ratios = [], [], []
    for block in range(asked.blocks):
        eva = theirs(arrays, asked.epochs, block)
        run, wall, cpu = ours(bags, eva, asked.epochs)
        apart = float(np.abs(np.array(run.losses) - eva["losses"].astype(float)).max())
        ratios.append(float(eva["wall"]) / wall)
        cpu_ratios.append(float(eva["cpu"]) / cpu)
        rows.append(
            f"{block:5d} {float(eva['wall']):10.1f} {wall:10.1f} {float(eva['cpu']):10.1f} {cpu:10.1f} "
            f"{len(run.losses):6d} {apart:14.1e} {float(eva['best']):10.4f} {run.val:10.4f}"
        )
    lines = [
        about_this_run("torch"),
        "",
        (
            "eva's seconds / ours: "
            f"{statistics.median(ratios):.1f} x by the clock ({min(ratios):.1f} to {max(ratios):.1f}), "
            f"{statistics.median(cpu_ratios):.1f} x of CPU ({min(cpu_ratios):.1f} to {max(cpu_ratios):.1f})"
        ),
        (
            f"128 + 32 slides, {len(arrays['bags']):,} patches, eva's padded to {160 * 1000:,}; {asked.epochs} epochs, "
            "one thread each"
        ),
        "",
        "block  eva, wall s  ours     eva, CPU s    ours  steps  max loss apart   eva's val   our val",
        *rows,
    ]
    write_out(lines, asked.out)


if __name__ == "__main__":
    main()
