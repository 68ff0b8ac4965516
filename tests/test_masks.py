"""iBOT's block masks: exact counts, shares, shapes, and that nothing but the key enters."""

import numpy as np
import pytest

from online_patching import philox
from pathfm.backbone.keyed import DROP_STREAM, MAX_VIEWS
from pathfm.methods import masks as masks_module
from pathfm.methods.masks import MASK_STREAM_BASE, block_masks

GRIDS = [(2, 2), (4, 4), (7, 7), (14, 14), (16, 16), (9, 20)]


def largest_part(mask):
    """Patches in the largest piece that hangs together by sides."""
    left, best = {tuple(p) for p in np.argwhere(mask)}, 0
    while left:
        edge, size = [left.pop()], 0
        while edge:
            y, x = edge.pop()
            size += 1
            for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if near in left:
                    left.remove(near)
                    edge.append(near)
        best = max(best, size)
    return best


def expected_counts(draws, grid, seed, view, probability, ratio):
    """The number of masked patches of each draw, one by one from its two words."""
    counts = []
    for draw in draws:
        first, second = philox.words(seed, draw, 0, MASK_STREAM_BASE + view, 2)[0].tolist()
        if first / 2**32 >= probability:
            counts.append(0)
            continue
        wanted = (ratio[0] + (ratio[1] - ratio[0]) * second / 2**32) * grid[0] * grid[1]
        counts.append(min(max(int(wanted + 0.5), 1), grid[0] * grid[1]))
    return counts


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [(0.1, 0.5), (0.45, 1.0)])
def test_every_view_has_exactly_as_many_masked_patches_as_its_draw_says(grid, ratio):
    draws = np.arange(60) * 7919 + 3
    masks = block_masks(draws, grid, seed=5, view=1, probability=0.7, ratio=ratio)
    assert masks.shape == (60, grid[0] * grid[1])
    assert masks.dtype == np.bool_
    assert masks.sum(1).tolist() == expected_counts(draws, grid, 5, 1, 0.7, ratio)


def test_a_mask_does_not_depend_on_batch_order_or_rank():
    draws = np.arange(64)
    whole = block_masks(draws, (14, 14), seed=3, view=0)
    shuffled = np.random.default_rng(0).permutation(64)
    assert np.array_equal(block_masks(shuffled, (14, 14), seed=3, view=0), whole[shuffled])
    for rank in range(4):
        part = block_masks(draws[rank * 16 : (rank + 1) * 16], (14, 14), seed=3, view=0)
        assert np.array_equal(part, whole[rank * 16 : (rank + 1) * 16])
    assert np.array_equal(block_masks(17, (14, 14), seed=3, view=0), whole[17:18])


def test_seed_draw_and_view_each_change_the_masks():
    first = block_masks(np.arange(32), (14, 14), seed=0, view=0)
    for other in (
        block_masks(np.arange(32), (14, 14), seed=1, view=0),
        block_masks(np.arange(32), (14, 14), seed=0, view=1),
        block_masks(np.arange(32) + 32, (14, 14), seed=0, view=0),
    ):
        assert (first != other).any(1).mean() > 0.5


def test_the_streams_lie_behind_those_of_stochastic_depth():
    assert MASK_STREAM_BASE == DROP_STREAM + MAX_VIEWS == (1 << 18) + 4096


def test_half_of_the_views_are_masked_and_shares_are_even_between_their_ends():
    counts = block_masks(np.arange(4000), (14, 14), seed=11, view=0).sum(1)
    assert (counts > 0).mean() == pytest.approx(0.5, abs=4 * 0.5 / 4000**0.5)
    shares = counts[counts > 0] / 196
    assert shares.min() >= 0.1 - 0.5 / 196
    assert shares.max() <= 0.5 + 0.5 / 196
    histogram = np.histogram(shares, bins=4, range=(0.1, 0.5))[0] / len(shares)
    assert histogram == pytest.approx([0.25] * 4, abs=0.05)


