"""PatchCamelyon 10-shot through the verbs: the data set alone decides how it is probed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from pathfm.datasets import registry
from pathfm.embed import EmbedConfig
from pathfm.embed import run as embed
from pathfm.embeddings import Embeddings
from pathfm.metrics import Standardiser
from pathfm.probe import EvaConfig, ProbeConfig, run
from pathfm.probing.files import read_predictions
from pathfm.probing.measuring import shots_of
from pathfm.probing.orders import draw_shots, linear_start
from pathfm.runtime import PathfmError
from tests.datasets_mini import make_patch_camelyon
from tests.test_leakage_verbs import weights
from tests.test_probe import QUIET

NAME = "patch_camelyon_10shot"
SIZES = (64, 30, 36)
RATE = 0.05  # of a short test: eva's own would hardly move a head in 60 steps


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Embeddings of a miniature copy, whose published sizes are said to be its own."""
    entry = registry.DATASETS[NAME]
    counts = dict(zip(("train", "val", "test"), SIZES, strict=True))
    small = replace(entry, facts=replace(entry.facts, counts=counts))

    def opened(root: Path):
        return replace(entry.open(root), facts=small.facts)

    known = MappingProxyType({**registry.DATASETS, NAME: replace(small, open=opened)})
    monkeypatch.setattr(registry, "DATASETS", known)
    root = make_patch_camelyon(tmp_path / "pcam", SIZES)
    options = {
        "weights": weights(tmp_path, None),
        "input_px": 32,
        "out": tmp_path / "e",
        "precision": "fp32",
    }
    return embed(
        EmbedConfig(data=Path(f"{NAME}={root}"), name="mine", tracking=QUIET, **options)
    ).path


def one_run(data: Embeddings, run_number: int, steps: int, few: bool = True) -> np.ndarray:
    """eva's protocol for one run, in float64: the test predictions of its best head."""
    at = {name: np.flatnonzero(np.array(data.splits) == name) for name in ("train", "val", "test")}
    rows = draw_shots(at["train"], data.labels, 10, 0, run_number) if few else at["train"]
    start = torch.from_numpy(linear_start(data.features.shape[1], 1, 0, run_number)).double()
    head = torch.nn.Linear(data.features.shape[1], 1).double()
    head.weight.data, head.bias.data = start[:-1].T.contiguous(), start[-1].clone()
    solver = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.ConstantLR(solver, 1 / 3, 5)
    x, y = torch.from_numpy(data.features).double(), torch.from_numpy(data.labels).double()
    best, kept = -1.0, None
    for step in range(1, steps + 1):  # an epoch is one batch of the 20
        solver.zero_grad()
        logits = head(x[rows])[:, 0]
        torch.nn.functional.binary_cross_entropy_with_logits(logits, y[rows]).backward()
        solver.step()
        schedule.step()
        if step % 10 == 0:
            with torch.no_grad():
                told = (head(x)[:, 0] > 0).long().numpy()
            score = balanced_accuracy_score(data.labels[at["val"]], told[at["val"]])
            if score > best + 1e-9:
                best, kept = score, told[at["test"]]
    assert kept is not None
    return kept


def test_choosing_the_data_set_chooses_its_protocol(
    features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "eva": EvaConfig(n_steps=60, learning_rates=(RATE,)),
        "c_values": (0.1,),
        "tracking": QUIET,
    }
    result = run(ProbeConfig(embeddings=[features], out=tmp_path / "p", **options))
    assert (result.shots, result.n_seeds, result.also, result.k) == (10, 50, ["eva"], 10)
    assert (result.n_train, result.n_val, result.n_test) == (20, 30, 36)
    probes = result.backbones[0].probes
    assert {name: len(scores.values) for name, scores in probes.items()} == dict.fromkeys(
        ("logistic", "knn", "eva"), 50
    )
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "20 train (10 of each class, drawn anew for each of 50 runs) / 30 val (chooses) / 36 test (reported)"
        in out
    )
    assert "eva's head, 50 runs" in out
    data = Embeddings.load(features)
    test = np.flatnonzero(np.array(data.splits) == "test")
    made = read_predictions(tmp_path / "p" / "predictions" / "mine.safetensors")
    apart = 0
    for number in (0, 24, 49):
        told = one_run(data, number, 60)
        # a picture whose logit is nearly 0 may fall to either side in float32
        assert (made["eva"].predicted[number, test] != told).sum() <= 1
        apart += int((one_run(data, number, 60, few=False) != told).sum())
    assert apart > 6  # trained on all of train they would say something else
    metrics = json.loads((tmp_path / "p/eva/mine/results.json").read_text())["metrics"]
    assert len(metrics["test"][0]["test/BinaryBalancedAccuracy"]["values"]) == 50


def test_the_other_probes_see_the_same_twenty_pictures_in_a_run(
    features: Path, tmp_path: Path
) -> None:
    options = {"eva": EvaConfig(n_runs=3, n_steps=20), "c_values": (0.01,), "k": 1}
    run(ProbeConfig(embeddings=[features], out=tmp_path / "p", tracking=QUIET, **options))
    data = Embeddings.load(features)
    at = {name: np.flatnonzero(np.array(data.splits) == name) for name in ("train", "test")}
    made = read_predictions(tmp_path / "p" / "predictions" / "mine.safetensors")
    assert made["knn"].runs == 3
    x, y = data.features, data.labels
    for number in range(3):
        rows = draw_shots(at["train"], y, 10, 0, number)
        assert np.bincount(y[rows]).tolist() == [10, 10]
        unit = x.astype(np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
        nearest = rows[(unit[at["test"]] @ unit[rows].T).argmax(axis=1)]
        assert (made["knn"].predicted[number, at["test"]] != y[nearest]).sum() <= 1
        scale = Standardiser.of(x[rows])
        head = LogisticRegression(C=0.01, tol=1e-8, max_iter=5000).fit(scale(x[rows]), y[rows])
        told = head.predict(scale(x[at["test"]]))
        assert (made["logistic"].predicted[number, at["test"]] != told).sum() <= 1


def test_the_saved_options_give_the_same_result_again(features: Path, tmp_path: Path) -> None:
    from pathfm.config import load_config

    told = {"eva": EvaConfig(n_runs=4, n_steps=20), "out": tmp_path / "p", "tracking": QUIET}
    first = run(ProbeConfig(embeddings=[features], **told))
    again = load_config(ProbeConfig, tmp_path / "p" / "probe.yaml")
    assert run(again.model_copy(update={"out": tmp_path / "q"})) == first


def test_fewer_than_ten_of_a_class_are_refused_and_other_data_is_trained_on_whole(
    features: Path, tmp_path: Path
) -> None:
    data = Embeddings.load(features)
    assert shots_of(data) == 10
    assert shots_of(replace(data, info=replace(data.info, data="patch_camelyon"))) == 0
    assert shots_of(replace(data, splits=())) == 0  # a folder that is called so
    splits = np.array(data.splits)
    ones = np.flatnonzero((splits == "train") & (data.labels == 1))
    splits[ones[9:]] = ""
    replace(data, splits=tuple(splits.tolist())).save(tmp_path / "few.safetensors")
    with pytest.raises(PathfmError, match="class 1 has 9 training samples, fewer than the 10"):
        run(
            ProbeConfig(
                embeddings=[tmp_path / "few.safetensors"], out=tmp_path / "p", tracking=QUIET
            )
        )
