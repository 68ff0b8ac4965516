"""Slide and segmentation probes beside kaiko-eva's own classes, run by kaiko-eva in its own process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pathfm.probing.parts import Parts
from pathfm.segmentation_probe.decoders import HeadName, TokenHead
from pathfm.segmentation_probe.fit import MaskedMaps, SegmentationProtocol
from pathfm.segmentation_probe.fit import fit_run as fit_pictures
from pathfm.segmentation_probe.scores import dice_table, eva_dice_loss
from pathfm.slide_probe import bags_of
from pathfm.slide_probe.abmil import AbMil
from pathfm.slide_probe.fit import SlideProtocol, fit_run, loss_of
from tests.eva_folder import run_eva
from tests.eva_probe_scripts import NETWORKS, TRAINING

pytestmark = pytest.mark.slow

Arrays = dict[str, NDArray[np.generic]]
CLASSES = ("background", "one", "two", "three")
ABMIL_NAMES = {  # ours -> eva's
    "project": "projector.0",
    "value": "gated_attention.attention_a.0",
    "gate": "gated_attention.attention_b.0",
    "score": "gated_attention.attention_c",
    "classify.0": "classifier._network.0",
    "classify.2": "classifier._network.2",
    "classify.4": "classifier._network.4",
}


def asked(folder: Path, script: str, given: Arrays) -> Arrays:
    """What kaiko-eva answers to arrays."""
    np.savez(folder / "given.npz", **given)  # type: ignore[arg-type]
    run_eva(script, str(folder / "given.npz"), str(folder / "found.npz"))
    with np.load(folder / "found.npz") as found:
        return dict(found)


# --- networks, losses, metrics ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def given() -> Arrays:
    rng = np.random.default_rng(0)
    bags = rng.normal(size=(5, 30, 20)).astype(np.float32)
    for i, size in enumerate(SIZES):
        bags[i, size:] = -np.inf  # as eva pads
    truth = rng.integers(0, 5, (6, 26, 34)) * (rng.random((6, 26, 34)) < 0.5)
    truth[1][truth[1] == 2] = 0  # a class that one picture lacks
    truth[4] = 0  # nothing but background
    return {
        "bags": bags,
        "labels": np.array([0, 1, 2, 1, 0]),
        "map0": rng.normal(size=(6, 12, 7, 9)).astype(np.float32),
        "map1": rng.normal(size=(6, 8, 4, 5)).astype(np.float32),
        "truth": truth.astype(np.int64),
        "predicted": rng.integers(0, 4, (6, 26, 34)),
    }


SIZES = [30, 4, 17, 1, 22]


@pytest.fixture(scope="module")
def eva(given: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    return asked(tmp_path_factory.mktemp("eva"), NETWORKS, given)


def test_our_abmil_is_eva_s_in_weights_logits_and_gradients(given: Arrays, eva: Arrays) -> None:
    torch.manual_seed(11)
    head = AbMil(20, 3)
    for name, value in head.named_parameters():
        layer, _, kind = name.rpartition(".")
        theirs = eva[f"abmil/weight/{ABMIL_NAMES[layer]}.{kind}"]
        assert np.array_equal(value.detach().numpy(), theirs), name  # one seed, the same weights
    bags = np.concatenate([given["bags"][i, :size] for i, size in enumerate(SIZES)])
    logits = head(torch.from_numpy(bags), SIZES)
    loss_of(logits, torch.from_numpy(given["labels"])).backward()  # type: ignore[no-untyped-call]
    assert np.allclose(logits.detach().numpy(), eva["abmil/logits"], rtol=0, atol=1e-6)
    for name, value in head.named_parameters():
        layer, _, kind = name.rpartition(".")
        assert value.grad is not None
        theirs = eva[f"abmil/grad/{ABMIL_NAMES[layer]}.{kind}"]
        assert np.allclose(value.grad.numpy(), theirs, rtol=0, atol=1e-6), name


@pytest.mark.parametrize("ignore", [None, 4])
@pytest.mark.parametrize("name", ["conv", "linear"])
def test_our_heads_and_loss_are_eva_s_in_logits_and_gradients(
    given: Arrays, eva: Arrays, name: HeadName, ignore: int | None
) -> None:
    torch.manual_seed(12)
    head = TokenHead(name, (12, 8), 4)
    maps = [torch.from_numpy(given["map0"]), torch.from_numpy(given["map1"])]
    truth = torch.from_numpy(given["truth"])
    truth = truth if ignore else truth.clamp(max=3)
    logits = head(maps, (26, 34))
    loss = eva_dice_loss(logits, truth, ignore)
    loss.backward()  # type: ignore[no-untyped-call]
    prefix = f"{name}/{ignore}"
    assert np.allclose(logits.detach().numpy(), eva[f"{prefix}/logits"], rtol=0, atol=1e-6)
    assert float(loss.detach()) == pytest.approx(float(eva[f"{prefix}/loss"]), abs=1e-6)
    for key, value in head.layers.named_parameters():
        at = f"_layers.{key}"
        assert value.grad is not None
        assert np.array_equal(value.detach().numpy(), eva[f"{prefix}/weight/{at}"]), key
        assert np.allclose(value.grad.numpy(), eva[f"{prefix}/grad/{at}"], rtol=0, atol=1e-6), key


def test_the_linear_head_is_eva_s_single_linear_layer_too(given: Arrays, eva: Arrays) -> None:
    head = TokenHead("linear", (12, 8), 4)
    weight = eva["single/None/weight/_layers.weight"]
    with torch.no_grad():
        layer = head.layers
        layer.weight.copy_(torch.from_numpy(weight)[:, :, None, None])  # type: ignore[operator, union-attr]
        layer.bias.copy_(torch.from_numpy(eva["single/None/weight/_layers.bias"]))  # type: ignore[operator, union-attr]
        maps = [torch.from_numpy(given["map0"]), torch.from_numpy(given["map1"])]
        assert np.allclose(head(maps, (26, 34)).numpy(), eva["single/None/logits"], atol=1e-6)


@pytest.mark.parametrize("ignore", [None, 4])
def test_our_dice_is_eva_s_mean_and_each_class(
    given: Arrays, eva: Arrays, ignore: int | None
) -> None:
    truth = given["truth"] if ignore else np.minimum(given["truth"].astype(np.int64), 3)
    table = dice_table(given["predicted"], truth, CLASSES, ignore, eva_ignore=True)
    assert table.mean == pytest.approx(float(eva[f"mean/{ignore}"]), abs=1e-6)
    assert np.allclose([*table.per_class.values()], eva[f"each/{ignore}"][:4], rtol=0, atol=1e-6)
    strict = dice_table(given["predicted"], truth, CLASSES, ignore)
    if ignore is None:
        assert strict.mean == table.mean
    else:  # eva counts what is predicted on pixels to be ignored as wrong: its Dice is lower
        assert strict.mean > table.mean + 0.01


# --- training ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def to_train_on() -> Arrays:
    rng = np.random.default_rng(1)
    sizes, labels = rng.integers(5, 40, 45), rng.permutation(np.arange(45) % 3)
    bags = rng.normal(size=(sizes.sum(), 16)).astype(np.float32)
    ends = sizes.cumsum()
    for label, end in zip(labels, ends, strict=True):
        bags[end - 2 : end, label] += 3
    masks = np.kron(rng.integers(0, 4, (30, 4, 4)), np.ones((8, 8), np.int64))
    maps = rng.normal(size=(30, 10, 4, 4)).astype(np.float32)
    maps[:, :4] += 2 * np.eye(4, dtype=np.float32)[masks[:, ::8, ::8]].transpose(0, 3, 1, 2)
    return {
        "slides/bags": bags,
        "slides/ends": ends,
        "slides/labels": labels,
        "slides/train": np.arange(21),
        "slides/val": np.arange(21, 33),
        "slides/test": np.arange(33, 45),
        "pictures/map": maps,
        "pictures/mask": masks,
        "pictures/train": np.arange(18),
        "pictures/val": np.arange(18, 24),
        "pictures/test": np.arange(24, 30),
    }


@pytest.fixture(scope="module")
def trained(to_train_on: Arrays, tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    return asked(tmp_path_factory.mktemp("trained"), TRAINING, to_train_on)


def order_of(read: NDArray[np.generic], n: int):  # type: ignore[no-untyped-def]
    """The order in which eva's loader read its n training rows, epoch by epoch."""
    return lambda epoch: read[epoch * n : (epoch + 1) * n].astype(np.int64)


