"""Levels chosen for a batch are those plan.choose_level chooses one by one."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_patching.errors import SamplerError
from online_patching.plan import can_serve, choose_level
from online_patching.sampling.levels import choose_levels

MPP = st.sampled_from([0.12, 0.24, 0.25, 0.2501, 0.255, 0.5, 0.51, 1.0, 1.02, 2.0, 4.0])


def columns(pyramids: list[list[float]]) -> SimpleNamespace:
    """What choose_levels reads of a corpus."""
    counts = np.asarray([len(p) for p in pyramids])
    records = {"first_level": np.cumsum(counts) - counts + 3, "n_levels": counts}
    flat = [np.nan] * 3 + [m for p in pyramids for m in p]  # rows of slides not asked for
    check = lambda rows: None  # noqa: E731
    return SimpleNamespace(records=records, levels={"mpp": np.asarray(flat)}, check=check)


@given(
    st.lists(st.lists(MPP, min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), MPP), max_size=20),
)
def test_every_choice_is_the_one_choose_level_makes(pyramids, asked):
    corpus = columns(pyramids)
    asked = [(row, mpp) for row, mpp in asked if row < len(pyramids)]
    asked = [(row, mpp) for row, mpp in asked if can_serve(pyramids[row], mpp)]
    got = choose_levels(corpus, [a[0] for a in asked], [a[1] for a in asked])
    first = corpus.records["first_level"]
    assert got.tolist() == [first[row] + choose_level(pyramids[row], mpp) for row, mpp in asked]


def test_a_slide_too_coarse_is_named_with_its_numbers():
    with pytest.raises(SamplerError, match=r"slide 1: its finest level has 1.1 .* 4.4x"):
        choose_levels(columns([[0.25], [2.0, 1.1]]), [0, 1], 0.25)


@pytest.mark.parametrize("mpp", [0.0, -1.0, np.nan, np.inf])
def test_what_is_no_magnification_is_refused(mpp):
    with pytest.raises(SamplerError, match="not a magnification"):
        choose_levels(columns([[0.25]]), [0], mpp)
