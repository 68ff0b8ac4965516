"""Segmentation losses: loops of their formulas, values by hand, gradients, relations."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, matthews_corrcoef

from pathfm.segmentation import losses as L
from tests import segmentation_loops as loops

P = [
    [0.38574776, 0.08795848, 0.83927506],
    [0.21592768, 0.44453627, 0.10463644],
    [0.8793516, 0.65118235, 0.5184219],
]
Y = [[1.0, 0, 0], [0, 0, 0], [1, 1, 1]]


def example(multi: bool, *, ignore: bool = True, seed: int = 1):
    """Float64 logits, truth and an ignore mask of three pictures that are not square."""
    g = torch.Generator().manual_seed(seed)
    shape = (3, 4, 5, 7) if multi else (3, 5, 7)
    logits = 2 * torch.randn(shape, generator=g, dtype=torch.float64)
    target = torch.randint(0, 4 if multi else 2, (3, 5, 7), generator=g)
    left_out = torch.rand((3, 5, 7), generator=g) < 0.3
    left_out[1, :2] = True  # pictures with unequal numbers of pixels
    return logits, target if multi else target.double(), left_out if ignore else None


OVERLAPS: dict[str, Any] = {
    "dice": (L.dice_loss, {}, loops.dice()),
    "dice, s = 0": (L.dice_loss, {"smooth": 0.0}, loops.dice(0)),
    "dice, V-Net": (L.dice_loss, {"squared": True, "smooth": 0.0}, loops.vnet(0)),
    "dice, V-Net, s = 1": (L.dice_loss, {"squared": True}, loops.vnet(1)),
    "dice, F2": (L.dice_loss, {"beta": 2.0}, loops.f_beta(2)),
    "dice, F1/2, s = 3": (L.dice_loss, {"beta": 0.5, "smooth": 3.0}, loops.f_beta(0.5, 3)),
    "jaccard": (L.jaccard_loss, {}, loops.jaccard()),
    "jaccard, s = 0": (L.jaccard_loss, {"smooth": 0.0}, loops.jaccard(0)),
    "tversky": (L.tversky_loss, {}, loops.tversky(0.3, 0.7)),
    "tversky .9 .2": (L.tversky_loss, {"alpha": 0.9, "beta": 0.2}, loops.tversky(0.9, 0.2)),
    "focal tversky": (L.focal_tversky_loss, {}, loops.tversky(0.3, 0.7, 1, 4 / 3)),
    "focal tversky, 1/2": (L.focal_tversky_loss, {"gamma": 0.5}, loops.tversky(0.3, 0.7, 1, 0.5)),
    "mcc": (L.mcc_loss, {}, loops.mcc()),
}
PIXELWISE: dict[str, Any] = {
    "bce": (L.bce_loss, {}, {}),
    "soft bce": (L.soft_bce_loss, {}, {"smoothing": 0.1}),
    "soft bce .3": (L.soft_bce_loss, {"label_smoothing": 0.3}, {"smoothing": 0.3}),
    "focal": (L.focal_loss, {}, {"gamma": 2}),
    "focal .5": (L.focal_loss, {"gamma": 0.5}, {"gamma": 0.5}),
}


# --- loops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["image", "batch"])
@pytest.mark.parametrize("name", OVERLAPS)
def test_a_loss_of_counts_equals_its_loop(name, reduction):
    function, options, formula = OVERLAPS[name]
    logits, target, ignore = example(False)
    ours = function(logits, target, ignore, reduction=reduction, **options).item()
    assert ours == pytest.approx(loops.summed(formula, logits, target, ignore, reduction), rel=1e-9)
    logits, target, ignore = example(True)
    for more in ({}, {"class_weights": (0.5, 2, 0, 1)}, {"classes": (1, 3)}):
        ours = function(logits, target, ignore, reduction=reduction, **options, **more).item()
        loop = loops.summed(
            formula,
            logits,
            target,
            ignore,
            reduction,
            weights=more.get("class_weights"),
            classes=more.get("classes"),
        )
        assert ours == pytest.approx(loop, rel=1e-9)


@pytest.mark.parametrize("reduction", ["image", "batch"])
@pytest.mark.parametrize("name", PIXELWISE)
def test_a_loss_of_pixels_equals_its_loop(name, reduction):
    function, options, told = PIXELWISE[name]
    for multi in (False, True):
        logits, target, ignore = example(multi)
        weights = (0.5, 2, 0.1, 1) if multi else (0.3, 1.7)
        several: list = [{}, {"class_weights": weights}, {"classes": (1,)}]
        several.append({"class_weights": weights, "classes": (1, 2) if multi else (0,)})
        for more in several:
            ours = function(logits, target, ignore, reduction=reduction, **options, **more).item()
            loop = loops.pixelwise(
                logits,
                target,
                ignore,
                reduction,
                weights=more.get("class_weights"),
                classes=more.get("classes"),
                **told,
            )
            assert ours == pytest.approx(loop, rel=1e-9)


def test_soft_counts_are_those_of_a_loop_and_add_up_to_the_pixels():
    logits, target, ignore = example(True)
    ours = L.soft_counts(logits, target, ignore)
    for b, found in enumerate(loops.pixels(logits, target, ignore)):
        for c in range(4):
            n = loops.counts(found, c)
            for name in ("tp", "fp", "fn", "tn"):
                assert getattr(ours, name)[b, c].item() == pytest.approx(n[name], rel=1e-9)
            assert ours.pixels[b, c].item() == pytest.approx(len(found))
    batch = L.soft_counts(logits, target, ignore, "batch")
    torch.testing.assert_close(batch.fp, ours.fp.sum(0, keepdim=True))


def test_float32_is_close_to_the_float64_loop_and_every_other_type_is_counted_in_float32():
    logits, target, ignore = example(False)
    for function, options, formula in OVERLAPS.values():
        ours = function(logits.float(), target, ignore, **options)
        assert ours.dtype == torch.float32
        assert ours.item() == pytest.approx(loops.summed(formula, logits, target, ignore), abs=2e-6)
    low = logits.bfloat16()
    assert torch.equal(L.dice_loss(low, target), L.dice_loss(low.float(), target))
    assert L.bce_loss(low, target).dtype == torch.float32


def test_a_large_picture_keeps_its_few_false_positives_in_float32():
    # 4 M pixels of confident tissue: FP as sum p - TP would be lost in rounding.
    logits = torch.full((1, 2048, 2048), 9.0)
    target = torch.ones(1, 2048, 2048)
    logits[0, 0, :3], target[0, 0, :3] = -1.0, 0.0
    exact = 3 / (1 + math.e)
    assert L.soft_counts(logits, target).fp.item() == pytest.approx(exact, rel=1e-6)


# --- by hand --------------------------------------------------------------------------------------


def test_dice_has_the_worked_value():
    logits, target = torch.tensor(P).double().logit()[None], torch.tensor(Y)[None]
    assert 1 - L.dice_loss(logits, target).item() == pytest.approx(0.64307916, abs=1e-7)
    assert 1 - L.dice_loss(logits, target, smooth=0.0).item() == pytest.approx(0.59916145, abs=1e-7)


# p = 3/4 and 1/4 where the truth is 1, 1/4 and 1/4 where it is 0:
# TP = 1, FP = 1/2, FN = 1, TN = 3/2; sum p^2 = 12/16, sum y^2 = 2.
HAND = [
    (L.dice_loss, {}, 1 - 3 / 4.5),
    (L.dice_loss, {"smooth": 0.0}, 1 - 2 / 3.5),
    (L.dice_loss, {"squared": True, "smooth": 0.0}, 1 - 2 / 2.75),
    (L.dice_loss, {"beta": 2.0, "smooth": 0.0}, 1 - 5 / (5 + 4 + 0.5)),
    (L.jaccard_loss, {"smooth": 0.0}, 1 - 1 / 2.5),
    (L.tversky_loss, {"smooth": 0.0}, 1 - 1 / (1 + 0.15 + 0.7)),
    (L.focal_tversky_loss, {"smooth": 0.0}, (1 - 1 / 1.85) ** 0.75),
    (L.mcc_loss, {}, 1 - (1.5 - 0.5) / math.sqrt(1.5 * 2 * 2 * 2.5)),
    (L.bce_loss, {}, -(3 * math.log(3 / 4) + math.log(1 / 4)) / 4),
    # labels .95 and .05: three pixels with .95 log 3/4 + .05 log 1/4, one the other way around
    (
        L.soft_bce_loss,
        {},
        -(2.9 * math.log(3 / 4) + 1.1 * math.log(1 / 4)) / 4,
    ),
    (L.focal_loss, {}, -(3 / 16 * math.log(3 / 4) + 9 / 16 * math.log(1 / 4)) / 4),
    (
        L.focal_loss,
        {"alpha": 0.25},
        -(
            0.25 / 16 * math.log(3 / 4)
            + 0.25 * 9 / 16 * math.log(1 / 4)
            + 1.5 / 16 * math.log(3 / 4)
        )
        / 4,
    ),
]


@pytest.mark.parametrize(("function", "options", "value"), HAND)
def test_four_pixels_by_hand(function, options, value):
    logits = torch.tensor([[[0.75, 0.25], [0.25, 0.25]]], dtype=torch.float64).logit()
    target = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert function(logits, target, **options).item() == pytest.approx(value, rel=1e-12)


def test_three_classes_with_weights_by_hand():
    # p = 1/2, 1/4, 1/4 at both pixels, which are of class 0 and 1; class 2 is absent.
    logits = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()
    logits = logits.view(1, 3, 1, 1).expand(1, 3, 1, 2)
    target = torch.tensor([[[0, 1]]])
    by_class = [1 - 2 * 0.5 / 2, 1 - 2 * 0.25 / 1.5, 1.0]
    dice = lambda **how: L.dice_loss(logits, target, smooth=0.0, **how).item()  # noqa: E731
    assert dice() == pytest.approx(sum(by_class) / 3)
    assert dice(class_weights=(1, 2, 3)) == pytest.approx(
        (by_class[0] + 2 * by_class[1] + 3 * by_class[2]) / 6
    )
    assert dice(empty="skip") == pytest.approx(sum(by_class[:2]) / 2)
    assert dice(classes=(1, 2)) == pytest.approx(sum(by_class[1:]) / 2)
    assert L.bce_loss(logits, target).item() == pytest.approx((math.log(2) + math.log(4)) / 2)


def test_inverse_frequency_weights_by_hand():
    assert L.inverse_frequency_weights([3, 1]) == pytest.approx((0.5, 1.5))
    # 1/share = 2, 4, 4 of mean 10/3; a class that never occurs gets none
    assert L.inverse_frequency_weights([2, 1, 1, 0]) == pytest.approx((0.6, 1.2, 1.2, 0))
    assert L.inverse_frequency_weights([1e-320, 1]) == pytest.approx((2, 0))
    target = torch.tensor([[0, 0, 1], [2, 1, 0]])
    assert L.class_pixels(target, 4).tolist() == [3, 2, 1, 0]
    assert L.class_pixels(target, 3, target == 0).tolist() == [0, 2, 1]
    assert np.mean(L.inverse_frequency_weights(L.class_pixels(target, 3))) == pytest.approx(1)


# --- gradients ------------------------------------------------------------------------------------

ALL = {name: (f, options) for name, (f, options, _) in {**OVERLAPS, **PIXELWISE}.items()}


@pytest.mark.parametrize("multi", [False, True], ids=["binary", "classes"])
@pytest.mark.parametrize("name", ALL)
def test_gradients_pass_gradcheck(name, multi):
    function, options = ALL[name]
    logits, target, ignore = example(multi)
    logits, target, ignore = logits[:2, ..., :3], target[:2, ..., :3], ignore[:2, ..., :3]
    logits = logits.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: function(z, target, ignore, **options), (logits,))


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_the_gradient_of_dice_is_the_closed_form(smooth):
    logits, target, _ = example(False)
    logits = logits[:1].requires_grad_()
    target = target[:1]
    L.dice_loss(logits, target, smooth=smooth).backward()
    p = logits.detach().sigmoid()
    total, overlap = p.sum() + target.sum() + smooth, (p * target).sum()
    by_p = -(2 * target * total - (2 * overlap + smooth)) / total**2
    torch.testing.assert_close(logits.grad, by_p * p * (1 - p), rtol=1e-10, atol=1e-14)


# --- relations ------------------------------------------------------------------------------------

masks = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)
soft = st.lists(st.tuples(st.floats(-6, 6), st.booleans()), min_size=1, max_size=40)


def hard(pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Saturated logits and truth: p is 0 or 1 exactly."""
    predicted, truth = (
        torch.tensor(v, dtype=torch.float64)[None] for v in zip(*pairs, strict=True)
    )
    return (2 * predicted - 1) * 1e3, truth