def test_a_slide_run_follows_eva_s_step_for_step_to_the_same_test_score(
    to_train_on: Arrays, trained: Arrays
) -> None:
    ends = to_train_on["slides/ends"].astype(int)
    features = np.split(to_train_on["slides/bags"], ends[:-1])
    bags = bags_of(features, to_train_on["slides/labels"].astype(int), ["a", "b", "c"])  # type: ignore[arg-type]
    parts = Parts(*(to_train_on[f"slides/{p}"].astype(np.int64) for p in ("train", "val", "test")))
    head = AbMil(16, 3)
    layers = {
        f"{ours}.{kind}": torch.from_numpy(trained[f"slides/initial/{theirs}.{kind}"])
        for ours, theirs in ABMIL_NAMES.items()
        for kind in ("weight", "bias")
    }
    head.load_state_dict(layers)
    protocol = SlideProtocol(batch=8, max_epochs=30, patience_epochs=9)
    found = fit_run(
        bags, parts, protocol, head=head, order=order_of(trained["slides/read"], len(parts.train))
    )
    theirs = trained["slides/losses"]
    assert len(theirs) == len(found.losses) > 30
    assert np.abs(np.array(found.losses) - theirs).max() < 2e-4
    assert found.epochs == len(trained["slides/scores"])
    assert found.best_epoch == int(trained["slides/scores"].argmax())
    assert found.val == pytest.approx(float(trained["slides/scores"].max()), abs=1e-6)
    assert found.test == pytest.approx(
        float(trained["slides/found/test/MulticlassAccuracy"]), abs=1e-6
    )


