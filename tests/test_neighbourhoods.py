"""patches_per_read: k draws from one window of tiles, with the density that is stated for them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from online_patching import PatchSampler
from online_patching.corpus import Corpus
from online_patching.philox import uniform
from online_patching.plan import choose_level, plan_patch
from online_patching.sampling import placing
from online_patching.sampling import sampler as sampler_module
from online_patching.slide_index import Codec, SlideIndex
from tests.sampling import (
    ALPHA,
    N,
    index,
    mask_of,
    p_of_counts,
    p_of_same_law,
    three_corpus,
    three_slides,
)

K = 4


@pytest.fixture(scope="module")
def three() -> Corpus:
    return three_corpus()


def make(slides: Corpus, **options) -> PatchSampler:
    settings = {"size_px": 128, "mpp": [0.25, 1.0], "seed": 11, "patches_per_read": K}
    return PatchSampler(slides, **(settings | options))


def test_a_group_shares_slide_and_mpp(three):
    draws = make(three).draw_batch(np.arange(4000))
    first = draws.take(draws.attempt == 0)
    shared = set(
        zip((first.draw // K).tolist(), first.slide.tolist(), first.mpp.tolist(), strict=True)
    )
    assert len(shared) == len({group for group, _, _ in shared})
    assert len(first) > 0.99 * len(draws)


def test_groups_are_counted_from_draw_0_whatever_is_asked_for(three):
    sampler = make(three)
    whole = sampler.draw_batch(np.arange(40))
    part = sampler.draw_batch([6, 7, 8])
    assert (part.x_px0 == whole.x_px0[6:9]).all()
    assert (part.slide == whole.slide[6:9]).all()


def jpeg(ix: SlideIndex, tile: int) -> SlideIndex:
    """The same slide with JPEG tiles, which are decoded smaller for coarse patches."""
    levels = tuple(
        replace(level, codec=Codec("jpeg"), tile_width_px=tile, tile_height_px=tile)
        for level in ix.levels
    )
    return replace(ix, levels=levels)


@pytest.mark.parametrize(
    ("tile", "mpp"),
    [(256, 0.26), (256, 0.4), (240, 0.7), (512, 0.26), (256, 0.6), (128, 1.7), (256, 2.3)],
)
def test_a_group_reads_no_more_tiles_than_its_window_has(tile, mpp):
    slides, masks = three_slides()
    ix = jpeg(slides[1], tile)
    sampler = PatchSampler(
        [ix], [masks[1]], size_px=128, mpp=mpp, patches_per_read=K, min_foreground=0.3
    )
    level = ix.levels[choose_level([lv.mpp for lv in ix.levels], mpp)]
    across = 1.5 * sampler.box_px0(0, mpp)[0] / level.downsample_x / tile
    n = int(np.ceil(across))
    draws = sampler.draw_batch(np.arange(800))
    refs, touched, last = sampler.refs(draws), [], -(-level.width_px // tile) - 1
    for g in range(200):
        plans = [plan_patch(ix, ref) for ref in refs[g * K : (g + 1) * K] if ref.attempt == 0]
        tiles = {(tile.row, tile.column) for plan in plans for tile in plan.tiles}
        touched.append(len(tiles))
        # The last column and row are narrower: a window there may reach one tile further.
        assert np.ptp([row for row, _ in tiles]) <= n
        assert np.ptp([column for _, column in tiles]) <= n
        rows, columns = (max(numbers) for numbers in zip(*tiles, strict=True))
        if columns < last and rows < -(-level.height_px // tile) - 1:
            assert len(tiles) <= n * n
    alone = [len(plan_patch(ix, ref).tiles) for ref in refs]
    assert np.mean(touched) < 0.8 * K * np.mean(alone)


def by_definition(n: int, rng: np.random.Generator) -> np.ndarray:
    """x origins of patches of 128 px on a slide of 900 x 700 px that is all tissue, as loops."""
    out = []
    for _ in range(n):
        center = rng.uniform(0, 900)
        tile = min(int(center // 256), 3)  # of 4, the last one narrower
        first = tile  # 1.5 * 128 <= 256: one tile wide
        low, high = first * 256, (first + 1) * 256 - 1 - 128
        if first == 3:
            high = 900 - 128
        low = min(low, high)
        out.append(int(rng.integers(low, high + 1)))
    return np.asarray(out)


def p_defined(sampler: PatchSampler) -> float:
    draws = sampler.draw_batch(np.arange(N))
    first_of_each = draws.x_px0[::K]  # members of a group are not independent of each other
    return p_of_same_law(first_of_each, by_definition(N, np.random.default_rng(0)))


def test_origins_have_the_density_of_the_definition(three):
    assert p_defined(make(three, mpp=0.25, slide_weights=[1, 0, 0])) > ALPHA


def test_that_test_fails_when_the_window_is_clipped_or_not_the_centres(three, monkeypatch):
    sampler = make(three, mpp=0.25, slide_weights=[1, 0, 0])
    right = placing.Axis.first_tile
    monkeypatch.setattr(
        placing.Axis, "first_tile", lambda self, c, u: np.minimum(right(self, c, u), 2)
    )
    assert p_defined(sampler) < ALPHA
    monkeypatch.undo()
    monkeypatch.setattr(placing.Axis, "first_tile", lambda self, c, u: (u * 4).astype(np.int64))
    assert p_defined(sampler) < ALPHA


def p_members(sampler: PatchSampler) -> float:
    """Origins within the first window of slide a, in x by y of 8 x 8 parts: uniform?"""
    draws = sampler.draw_batch(np.arange(2 * N))
    low, parts = 127 + 1, 8  # windows begin at 0 and are 256 px, patches 128 px and 1 px of slack
    here = (draws.x_px0 < low) & (draws.y_px0 < low) & (draws.attempt == 0)
    x, y = draws.x_px0[here], draws.y_px0[here]
    seen = np.bincount(x * parts // low * parts + y * parts // low, minlength=parts * parts)
    return p_of_counts(seen, np.ones(parts * parts))


def test_members_are_uniform_in_their_window(three):
    assert p_members(make(three, mpp=0.25, slide_weights=[1, 0, 0])) > ALPHA


def test_that_test_fails_when_members_are_near_the_first(three, monkeypatch):
    sampler = make(three, mpp=0.25, slide_weights=[1, 0, 0])
    assert p_members(sampler) > ALPHA
    monkeypatch.setattr(placing, "uniform", lambda w: uniform(w) ** 1.1)
    assert p_members(sampler) < ALPHA


def p_wide_windows(sampler: PatchSampler) -> float:
    """Which of the two or three windows of 2 tiles that hold a point are chosen, on a long slide."""
    draws = sampler.draw_batch(np.arange(N))
    # The centre of the window is not known; but windows of 2 of 20 tiles of 256 px, uniform given a
    # uniform point, begin at tile 0 to 18 with these shares (a point in an end tile has one choice).
    share = np.full(19, 2 * 0.5)
    share[[0, -1]] += 0.5
    low = 512 - 224 - 1
    expected = np.zeros(20 * 256)
    for first in range(19):
        stop = low if first < 18 else 512 - 224
        expected[first * 256 : first * 256 + stop + 1] += share[first] / (stop + 1)
    seen = np.bincount(draws.x_px0[::K] // 32, minlength=160)
    return p_of_counts(seen, expected.reshape(160, 32).sum(axis=1))


def test_windows_are_uniform_among_those_that_hold_the_point(monkeypatch):
    ix = index("long", 20 * 256, 900, 0.25)
    slides = Corpus.from_slides([ix], [mask_of(ix, np.ones((9, 51), bool))])
    sampler = make(slides, size_px=224, mpp=0.25)
    assert p_wide_windows(sampler) > ALPHA
    right = placing.Axis.first_tile
    monkeypatch.setattr(placing.Axis, "first_tile", lambda self, c, u: right(self, c, u * 0.5))
    assert p_wide_windows(sampler) < ALPHA


def test_both_extreme_origins_are_reached(three):
    draws = make(three, mpp=0.25, slide_weights=[1, 0, 0]).draw_batch(np.arange(N))
    assert {0, 900 - 128} <= set(draws.x_px0.tolist())
    assert {0, 700 - 128} <= set(draws.y_px0.tolist())


def test_a_group_without_a_window_falls_back_to_single_patches(three, monkeypatch):
    def none(corpus, boxes, axes, least):
        return lambda which, w: (which * 0, which * 0, np.zeros(len(which), bool))

    alone = make(three).draw_batch(np.arange(40), 1)
    monkeypatch.setattr(sampler_module, "neighbourhoods", none)
    got = make(three).draw_batch(np.arange(40))
    assert (got.attempt == alone.attempt).all()
    assert (got.x_px0 == alone.x_px0).all()