def scored(pairs) -> tuple[torch.Tensor, torch.Tensor]:
    z, y = zip(*pairs, strict=True)
    return torch.tensor([z], dtype=torch.float64), torch.tensor([y])


@given(masks)
@settings(deadline=None)
def test_dice_without_smoothing_is_f1_on_hard_masks(pairs):
    logits, truth = hard(pairs)
    sklearn = f1_score(truth[0], logits[0] > 0, zero_division=1.0)
    assert 1 - L.dice_loss(logits, truth, smooth=0.0).item() == pytest.approx(sklearn, abs=1e-12)


@given(masks)
@settings(deadline=None)
def test_mcc_is_sklearns_on_hard_masks_of_two_classes(pairs):
    logits, truth = hard(pairs)
    if len(set(truth[0].tolist())) == 2:
        sklearn = matthews_corrcoef(truth[0], logits[0] > 0)
        assert 1 - L.mcc_loss(logits, truth).item() == pytest.approx(sklearn, abs=1e-9)


@given(soft)
@settings(deadline=None)
def test_tversky_of_a_half_and_a_half_is_dice(pairs):
    tversky = L.tversky_loss(*scored(pairs), alpha=0.5, beta=0.5, smooth=0.0).item()
    assert tversky == pytest.approx(L.dice_loss(*scored(pairs), smooth=0.0).item(), rel=1e-12)


