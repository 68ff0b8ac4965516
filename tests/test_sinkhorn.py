"""Sinkhorn-Knopp: the loop of SwAV in float64, its marginals, and rows spread over ranks."""

import math

import pytest
import torch

from pathfm.losses import sinkhorn as module
from pathfm.losses.sinkhorn import sinkhorn
from pathfm.runtime import PathfmError
from tests.rank_threads import run_ranks


def scores(n=7, k=5, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, k, generator=generator, dtype=torch.float64)


def swavs_loop(s, temperature, iterations):
    """SwAV's listing (appendix A), number by number: Q is K x B there, samples are columns."""
    b, k = len(s), len(s[0])
    q = [[math.exp(s[i][j] / temperature) for i in range(b)] for j in range(k)]
    total = sum(map(sum, q))
    q = [[v / total for v in row] for row in q]
    for _ in range(iterations):
        q = [[v / (sum(row) * k) for v in row] for row in q]
        sums = [sum(q[j][i] for j in range(k)) for i in range(b)]
        q = [[q[j][i] / (sums[i] * b) for i in range(b)] for j in range(k)]
    return [[q[j][i] * b for j in range(k)] for i in range(b)]


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("temperature", [0.04, 1.0])
def test_assignments_are_those_of_swavs_loop(temperature, iterations):
    s = scores()
    want = torch.tensor(swavs_loop(s.tolist(), temperature, iterations), dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(s, temperature, iterations), want, rtol=1e-9, atol=1e-15)
    single = sinkhorn(s.float(), temperature, iterations)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), want, rtol=1e-3, atol=1e-6)


def test_two_samples_that_want_one_prototype_share_by_hand():
    # equal rows: scaling the columns leaves each row even, whatever the scores say
    s = torch.tensor([[3.0, 0.0], [3.0, 0.0]])
    torch.testing.assert_close(sinkhorn(s, 1.0, 1), torch.full((2, 2), 0.5))


def test_rows_sum_to_one_and_columns_to_their_share():
    q = sinkhorn(scores(60, 6).float(), 0.3, 100)
    torch.testing.assert_close(q.sum(1), torch.ones(60))
    torch.testing.assert_close(q.sum(0), torch.full((6,), 10.0), rtol=1e-3, atol=0)
    rough = sinkhorn(scores(60, 6).float(), 0.3, 3)
    torch.testing.assert_close(rough.sum(1), torch.ones(60))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_scores_far_apart_stay_finite(scale):
    q = sinkhorn(scores(9, 4, scale=scale).float(), 0.01)
    assert torch.isfinite(q).all()
    torch.testing.assert_close(q.sum(1), torch.ones(9))


def test_a_prototype_nobody_likes_gets_its_share_where_exponentials_would_vanish():
    s = scores(8, 4).float()
    s[:, 2] -= 50.0  # at temperature 0.1 that is e^-500
    torch.testing.assert_close(
        sinkhorn(s, 0.1, 50).sum(0), torch.full((4,), 2.0), rtol=1e-2, atol=0
    )


def test_ranks_with_unequal_rows_get_the_rows_of_the_whole(monkeypatch):
    s = scores(8, 5).float()
    whole, cuts = sinkhorn(s, 0.1), (0, 5, 5, 8)

    def work(rank):
        return sinkhorn(s[cuts[rank] : cuts[rank + 1]], 0.1)

    parts = run_ranks(monkeypatch, 3, work)
    assert [len(part) for part in parts] == [5, 0, 3]
    torch.testing.assert_close(torch.cat(parts), whole)
    alone = sinkhorn(s[:5], 0.1)
    assert (alone - whole[:5]).abs().max() > 0.01  # or the test could not see ranks


@pytest.mark.parametrize("slab", [1, 10, 21])
def test_slabs_change_nothing(slab, monkeypatch):
    want = sinkhorn(scores(), 0.1)
    monkeypatch.setattr(module, "SLAB_ELEMENTS", slab)
    torch.testing.assert_close(sinkhorn(scores(), 0.1), want)


def test_scores_are_left_as_they_were():
    for given in (scores(), scores().float()):
        before = given.clone()
        sinkhorn(given, 1.0)
        assert torch.equal(given, before)


def test_no_gradient_flows_and_autocast_changes_nothing():
    s = scores().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = sinkhorn(s, 0.1)
    assert not q.requires_grad
    assert torch.equal(q, sinkhorn(s, 0.1))


@pytest.mark.parametrize(
    ("temperature", "iterations"), [(0.0, 3), (-1.0, 3), (math.nan, 3), (1, 0)]
)
def test_what_cannot_be_computed_is_refused(temperature, iterations):
    with pytest.raises(PathfmError, match="must be above 0"):
        sinkhorn(scores(), temperature, iterations)
