"""SupCon's losses: the paper's sums in float64, three libraries, hand-worked values, properties."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import NTXentLoss

from pathfm.losses.sphere import sphere_facts, sphere_sums
from pathfm.losses.supcon import n_anchors, positive_pairs, supcon_loss
from pathfm.runtime import PathfmError

LABELS = [0, 0, 1, 1, 0, 2, -1, -1, 1, 3, 3]


def points(n=11, d=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, generator=generator, dtype=dtype), dim=1)


def papers_sums(z, labels, temperature, kind):
    """Eq. 2 and 3, anchor by anchor; the mean over anchors with a positive. No label: -1."""
    rows, total, anchors = range(len(z)), 0.0, 0
    for i in rows:
        positives = [p for p in rows if p != i and labels[p] == labels[i] >= 0]
        if not positives:
            continue
        anchors += 1
        e = {
            a: math.exp(sum(x * y for x, y in zip(z[i], z[a], strict=True)) / temperature)
            for a in rows
            if a != i
        }
        everything = sum(e.values())
        if kind == "out":
            total -= sum(math.log(e[p] / everything) for p in positives) / len(positives)
        else:
            total -= math.log(sum(e[p] for p in positives) / len(positives) / everything)
    return total / max(anchors, 1)


@pytest.mark.parametrize("kind", ["out", "in"])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_both_losses_are_the_papers_sums(kind, temperature):
    z, labels = points(), torch.tensor(LABELS)
    want = papers_sums(z.tolist(), LABELS, temperature, kind)
    assert float(supcon_loss(z, labels, temperature, kind)) == pytest.approx(want, rel=1e-12)
    single = supcon_loss(z.float(), labels, temperature, kind)
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_one_label_a_sample_is_lightlys_nt_xent(temperature):
    first, second = points(7, seed=1), points(7, seed=2)
    want = float(NTXentLoss(temperature)(first, second))
    labels = torch.arange(7).repeat(2)
    for kind in ("out", "in"):
        got = float(supcon_loss(torch.cat([first, second]), labels, temperature, kind))
        assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.slow  # its import
def test_l_out_is_that_of_pytorch_metric_learning():
    from pytorch_metric_learning.losses import SupConLoss

    z = (3 * points(12)).requires_grad_()  # it normalises by itself: so does the comparison
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 0])  # 3 and 4 have no positive
    want = SupConLoss(temperature=0.1)(z, labels)
    (want_gradient,) = torch.autograd.grad(want, z)
    got = supcon_loss(F.normalize(z, dim=1), labels, 0.1)
    (gradient,) = torch.autograd.grad(got, z)
    assert got.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=1e-8)


def test_values_by_hand():
    # three unit vectors, a and b of one class: a.b = 0, a.c = -1, b.c = 0, temperature 1
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([5, 5, 7])
    of_a = math.log(1 + math.exp(-1))  # -log(e^0 / (e^0 + e^-1))
    of_b = math.log(2)  # -log(e^0 / (e^0 + e^0))
    for kind in ("out", "in"):
        assert float(supcon_loss(z, labels, 1.0, kind)) == pytest.approx((of_a + of_b) / 2)
    # all of one class: positives of a have cosines 0 and -1, and are all there is
    one = torch.tensor([5, 5, 5])
    assert float(supcon_loss(z, one, 1.0, "in")) == pytest.approx(math.log(2))
    ends = (0 + 1) / 2 + math.log(1 + math.exp(-1))
    assert float(supcon_loss(z, one, 1.0)) == pytest.approx((2 * ends + math.log(2)) / 3)
    # a collapse: every cosine alike, so log of the number of others
    same = torch.ones(6, 4) / 2
    assert float(supcon_loss(same, torch.tensor([0, 0, 1, 1, 2, 2]), 0.1)) == pytest.approx(
        math.log(5)
    )


@pytest.mark.parametrize("kind", ["out", "in"])
def test_gradients_are_those_of_finite_differences(kind):
    labels = torch.tensor(LABELS)
    assert torch.autograd.gradcheck(
        lambda z: supcon_loss(z, labels, 0.3, kind), (points().requires_grad_(),)
    )


@given(
    st.lists(st.integers(-1, 3), min_size=2, max_size=14),
    st.floats(0.03, 5),
    st.integers(0, 999),
)
@settings(max_examples=80, deadline=None)
def test_l_in_never_exceeds_l_out(labels, temperature, seed):
    z, classes = points(len(labels), 4, seed), torch.tensor(labels)
    inside = float(supcon_loss(z, classes, temperature, "in"))
    outside = float(supcon_loss(z, classes, temperature, "out"))
    assert inside <= outside + 1e-9
    positives = positive_pairs(classes, slice(None)).sum(1)
    if int(positives.max()) <= 1:
        assert inside == pytest.approx(outside)
    assert int(n_anchors(classes)) == int((positives > 0).sum())


@pytest.mark.parametrize("kind", ["out", "in"])
def test_the_order_of_rows_does_not_matter(kind):
    z, labels = points(), torch.tensor(LABELS)
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        supcon_loss(z[order], labels[order], 0.1, kind), supcon_loss(z, labels, 0.1, kind)
    )


@pytest.mark.parametrize("kind", ["out", "in"])
def test_parts_of_the_anchors_average_to_the_whole_however_positives_fall(kind):
    z = points(12).requires_grad_()
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 3, 4, -1, -1, 4, 5])  # 4, 1 and 1 anchors a part
    whole = supcon_loss(z, labels, 0.2, kind)
    parts = [supcon_loss(z, labels, 0.2, kind, slice(k, k + 4)) for k in (0, 4, 8)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    (want,) = torch.autograd.grad(whole, z)
    (got,) = torch.autograd.grad(torch.stack(parts).mean(), z)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["out", "in"])
def test_rows_without_a_label_are_negatives_and_never_positives(kind):
    z = points(6)
    labels = torch.tensor([0, 0, 1, 1, -1, -1])
    with_them = supcon_loss(z, labels, 0.1, kind)
    as_strangers = supcon_loss(z, torch.tensor([0, 0, 1, 1, 8, 9]), 0.1, kind)
    without = supcon_loss(z[:4], labels[:4], 0.1, kind)
    torch.testing.assert_close(with_them, as_strangers)
    assert float(with_them) > float(without)


@pytest.mark.parametrize("kind", ["out", "in"])
@pytest.mark.parametrize("labels", [[-1, -1, -1], [0, 1, 2], [0, 1, -1]])
def test_a_batch_without_any_positive_is_zero_with_a_gradient_of_zero(kind, labels):
    z = points(3, dtype=torch.float32).requires_grad_()
    loss = supcon_loss(z, torch.tensor(labels), 0.1, kind)
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


@pytest.mark.parametrize("kind", ["out", "in"])
@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e3, 1e30])
def test_extreme_temperatures_stay_finite(kind, temperature):
    z = points(dtype=torch.float32)
    z[3] = z[2]
    z.requires_grad_()
    loss = supcon_loss(z, torch.tensor(LABELS), temperature, kind)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("kind", ["out", "in"])
def test_the_loss_is_fp32_under_bf16_autocast(kind):
    z, labels = points(dtype=torch.float32), torch.tensor(LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = supcon_loss(z, labels, 0.07, kind)
    assert under.dtype == torch.float32
    assert torch.equal(under, supcon_loss(z, labels, 0.07, kind))


def test_a_gradient_step_pulls_a_class_together_and_others_apart():
    z, labels = points(8, 6), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(supcon_loss(z, labels, 0.1), z)
    after = F.normalize(z - 0.05 * gradient, dim=1)
    cosines = [(x @ x.T)[~torch.eye(8, dtype=torch.bool)].view(8, 7) for x in (z, after)]
    same = positive_pairs(labels, slice(None))[~torch.eye(8, dtype=torch.bool)].view(8, 7)
    assert cosines[1][same].mean() > cosines[0][same].mean()
    assert cosines[1][~same].mean() < cosines[0][~same].mean()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"z": points(1), "labels": torch.tensor([0])}, "N >= 2"),
        ({"labels": torch.tensor([0, 1])}, "as many integer labels"),
        ({"labels": torch.tensor(LABELS).float()}, "integer labels"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": math.nan}, "above 0"),
        ({"kind": "both"}, "choose 'out' or 'in'"),
    ],
)
def test_what_cannot_be_computed_is_refused(given, message):
    asked = {"z": points(), "labels": torch.tensor(LABELS), "temperature": 0.1} | given
    with pytest.raises(PathfmError, match=message):
        supcon_loss(**asked)


# --- alignment and uniformity ---------------------------------------------------------------------


def test_the_figures_of_the_sphere_are_those_of_loops_and_add_up_over_parts():
    z, labels = points(dtype=torch.float32), LABELS
    n, rows = len(z), z.double().tolist()
    squared = [[math.dist(a, b) ** 2 for b in rows] for a in rows]
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    positive = [(i, j) for i, j in pairs if labels[i] == labels[j] >= 0]
    want = {
        "alignment": sum(squared[i][j] for i, j in positive) / len(positive),
        "uniformity": math.log(sum(math.exp(-2 * squared[i][j]) for i, j in pairs) / len(pairs)),
        "positives_per_anchor": len(positive) / n,
        "anchors_without_positive": 3 / n,  # the class of one, and the two without a class
    }
    classes = torch.tensor(labels)
    parts = [sphere_sums(z, classes, s) for s in (slice(0, 4), slice(4, 5), slice(5, n))]
    for sums in (sphere_sums(z, classes, slice(0, n)), torch.stack(parts).sum(0)):
        facts = sphere_facts(sums)
        assert {name: float(v) for name, v in facts.items()} == pytest.approx(want, rel=1e-5)


def test_a_collapse_and_an_even_circle_have_the_uniformity_known():
    labels = torch.arange(8)
    one = sphere_facts(sphere_sums(torch.eye(1, 3).expand(8, 3), labels, slice(0, 8)))
    assert float(one["uniformity"]) == pytest.approx(0, abs=1e-6)
    assert math.isnan(float(one["alignment"]))
    cross = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    facts = sphere_facts(sphere_sums(cross, torch.tensor([0, 0, 1, 1]), slice(0, 4)))
    # each point has two at squared distance 2 and one at 4, which is its only positive
    assert float(facts["uniformity"]) == pytest.approx(
        math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    )
    assert float(facts["alignment"]) == pytest.approx(4)
