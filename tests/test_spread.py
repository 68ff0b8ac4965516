"""KoLeo and KDE: loops in float64, lightly's KoLeo, and the sign that must not be wrong."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lightly.loss import KoLeoLoss

from pathfm.losses.spread import kde, koleo
from pathfm.runtime import PathfmError

TERMS = {"koleo": koleo, "kde": lambda z: kde(z, 5.0), "kde sharp": lambda z: kde(z, 50.0)}


def rows(n=8, d=5, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(row):
    length = math.sqrt(sum(v * v for v in row))
    return [v / length for v in row]


def koleo_loop(z):
    """Sablayrolles et al. 2019, point by point."""
    z = [unit(row) for row in z]
    total = 0.0
    for i, a in enumerate(z):
        nearest = min(math.dist(a, b) for j, b in enumerate(z) if j != i)
        total -= math.log(nearest + 1e-8)
    return total / len(z)


def kde_loop(z, kappa):
    """The mean log of a kernel density, point by point."""
    z = [unit(row) for row in z]
    total = 0.0
    for i, a in enumerate(z):
        kernels = [
            math.exp(kappa * (sum(x * y for x, y in zip(a, b, strict=True)) - 1))
            for j, b in enumerate(z)
            if j != i
        ]
        total += math.log(sum(kernels) / len(kernels))
    return total / len(z)


def mean_cosine(z):
    z = F.normalize(z, dim=1)
    n = len(z)
    return float(((z @ z.T).sum() - n) / (n * (n - 1)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_koleo_is_the_papers_loop_and_lightlys(seed):
    z = rows(seed=seed)
    assert float(koleo(z)) == pytest.approx(koleo_loop(z.tolist()), rel=1e-12)
    assert float(koleo(z.float())) == pytest.approx(koleo_loop(z.tolist()), rel=1e-5)
    assert float(koleo(z)) == pytest.approx(float(KoLeoLoss()(z)), rel=1e-6)


@pytest.mark.parametrize("kappa", [0.1, 5.0, 200.0])
def test_kde_is_its_loop(kappa):
    z = rows()
    assert float(kde(z, kappa)) == pytest.approx(kde_loop(z.tolist(), kappa), rel=1e-12)
    assert float(kde(z.float(), kappa)) == pytest.approx(kde_loop(z.tolist(), kappa), rel=1e-5)


def test_values_by_hand():
    # two opposite points and one at a right angle: distances 2 and the root of 2
    z = torch.tensor([[2.0, 0.0], [-3.0, 0.0], [0.0, 0.5]])
    assert float(koleo(z)) == pytest.approx(-math.log(2) / 2, rel=1e-6)
    two = math.log((math.exp(-2 * 5) + math.exp(-5)) / 2)
    assert float(kde(z, 5.0)) == pytest.approx((2 * two - 5) / 3, rel=1e-6)
    assert float(kde(torch.ones(4, 3), 5.0)) == pytest.approx(0, abs=1e-6)
    assert float(kde(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 5.0)) == pytest.approx(-10)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("spread", [0.01, 0.3, 1.0])
def test_one_gradient_step_on_the_term_alone_lowers_the_mean_cosine(name, spread):
    # near a collapse (all rows almost one), half way, and a cloud pushed to one side
    towards = torch.zeros(16, 8)
    towards[:, 0] = 1.0
    z = (towards + spread * rows(16, 8, dtype=torch.float32)).requires_grad_()
    value = TERMS[name](z)
    (gradient,) = torch.autograd.grad(value, z)
    step = 0.05 * spread / float(gradient.norm(dim=1).mean())
    after = (z - step * gradient).detach()
    assert mean_cosine(after) < mean_cosine(z.detach())
    assert float(TERMS[name](after)) < float(value.detach())
    assert mean_cosine((z + step * gradient).detach()) > mean_cosine(z.detach())


@pytest.mark.parametrize("name", TERMS)
def test_spreading_a_cluster_lowers_the_term(name):
    centre, noise = rows(1, 6, seed=3), rows(20, 6, seed=4)
    values = [float(TERMS[name](centre + s * noise)) for s in (0.01, 0.1, 0.5, 3.0)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("name", TERMS)
def test_gradients_are_those_of_finite_differences(name):
    assert torch.autograd.gradcheck(TERMS[name], (rows().requires_grad_(),))


@pytest.mark.parametrize("name", TERMS)
def test_equal_rows_give_finite_values_and_gradients(name):
    z = rows(dtype=torch.float32)
    z[3] = z[1]
    z[5] = 0.0
    z.requires_grad_()
    value = TERMS[name](z)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("name", TERMS)
def test_terms_are_fp32_under_autocast_and_do_not_depend_on_lengths_or_order(name):
    z = rows(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = TERMS[name](z)
    assert under.dtype == torch.float32
    assert torch.equal(under, TERMS[name](z))
    lengths = torch.arange(1.0, 9.0)[:, None]
    torch.testing.assert_close(TERMS[name](z * lengths), under)
    torch.testing.assert_close(TERMS[name](z.flip(0)), under)
    assert TERMS[name](z.bfloat16()).dtype == torch.float32


@given(st.integers(2, 12), st.integers(1, 6), st.floats(0.01, 100), st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_kde_lies_within_its_bounds(n, d, kappa, seed):
    value = float(kde(rows(n, d, seed), kappa))
    assert -2 * kappa - 1e-6 <= value <= 1e-6


@pytest.mark.parametrize("name", TERMS)
def test_one_row_is_refused(name):
    with pytest.raises(PathfmError, match="two or more rows"):
        TERMS[name](rows(1))


def test_a_concentration_of_zero_is_refused():
    with pytest.raises(PathfmError, match="concentration is 0"):
        kde(rows(), 0)
