"""Scores of masks against scikit-learn, loops and hand-worked cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score, matthews_corrcoef

from pathfm.segmentation.scores import boundary_f, count, score_mask, tolerance_px


def blobs(seed: int, shape: tuple[int, int] = (23, 31)) -> np.ndarray:
    from scipy import ndimage

    noise = np.random.default_rng(seed).normal(size=shape)
    return ndimage.gaussian_filter(noise, 2.5) > 0


@pytest.mark.parametrize("seed", range(5))
def test_dice_iou_and_mcc_are_scikit_learns(seed: int) -> None:
    truth, predicted = blobs(seed), blobs(seed) ^ (blobs(seed + 50) & blobs(seed + 90))
    ignore = blobs(seed + 20) & blobs(seed + 30)
    got = count(predicted, truth, ignore)
    t, p = truth[~ignore], predicted[~ignore]
    assert got.dice == pytest.approx(f1_score(t, p), abs=1e-12)
    assert got.iou == pytest.approx(jaccard_score(t, p), abs=1e-12)
    assert got.mcc == pytest.approx(matthews_corrcoef(t, p), abs=1e-12)
    assert got.iou == pytest.approx(got.dice / (2 - got.dice))
    assert got.tp + got.fp + got.fn + got.tn == (~ignore).sum()


def test_a_hand_worked_case() -> None:
    truth = np.zeros((4, 6), bool)
    truth[1:3, 1:4] = True  # 6 pixels
    predicted = np.zeros((4, 6), bool)
    predicted[1:3, 2:6] = True  # 8 pixels, 4 of them true
    got = score_mask(predicted, truth, kinds={"fat": truth, "pen": ~truth, "edge": truth & ~truth})
    assert got.dice == pytest.approx(8 / 14)
    assert got.iou == pytest.approx(4 / 10)
    assert got.mcc == pytest.approx((4 * 14 - 4 * 2) / math.sqrt(8 * 6 * 18 * 16))
    assert got.tissue_lost == pytest.approx(2 / 6)
    assert got.glass_taken == pytest.approx(4 / 18)
    assert got.kind_px == {"fat": 6, "pen": 18, "edge": 0}
    assert got.kind_inside_px == {"fat": 4, "pen": 4, "edge": 0}


def test_empty_and_full_masks_follow_the_stated_rules() -> None:
    none, some, full = np.zeros((5, 7), bool), blobs(1, (5, 7)), np.ones((5, 7), bool)
    assert some.any()
    both = score_mask(none, none)
    assert (both.dice, both.iou, both.mcc, both.boundary_f) == (1, 1, 1, 1)
    assert math.isnan(both.tissue_lost)
    assert both.glass_taken == 0
    for predicted, truth in ((none, some), (some, none)):
        got = score_mask(predicted, truth)
        assert (got.dice, got.iou, got.mcc, got.boundary_f) == (0, 0, 0, 0)
    assert score_mask(full, full).mcc == 1
    assert math.isnan(score_mask(full, full).glass_taken)
    assert score_mask(full, none).mcc == 0
    everything_ignored = score_mask(none, some, ignore=full)
    assert everything_ignored.dice == 1


def brute_boundary_f(predicted, truth, ignore, within_px: float) -> float:
    height, width = truth.shape

    def outline(mask) -> list[tuple[int, int]]:
        found = []
        for y in range(height):
            for x in range(width):
                around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
                around = [(v, u) for v, u in around if 0 <= v < height and 0 <= u < width]
                if (
                    mask[y, x]
                    and not ignore[y, x]
                    and any(not mask[v, u] and not ignore[v, u] for v, u in around)
                ):
                    found.append((y, x))
        return found

    hidden = list(zip(*np.nonzero(ignore), strict=True))
    hidden += [(y, x) for y in (0, height - 1) for x in range(width)]
    hidden += [(y, x) for y in range(height) for x in (0, width - 1)]
    shares = []
    for own, other in ((predicted, truth), (truth, predicted)):
        asked = [p for p in outline(own) if all(math.dist(p, q) > within_px for q in hidden)]
        met = [any(math.dist(p, q) <= within_px for q in outline(other)) for p in asked]
        if met:
            shares.append(sum(met) / len(met))
    if len(shares) < 2:
        return 0.0 if shares else 1.0
    return 2 * shares[0] * shares[1] / (sum(shares) or 1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("within_px", [1.0, 2.3])
def test_the_boundary_f_score_equals_a_loop(seed: int, within_px: float) -> None:
    shape = (13, 17)
    truth, predicted = (
        blobs(seed, shape),
        blobs(seed, shape) ^ (blobs(seed + 7, shape) & blobs(9, shape)),
    )
    ignore = np.zeros(shape, bool)
    if seed % 2:
        ignore[4:7, 8:11] = True
    expected = brute_boundary_f(predicted, truth, ignore, within_px)
    got = boundary_f(predicted, truth, ignore if seed % 2 else None, within_px)
    assert got == pytest.approx(expected, abs=1e-12)
    assert 0 < expected <= 1


def test_an_outline_towards_ignored_pixels_is_none() -> None:
    truth, ignore = np.ones((20, 30), bool), np.zeros((20, 30), bool)
    truth[:, :5], ignore[:, 20:] = False, True
    predicted = truth.copy()
    predicted[:, 18:] = False  # an outline at 17: three from what is ignored, two from column 19
    half = boundary_f(predicted, truth & ~ignore, ignore, within_px=2)
    assert half == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert boundary_f(truth, truth & ~ignore, ignore, within_px=2) == 1


def test_a_mask_that_ends_a_pixel_short_of_the_pictures_edge_loses_nothing() -> None:
    truth = np.zeros((60, 80), bool)
    truth[:, :40] = True
    for cut in (np.s_[:1], np.s_[-1:], np.s_[:, :1]):
        short = truth.copy()
        short[cut] = False
        assert boundary_f(short, truth) == boundary_f(truth, short) == 1
    full, short = np.ones((60, 80), bool), np.ones((60, 80), bool)
    short[0] = False
    assert boundary_f(short, full) == 1
    short[:6] = False  # further than the tolerance: an outline that is not there
    assert boundary_f(short, full) == 0


def test_a_moved_outline_scores_by_the_tolerance() -> None:
    truth, moved = np.zeros((60, 80), bool), np.zeros((60, 80), bool)
    truth[10:50, 10:60] = True
    moved[10:50, 14:64] = True
    assert boundary_f(moved, truth, within_px=4) == 1
    assert boundary_f(moved, truth, within_px=3) < 0.6
    assert tolerance_px((600, 800)) == pytest.approx(7.5)
    assert tolerance_px((3, 4)) == 1


def test_what_is_ignored_changes_nothing() -> None:
    truth, predicted, ignore = blobs(1), blobs(2), np.zeros((23, 31), bool)
    ignore[5:12, 8:20] = True
    before = score_mask(predicted, truth, ignore, {"fat": truth})
    assert score_mask(predicted ^ ignore, truth ^ ignore, ignore, {"fat": truth ^ ignore}) == before


def test_masks_of_unequal_shape_or_kind_are_refused() -> None:
    mask = np.zeros((3, 4), bool)
    with pytest.raises(ValueError, match="one shape"):
        score_mask(mask, mask.T)
    with pytest.raises(ValueError, match="must be bool"):
        score_mask(mask.astype(np.uint8), mask)
