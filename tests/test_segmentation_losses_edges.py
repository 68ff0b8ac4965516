"""Segmentation losses at the edges: saturated and absent classes, ignored pixels."""

import math

import pytest
import torch

from pathfm.segmentation import losses as L
from pathfm.segmentation.losses.combined import LOSSES

VARIANTS = {
    "bce": L.BCELoss(),
    "bce of images": L.BCELoss(reduction="image"),
    "soft bce": L.SoftBCEWithLogitsLoss(),
    "focal": L.FocalLoss(),
    "focal, gamma 1/2": L.FocalLoss(gamma=0.5),
    "focal, gamma 0": L.FocalLoss(gamma=0.0),
    "dice": L.DiceLoss(),
    "dice, s = 0": L.DiceLoss(smooth=0.0),
    "dice of the batch, s = 0": L.DiceLoss(smooth=0.0, reduction="batch"),
    "dice, skipping": L.DiceLoss(smooth=0.0, empty="skip"),
    "dice, V-Net, s = 0": L.DiceLoss(squared=True, smooth=0.0),
    "dice, F2": L.DiceLoss(beta=2.0, smooth=0.0),
    "jaccard": L.JaccardLoss(),
    "jaccard, s = 0": L.JaccardLoss(smooth=0.0),
    "tversky, s = 0": L.TverskyLoss(smooth=0.0),
    "focal tversky": L.FocalTverskyLoss(),
    "focal tversky, s = 0": L.FocalTverskyLoss(smooth=0.0),
    "focal tversky, gamma 3": L.FocalTverskyLoss(gamma=3.0, smooth=0.0),
    "mcc": L.MCCLoss(),
    "mcc of the batch": L.MCCLoss(reduction="batch"),
    "mcc, skipping": L.MCCLoss(empty="skip"),
}
TARGETS = ["empty", "full", "one pixel", "all but one", "half"]
LOGITS = ["all -", "all +", "perfect", "wrong", "zero", "nearly perfect", "one pixel"]


def binary_truth(name: str) -> torch.Tensor:
    y = torch.zeros(2, 8, 6)
    if name in ("full", "all but one"):
        y[:] = 1
    if name == "one pixel":
        y[:, 3, 2] = 1
    if name == "all but one":
        y[:, 3, 2] = 0
    if name == "half":
        y[:, :4] = 1
    return y


def binary_logits(name: str, y: torch.Tensor, size: float) -> torch.Tensor:
    one = torch.full_like(y, -size)
    one[:, 0, 0] = size
    return {
        "all -": torch.full_like(y, -size),
        "all +": torch.full_like(y, size),
        "perfect": (2 * y - 1) * size,
        "wrong": (1 - 2 * y) * size,
        "zero": torch.zeros_like(y),
        "nearly perfect": (2 * y - 1) * min(size, 15.0),
        "one pixel": one,
    }[name]


def assert_finite(loss, logits, truth, dtype, what) -> None:
    z = logits.to(dtype).detach().clone().requires_grad_()
    value = loss(z, truth)
    value.backward()
    assert torch.isfinite(value), what
    assert -1e-6 <= value.item() <= 1.3e5, what
    assert z.grad is not None
    assert z.grad.dtype == dtype
    assert torch.isfinite(z.grad).all(), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_are_finite(name, dtype):
    for truth_name in TARGETS:
        y = binary_truth(truth_name)
        for logits_name in LOGITS:
            for size in (20.0, 90.0, 6e4):
                z = binary_logits(logits_name, y, size)
                what = f"{truth_name} {logits_name} {size}"
                assert_finite(VARIANTS[name], z, y, dtype, what)
                both = torch.stack([torch.zeros_like(z), z, -z], 1)
                assert_finite(VARIANTS[name], both, y.long(), dtype, f"classes: {what}")


@pytest.mark.parametrize("name", VARIANTS)
def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_costs(name):
    least = 0.0
    if name == "soft bce":  # labels are .95 and .05: being sure costs
        least = 0.05 * 40
    for truth_name in ("one pixel", "all but one", "half"):
        y = binary_truth(truth_name)
        assert VARIANTS[name]((2 * y - 1) * 40, y).item() == pytest.approx(least, abs=2e-6)
        assert VARIANTS[name]((1 - 2 * y) * 40, y).item() > least + 0.3


@pytest.mark.parametrize("name", VARIANTS)
def test_every_loss_falls_when_its_gradient_is_followed(name):
    generator = torch.Generator().manual_seed(3)
    y = binary_truth("half")
    z = torch.randn(y.shape, generator=generator).requires_grad_()
    before = VARIANTS[name](z, y)
    (gradient,) = torch.autograd.grad(before, z)
    assert VARIANTS[name](z - 0.1 * gradient / gradient.norm(), y) < before
    assert (torch.sign(gradient) == torch.sign(0.5 - y)).float().mean() > 0.9


