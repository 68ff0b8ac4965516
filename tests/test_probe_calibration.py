"""What `probe` says of calibration, and of features at several µm/px."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from pathfm.datasets import open_dataset
from pathfm.embeddings import Embeddings
from pathfm.metrics import knn_predict, knn_shares
from pathfm.probe import ProbeConfig, ProbeResult, load_result, run, show
from pathfm.probing.result import _common_name, by_model
from pathfm.probing.scores import probabilities
from pathfm.runtime import PathfmError
from tests.datasets_mini import small_slide
from tests.test_metrics import blobs
from tests.test_probe import QUIET, made_up
from tests.test_probe_protocols import SHORT, with_splits


def config(*files: Path, **changes: object) -> ProbeConfig:
    told = {"tracking": QUIET, "n_seeds": 2}
    return ProbeConfig(embeddings=list(files), **{**told, **changes})


def slow_ece(shares: np.ndarray, truth: np.ndarray) -> float:
    """Guo et al. 2017, eq. 3, bin by bin."""
    sure, right = shares.max(axis=1), shares.argmax(axis=1) == truth
    total = 0.0
    for m in range(1, 16):
        inside = [i for i in range(len(truth)) if (m - 1) / 15 < sure[i] <= m / 15]
        if inside:
            total += len(inside) * abs(right[inside].mean() - sure[inside].mean())
    return total / len(truth)


def test_shares_of_votes_are_scikit_learns_probabilities() -> None:
    features, labels = blobs(120, 6, 3, seed=1)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    theirs = KNeighborsClassifier(7).fit(unit[:80], labels[:80]).predict_proba(unit[80:])
    ours = knn_shares(features[:80], labels[:80], features[80:], 7, 3)
    np.testing.assert_allclose(ours, theirs)
    told = knn_predict(features[:80], labels[:80], features[80:], 7, 3)
    np.testing.assert_array_equal(told, ours.argmax(axis=1))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_probabilities_of_eva_s_heads_are_torch_s_softmax_and_sigmoid(n_classes: int) -> None:
    logits = np.random.default_rng(0).normal(0, 20, (9, 1 if n_classes == 2 else 3))
    z = torch.tensor(logits, dtype=torch.float64)
    one = torch.sigmoid(z)
    expected = torch.cat([1 - one, one], dim=1) if n_classes == 2 else torch.softmax(z, dim=1)
    got = probabilities(logits.astype(np.float64), n_classes)
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_calibration_of_every_probe_and_repeat_is_that_of_its_answers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_splits("train", "train", "val", "test", noise=3.0)
    data.save(tmp_path / "init.safetensors")
    result = run(
        config(tmp_path / "init.safetensors", out=tmp_path / "p", also=("eva",), eva=SHORT)
    )
    probes = result.backbones[0].probes
    at = {name: np.flatnonzero(np.array(data.splits) == name) for name in ("train", "test")}
    x, y = data.features, data.labels
    votes = knn_shares(x[at["train"]], y[at["train"]], x[at["test"]], 20, 3)
    assert probes["knn"].ece == [pytest.approx(slow_ece(votes, y[at["test"]]))]
    assert len(probes["eva"].ece) == SHORT.n_runs
    sure = votes.max(axis=1).mean() - (votes.argmax(axis=1) == y[at["test"]]).mean()
    assert probes["knn"].overconfidence == [pytest.approx(sure)]
    for scores in probes.values():
        assert all(0 <= ece <= 1 for ece in scores.ece)
        assert all(
            abs(o) <= e + 1e-12 for o, e in zip(scores.overconfidence, scores.ece, strict=True)
        )
    saved = json.loads((tmp_path / "p" / "probe.json").read_text())
    assert saved["backbones"][0]["probes"]["logistic"]["ece"] == probes["logistic"].ece
    out = capsys.readouterr().out
    assert "calibration error (ECE, 15 bins)" in out
    assert f"{100 * probes['knn'].ece[0]:.1f} ({100 * sure:+.1f})" in out


def test_a_result_written_before_calibration_can_still_be_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up().save(tmp_path / "init.safetensors")
    run(config(tmp_path / "init.safetensors", out=tmp_path / "p"))
    saved = json.loads((tmp_path / "p" / "probe.json").read_text())
    for scores in saved["backbones"][0]["probes"].values():
        for name in ("ece", "overconfidence", "n_groups"):
            del scores[name]
        scores["interval"] = []  # as it was written then
    (tmp_path / "p" / "probe.json").write_text(json.dumps(saved))
    found = load_result(tmp_path / "p" / "probe.json")
    assert isinstance(found, ProbeResult)
    capsys.readouterr()
    show(found)
    assert "calibration" not in capsys.readouterr().out


# --- one model at several µm/px -----------------------------------------------------------------------


def test_features_of_one_model_at_several_mpp_are_one_row_by_mpp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for mpp, noise in ((0.5, 1.0), (2.0, 6.0), (1.0, 3.0)):
        one = with_splits("train", "val", "test", name=f"dinov2-{mpp:g}", noise=noise)
        info = replace(one.info, mpp=mpp, backbone_digest="d", transform=f"to {mpp}")
        replace(one, info=info).save(tmp_path / "e" / f"{mpp:g}.safetensors")
    other = with_splits("train", "val", "test", name="other")
    replace(other, info=replace(other.info, mpp=0.5)).save(tmp_path / "e" / "x.safetensors")
    result = run(config(tmp_path / "e", out=tmp_path / "p"))
    models = {model.name: model for model in by_model(result.backbones)}
    assert [b.mpp for b in models["dinov2"].at] == [0.5, 1.0, 2.0]
    assert [b.mpp for b in models["other"].at] == [0.5]
    means = [b.probes["logistic"].mean for b in models["dinov2"].at]
    assert means == sorted(means, reverse=True)
    out = capsys.readouterr().out
    assert "by µm/px of the input" in out
    table = out[out.index("by µm/px of the input") :].split("recall of each class")[0]
    assert "other" not in table
    assert all(f"{mpp:g} µm/px" in table for mpp in (0.5, 1, 2))
    assert f"{100 * means[0]:.1f} [" in table


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["dinov2-0.25", "dinov2-0.5"], "dinov2"),
        (["a_1", "a_10"], "a"),
        (["uni 0.5um", "uni 1um"], "uni"),
        (["x", "y"], ""),
        (["vit2"], "vit2"),
    ],
)
def test_a_model_is_called_what_its_files_begin_with(names: list[str], said: str) -> None:
    assert _common_name(names) == said


# --- rows at several µm/px ----------------------------------------------------------------------------


def test_rows_at_several_mpp_are_scored_apart_with_their_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = with_splits("train", "train", "val", "test", noise=3.0)
    test = np.flatnonzero(np.array(data.splits) == "test")
    mpp = np.full(240, np.nan, np.float32)
    mpp[test[:25]], mpp[test[25:55]] = 0.5, 1.0
    mpp[np.array(data.splits) != "test"] = 1.0
    features = data.features.copy()
    features[test[25:55]] = features[test[25:55]][::-1]  # other pictures' features: near to chance
    replace(data, mpp=mpp, features=features).save(tmp_path / "init.safetensors")
    result = run(config(tmp_path / "init.safetensors", out=tmp_path / "p"))
    fine, coarse = result.backbones[0].by_mpp
    assert (fine.mpp, fine.n, coarse.mpp, coarse.n) == (0.5, 25, 1.0, 30)
    train = np.flatnonzero(np.array(data.splits) == "train")
    told = knn_predict(features[train], data.labels[train], features[test[:25]], 20, 3)
    assert fine.probes["knn"].values == [
        pytest.approx(balanced_accuracy_score(data.labels[test[:25]], told))
    ]
    assert fine.probes["knn"].mean > coarse.probes["knn"].mean
    assert sum(map(sum, coarse.probes["logistic"].confusion)) == 30
    out = capsys.readouterr().out
    assert "one probe for all" in " ".join(out.split())
    assert load_result(tmp_path / "p" / "probe.json") == result


def test_too_many_mpp_for_a_table_are_said(tmp_path: Path) -> None:
    data = made_up()
    mpp = np.linspace(0.25, 2, 240).astype(np.float32)
    replace(data, mpp=mpp).save(tmp_path / "init.safetensors")
    result = run(config(tmp_path / "init.safetensors", out=tmp_path / "p"))
    assert result.backbones[0].by_mpp == []
    assert any("240 different µm/px" in caveat for caveat in result.caveats)


def test_mpp_of_rows_come_back_from_disk_and_must_fit(tmp_path: Path) -> None:
    data = made_up()
    mpp = np.resize(np.array([0.5, np.nan], np.float32), 240)
    replace(data, mpp=mpp).save(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(Embeddings.load(tmp_path / "a.safetensors").mpp, mpp)
    data.save(tmp_path / "b.safetensors")
    assert Embeddings.load(tmp_path / "b.safetensors").mpp is None
    with pytest.raises(PathfmError, match=r"µm/px .* for 240 rows"):
        replace(data, mpp=mpp[:5])


def test_places_in_slides_are_the_same_data_at_any_mpp_that_is_asked_for(tmp_path: Path) -> None:
    for number in (0, 1):
        small_slide(tmp_path / f"{number}.tif", number)
    rows = ["slide,x_um,y_um,label", "0.tif,50,40,a", "1.tif,60,40,b"]
    (tmp_path / "t.csv").write_text("\n".join(rows) + "\n")
    a, b = (open_dataset(tmp_path / "t.csv", mpp=mpp, size_px=32) for mpp in (0.5, 1.0))
    assert a.digest == b.digest
    assert (a.read(0) != b.read(0)).any()
    with_mpp = ["slide,x_um,y_um,label,mpp", "0.tif,50,40,a,0.5", "1.tif,60,40,b,1.0"]
    (tmp_path / "u.csv").write_text("\n".join(with_mpp) + "\n")
    own = open_dataset(tmp_path / "u.csv", size_px=32).digest
    (tmp_path / "u.csv").write_text("\n".join([*with_mpp[:2], "1.tif,60,40,b,2.0"]) + "\n")
    assert open_dataset(tmp_path / "u.csv", size_px=32).digest != own  # the table's own is data


def test_mpp_of_the_input_is_that_of_the_patch_or_of_the_picture_resized(tmp_path: Path) -> None:
    from pathfm.embed.samples import input_mpp

    for number, side in enumerate((64, 32, 48)):
        Image.new("RGB", (side + 9, side)).save(tmp_path / f"{number}.png")
    rows = ["path,label,mpp", "0.png,a,0.25", "1.png,b,0.5", "2.png,a,0.5"]
    (tmp_path / "p.csv").write_text("\n".join(rows) + "\n")
    np.testing.assert_allclose(input_mpp(open_dataset(tmp_path / "p.csv"), 32), [0.5, 0.5, 0.75])
    alike = [row.replace("0.25", "0.5") for row in rows]
    (tmp_path / "q.csv").write_text("\n".join(alike) + "\n")
    assert np.isnan(input_mpp(open_dataset(tmp_path / "q.csv"), 32)).all()
    small_slide(tmp_path / "s.tif", 0)
    (tmp_path / "s.csv").write_text(
        "slide,x_um,y_um,label,mpp\ns.tif,50,40,a,0.5\ns.tif,60,40,b,1.0\n"
    )
    np.testing.assert_allclose(input_mpp(open_dataset(tmp_path / "s.csv"), 224), [0.5, 1.0])
