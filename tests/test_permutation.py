"""A keyed permutation is one to one, and looks like a random one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_patching.philox import words
from online_patching.sampling import permutation
from online_patching.sampling.permutation import permuted
from tests.sampling import ALPHA, N, p_of_counts


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_every_number_comes_once(n, seed, turn):
    assert sorted(permuted(np.arange(n), n, seed, turn).tolist()) == list(range(n))


def test_a_number_goes_where_it_goes_in_any_company():
    whole = permuted(np.arange(1000), 1000, 5, 3)
    assert [permuted([i], 1000, 5, 3)[0] for i in (0, 1, 999)] == whole[[0, 1, 999]].tolist()
    mixed = permuted([7, 7], 1000, 5, [3, 4])
    assert mixed[0] == whole[7] != mixed[1]


def test_very_many_numbers_stay_in_range_and_apart():
    n = 10**12 + 39
    got = permuted(np.arange(50_000) * (n // 50_000), n, 1)
    assert len(set(got.tolist())) == 50_000
    assert 0 <= got.min() < got.max() < n


def p_places(n: int, turns: int = N) -> float:
    """Where 0, n // 2 and n - 1 go in many orders: everywhere equally often?"""
    starts = (0, n // 2, n - 1)
    got = [permuted(np.full(turns, start), n, 3, np.arange(turns)) for start in starts]
    return min(p_of_counts(np.bincount(one, minlength=n), np.ones(n)) for one in got)


def p_pairs(n: int, turns: int = N) -> float:
    """The ordered pairs that (0, 1) goes to: all n * (n - 1) equally often?"""
    first, second = (permuted(np.full(turns, i), n, 3, np.arange(turns)) for i in (0, 1))
    counts = np.bincount(first * n + second, minlength=n * n)
    return p_of_counts(counts, 1 - np.eye(n).ravel())


def p_neighbours(n: int) -> float:
    """The step from one number's place to the next one's, modulo n, in 100 groups."""
    order = permuted(np.arange(n), n, 9)
    return p_of_counts(np.bincount(np.diff(order) % n * 100 // n, minlength=100), np.ones(100))


@pytest.mark.parametrize("n", [2, 3, 7, 30, 1000])
def test_every_place_is_equally_likely(n):
    assert p_places(n) > ALPHA


@pytest.mark.parametrize("n", [3, 6, 13, 40])
def test_pairs_are_equally_likely(n):
    assert p_pairs(n) > ALPHA


def test_neighbours_do_not_stay_together():
    assert p_neighbours(N) > ALPHA


def test_those_tests_fail_on_a_shift_and_on_few_rounds(monkeypatch):
    def shift(here, a, b, seed, turn):
        return (here + words(seed, turn, 0, 9, 1).astype(np.int64)[:, 0]) % (a * b)

    monkeypatch.setattr(permutation, "_once", shift)
    assert p_pairs(6) < ALPHA
    assert p_neighbours(N) < ALPHA
    monkeypatch.undo()
    monkeypatch.setattr(permutation, "ROUNDS_BELOW_1000", 4)
    assert p_pairs(6) < ALPHA


def test_golden_orders():
    """A change here changes every resumed epoch."""
    assert permuted(np.arange(10), 10, 1).tolist() == [7, 6, 9, 4, 0, 3, 2, 5, 1, 8]
    assert permuted(np.arange(5), 10**9, 2, 3).tolist() == [
        927685735,
        960131055,
        619533822,
        203936852,
        697167029,
    ]


@pytest.mark.parametrize(("places", "n"), [([3], 3), ([-1], 3), ([0], 0)])
def test_places_outside_are_refused(places, n):
    with pytest.raises(ValueError, match=r"lie in|cannot be"):
        permuted(places, n, 0)
