"""Grids cover every slide in a stated order; epochs visit every place once."""

from __future__ import annotations

import numpy as np
import pytest

from online_patching.corpus import Corpus
from online_patching.errors import SamplerError
from online_patching.sampling import grid as grid_module
from online_patching.sampling.grid import EpochSampler, GridSampler
from online_patching.sampling.permutation import permuted
from tests.sampling import ALPHA, index, mask_of, p_of_counts, three_corpus, three_slides


@pytest.fixture(scope="module")
def three() -> Corpus:
    return three_corpus()


def make(three: Corpus, **options) -> GridSampler:
    return GridSampler(three, **{"size_px": 128, "mpp": 1.0, **options})


def places_one_by_one(slides, masks, size_px, mpps, overlap_px, min_foreground):
    """The definition, written as loops: (slide, µm/px, x, y) of every kept patch, in order."""
    for row, (ix, mask) in enumerate(zip(slides, masks, strict=True)):
        for mpp in mpps:
            if ix.mpp > 2 * mpp:
                continue
            sides = size_px * mpp / ix.mpp_x, size_px * mpp / ix.mpp_y
            axes = []
            for side, limit in zip(sides, ix.dimensions, strict=True):
                step, starts = side * (1 - overlap_px / size_px), []
                while not starts or starts[-1] + side < limit - 1e-6 * step:
                    starts.append(len(starts) * step)
                free = limit - side
                axes.append([int(np.floor(free / 2 + 0.5)) if free <= 0
                             else int(min(np.floor(s + 0.5), np.floor(free))) for s in starts])  # fmt: skip
            for y in axes[1]:
                for x in axes[0]:
                    if mask.fraction(x, y, *sides) >= min_foreground:
                        yield row, mpp, x, y


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_foreground": 0.0},
        {"overlap_px": 40, "size_px": 100},
        {"mpp": [1.0, 0.25, 2.0], "min_foreground": 0.7},
        {"size_px": 2000, "min_foreground": 0.1},  # larger than slide a
        {"overlap_px": 100, "mpp": 2.0},
    ],
)
def test_the_draws_are_those_of_the_definition(three, options):
    sampler = make(three, **options)
    slides, masks = three_slides()
    mpps = np.atleast_1d(options.get("mpp", 1.0)).tolist()
    expected = list(places_one_by_one(
        slides, masks, sampler.size_px, mpps, sampler.overlap_px, sampler.min_foreground))  # fmt: skip
    draws = sampler.draw_batch(np.arange(len(sampler)))
    got = list(zip(draws.slide.tolist(), draws.mpp.tolist(), draws.x_px0.tolist(),
                   draws.y_px0.tolist(), strict=True))  # fmt: skip
    assert got == expected
    some = np.random.default_rng(0).permutation(len(sampler))[:50]
    assert (sampler.draw_batch(some).x_px0 == draws.x_px0[some]).all()


def uncovered(sampler: GridSampler) -> int:
    """Level-0 pixels of slide a that no patch touches."""
    seen = np.zeros((700, 900), bool)
    for i in sampler.draws_of(0):
        ref = sampler[i]
        stop_x, stop_y = np.ceil(ref.x_px0 + ref.width_px0), np.ceil(ref.y_px0 + ref.height_px0)
        seen[max(ref.y_px0, 0) : int(stop_y), max(ref.x_px0, 0) : int(stop_x)] = True
    return int((~seen).sum())


@pytest.mark.parametrize("options", [{"mpp": 0.25}, {"mpp": 0.3, "size_px": 97, "overlap_px": 13}])
def test_a_grid_covers_the_slide_with_its_last_row_and_column(three, options):
    assert uncovered(make(three, min_foreground=0.0, **options)) == 0


def test_that_test_fails_when_the_last_row_and_column_are_dropped(three, monkeypatch):
    monkeypatch.setattr(grid_module, "_count",
                        lambda side, stride, limit: (limit / (side * stride)).astype(int))  # fmt: skip
    assert uncovered(make(three, min_foreground=0.0, mpp=0.25)) > 0


def test_rounding_adds_no_column_that_is_not_needed():
    """768 px in steps of 64 * 0.3 / 0.25 = 76.8: ten, though (768 - 76.8) / 76.8 is a little over 9."""
    ix = index("exact", 768, 80, 0.25)
    grid = GridSampler(
        [ix], [mask_of(ix, np.ones((8, 76), bool))], size_px=64, mpp=0.3, min_foreground=0
    )
    assert len(grid) == 10 * 2


def test_patches_are_taken_from_where_mpp_differ_by_axis(three):
    refs = [ref for ref in make(three) if ref.slide_id == "c"]
    assert {round(ref.width_px0 / ref.height_px0, 9) for ref in refs} == {round(1.14 / 1.1, 9)}


