"""Laws over µm/px: as defined, truncated to what each slide serves, and found out when broken."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.optimize import linprog

from online_patching import PatchSampler
from online_patching.corpus import Corpus
from online_patching.errors import SamplerError
from online_patching.sampling.magnification import (
    Continuous,
    MaxAvg,
    MinMax,
    Reach,
    Weighted,
    policy_of,
)
from online_patching.sampling.transfer import transfer
from tests.sampling import ALPHA, N, p_of_counts, p_of_law, three_corpus

LOW, HIGH = 0.25, 2.0
KERNELS = ("info", "abs")
LAWS = [
    Continuous(LOW, HIGH),
    Continuous(LOW, HIGH, "log"),
    *(MaxAvg(LOW, HIGH, kernel) for kernel in KERNELS),
    MaxAvg(LOW, HIGH, temperature=0.2),
    *(MinMax(LOW, HIGH, kernel) for kernel in KERNELS),
]


@pytest.fixture(scope="module")
def three() -> Corpus:
    return three_corpus()


def drawn(three: Corpus, policy, slide: int) -> np.ndarray:
    weights = np.arange(3) == slide
    sampler = PatchSampler(three, size_px=64, mpp=policy, slide_weights=weights, seed=5)
    return sampler.draw_batch(np.arange(N)).mpp


def p_truncated(values: np.ndarray, law, low: float, high: float) -> float:
    """Do values follow `law` given that they lie in [low, high]? Ends with mass of their own are
    counted, what is between is compared with the law."""
    below = np.asarray([law.cdf(np.asarray([low]))[0] if low == law.low else 0.0])[0]
    start, stop = law.cdf(np.asarray([low]))[0], law.cdf(np.asarray([np.nextafter(high, 0)]))[0]
    above = law.cdf(np.asarray([high]))[0] - stop
    inner = values[(values > low) & (values < high)]
    at_low, at_high = (values == low).sum(), (values == high).sum()
    p_ends = p_of_counts([at_low, len(inner), at_high], [below, stop - start, above])
    return min(p_ends, p_of_law(inner, lambda x: (law.cdf(x) - start) / (stop - start)))


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_slide_that_serves_everything_follows_the_law(three, law):
    assert p_truncated(drawn(three, law, 0), law, LOW, HIGH) > ALPHA


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_coarse_slide_follows_the_law_given_what_it_serves(three, law):
    values = drawn(three, law, 2)
    least = (1.1 + 1.14) / 2 / 2 / (1 + 1e-9)
    assert values.min() >= least
    assert p_truncated(values, law, least, HIGH) > ALPHA


def test_that_test_fails_on_clipping_and_on_another_law(three, monkeypatch):
    law = Continuous(LOW, HIGH)
    least = (1.1 + 1.14) / 2 / 2 / (1 + 1e-9)
    assert p_truncated(drawn(three, law, 2), law, least, HIGH) > ALPHA
    assert p_truncated(drawn(three, law, 2), Continuous(LOW, HIGH, "log"), least, HIGH) < ALPHA
    for one, other in ((0, 1), (2, 3), (2, 4), (5, 6), (2, 0)):
        assert p_truncated(drawn(three, LAWS[one], 0), LAWS[other], LOW, HIGH) < ALPHA
    monkeypatch.setattr(
        Continuous, "draw", lambda self, u, reach: np.maximum(self.quantile(u), reach.least_mpp)
    )
    assert p_truncated(drawn(three, law, 2), law, least, HIGH) < ALPHA


# --- the paper's laws ---------------------------------------------------------------------------


def signal(law, y: float, n: int = 200_000) -> float:
    """S(y): the mean of K(x, y) over the law, by its quantiles."""
    x = law.quantile((np.arange(n) + 0.5) / n)
    return float(transfer(law.kernel, x, np.full(n, y)).mean())


def test_kernels_are_those_of_the_paper():
    assert transfer("info", np.asarray([0.5]), np.asarray([2.0]))[0] == (0.5 / 2.0) ** 2
    assert transfer("info", np.asarray([2.0]), np.asarray([0.5]))[0] == (0.5 / 2.0) ** 2
    assert transfer("abs", np.asarray([0.5]), np.asarray([2.0]))[0] == 1 / 2.5


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("low", "high"), [(0.25, 2.0), (0.1, 7.0), (0.9, 1.0)])
def test_minmax_serves_all_mpp_alike_and_nothing_serves_the_worst_better(kernel, low, high):
    law = MinMax(low, high, kernel)
    y = np.linspace(low, high, 41)
    signals = np.asarray([signal(law, v) for v in y])
    assert np.ptp(signals) < 1e-4
    # The linear program of the paper (Eq. 11) on a grid of 160 µm/px.
    grid = np.geomspace(low, high, 160)
    table = transfer(kernel, grid[:, None], grid[None, :])
    answer = linprog(
        np.r_[np.zeros(160), -1.0],
        A_ub=np.c_[-table, np.ones(160)], b_ub=np.zeros(160),
        A_eq=np.r_[np.ones(160), 0.0][None], b_eq=[1.0],
        bounds=[(0, None)] * 160 + [(None, None)],
    )  # fmt: skip
    # Fewer points to serve: the program is a little better off.
    assert signals.min() == pytest.approx(answer.x[-1], rel=3e-3)
    assert signals.min() <= answer.x[-1] + 1e-6


def test_minmax_of_the_information_kernel_is_the_closed_form():
    law = MinMax(LOW, HIGH)
    length = np.log(8)
    assert signal(law, 0.7) == pytest.approx(1 / (1 + length), rel=1e-4)
    x = law.quantile((np.arange(N) + 0.5) / N)
    assert (x == LOW).mean() == pytest.approx(0.5 / (1 + length), abs=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("temperature", [1.0, 0.15])
def test_maxavg_is_the_exponential_of_the_total_transfer(kernel, temperature):
    law = MaxAvg(LOW, HIGH, kernel, temperature)

    def density(x):
        k, _ = quad(
            lambda y: float(transfer(kernel, np.asarray(x), np.asarray(y))), LOW, HIGH, points=[x]
        )
        return np.exp(k / temperature)

    whole, _ = quad(density, LOW, HIGH)
    for x in (0.3, 0.8, 1.4, 1.9):
        part, _ = quad(density, LOW, x)
        assert law.cdf(np.asarray([x]))[0] == pytest.approx(part / whole, abs=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_maxavg_has_the_best_average_plus_entropy(kernel):
    """Against laws in its neighbourhood, on a grid: the objective of Eq. 5."""
    grid = np.linspace(LOW, HIGH, 801)
    law, step = MaxAvg(LOW, HIGH, kernel), grid[1] - grid[0]
    p = np.diff(law.cdf(grid)) / step
    middle = (grid[1:] + grid[:-1]) / 2
    table = transfer(kernel, middle[:, None], middle[None, :])

    def objective(density):
        average = (density[:, None] * table).sum() * step * step
        return average - law.temperature * (density * np.log(density)).sum() * step

    for wave in (1, 2, 5):
        bump = np.cos(np.linspace(0, np.pi * wave, len(p)))
        for size in (0.02, -0.02):
            other = p * (1 + size * (bump - (p * bump).sum() * step))
            assert objective(p) > objective(other / (other.sum() * step))


# --- what slides serve --------------------------------------------------------------------------

SIDES = np.log2([16.0, 64.0, 256.0, 1024.0])


def reach(rich, least=0.0, least_share=0.4) -> Reach:
    table = np.atleast_2d(np.asarray(rich, np.float32))
    return Reach(
        np.broadcast_to(np.asarray(least, float), len(table)), table, SIDES, 100, least_share
    )


def test_pieces_are_where_the_interpolated_share_reaches_the_threshold():
    """A slide with a hole in what it serves, against a fine scan."""
    one = reach([0.8, 0.2, 0.5, 0.1], least=0.2)
    scan = np.linspace(0.1, 4, 40_001)
    served = one.serves(scan)[0]
    start, stop = (edges[0] for edges in one.pieces(0.1, 4))
    inside = ((scan[:, None] >= start) & (scan[:, None] <= stop)).any(axis=1)
    assert (inside == served).mean() > 0.9999
    assert len(Continuous(0.1, 4).served(one)[0]) == 2


def test_draws_fall_into_the_pieces_and_nowhere_else():
    one = reach([0.8, 0.2, 0.5, 0.1], least=0.2)
    law, u = Continuous(0.1, 4.0, "log"), (np.arange(N) + 0.5) / N
    values = law.draw(
        u, one._replace(least_mpp=np.repeat(one.least_mpp, N), rich=np.repeat(one.rich, N, axis=0))
    )
    assert one.serves(np.unique(values))[0].all()
    (a, b), (c, d) = law.served(one)[0]
    expected = np.log(b / a) / (np.log(b / a) + np.log(d / c))
    assert (values <= b).mean() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("policy", [Weighted((0.3, 1.0, 4.0)), *LAWS], ids=str)
def test_servable_is_whether_anything_can_be_drawn(policy):
    rich = np.random.default_rng(2).uniform(0, 1, (500, 4)) ** 2
    many = reach(rich, least=np.linspace(0.01, 3, 500), least_share=0.35)
    assert policy.servable(many).tolist() == [bool(x) for x in policy.served(many)]
    can = np.flatnonzero(policy.servable(many))
    assert 50 < len(can) < 450
    some = Reach(many.least_mpp[can], many.rich[can], *many[2:])
    for u in (0.0, 0.5, 1 - 2.0**-53):
        values = policy.draw(np.full(len(can), u), some)
        for i, value in enumerate(values):
            one = Reach(some.least_mpp[i : i + 1], some.rich[i : i + 1], *some[2:])
            assert one.serves(np.asarray([value]))[0, 0]


def test_an_end_with_mass_of_its_own_needs_a_slide_that_serves_it():
    law = MinMax(LOW, HIGH)
    fine, coarse = reach([1, 1, 1, 1]), reach([1, 1, 1, 1], least=0.5)
    assert law.draw(np.asarray([0.0]), fine)[0] == LOW
    assert law.draw(np.asarray([0.1]), fine)[0] == LOW
    assert law.draw(np.asarray([0.0]), coarse)[0] == 0.5
    assert law.draw(np.asarray([0.999]), coarse)[0] == HIGH


# --- values -------------------------------------------------------------------------------------


def test_policies_are_values():
    assert policy_of(0.5) == Weighted((0.5,))
    assert policy_of([0.25, 1], [3, 1]) == Weighted((0.25, 1.0), (3.0, 1.0))
    assert policy_of(LAWS[0]) is LAWS[0]
    assert len({str(law.config) for law in LAWS}) == len(LAWS)
    assert {LAWS[0], Continuous(LOW, HIGH)} == {LAWS[0]}


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Continuous(2.0, 0.25),
        lambda: Continuous(0.0, 1.0),
        lambda: Continuous(0.25, float("inf")),
        lambda: Continuous(0.25, 2.0, "flat"),
        lambda: MaxAvg(0.25, 2.0, "kernel"),
        lambda: MaxAvg(0.25, 2.0, temperature=0.0),
        lambda: MinMax(0.25, 2.0, "none"),
        lambda: Weighted(()),
        lambda: Weighted((0.5, -1.0)),
        lambda: Weighted((0.5,), (0.0,)),
        lambda: policy_of(LAWS[0], [1.0]),
    ],
)
def test_senseless_policies_are_refused(bad):
    with pytest.raises(SamplerError):
        bad()


def test_values_are_multiples_that_no_last_bit_of_log_or_exp_can_move(three):
    values = drawn(three, Continuous(LOW, HIGH, "log"), 0)
    assert (values * 2**24 == np.floor(values * 2**24)).all()