def test_a_segmentation_run_follows_eva_s_step_for_step_to_the_same_dice(
    to_train_on: Arrays, trained: Arrays
) -> None:
    data = MaskedMaps(
        [to_train_on["pictures/map"].astype(np.float32)],
        to_train_on["pictures/mask"].astype(np.int64),
        CLASSES,
    )
    rows = (to_train_on[f"pictures/{p}"].astype(np.int64) for p in ("train", "val", "test"))
    parts = Parts(*rows)
    head = TokenHead("conv", (10,), 4)
    head.layers.load_state_dict(
        {
            k: torch.from_numpy(trained[f"pictures/initial/_layers.{k}"])
            for k in head.layers.state_dict()
        }
    )
    protocol = SegmentationProtocol(batch=8, steps=32)
    found = fit_pictures(
        data,
        parts,
        protocol,
        head=head,
        order=order_of(trained["pictures/read"], len(parts.train)),
    )
    theirs = trained["pictures/losses"]
    assert len(theirs) == len(found.losses) == 32
    assert np.abs(np.array(found.losses) - theirs).max() < 1e-5
    scores = trained["pictures/scores"]
    assert len(scores) == 10  # the eleventh epoch is cut short by max_steps and not judged
    assert found.best_epoch == int(scores.argmax())
    assert found.val.mean == pytest.approx(float(scores.max()), abs=1e-4)
    assert found.test is not None
    assert found.test.mean == pytest.approx(
        float(trained["pictures/found/test/MonaiDiceScore"]), abs=1e-4
    )
