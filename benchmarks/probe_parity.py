"""Our batched heads beside kaiko-eva's own run: the same embeddings, first head and batch order.

    pathfm embed --data ../shared/data/patches/colorectal5 --weights FILE --name init --out /tmp/emb
    python benchmarks/probe_parity.py /tmp/emb/init.safetensors [--out FILE] [--steps 12500]

eva (a folder of its own, see tests/eva_folder.py) trains one run in a process of its own, once for 500 steps
and once to the end; what it drew is written down and our heads are given the same. Then our own runs with
our own heads and orders: 1, 5, and 5 x 8 learning rates. eva trains one run and one learning rate at a time,
so its 5 and 40 are its one multiplied: marked. One thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import about_this_run, write_out
from safetensors.numpy import load_file, save_file

from pathfm.datasets import stratified_split
from pathfm.embeddings import Embeddings
from pathfm.metrics import balanced_accuracy, initial_head
from pathfm.probing.heads import TrainedHeads, train_heads
from pathfm.probing.linear import fit_probe
from pathfm.probing.orders import linear_start
from pathfm.probing.parts import Parts, Rows
from pathfm.probing.protocol import HeadProtocol
from pathfm.probing.scores import eva_metrics

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.eva_folder import eva_folder

PATIENCE = 1250
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
THEIRS = Path(__file__).with_name("probe_parity_eva.py")


@dataclass
class Drawn:
    """The order that eva drew, for every run."""

    train: Rows
    order: Rows

    @property
    def n_train(self) -> int:
        """Rows an epoch."""
        return len(self.train)

    def rows(self, run: int, epoch: int) -> Rows:
        """eva's epoch; the last, which the steps cut off, filled up with rows that are not reached."""
        drawn = self.order[epoch * self.n_train : (epoch + 1) * self.n_train]
        whole = np.concatenate([drawn, np.zeros(self.n_train - len(drawn), np.int64)])
        return np.asarray(self.train[whole])


