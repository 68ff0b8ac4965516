"""Schedules against values worked out by hand."""

import pytest

from pathfm.schedules import cosine, linear, warmup_cosine


@pytest.mark.parametrize(
    ("step", "value"),
    [(0, 0.99), (1, 0.99 + 0.01 * (2 - 2**0.5) / 4), (2, 0.995), (4, 1.0), (5, 1.0), (99, 1.0)],
)
def test_the_ema_momentum_follows_half_a_cosine_over_five_steps(step, value):
    # cos(pi/4) = sqrt(2)/2, cos(pi/2) = 0, cos(pi) = -1
    assert cosine(0.99, 1.0, step, 5) == pytest.approx(value, abs=1e-12)


def test_weight_decay_rises_along_the_same_cosine():
    assert [round(cosine(0.04, 0.4, step, 3), 12) for step in range(3)] == [0.04, 0.22, 0.4]


@pytest.mark.parametrize(
    ("step", "value"), [(0, 0.0), (5, 4e-4), (9, 7.2e-4), (10, 8e-4), (15, 4.05e-4), (20, 1e-5)]
)
def test_warm_up_then_cosine(step, value):
    # ten steps up to 8e-4, then eleven steps (10..20) down to 1e-5, half-way at 15
    assert warmup_cosine(8e-4, 1e-5, step, 21, 10) == pytest.approx(value, abs=1e-12)


def test_without_warm_up_the_first_step_has_the_peak():
    assert warmup_cosine(1.0, 0.0, 0, 10, 0) == 1.0


def test_a_warm_up_as_long_as_the_run_never_divides_by_zero():
    assert [warmup_cosine(1.0, 0.0, step, 4, 4) for step in range(4)] == [0.0, 0.25, 0.5, 0.75]


def test_one_step_is_its_start():
    assert cosine(3.0, 5.0, 0, 1) == 3.0


def test_a_line_and_its_flat_end():
    assert [linear(0.04, 0.07, step, 3) for step in (0, 3, 9)] == [0.04, 0.07, 0.07]
    assert linear(0.04, 0.07, 1, 3) == pytest.approx(0.05)
    assert linear(0.04, 0.07, 0, 0) == 0.07