@given(soft, st.floats(0, 5))
@settings(deadline=None)
def test_tversky_of_a_half_with_s_is_dice_with_twice_s(pairs, s):
    tversky = L.tversky_loss(*scored(pairs), alpha=0.5, beta=0.5, smooth=s).item()
    assert tversky == pytest.approx(L.dice_loss(*scored(pairs), smooth=2 * s).item(), rel=1e-12)


@given(soft)
@settings(deadline=None)
def test_jaccard_is_dice_over_two_less_dice(pairs):
    d = 1 - L.dice_loss(*scored(pairs), smooth=0.0).item()
    jaccard = 1 - L.jaccard_loss(*scored(pairs), smooth=0.0).item()
    assert jaccard == pytest.approx(d / (2 - d), rel=1e-9, abs=1e-12)


@given(soft)
@settings(deadline=None)
def test_f1_is_dice_and_focal_without_gamma_is_cross_entropy(pairs):
    logits, truth = scored(pairs)
    f1 = L.dice_loss(logits, truth, beta=1.0).item()
    tversky = L.tversky_loss(logits, truth, alpha=1.0, beta=1.0).item()
    assert tversky == pytest.approx(L.jaccard_loss(logits, truth).item(), rel=1e-12)
    assert f1 == pytest.approx(L.dice_loss(logits, truth).item(), rel=1e-12)
    assert L.focal_loss(logits, truth, gamma=0.0).item() == pytest.approx(
        torch.nn.functional.binary_cross_entropy_with_logits(logits, truth.double()).item()
    )


