"""The probe against scikit-learn, the table it prints, and what it refuses to compare."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score

from pathfm.datasets import stratified_split
from pathfm.embeddings import Embeddings, EmbeddingsInfo
from pathfm.metrics import Standardiser
from pathfm.probe import (
    ProbeConfig,
    compare_paired,
    find_embeddings,
    probe_backbone,
    run,
)
from pathfm.probing.scoring import interval_of
from pathfm.runtime import PathfmError
from pathfm.tracking import TrackingConfig
from pathfm.uncertainty import Predictions
from tests.test_metrics import blobs

QUIET = TrackingConfig(enabled=False)


def made_up(name: str = "init", noise: float = 0.0, n: int = 240, **info: object) -> Embeddings:
    features, labels = blobs(n, 10, 3, seed=5)
    features = features + noise * np.random.default_rng(1).normal(size=features.shape)
    about = EmbeddingsInfo(name, "vit", name, "made up", "blobs", "d" * 64, 224)
    about = replace(about, **info)  # type: ignore[arg-type]
    paths = tuple(f"{i}.png" for i in range(n))
    return Embeddings(features.astype(np.float32), labels, ("a", "b", "c"), paths, (), about)


def config(*paths: Path, **changes: object) -> ProbeConfig:
    return ProbeConfig(embeddings=list(paths or (Path("x"),)), tracking=QUIET, **changes)


@pytest.mark.parametrize("c", [0.01, 1.0])
def test_with_one_c_the_scores_are_scikit_learns_on_the_same_splits(c: float) -> None:
    data = made_up(noise=2.0)
    options = config(c_values=(c,))
    splits = [stratified_split(data.labels, 0.3, 0, repeat) for repeat in range(3)]
    got = probe_backbone(data, splits, options).probes["logistic"]
    for split, value in zip(splits, got.values, strict=True):
        scale = Standardiser.of(data.features[split.train])
        head = LogisticRegression(C=c, tol=1e-8, max_iter=2000)
        head.fit(scale(data.features[split.train]), data.labels[split.train])
        predicted = head.predict(scale(data.features[split.test]))
        # one test picture on the border may fall to either side
        assert value == pytest.approx(
            balanced_accuracy_score(data.labels[split.test], predicted), abs=0.015
        )
    assert got.c == [c] * 3
    assert got.mean == pytest.approx(np.mean(got.values))
    assert got.sd == pytest.approx(np.std(got.values, ddof=1))


def test_c_is_chosen_without_the_test_half() -> None:
    data = made_up(noise=2.0)
    split = stratified_split(data.labels, 0.3, 0, 0)
    options = config()
    before = probe_backbone(data, [split], options).probes["logistic"].c
    spoiled = data.features.copy()
    spoiled[split.test] = 1e3
    after = probe_backbone(replace(data, features=spoiled), [split], options).probes["logistic"].c
    assert before == after


def test_noise_makes_features_worse_and_the_verdict_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up("init").save(tmp_path / "e" / "init.safetensors")
    made_up("a-noisy", noise=4.0).save(tmp_path / "e" / "a-noisy.safetensors")
    result = run(config(tmp_path / "e", out=tmp_path / "p"))
    assert [b.name for b in result.backbones] == ["init", "a-noisy"]  # `init` is the baseline
    logistic = next(p for p in result.paired if p.probe == "logistic")
    assert not logistic.no_worse
    assert logistic.mean < -0.1
    assert len(logistic.differences) == 5
    saved = json.loads((tmp_path / "p" / "probe.json").read_text())
    assert len(saved["backbones"][0]["probes"]["knn"]["values"]) == 5
    confusion = np.array(saved["backbones"][0]["probes"]["logistic"]["confusion"])
    assert confusion.sum() == 5 * result.n_test
    out = capsys.readouterr().out
    assert "input 224 px" in out
    margin = 100 * np.std(saved["backbones"][0]["probes"]["logistic"]["values"], ddof=1)
    told = f"a-noisy no worse than init minus one sd ({margin:.1f} points) (logistic): NO"
    assert told in " ".join(out.split())
    assert "baseline: init\n" in out
    assert "optimistic" in out


def test_features_that_narrow_are_called_what_they_are(tmp_path: Path) -> None:
    made_up("init").save(tmp_path / "e" / "init.safetensors")
    wide = made_up("narrow")
    narrow = replace(wide, features=np.repeat(wide.features[:, :2], 5, axis=1))
    narrow.save(tmp_path / "e" / "narrow.safetensors")
    result = run(config(tmp_path / "e", out=tmp_path / "p", n_seeds=2))
    assert any("RankMe of narrow" in caveat and "collapse" in caveat for caveat in result.caveats)


def test_a_rerun_is_skipped_until_features_or_options_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up().save(tmp_path / "init.safetensors")
    options = config(tmp_path / "init.safetensors", out=tmp_path / "p", n_seeds=2)
    first = run(options)
    assert "up to date" not in capsys.readouterr().out
    assert run(options) == first
    assert "up to date" in capsys.readouterr().out
    assert run(options.model_copy(update={"k": 3})) != first
    made_up(backbone_digest="other").save(tmp_path / "init.safetensors")
    run(options)
    assert "up to date" not in capsys.readouterr().out


def test_equal_features_are_no_worse_and_differ_by_nothing() -> None:
    a = probe_backbone(made_up(), [stratified_split(made_up().labels, 0.3, 0, 0)], config())
    paired = compare_paired(a, replace(a, name="b"), "logistic")
    assert paired.no_worse
    assert paired.differences == [0.0]


def test_the_result_is_a_function_of_the_seed() -> None:
    data = made_up(noise=2.0)
    runs = []
    for seed in (0, 0, 1):
        splits = [stratified_split(data.labels, 0.3, seed, repeat) for repeat in range(2)]
        runs.append(probe_backbone(data, splits, config(seed=seed)))
    assert runs[0] == runs[1]
    assert runs[0].probes["knn"].values != runs[2].probes["knn"].values


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"input_px": 112}, "input_px 224 and 112"),
        ({"data_digest": "e" * 64}, "data_digest"),
        ({"name": "init"}, "one name"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, other: dict[str, object], message: str
) -> None:
    made_up().save(tmp_path / "a.safetensors")
    made_up(**{"name": "b", **other}).save(tmp_path / "b.safetensors")  # type: ignore[arg-type]
    with pytest.raises(PathfmError, match=message):
        run(config(tmp_path / "a.safetensors", tmp_path / "b.safetensors", out=tmp_path / "p"))


def test_missing_embeddings_are_named(tmp_path: Path) -> None:
    with pytest.raises(PathfmError, match="pathfm embed"):
        find_embeddings([tmp_path])
    with pytest.raises(PathfmError, match="no embeddings at"):
        run(config(tmp_path / "none.safetensors", out=tmp_path / "p"))


def test_features_of_two_precisions_are_compared_and_said_to_be(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up().save(tmp_path / "a.safetensors")
    made_up(name="b", precision="bf16").save(tmp_path / "b.safetensors")
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    result = run(ProbeConfig(embeddings=files, out=tmp_path / "p", n_seeds=1, tracking=QUIET))
    assert any("init in fp32, b in bf16" in caveat for caveat in result.caveats)
    assert "b (bf16)" in capsys.readouterr().out


def test_why_there_is_no_interval_is_said_once_and_alike_for_every_figure() -> None:
    truth = np.array([0, 1] * 10)
    notes = set()
    for wrong in (0, 1):
        predicted = truth.copy()
        predicted[:wrong] ^= 1
        made = Predictions(truth, predicted[None], 2, groups=tuple(["one"] * 20))
        interval, note = interval_of(made)
        assert interval is None
        notes.add(note)
    (note,) = notes
    assert note == (
        "no interval: what is tested is of 1 patient or slide, and an interval draws them anew: test on at "
        "least 2, better 20"
    )


def test_of_one_patient_the_table_the_file_and_the_notes_say_that_there_is_no_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = made_up()
    groups = tuple("train" if i % 2 else "tested" for i in range(240))
    splits = tuple("train" if i % 4 == 1 else "val" if i % 4 == 3 else "test" for i in range(240))
    replace(data, groups=groups, splits=splits).save(tmp_path / "init.safetensors")
    result = run(config(tmp_path / "init.safetensors", out=tmp_path / "p"))
    out = capsys.readouterr().out
    assert " [none]" in out
    assert "±" not in out.split("recall of each class")[0]  # one repeat has no sd
    assert out.count("no interval: what is tested is of 1 patient or slide") == 1
    scores = json.loads((tmp_path / "p" / "probe.json").read_text())["backbones"][0]["probes"][
        "knn"
    ]
    assert scores["interval"] is None
    assert scores["n_groups"] == 1
    assert scores["interval_note"] in result.caveats