def test_probability_0_masks_nothing_and_1_everything_that_is_asked():
    none = block_masks(np.arange(50), (7, 7), seed=0, view=0, probability=0.0)
    assert not none.any()
    every = block_masks(np.arange(50), (7, 7), seed=0, view=0, probability=1.0)
    assert every.any(1).all()
    full = block_masks(np.arange(50), (7, 7), seed=0, view=0, probability=1.0, ratio=(1.0, 1.0))
    assert full.all()


def test_no_part_of_the_grid_is_spared():
    masks = block_masks(np.arange(4000), (9, 20), seed=2, view=0, probability=1.0)
    share = masks.mean(0).reshape(9, 20)
    # a block that must lie inside reaches the corners least, the middle most, as in BEiT
    assert share.min() > 0.05
    assert share[3:6, 7:13].mean() > share.mean() > share[:1, :1].mean()
    np.testing.assert_allclose(share, share[::-1, ::-1], atol=0.05)


def test_masks_are_blocks_and_no_dust():
    masks = block_masks(np.arange(300), (14, 14), seed=2, view=0, probability=1.0)
    masks = masks.reshape(-1, 14, 14)
    ours = np.mean([largest_part(m) / m.sum() for m in masks])
    generator = np.random.default_rng(0)
    dust = [generator.permutation(m.ravel()).reshape(14, 14) for m in masks]
    assert ours > 0.7
    assert np.mean([largest_part(m) / m.sum() for m in dust]) < 0.5


def test_a_block_is_as_large_and_as_wide_as_its_words_say(monkeypatch):
    monkeypatch.setattr(masks_module, "MIN_BLOCK", 12)
    masks, missing = np.zeros((1, 10, 12), bool), np.array([12])
    # area 12 whatever the word; aspect 1 / 0.3 at the end of its range: 6.3 high, 1.9 wide
    words = np.array([[0.9, 1.0 - 1e-12, 0.5, 0.99]])
    masks_module._try_blocks(masks, missing, np.array([0]), words)
    expected = np.zeros((10, 12), bool)
    expected[2:8, 10:12] = True  # top = floor(5 * 0.5), left = floor(11 * 0.99)
    assert np.array_equal(masks[0], expected)
    assert missing.tolist() == [0]


def test_a_block_that_hides_too_much_or_does_not_fit_is_not_laid(monkeypatch):
    masks, missing = np.zeros((1, 10, 12), bool), np.array([3])
    # area 3 at the end of the aspects: 3 x 1; it fits
    masks_module._try_blocks(masks, missing, np.array([0]), np.array([[0.5, 0.99999, 0, 0]]))
    assert masks.sum() == 3
    masks, missing = np.zeros((1, 2, 12), bool), np.array([3])  # two rows: it does not
    masks_module._try_blocks(masks, missing, np.array([0]), np.array([[0.5, 0.99999, 0, 0]]))
    assert masks.sum() == 0
    assert missing.tolist() == [3]
    masks, missing = np.zeros((1, 10, 12), bool), np.array([1])
    monkeypatch.setattr(masks_module, "MIN_BLOCK", 1)
    masks[0, 0, 0] = True  # all that the block would hide is hidden
    masks_module._try_blocks(masks, missing, np.array([0]), np.array([[0.0, 0.5, 0, 0]]))
    assert missing.tolist() == [1]


def test_counts_are_exact_too_where_no_block_is_ever_laid(monkeypatch):
    monkeypatch.setattr(masks_module, "TRIES", 0)
    draws = np.arange(40)
    masks = block_masks(draws, (7, 7), seed=5, view=0)
    assert masks.sum(1).tolist() == expected_counts(draws, (7, 7), 5, 0, 0.5, (0.1, 0.5))
    assert np.array_equal(block_masks(draws[::-1], (7, 7), seed=5, view=0), masks[::-1])


def test_masks_of_a_run_stay_as_they_are():
    masks = block_masks(np.arange(4), (5, 6), seed=0, view=1, probability=1.0)
    rows = ["".join(".#"[int(p)] for p in mask) for mask in masks]
    assert rows == [
        "................#.....#.....#.",
        "..................###...###...",
        "....##....##....##............",
        "................##....##....#.",
    ]
