"""Weights of slides: what every group gets, which slides a study sees, and clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from online_patching import PatchSampler
from online_patching.corpus import Corpus
from online_patching.errors import SamplerError
from online_patching.sampling import weights
from online_patching.sampling.weights import (
    SlideShares,
    area_weights,
    check_weights,
    group_weights,
    share_of_slides,
    table_of,
    uniform_weights,
    weight_column,
)
from tests.sampling import ALPHA, N, p_of_counts, three_corpus, three_slides

TABLE = {
    "label": ["t", "t", "t", "t", "n", "n"],
    "patient": ["p1", "p1", "p2", "p3", "p1", "p4"],
    "w": [1.0, 2.0, 0.0, 4.0, 5.0, 6.0],
}


@pytest.fixture(scope="module")
def three() -> Corpus:
    return three_corpus()


def shares_by_loop(rows: list[tuple]) -> list[float]:
    """The definition: divide 1 among the groups of the first column, each part among its subgroups."""

    def divide(members: list[int], depth: int, whole: float, out: list[float]) -> None:
        if depth == len(rows[0]):
            for i in members:
                out[i] = whole / len(members)
            return
        groups = {rows[i][depth] for i in members}
        for group in groups:
            inside = [i for i in members if rows[i][depth] == group]
            divide(inside, depth + 1, whole / len(groups), out)

    out = [0.0] * len(rows)
    divide(list(range(len(rows))), 0, 1.0, out)
    return out


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=30
    )
)
def test_groups_within_groups_get_equal_shares(rows):
    columns = dict(zip("abc", np.asarray(rows).T, strict=True))
    got = group_weights(columns, ("a", "b", "c"))
    assert got / got.sum() == pytest.approx(shares_by_loop(rows))


def test_one_column_and_shares_by_name():
    got = group_weights(TABLE, "label")
    assert (got[:4].sum(), got[4:].sum()) == (pytest.approx(1), pytest.approx(1))
    got = group_weights(TABLE, ("label", "patient"), {"t": 3, "n": 1})
    assert got.sum() == pytest.approx(4)
    assert got.tolist() == pytest.approx([0.5, 0.5, 1, 1, 0.5, 0.5])


def p_labels(three: Corpus, given_weights) -> float:
    """Slides a and b are tumour, c is normal: do the labels come up equally often?"""
    draws = PatchSampler(three, size_px=128, mpp=1.0, slide_weights=given_weights, seed=3)
    slides = draws.draw_batch(np.arange(N)).slide
    return p_of_counts(np.bincount(slides, minlength=3), [0.25, 0.25, 0.5])


def test_labels_are_drawn_equally_often(three, monkeypatch):
    table = {"label": ["t", "t", "n"]}
    assert p_labels(three, group_weights(table, "label")) > ALPHA
    assert p_labels(three, uniform_weights(three)) < ALPHA
    monkeypatch.setattr(weights.SlideShares, "pick", lambda self, u: (u * 3).astype(np.int64))
    assert p_labels(three, group_weights(table, "label")) < ALPHA


def test_area_is_the_tissue_of_the_masks(three):
    areas = [mask.tissue_area_um2 for mask in three_slides()[1]]
    assert area_weights(three) == pytest.approx(areas)


# --- a choice by weight -------------------------------------------------------------------------


def p_picks(given_weights) -> float:
    u = np.random.default_rng(0).random(N)
    picked = SlideShares(np.asarray(given_weights, float)).pick(u)
    return p_of_counts(np.bincount(picked, minlength=len(given_weights)), given_weights)


def test_slides_are_picked_by_weight_and_never_at_weight_0(monkeypatch):
    given_weights = [0, 1, 5, 0.25, 0, 0, 3, 0]
    assert p_picks(given_weights) > ALPHA
    extremes = SlideShares(np.asarray(given_weights)).pick(np.asarray([0.0, 1 - 2.0**-53]))
    assert extremes.tolist() == [1, 6]
    monkeypatch.setattr(
        SlideShares,
        "pick",
        lambda self, u: np.searchsorted(self._sums, u * self._sums[-1]) % 8 * 0 + 2,
    )
    assert p_picks(given_weights) < ALPHA


def test_a_million_slides_keep_eight_bytes_each():
    assert SlideShares(np.ones(10**6))._sums.nbytes == 8 * 10**6


# --- shares of slides ---------------------------------------------------------------------------

IDS = [f"slide-{i}" for i in range(1000)]


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_a_share_has_that_many_slides(share):
    assert share_of_slides(IDS, share, seed=1).sum() == round(1000 * share)


def test_smaller_shares_lie_within_larger_ones_and_seeds_differ():
    tenth, third = share_of_slides(IDS, 0.1, 1), share_of_slides(IDS, 0.3, 1)
    assert (third | ~tenth).all()
    assert 0 < (tenth & share_of_slides(IDS, 0.1, 2)).sum() < 30


def test_more_slides_change_few_and_order_none():
    before = dict(zip(IDS, share_of_slides(IDS, 0.3, 1), strict=True))
    more = [*reversed(IDS), *(f"new-{i}" for i in range(10))]
    after = dict(zip(more, share_of_slides(more, 0.3, 1), strict=True))
    assert sum(before[name] != after[name] for name in IDS) <= 10


def test_shares_by_patient_keep_patients_whole():
    patients = [f"p{i // 7}" for i in range(1000)]
    kept = share_of_slides(IDS, 0.25, 1, patients)
    by_patient = {
        p: {k for k, q in zip(kept, patients, strict=True) if q == p} for p in set(patients)
    }
    assert all(len(values) == 1 for values in by_patient.values())
    assert sum(values == {True} for values in by_patient.values()) == round(0.25 * 143)


def test_which_slides_are_kept_is_unrelated_to_their_names():
    chosen = [share_of_slides(IDS[:40], 0.5, seed) for seed in range(500)]
    kept = np.sum(chosen, axis=0)
    assert abs(kept - 250).max() < 5 * np.sqrt(125)


def test_one_slide_is_always_left():
    assert share_of_slides(IDS[:3], 0.01, 1).sum() == 1


# --- tables and refusals ------------------------------------------------------------------------


def test_rows_are_put_in_the_order_of_the_slides():
    rows = [
        {"slide_id": "b", "site": "x"},
        {"slide_id": "zzz", "site": "y"},
        {"slide_id": "a", "site": "z"},
    ]
    table = table_of(["a", "b"], rows)
    assert table["site"].tolist() == ["z", "x"]
    assert weight_column(TABLE, "w").tolist() == TABLE["w"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_weights([1, 2], 3), "3 slides need as many weights"),
        (lambda: check_weights([1, np.nan, 1], 3), "slide 1 has nan"),
        (lambda: check_weights([1, 1, -1.0], 3), "slide 2 has -1"),
        (lambda: check_weights([0, 0], 2), "all 2 are 0"),
        (lambda: check_weights(["a", "b"], 2), "not numbers"),
        (lambda: group_weights(TABLE, "site"), "no column 'site'; there are label, patient"),
        (lambda: group_weights(TABLE, ()), "at least one column"),
        (lambda: group_weights({"a": ["x", ""]}, "a"), "slide 1 has no value"),
        (lambda: group_weights({"a": [1.0, np.nan]}, "a"), "slide 1 has no value"),
        (lambda: group_weights({"a": [1, 2], "b": [1]}, ("a", "b")), "one value a slide each"),
        (lambda: group_weights({"a": []}, "a"), "one value a slide each"),
        (lambda: group_weights(TABLE, "label", {"t": 1, "n": 1, "x": 1}), "no slide has label 'x'"),
        (lambda: group_weights(TABLE, "label", {"t": 1}), "shares name no label 'n'"),
        (lambda: group_weights(TABLE, "label", {"t": 0, "n": 0}), "all 2 are 0"),
        (lambda: weight_column({"w": [0.0, 0.0]}, "w"), "column 'w'"),
        (lambda: table_of(["a"], [{"slide_id": "b"}]), "1 of 1 slides have no row, such as 'a'"),
        (lambda: table_of(["a"], [{"slide_id": "a"}] * 2), "more than one row"),
        (lambda: table_of(["a"], [{"name": "a"}]), "no 'slide_id', only 'name'"),
        (lambda: share_of_slides(IDS, 0.0, 1), r"lies in \(0, 1\]"),
        (lambda: share_of_slides(IDS, 0.5, -1), "64-bit"),
        (lambda: share_of_slides(IDS, 0.5, 1, ["p"]), "as many groups"),
        (lambda: share_of_slides([], 0.5, 1), "no slides"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_reason(call, message):
    with pytest.raises(SamplerError, match=message):
        call()
