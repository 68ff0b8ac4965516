"""SimCLR, SupCon and the supervised baseline as methods: one step is a function of the global batch."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pathfm.backbone import load_backbone
from pathfm.losses.supcon import supcon_loss
from pathfm.methods import MicroBatch, build_method
from pathfm.methods.caching import JointLoss
from pathfm.methods.embedding import embed_views
from pathfm.methods.settings import SimclrSettings, SupconSettings, SupervisedSettings
from pathfm.runtime import PathfmError
from tests.rank_threads import run_ranks

SIMCLR = SimclrSettings(hidden_dim=16, projection_dim=8)
SUPCON = SupconSettings(hidden_dim=16, projection_dim=8)
SUPERVISED = SupervisedSettings(n_classes=3)
SETTINGS = {
    "simclr": SIMCLR,
    "supcon": SUPCON,
    "supcon in": SUPCON.model_copy(update={"kind": "in"}),
    "supervised": SUPERVISED.model_copy(update={"label_smoothing": 0.1}),
}
LABELS = [0, 1, 0, -1, 1, 1, 0, 2]
"""Unequal positives and labels in every split: the last part of two has one class of one."""


def method(name, drop_path=0.3, seed=0, settings=None):
    backbone = load_backbone(
        "vit_tiny_patch16_224",
        "random",
        embed_dim=24,
        depth=2,
        num_heads=2,
        drop_path=drop_path,
    )
    return build_method(name.split()[0], backbone, settings or SETTINGS[name], steps=10, seed=seed)


def pictures(n_views=2, batch=8, sizes=(32, 32, 32), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, s, s, generator=generator) for s in sizes[:n_views]]


def micros(crops, part, count, labels=LABELS):
    """The samples `part` of a batch in `count` micro-batches."""
    rows = np.array_split(np.arange(*part.indices(len(crops[0]))), count)
    return [
        MicroBatch(
            [crop[r] for crop in crops],
            2,
            100 + r,
            None if labels is None else torch.tensor(labels)[r],
            seed=7,
            step=3,
            index=index,
            count=count,
        )
        for index, r in enumerate(rows)
    ]


def take_step(made, parts):
    """The step's loss on this rank, every parameter's gradient, what the method tells of it."""
    for micro in parts:
        made.look(micro)
    made.settle(3)
    total = 0.0
    for micro in parts:
        loss = made(micro)
        loss.backward()
        total += loss.item()
    made.before_update(3)
    made.after_update(3)
    gradients = {name: p.grad for name, p in made.named_parameters()}
    return SimpleNamespace(
        loss=total,
        gradients=gradients,
        told={name: float(value) for name, value in made.diagnostics().items()},
    )


def over_ranks(monkeypatch, name, crops, world, count, labels=LABELS):
    """The same step on so many ranks as the loop has it: losses and gradients averaged."""
    size = len(crops[0]) // world
    made = [method(name) for _ in range(world)]

    def work(rank):
        return take_step(
            made[rank], micros(crops, slice(rank * size, (rank + 1) * size), count, labels)
        )

    done = run_ranks(monkeypatch, world, work)
    assert all(one.told == pytest.approx(done[0].told, nan_ok=True) for one in done)
    return SimpleNamespace(
        loss=sum(one.loss for one in done) / world,
        gradients={
            key: sum(one.gradients[key] for one in done) / world for key in done[0].gradients
        },
        told=done[0].told,
    )


def assert_same_step(got, want):
    assert got.loss == pytest.approx(want.loss, rel=1e-5)
    assert got.told == pytest.approx(want.told, rel=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in want.gradients.values())
    for key, gradient in want.gradients.items():
        torch.testing.assert_close(
            got.gradients[key], gradient, rtol=1e-4, atol=1e-6 * largest, msg=key
        )


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("world", "count"), [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_a_step_is_the_same_however_its_batch_is_split(name, world, count, monkeypatch):
    crops = pictures()
    whole = take_step(method(name), micros(crops, slice(None), 1))
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in whole.gradients.values())
    split = over_ranks(monkeypatch, name, crops, world, count)
    assert_same_step(split, whole)


def test_a_split_that_forgets_the_other_ranks_is_another_step():
    # or the test above could not see what it is there for
    crops = pictures()
    whole = take_step(method("simclr"), micros(crops, slice(None), 1))
    half = take_step(method("simclr"), micros(crops, slice(0, 4), 1))
    assert abs(half.loss - whole.loss) > 0.01


@pytest.mark.parametrize("name", ["simclr", "supcon", "supcon in"])
@pytest.mark.parametrize("n_views", [2, 3])
def test_the_loss_is_that_of_its_own_networks_in_float64(name, n_views):
    made, crops = method(name, drop_path=0.0), pictures(n_views, sizes=(32, 32, 16))
    done = take_step(made, micros(crops, slice(None), 1))
    with torch.no_grad():
        z = [
            F.normalize(made.student["head"](made.exported.embed(c)).double(), dim=1) for c in crops
        ]
    labels = torch.arange(8) if name == "simclr" else torch.tensor(LABELS)
    kind = "in" if name == "supcon in" else "out"
    want = supcon_loss(torch.cat(z), labels.repeat(n_views), 0.1, kind)
    assert done.loss == pytest.approx(want.item(), rel=1e-5)
    assert done.told["temperature"] == pytest.approx(0.1)
    if name == "simclr":
        assert done.told["positives_per_anchor"] == pytest.approx(n_views - 1)
        squared = [float((a - b).square().sum(1).mean()) for a in z for b in z if a is not b]
        assert done.told["alignment"] == pytest.approx(np.mean(squared), rel=1e-5)
    else:  # class 0: three samples, 1: three, 2: one; one without a class
        pairs = 2 * 3 * n_views * (3 * n_views - 1) + n_views * (n_views - 1)
        assert done.told["positives_per_anchor"] == pytest.approx(pairs / (8 * n_views))
        assert done.told["anchors_without_positive"] == pytest.approx(1 / 8)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_few_steps_lower_the_loss(name):
    made, crops = method(name), pictures()
    optimizer = torch.optim.AdamW(made.trained().parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        losses.append(take_step(made, micros(crops, slice(None), 1)).loss)
        optimizer.step()
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("name", SETTINGS)
def test_the_exported_backbone_is_the_trained_one_without_the_head(name):
    made = method(name)
    before = made.exported.digest
    take_step(made, micros(pictures(), slice(None), 1))
    torch.optim.SGD(made.trained().parameters(), lr=0.1).step()
    assert made.exported.digest != before
    assert made.exported is made.student["backbone"]
    assert not any("head" in key for key in made.exported.state_dict())
    assert {id(p) for p in made.trained().parameters()} == {id(p) for p in made.parameters()}


@pytest.mark.parametrize("name", SETTINGS)
def test_heads_depend_on_the_seed_alone_and_hold_no_batchnorm(name):
    torch.manual_seed(1)
    first = method(name, seed=4)
    torch.manual_seed(2)
    again, other = (method(name, seed=s) for s in (4, 5))
    heads = [made.student["head"].state_dict() for made in (first, again, other)]
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])
    assert not all(torch.equal(heads[0][key], heads[2][key]) for key in heads[0])
    kinds = [type(module).__name__ for module in first.student["head"].modules()]
    assert not any("BatchNorm" in kind for kind in kinds)
    if name != "supervised":
        widths = [
            m.out_features for m in first.student["head"].modules() if hasattr(m, "out_features")
        ]
        assert widths == [16, 8]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_state_brings_the_same_step_back(name):
    made, crops = method(name), pictures()
    other = method(name, seed=9)
    other.load_state_dict({key: tensor.clone() for key, tensor in made.state_dict().items()})
    parts = micros(crops, slice(None), 1)
    assert take_step(other, parts).loss == take_step(made, parts).loss


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_fp32_under_bf16_autocast(name):
    crops, made = pictures(), method(name)
    parts = micros(crops, slice(None), 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for micro in parts:
            made.look(micro)
        made.settle(3)
        losses = [made.loss(micro) for micro in parts]
    assert all(loss.dtype == torch.float32 for loss in losses)
    got = sum(loss.item() for loss in losses)
    want = take_step(method(name), micros(crops, slice(None), 1)).loss
    assert got == pytest.approx(want, rel=0.05)


@pytest.mark.parametrize("name", ["supcon", "supervised"])
def test_a_batch_without_labels_is_refused_and_one_without_any_known_teaches_nothing(name):
    with pytest.raises(PathfmError, match="without labels"):
        take_step(method(name), micros(pictures(), slice(None), 1, labels=None))
    for count in (1, 2):
        done = take_step(method(name), micros(pictures(), slice(None), count, labels=[-1] * 8))
        assert done.loss == 0
        assert all(float(g.abs().max()) == 0 for g in done.gradients.values())


def test_simclr_with_one_view_is_refused_and_supcon_learns_from_other_samples():
    with pytest.raises(PathfmError, match="one view a sample"):
        take_step(method("simclr"), micros(pictures(1), slice(None), 1))
    done = take_step(method("supcon"), micros(pictures(1), slice(None), 1))
    assert done.loss > 0
    assert done.told["anchors_without_positive"] == pytest.approx(2 / 8)


def test_gradient_caching_embeds_once_more_only_when_it_must():
    calls = []

    def embed(micro):
        calls.append(micro.index)
        return torch.ones(len(micro), 2)

    joint = JointLoss(lambda rows: rows.square().sum())
    for count, looked in ((1, []), (3, [0, 1, 2])):
        calls.clear()
        for micro in micros(pictures(), slice(None), count):
            joint.look(micro, embed)
        assert calls == looked
        joint.settle()


def test_cached_gradients_are_the_losss_by_hand():
    # loss (1a + 2b + 3c + 4d)^2 of rows 1, 2, 3, 4: value 30^2, gradient 60 times 1, 2, 3, 4
    weights = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    joint = JointLoss(lambda rows: (weights * rows).sum().square())
    parts = micros(pictures(batch=4), slice(None), 2, labels=None)
    values = {0: torch.tensor([[1.0], [2.0]]), 1: torch.tensor([[3.0], [4.0]])}
    for micro in reversed(parts):  # their index says where they belong
        joint.look(micro, lambda m: values[m.index])
    joint.settle()
    for micro in parts:
        rows = values[micro.index].clone().requires_grad_()
        loss = joint.loss(micro, rows)
        loss.backward()
        assert loss.item() == pytest.approx(450)
        assert torch.equal(rows.grad, 60 * values[micro.index])


def test_stochastic_depth_is_drawn_for_each_view_and_again_the_same():
    made = method("simclr", drop_path=0.9)
    (picture,) = pictures(1, batch=32)
    (micro,) = micros([picture, picture], slice(None), 1, labels=None)
    with torch.no_grad():
        features = embed_views(made.exported, micro)
        again = embed_views(made.exported, micro)
        made.exported.eval()
        undropped = embed_views(made.exported, micro)
    first, second = features.chunk(2)
    assert torch.equal(features, again)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(*undropped.chunk(2))


# --- the supervised baseline ----------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_its_sum_over_labelled_samples(smoothing):
    settings = SUPERVISED.model_copy(update={"label_smoothing": smoothing})
    made, crops = method("supervised", drop_path=0.0, settings=settings), pictures()
    done = take_step(made, micros(crops, slice(None), 1))
    total, right, n = 0.0, 0, 0
    with torch.no_grad():
        logits = made.student["head"](made.exported.embed(crops[0])).double().tolist()
    for row, label in zip(logits, LABELS, strict=True):
        if label < 0:
            continue
        normaliser = math.log(sum(map(math.exp, row)))
        for k, logit in enumerate(row):  # Szegedy et al. 2016, section 7: u(k) = 1 / K
            target = (1 - smoothing) * (k == label) + smoothing / len(row)
            total -= target * (logit - normaliser)
        right += max(row) == row[label]
        n += 1
    assert done.loss == pytest.approx(total / n, rel=1e-5)
    assert done.told["train_accuracy"] == pytest.approx(right / n)
    assert done.told["labelled_share"] == pytest.approx(7 / 8)
    # nothing of one step is left in the next
    assert take_step(made, micros(crops, slice(None), 1)).told == pytest.approx(done.told)


def test_a_classifier_of_unknown_width_is_refused():
    with pytest.raises(PathfmError, match="n_classes is not known"):
        method("supervised", settings=SupervisedSettings())
