"""Our heads follow kaiko-eva's own run: its Trainer, module, data set, metrics and early stopping."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pathfm.probing.heads import train_heads
from pathfm.probing.orders import linear_start
from pathfm.probing.parts import Parts, Rows
from pathfm.probing.protocol import HeadProtocol
from pathfm.probing.scores import eva_metrics
from tests.eva_folder import eva_folder
from tests.test_metrics import blobs

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "probe_parity_eva.py"
PATIENCE, BATCH = 4, 32


class Drawn:
    """What eva's loader drew, epoch after epoch."""

    def __init__(self, train: Rows, order: Rows) -> None:
        self.train, self.order, self.n_train = train, order, len(train)

    def rows(self, run: int, epoch: int) -> Rows:
        drawn = self.order[epoch * self.n_train : (epoch + 1) * self.n_train]
        whole = np.concatenate([drawn, np.zeros(self.n_train - len(drawn), np.int64)])
        return self.train[whole]


@pytest.mark.slow
@pytest.mark.parametrize(("n_classes", "steps"), [(3, 83), (2, 400)])
def test_loss_by_loss_and_epoch_by_epoch_we_do_what_eva_does(
    tmp_path: Path, n_classes: int, steps: int
) -> None:
    x, y = blobs(260, 11, n_classes, seed=2)
    rows = np.random.default_rng(0).permutation(260)
    parts = Parts(np.sort(rows[:180]), np.sort(rows[180:]), np.zeros(0, np.int64))
    outputs = 1 if n_classes == 2 else n_classes
    start = linear_start(11, outputs, 0, 0)
    task = {"features": x, "labels": y, "train": parts.train, "val": parts.val}
    task |= {"head": np.ascontiguousarray(start[:-1].T), "bias": np.ascontiguousarray(start[-1])}
    save_file(task, tmp_path / "task.safetensors")
    env = os.environ | {"PYTHONPATH": str(eva_folder()), "OMP_NUM_THREADS": "1"}
    words = [str(tmp_path), str(steps), str(PATIENCE), str(BATCH)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), *words],
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = load_file(tmp_path / "eva.safetensors")
    said = json.loads((tmp_path / "eva.json").read_text())["results"]

    told = HeadProtocol(n_runs=1, n_steps=steps, batch_size=BATCH, patience=PATIENCE)
    orders = Drawn(parts.train, theirs["order"])
    ours = train_heads(x, y, parts, n_classes, told, orders=orders, starts=start[None])
    assert len(ours.losses) == len(theirs["losses"])  # stopped by patience or steps alike
    np.testing.assert_allclose(ours.losses[:, 0, 0], theirs["losses"], atol=2e-6)
    np.testing.assert_allclose(ours.val_scores[:, 0, 0], theirs["val_accuracy"], atol=1e-6)
    found = eva_metrics(ours.logits(x[parts.val])[0], y[parts.val], n_classes, BATCH)
    assert {f"val/{name}" for name in found} == set(said)
    for name, value in found.items():
        assert value == pytest.approx(said[f"val/{name}"]["mean"], abs=2e-6), name
