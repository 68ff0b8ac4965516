"""What a ledger counts and decides: a function of the stream alone, however it was cut, and bounded."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from online_patching import errors
from online_patching.loading.batch import Failure
from online_patching.loading.ledger import (
    LOST,
    MAX_NAMED,
    MAX_QUARANTINED,
    MAX_WATCHED,
    Ledger,
    Rule,
)
from online_patching.sampling.sampler import Draws

RULE = Rule(quarantine_after=3, window_draws=64)


class Slides:
    """Draw d, attempt a chooses slide (d * 7 + a * 3) % n: enough of a sampler for a ledger."""

    def __init__(self, n: int) -> None:
        self.n = n

    def draw_batch(self, draws: Any, attempt: Any = 0, barred: Any = None) -> Draws:
        draw = np.atleast_1d(np.asarray(draws, np.int64))
        tried = np.broadcast_to(np.asarray(attempt, np.int64), draw.shape).copy()
        slide = (draw * 7 + tried * 3) % self.n
        for row, start in (barred or {}).items():
            for i in np.flatnonzero((slide == row) & (draw >= start)):
                while slide[i] in barred and draw[i] >= barred[slide[i]]:
                    tried[i] += 1
                    slide[i] = (draw[i] * 7 + tried[i] * 3) % self.n
        zero = np.zeros(len(draw), np.int64)
        return Draws(draw, tried, slide, zero.astype(float), zero, zero, zero)


def stream_of_failures(source: Slides, bad: set[int], draws: int) -> list[Failure]:
    """What fails when every patch on `bad` slides does, without quarantine."""
    out = []
    for draw in range(draws):
        attempt = 0
        while (row := (draw * 7 + attempt * 3) % source.n) in bad:
            out.append(Failure(draw, attempt, f"s{row}", "TileDecodeError: tile 3"))
            attempt += 1
    return out


def run(
    failures: list[Failure], source: Any, cuts: list[int], end: int, through_json: bool
) -> Ledger:
    ledger, at = Ledger(RULE), 0
    for cut in [*sorted(cuts), end]:
        part = [f for f in failures if at <= f.draw < cut]
        ledger = ledger.after(part[::-1]).decided(cut, source)  # in any order
        if through_json:
            ledger = Ledger.from_json(json.loads(json.dumps(ledger.as_json(cut))))
        at = cut
    return ledger


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(5, 40),
    bad=st.sets(st.integers(0, 39), max_size=6),
    cuts=st.lists(st.integers(1, 299), max_size=12),
    through_json=st.booleans(),
)
def test_a_ledger_does_not_depend_on_how_the_stream_was_cut(n, bad, cuts, through_json):
    """Steps are no longer than a window: cut at their ends too."""
    source = Slides(n)
    bad = {row for row in bad if row < n - 2}
    failures = stream_of_failures(source, bad, 300) if len(bad) < n - 2 else []
    whole = run(failures, source, list(range(1, 300)), 300, False)
    parts = run(failures, source, cuts + list(range(64, 300, 64)), 300, through_json)
    assert parts.as_json(300) == whole.as_json(300)
    assert parts.barred == whole.barred


def test_a_slide_is_quarantined_from_the_window_after_the_next():
    failures = stream_of_failures(Slides(8), {2}, 64)
    before = Ledger(RULE).after(failures).decided(63, Slides(8))
    assert before.barred == {}
    after = before.decided(64, Slides(8))
    assert after.barred == {2: 128}
    (quarantine,) = after.quarantined
    assert quarantine.slide_id == "s2"
    assert quarantine.failed == {"TileDecodeError": len(failures)}


def test_a_slide_that_mostly_works_is_kept():
    """8 slides, 64 draws: 8 choose each. 3 failures are enough in number, and not in share."""
    some = [Failure(d, 0, "s2", "TileDecodeError: x") for d in range(64) if d * 7 % 8 == 2]
    assert len(some) == 8
    assert Ledger(RULE).after(some[:3]).decided(64, Slides(8)).barred == {}
    assert Ledger(RULE).after(some[:4]).decided(64, Slides(8)).barred == {2: 128}
    assert Ledger(RULE).after(some[:2]).decided(64, Slides(64)).barred == {}  # too few


def test_what_filters_refuse_is_counted_apart_and_never_quarantines():
    refused = [Failure(d, 0, "s2", "filter: blur: 3.1 < 4") for d in range(50)]
    ledger = Ledger(RULE).after(refused).decided(64, Slides(1))
    assert ledger.filtered == Counter({"filter: blur": 50})
    assert not ledger.failed and not ledger.barred
    ledger.check_budget(50, 0.0)


@pytest.mark.parametrize(("delivered", "asked"), [(0, 127), (63, 127), (64, 191), (130, 255)])
def test_nothing_is_asked_for_whose_quarantines_are_not_known(delivered, asked):
    assert Ledger(RULE).may_request(asked, delivered)
    assert not Ledger(RULE).may_request(asked + 1, delivered)
    assert Ledger(Rule(None, 64)).may_request(10**9, delivered)


def test_a_step_as_long_as_a_window_can_always_be_asked_for():
    for first in range(200):
        assert Ledger(RULE).may_request(first + RULE.window_draws - 1, first)


def test_the_budget_is_lenient_at_first_and_names_what_failed():
    five = Ledger(RULE).after([Failure(d, 0, "s1", "ShortReadError: x") for d in range(5)])
    five.check_budget(5, 0.05)
    six = five.after([Failure(9, 0, "s2", "TileDecodeError: x")])
    with pytest.raises(
        errors.FailureBudgetError, match=r"6 failures in 10 draws.*5 x s1: ShortReadError; 1 x s2"
    ):
        six.check_budget(10, 0.05)
    six.check_budget(120, 0.05)


def test_the_budget_forgives_kinds_also_where_names_ran_out():
    gone = [Failure(d, 0, f"s{d}", "ObjectNotFoundError: x") for d in range(2 * MAX_NAMED)]
    bad = [Failure(500 + d, 0, f"t{d}", "TileDecodeError: x") for d in range(6)]
    ledger = Ledger(RULE).after(gone + bad)
    with pytest.raises(errors.FailureBudgetError, match=r"134 failures in 100 draws"):
        ledger.check_budget(100, 0.06)
    ledger.check_budget(100, 0.06, LOST)
    with pytest.raises(errors.FailureBudgetError, match=r"6 failures in .* 6 x other slides: Tile"):
        ledger.check_budget(100, 0.05, LOST)


def test_a_state_stays_small_whatever_fails():
    source = Slides(5000)
    ledger = Ledger(Rule(1, 4096))
    for window in range(3):
        draws = range(window * 4096, (window + 1) * 4096)
        failures = [
            Failure(d, a, f"slide-{(d * 7 + a * 3) % 5000:05}", f"Kind{a}Error: {d}")
            for d in draws
            for a in range(2)
        ]
        half = len(failures) // 2
        ledger = ledger.after(failures[:half]).after(failures[half:])
        saved = ledger.as_json((window + 1) * 4096 - 1)
        assert len(saved["failed"]) <= MAX_NAMED + 2
        assert len(saved["watched"]) <= MAX_WATCHED
        assert sum(saved["failed"].values()) == (window + 1) * 8192
        assert len(json.dumps(saved)) < 80_000
        again = Ledger.from_json(json.loads(json.dumps(saved)))
        ledger = ledger.decided((window + 1) * 4096, source)
        assert again.decided((window + 1) * 4096, source).barred == ledger.barred
        assert len(ledger.quarantined) <= MAX_QUARANTINED
    assert len(ledger.quarantined) == MAX_QUARANTINED


def test_counts_of_ranks_add_up():
    failures = stream_of_failures(Slides(8), {2, 3}, 50)
    ranks = [Ledger(RULE).after([f for f in failures if f.draw // 5 % 2 == r]) for r in range(2)]
    joined = Ledger(RULE).joined(ranks[0]).joined(ranks[1])
    assert joined.as_json(50) == Ledger(RULE).after(failures).as_json(50)


@pytest.mark.parametrize("bad", [{"quarantine_after": 0}, {"window_draws": 0}])
def test_senseless_rules_are_refused(bad):
    with pytest.raises(errors.LoaderError, match="at least 1"):
        Rule(**bad)