@given(soft, st.integers(2, 7))
@settings(max_examples=30, deadline=None)
def test_mcc_does_not_depend_on_the_size_of_the_picture(pairs, times):
    logits, truth = scored(pairs)
    once = L.mcc_loss(logits, truth).item()
    assert L.mcc_loss(logits.repeat(1, times), truth.repeat(1, times)).item() == pytest.approx(once)


@given(soft)
@settings(deadline=None)
def test_swapping_classes_leaves_mcc_and_bce_but_not_dice(pairs):
    logits, truth = scored(pairs)
    assert L.mcc_loss(-logits, ~truth).item() == pytest.approx(L.mcc_loss(logits, truth).item())
    assert L.bce_loss(-logits, ~truth).item() == pytest.approx(L.bce_loss(logits, truth).item())


def test_dice_does_not_see_how_much_background_is_right_and_mcc_does():
    logits, truth = torch.tensor([[9.0, 9.0, -9.0, 9.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    more, blank = torch.cat([logits, -60 * torch.ones(1, 96)], 1), torch.zeros(1, 96)
    wider = torch.cat([truth, blank], 1)
    assert L.dice_loss(more, wider).item() == pytest.approx(L.dice_loss(logits, truth).item())
    assert L.mcc_loss(more, wider).item() < L.mcc_loss(logits, truth).item() - 0.3


def test_two_classes_by_softmax_are_binary_by_sigmoid():
    logits, target, ignore = example(False)
    two = torch.stack([torch.zeros_like(logits), logits], 1)
    for function in (L.bce_loss, L.soft_bce_loss, L.focal_loss):
        multi = function(two, target.long(), ignore)
        torch.testing.assert_close(multi, function(logits, target, ignore))
    for function, options, _ in OVERLAPS.values():
        multi = function(two, target.long(), ignore, classes=(1,), **options)
        torch.testing.assert_close(multi, function(logits, target, ignore, **options))