def ask_eva(
    folder: Path, task: dict[str, Any], steps: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """eva's record and results of one session."""
    folder.mkdir()
    save_file(task, folder / "task.safetensors")
    env = os.environ | {"PYTHONPATH": str(eva_folder()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(THEIRS), str(folder), str(steps), str(PATIENCE)]
    subprocess.run(command, check=True, env=env, capture_output=True)
    return load_file(folder / "eva.safetensors"), json.loads((folder / "eva.json").read_text())


def follow(task: dict[str, Any], parts: Parts, theirs: dict[str, Any]) -> TrainedHeads:
    """Our one head on eva's first head and batches."""
    start = np.concatenate([task["head"].T, task["bias"][None]])[None]
    told = HeadProtocol(n_runs=1, n_steps=len(theirs["losses"]), patience=PATIENCE)
    orders = Drawn(parts.train, theirs["order"])
    return train_heads(
        task["features"], task["labels"], parts, len(start[0, 0]), told, orders=orders, starts=start
    )


def differences(ours: TrainedHeads, theirs: dict[str, Any]) -> str:
    """The largest difference in loss and in validation accuracy, and where both did best."""
    loss = np.abs(ours.losses[:, 0, 0] - theirs["losses"]).max()
    scores = ours.val_scores[:, 0, 0]
    accuracy = np.abs(scores - theirs["val_accuracy"]).max()
    best = (int(ours.best_step[0, 0]), int(ours.val_steps[theirs["val_accuracy"].argmax()]))
    return (
        f"{len(ours.losses):,} steps: losses differ by at most {loss:.1e} (of {theirs['losses'].min():.3f} to "
        f"{theirs['losses'].max():.3f}), validation accuracies of {len(scores):,} epochs by at most "
        f"{accuracy:.1e}; best checkpoint at step {best[0]:,} (eva's at {best[1]:,})"
    )


def timed(
    task: dict[str, Any], parts: Parts, runs: int, rates: tuple[float, ...], steps: int
) -> tuple[TrainedHeads, float, float]:
    """Our own training, the seconds by the clock and of CPU."""
    told = HeadProtocol(rates, n_runs=runs, n_steps=steps, patience=PATIENCE)
    clock, cpu = time.perf_counter(), time.process_time()
    heads = train_heads(
        task["features"], task["labels"], parts, int(task["labels"].max()) + 1, told
    )
    return heads, time.perf_counter() - clock, time.process_time() - cpu


def logistic(task: dict[str, Any], parts: Parts, n_classes: int) -> float:
    """Balanced accuracy of L-BFGS on validation, C chosen by a fifth of the training rows."""
    x, y = task["features"], task["labels"]
    inner = stratified_split(y[parts.train], 0.2, 0, 0)
    start = initial_head(x.shape[1], n_classes, 0, 0)
    c_values = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 1.0)
    probe = fit_probe(
        x, y, parts.train[inner.train], parts.train[inner.test], c_values, start, parts.train
    )
    return balanced_accuracy(y[parts.val], probe.predict(x[parts.val]), n_classes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("embeddings", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=12_500, help="of the full run")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data = Embeddings.load(asked.embeddings)
    x = np.ascontiguousarray(data.features, np.float32)
    split = stratified_split(data.labels, 0.3, 0, 0, data.groups)
    parts = Parts(split.train, split.test, np.zeros(0, np.int64))
    n_classes = len(data.classes)
    first = linear_start(x.shape[1], n_classes, 0, 0)
    task = {"features": x, "labels": data.labels, "train": parts.train, "val": parts.val}
    task |= {"head": np.ascontiguousarray(first[:-1].T), "bias": np.ascontiguousarray(first[-1])}
    lines = [about_this_run("torch", "numpy"), f"kaiko-eva {_eva_version()}, one thread each"]
    lines.append(
        f"{data.info.name}: {data.info.backbone}, {data.info.data}, input {data.info.input_px} px, "
        f"{len(x):,} x {x.shape[1]}, {n_classes} classes, {len(parts.train):,} train / {len(parts.val):,} val "
        "(drawn by class; validation chooses and reports)"
    )
    with tempfile.TemporaryDirectory() as folder:
        short, _ = ask_eva(Path(folder) / "short", task, 500)
        lines += [
            "",
            "the same first head and batches",
            differences(follow(task, parts, short), short),
        ]
        theirs, told = ask_eva(Path(folder) / "full", task, asked.steps)
    clock = time.perf_counter()
    ours = follow(task, parts, theirs)
    same_s = time.perf_counter() - clock
    lines.append(differences(ours, theirs))
    lines += ["", "metrics of that run's best head on validation: eva, ours"]
    found = eva_metrics(ours.logits(x[parts.val])[0], data.labels[parts.val], n_classes)
    for name, value in found.items():
        lines.append(f"  {name:22} {told['results'][f'val/{name}']['mean']:.6f}  {value:.6f}")
    lines += _times(task, parts, asked.steps, told, same_s, n_classes)
    write_out(lines, asked.out)


def _times(
    task: dict[str, Any],
    parts: Parts,
    steps: int,
    told: dict[str, Any],
    same_s: float,
    n_classes: int,
) -> list[str]:
    """Wall and CPU seconds of both, and what our own runs score."""
    theirs_s = told["wall_s"]
    lines = ["", f"seconds for {steps:,} steps (wall; CPU), eva / ours"]
    lines.append(
        f"  1 run, the same batches   {theirs_s:8.1f} ({told['cpu_s']:.1f})  {same_s:7.1f}  {theirs_s / same_s:7.1f} x"
    )
    scores = []
    for runs, rates in ((1, RATES[2:3]), (5, RATES[2:3]), (5, RATES)):
        heads, wall_s, cpu_s = timed(task, parts, runs, rates, steps)
        n = runs * len(rates)
        name = f"{runs} run{'s' if runs > 1 else ''} x {len(rates)} learning rate{'s' if len(rates) > 1 else ''}"
        mark = "" if n == 1 else " extrapolated for eva: 1 run x " + str(n)
        lines.append(
            f"  {name:25} {n * theirs_s:8.1f} ({n * told['cpu_s']:.1f})  {wall_s:7.1f} ({cpu_s:.1f})  "
            f"{n * theirs_s / wall_s:7.1f} x, of CPU {n * told['cpu_s'] / cpu_s:.1f} x{mark}"
        )
        best = heads.best_score[:, heads.rate]
        sd = statistics.stdev(best.tolist()) if runs > 1 else 0.0
        scores.append(
            f"  {name:25} {best.mean():.4f} (sd {sd:.4f}), learning rate {heads.learning_rates[heads.rate]:g}"
        )
    eva = told["results"]["val/MulticlassAccuracy"]["mean"]
    lines += [
        "",
        "best macro accuracy on validation (which chose it)",
        f"  eva, 1 run {' ' * 14} {eva:.4f}",
    ]
    lines += scores
    lines.append(
        f"  L-BFGS, C by a fifth of train {logistic(task, parts, n_classes):.4f} (validation chose nothing)"
    )
    return lines


def _eva_version() -> str:
    (found,) = eva_folder().glob("kaiko_eva-*.dist-info")
    return found.name.removeprefix("kaiko_eva-").removesuffix(".dist-info")


if __name__ == "__main__":
    main()