def test_the_largest_options_still_give_finite_values_and_gradients():
    y = binary_truth("half")
    for z in (40 * (1 - 2 * y), 40 * (2 * y - 1), torch.zeros_like(y)):
        for built in (
            L.DiceLoss(beta=1e6, smooth=1e6),
            L.TverskyLoss(alpha=1e6, beta=1e6),
            L.FocalTverskyLoss(alpha=1e6, beta=1e6, smooth=0.0),
            L.FocalLoss(gamma=1e6),
        ):
            assert_finite(built, z, y, torch.float32, repr(built))


# --- absent classes -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dice", "jaccard", "tversky", "focal_tversky"])
def test_an_absent_class_scores_one_where_it_is_predicted_empty(loss):
    nothing = torch.zeros(1, 4, 4)
    for smooth in (0.0, 1.0):
        built = LOSSES[loss](smooth=smooth)
        assert built(torch.full((1, 4, 4), -40.0), nothing).item() == pytest.approx(0, abs=1e-6)
        assert built(torch.full((1, 4, 4), 40.0), nothing).item() > 0.8
        skipped = LOSSES[loss](smooth=smooth, empty="skip")
        assert skipped(torch.full((1, 4, 4), 40.0), nothing).item() == 0


def test_an_absent_class_predicted_somewhere_scores_s_over_s_and_its_pixels():
    z = torch.full((1, 4, 4), -90.0)
    z[0, 0, :3] = 90.0
    assert L.dice_loss(z, torch.zeros(1, 4, 4), smooth=1.0).item() == pytest.approx(1 - 1 / 4)
    assert L.dice_loss(z, torch.zeros(1, 4, 4), smooth=0.0).item() == pytest.approx(1)


def test_mcc_of_a_truth_of_one_class_is_the_share_of_wrong_pixels_or_nothing():
    z = torch.full((1, 4, 4), -90.0)
    z[0, 0, :3] = 90.0
    assert L.mcc_loss(z, torch.zeros(1, 4, 4)).item() == pytest.approx(3 / 16)
    assert L.mcc_loss(z, torch.ones(1, 4, 4)).item() == pytest.approx(13 / 16)
    assert L.mcc_loss(z, torch.ones(1, 4, 4), empty="skip").item() == 0
    faint = torch.zeros(1, 4, 4, requires_grad=True)
    L.mcc_loss(faint, torch.zeros(1, 4, 4)).backward()
    assert faint.grad is not None
    assert (faint.grad > 0).all()


def test_a_skipped_picture_leaves_the_mean_to_the_others():
    z = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.stack([torch.zeros(4, 4), torch.eye(4)])
    for loss in (L.dice_loss, L.jaccard_loss, L.mcc_loss):
        assert loss(z, y, empty="skip").item() == pytest.approx(loss(z[1:], y[1:]).item())
        assert loss(z, y, empty="count").item() != pytest.approx(loss(z[1:], y[1:]).item())


# --- ignored pixels -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("multi", [False, True], ids=["binary", "classes"])
def test_ignored_pixels_may_hold_anything_and_get_no_gradient(name, multi):
    generator = torch.Generator().manual_seed(5)
    z = torch.randn((2, 3, 4, 5) if multi else (2, 4, 5), generator=generator)
    y = torch.randint(0, 3 if multi else 2, (2, 4, 5), generator=generator)
    ignore = torch.zeros(2, 4, 5, dtype=torch.bool)
    ignore[:, :, 3:] = True
    odd, odd_y = z.clone(), y.clone()
    odd[..., 3:], odd_y[..., 3:] = math.nan, 255
    odd.requires_grad_()
    value = VARIANTS[name](odd, odd_y, ignore)
    value.backward()
    cropped = VARIANTS[name](z[..., :3], y[..., :3])
    torch.testing.assert_close(value, cropped)
    assert odd.grad is not None
    assert (odd.grad[..., 3:] == 0).all()
    assert (odd.grad[..., :3] != 0).any()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_picture_of_which_all_is_ignored_has_no_say(name):
    z = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(5)).requires_grad_()
    y = (torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(6)) < 0.5).float()
    ignore = torch.zeros(2, 4, 5, dtype=torch.bool)
    ignore[0] = True
    torch.testing.assert_close(VARIANTS[name](z, y, ignore), VARIANTS[name](z[1:], y[1:]))
    nothing = VARIANTS[name](z, y, torch.ones_like(ignore))
    nothing.backward()
    assert nothing.item() == 0
    assert (z.grad == 0).all()