def test_what_cannot_be_served_is_listed(three):
    slides, masks = three_slides()
    bare = index("bare", 800, 600, 0.25)
    speck = np.zeros((60, 80), bool)
    speck[0, 0] = True
    sampler = GridSampler(
        [*slides, bare], [*masks, mask_of(bare, speck)], size_px=128, mpp=[0.25, 1.0]
    )
    assert [(name, mpp) for name, mpp, _ in sampler.left_out] == [
        ("c", 0.25),
        ("bare", 0.25),
        ("bare", 1.0),
    ]
    assert "1.12" in sampler.left_out[0][2]
    assert "40% tissue" in sampler.left_out[1][2]
    assert len(sampler.draws_of(3)) == 0
    ids = {i: sampler.corpus.slide_id(i) for i in range(4)}
    for row, name in ids.items():
        assert {sampler[i].slide_id for i in sampler.draws_of(row)} <= {name}
    assert sum(len(sampler.draws_of(row)) for row in range(4)) == len(sampler)


def test_a_grid_ends(three):
    sampler = make(three)
    assert len(list(sampler)) == len(sampler)
    with pytest.raises(SamplerError, match="there are draws 0 to"):
        sampler.draw_batch([len(sampler)])


def test_a_replacement_is_another_place_and_pure(three):
    sampler = make(three)
    numbers = np.arange(len(sampler))
    first, again = sampler.draw_batch(numbers), sampler.draw_batch(numbers, 1)
    assert (again.attempt == 1).all()
    assert ((first.x_px0 != again.x_px0) | (first.slide != again.slide)).mean() > 0.5
    assert sampler.draw_batch([5], 1).x_px0 == again.x_px0[5]
    barred = sampler.draw_batch(numbers, barred={1: 0})
    assert not (barred.slide == 1).any()
    assert (barred.x_px0 == first.x_px0)[first.slide != 1].all()
    with pytest.raises(SamplerError, match="3 slide"):
        sampler.draw_batch([0], barred={0: 0, 1: 0, 2: 0})


@pytest.mark.parametrize(
    "bad",
    [{"mpp": []}, {"mpp": [1.0, 1.0]}, {"overlap_px": 128}, {"overlap_px": -1}, {"mpp": 0.001},
     {"size_px": 0}, {"mpp": 0.06}],
)  # fmt: skip
def test_senseless_grids_are_refused(three, bad):
    with pytest.raises(SamplerError):
        make(three, **bad)


# --- epochs -------------------------------------------------------------------------------------


def places(sampler: EpochSampler, epoch: int) -> list[tuple[int, ...]]:
    n = sampler.epoch_length
    draws = sampler.draw_batch(np.arange(epoch * n, (epoch + 1) * n))
    return list(zip(draws.slide.tolist(), draws.x_px0.tolist(), draws.y_px0.tolist(), strict=True))


def is_without_replacement(sampler: EpochSampler) -> bool:
    grid = sampler.grid.draw_batch(np.arange(sampler.epoch_length))
    columns = (grid.slide.tolist(), grid.x_px0.tolist(), grid.y_px0.tolist())
    everything = sorted(zip(*columns, strict=True))
    return all(sorted(places(sampler, epoch)) == everything for epoch in range(3))


def test_an_epoch_has_every_place_once_and_its_own_order(three):
    sampler = EpochSampler(make(three, size_px=64), seed=4)
    assert sampler.epoch_length > 500
    assert is_without_replacement(sampler)
    assert places(sampler, 0) != places(sampler, 1)
    assert places(sampler, 0) != places(EpochSampler(sampler.grid, seed=5), 0)
    alone = sampler.draw_batch([sampler.epoch_length + 3])
    assert (alone.slide[0], alone.x_px0[0], alone.y_px0[0]) == places(sampler, 1)[3]


def test_that_test_fails_when_places_are_drawn_with_repeats(three, monkeypatch):
    def with_repeats(at, n, seed, epoch):
        return (permuted(at, n, seed, epoch) * 7919) % n // 2

    sampler = EpochSampler(make(three, size_px=64), seed=4)
    assert is_without_replacement(sampler)
    monkeypatch.setattr(grid_module, "permuted", with_repeats)
    assert not is_without_replacement(sampler)


def p_slides_of_halves(sampler: EpochSampler) -> float:
    """The slides of the first half of each epoch: drawn in proportion to their places?"""
    n, grid = sampler.epoch_length, sampler.grid
    epochs = 100_000 // (n // 2) + 1
    number = (np.arange(epochs)[:, None] * n + np.arange(n // 2)).ravel()
    seen = np.bincount(sampler.draw_batch(number).slide, minlength=3)
    return p_of_counts(seen, [len(grid.draws_of(row)) for row in range(3)])


def test_half_an_epoch_is_a_fair_sample(three, monkeypatch):
    sampler = EpochSampler(make(three, size_px=64), seed=4)
    assert p_slides_of_halves(sampler) > ALPHA
    monkeypatch.setattr(grid_module, "permuted", lambda at, n, seed, epoch: (at + epoch % 50) % n)
    assert p_slides_of_halves(sampler) < ALPHA


def test_epochs_end_where_a_number_of_them_is_given(three):
    grid = make(three)
    assert len(EpochSampler(grid, epochs=3)) == 3 * len(grid)
    with pytest.raises(SamplerError, match="there are draws"):
        EpochSampler(grid, epochs=1).draw_batch([len(grid)])
    with pytest.raises(TypeError, match="no length"):
        len(EpochSampler(grid))
    with pytest.raises(SamplerError, match="epochs"):
        EpochSampler(grid, epochs=0)
    assert EpochSampler(grid, 1).digest != EpochSampler(grid, 2).digest != grid.digest
