"""Segmentation losses against MONAI and smp where conventions agree, and told where they do not.

Of segmentation_models_pytorch only the folder `losses` is loaded, under another name: the package
itself imports a SegFormer encoder whose licence forbids commercial use.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pathfm.segmentation import losses as L

pytestmark = pytest.mark.slow  # importing monai takes eight seconds


@pytest.fixture(scope="module")
def monai() -> ModuleType:
    return importlib.import_module("monai.losses")


@pytest.fixture(scope="module")
def smp() -> ModuleType:
    package = importlib.util.find_spec("segmentation_models_pytorch")  # finds, runs nothing
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "losses"
    spec = importlib.util.spec_from_file_location(
        "smp_losses_alone", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["smp_losses_alone"] = module
    spec.loader.exec_module(module)
    return module


def example(multi: bool):
    g = torch.Generator().manual_seed(11)
    logits = 2 * torch.randn((3, 4, 9, 7) if multi else (3, 9, 7), generator=g)
    return logits, torch.randint(0, 4 if multi else 2, (3, 9, 7), generator=g)


def close(ours, theirs, rtol=2e-5) -> None:
    torch.testing.assert_close(ours, theirs.float().reshape(()), rtol=rtol, atol=1e-6)


def test_smps_package_itself_is_never_imported(smp) -> None:
    assert smp.DiceLoss.__module__ == "smp_losses_alone.dice"
    assert not [name for name in sys.modules if name.startswith("segmentation_models_pytorch")]


# --- MONAI ----------------------------------------------------------------------------------------

SAME_IN_MONAI: dict[str, Any] = {
    "dice": (L.dice_loss, {}, "DiceLoss", {}),
    "dice, V-Net": (L.dice_loss, {"squared": True}, "DiceLoss", {"squared_pred": True}),
    "tversky": (
        L.tversky_loss,
        {"alpha": 0.3, "beta": 0.7},
        "TverskyLoss",
        {"alpha": 0.3, "beta": 0.7},
    ),
}


@pytest.mark.parametrize("smooth", [1e-5, 1.0, 7.0])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("name", SAME_IN_MONAI)
def test_dice_and_tversky_are_monais(monai, name, batch, smooth):
    ours, options, theirs, told = SAME_IN_MONAI[name]
    told = {**told, "smooth_nr": smooth, "smooth_dr": smooth, "batch": batch}
    options = {**options, "smooth": smooth, "reduction": "batch" if batch else "image"}
    z, y = example(False)
    oracle = getattr(monai, theirs)(sigmoid=True, **told)
    close(ours(z, y, **options), oracle(z[:, None], y[:, None].float()))
    z, y = example(True)
    oracle = getattr(monai, theirs)(softmax=True, to_onehot_y=True, **told)
    close(ours(z, y, **options), oracle(z, y[:, None].float()))
    oracle = getattr(monai, theirs)(
        softmax=True, to_onehot_y=True, include_background=False, **told
    )
    close(ours(z, y, classes=(1, 2, 3), **options), oracle(z, y[:, None].float()))


def test_jaccard_is_monais_with_twice_the_smoothing(monai):
    z, y = example(False)  # theirs is (2 TP + s) / (2 (TP + FP + FN) + s)
    oracle = monai.DiceLoss(sigmoid=True, jaccard=True, smooth_nr=3.0, smooth_dr=3.0)
    close(L.jaccard_loss(z, y, smooth=1.5), oracle(z[:, None], y[:, None]))


def test_class_weights_are_monais_if_their_mean_is_one(monai):
    z, y = example(True)
    weights = L.inverse_frequency_weights([8.0, 4.0, 2.0, 1.0])
    told = {"softmax": True, "to_onehot_y": True, "smooth_nr": 1.0, "smooth_dr": 1.0}
    close(
        L.dice_loss(z, y, class_weights=weights),
        monai.DiceLoss(weight=weights, **told)(z, y[:, None]),
    )
    doubled = [2 * w for w in weights]  # ours divides by their sum, MONAI by their number
    close(
        2 * L.dice_loss(z, y, class_weights=doubled),
        monai.DiceLoss(weight=doubled, **told)(z, y[:, None]),
    )


def test_binary_focal_is_monais_and_of_classes_is_their_sum_where_monai_has_the_mean(monai):
    z, y = example(False)
    for gamma, alpha in ((2.0, None), (0.5, None), (2.0, 0.25)):
        oracle = monai.FocalLoss(gamma=gamma, alpha=alpha)
        close(L.focal_loss(z, y, gamma=gamma, alpha=alpha), oracle(z[:, None], y[:, None].float()))
    z, y = example(True)
    oracle = monai.FocalLoss(use_softmax=True, to_onehot_y=True, gamma=2.0)
    close(L.focal_loss(z, y) / 4, oracle(z, y[:, None]))
    weights = (0.1, 1.0, 2.0, 0.9)
    oracle = monai.FocalLoss(use_softmax=True, to_onehot_y=True, gamma=2.0, weight=weights)
    close(L.focal_loss(z, y, class_weights=weights) / 4, oracle(z, y[:, None]))


@pytest.mark.parametrize("batch", [False, True])
def test_mcc_is_monais_on_pictures_of_both_classes(monai, batch):
    reduction = "batch" if batch else "image"
    z, y = example(False)
    oracle = monai.MCCLoss(sigmoid=True, batch=batch, smooth_dr=0.0)
    close(L.mcc_loss(z, y, reduction=reduction), oracle(z[:, None], y[:, None]))
    z, y = example(True)
    oracle = monai.MCCLoss(softmax=True, to_onehot_y=True, batch=batch, smooth_dr=0.0)
    close(L.mcc_loss(z, y, reduction=reduction), oracle(z, y[:, None]))


def test_where_the_truth_is_one_class_ours_counts_wrong_pixels_and_monais_mcc_says_one(monai):
    z = torch.full((1, 4, 4), -90.0)
    z[0, 0, 0] = 90.0
    nothing = torch.zeros(1, 4, 4)
    assert monai.MCCLoss(sigmoid=True)(z[:, None], nothing[:, None]).item() == pytest.approx(1)
    assert L.mcc_loss(z, nothing).item() == pytest.approx(1 / 16)


# --- torch ----------------------------------------------------------------------------------------


def test_cross_entropy_is_torchs_but_weights_divide_by_pixels_and_not_by_weights():
    z, y = example(False)
    close(L.bce_loss(z, y), F.binary_cross_entropy_with_logits(z, y.float()))
    close(
        L.bce_loss(z, y, class_weights=(1, 5)),
        F.binary_cross_entropy_with_logits(z, y.float(), pos_weight=torch.tensor(5.0)),
    )
    z, y = example(True)
    close(L.bce_loss(z, y), F.cross_entropy(z, y))
    close(L.soft_bce_loss(z, y), F.cross_entropy(z, y, label_smoothing=0.1))
    weights = torch.tensor([0.1, 1.0, 2.0, 0.9])
    torchs = F.cross_entropy(z, y, weight=weights) * weights[y].sum() / y.numel()
    close(L.bce_loss(z, y, class_weights=weights.tolist()), torchs)
    left_out = y == 2
    close(L.bce_loss(z, y, left_out), F.cross_entropy(z, y, ignore_index=2))


# --- smp ------------------------------------------------------------------------------------------


def test_smps_dice_is_ours_over_the_batch_with_twice_its_smoothing(smp):
    for smooth in (0.0, 1.0, 3.0):  # theirs is (TP + s) / (TP + FP/2 + FN/2 + s): s counts twice
        z, y = example(False)
        oracle = smp.DiceLoss("binary", smooth=smooth)
        close(L.dice_loss(z, y, smooth=2 * smooth, reduction="batch"), oracle(z[:, None], y))
        z, y = example(True)
        oracle = smp.DiceLoss("multiclass", smooth=smooth)
        close(L.dice_loss(z, y, smooth=2 * smooth, reduction="batch"), oracle(z, y))


def test_smps_jaccard_and_tversky_are_ours_over_the_batch(smp):
    z, y = example(True)
    how = {"smooth": 1.0, "reduction": "batch"}
    close(L.jaccard_loss(z, y, **how), smp.JaccardLoss("multiclass", smooth=1.0)(z, y))
    oracle = smp.TverskyLoss("multiclass", smooth=1.0, alpha=0.3, beta=0.7)
    close(L.tversky_loss(z, y, **how), oracle(z, y))
    # Their focal power is taken of the mean, ours (the paper's) of each class.
    z, y = example(False)
    oracle = smp.TverskyLoss("binary", smooth=1.0, alpha=0.3, beta=0.7, gamma=0.75)
    close(L.focal_tversky_loss(z, y, **how), oracle(z[:, None], y))


def test_class_weights_are_smps_who_divides_by_their_sum_too(smp):
    z, y = example(True)
    weights = [0.5, 2.0, 4.0, 1.0]
    oracle = smp.DiceLoss("multiclass", smooth=1.0, class_weights=weights)
    close(L.dice_loss(z, y, smooth=2.0, reduction="batch", class_weights=weights), oracle(z, y))


def test_smp_divides_by_absent_classes_which_ours_counts_or_skips(smp):
    z, y = example(True)
    y = y.clamp_max(2)  # class 3 is absent
    how = {"smooth": 0.0, "reduction": "batch"}
    theirs = smp.DiceLoss("multiclass")(z, y)
    close(L.dice_loss(z, y, empty="skip", **how) * 3 / 4, theirs)
    assert L.dice_loss(z, y, empty="count", **how) > theirs + 0.2


def test_smps_soft_labels_are_twice_as_soft_as_ours(smp):
    z, y = example(False)
    oracle = smp.SoftBCEWithLogitsLoss(smooth_factor=0.1)
    close(L.soft_bce_loss(z, y, label_smoothing=0.2), oracle(z, y.float()))


def test_smps_binary_focal_is_ours_and_of_classes_is_one_sigmoid_each(smp):
    z, y = example(False)
    close(L.focal_loss(z, y), smp.FocalLoss("binary")(z, y.float()))
    close(L.focal_loss(z, y, alpha=0.25), smp.FocalLoss("binary", alpha=0.25)(z, y.float()))
    z, y = example(True)
    each = [L.focal_loss(z[:, c], y == c) for c in range(4)]
    close(torch.stack(each).mean(), smp.FocalLoss("multiclass")(z, y))
    assert abs(L.focal_loss(z, y) - torch.stack(each).mean()) > 0.05


def test_smps_mcc_wants_probabilities_and_is_not_finite_in_half_precision(smp):
    z, y = example(False)
    oracle = smp.MCCLoss()
    close(L.mcc_loss(z, y, reduction="batch"), oracle(z.sigmoid(), y.float()), rtol=1e-4)
    # logits pass as if they were probabilities, and give another value without a word
    assert abs(oracle(z, y.float()).item() - L.mcc_loss(z, y, reduction="batch").item()) > 0.1
    large, truth = torch.randn(1, 400, 400).half(), torch.ones(1, 400, 400).half()
    truth[:, :200] = 0
    assert not torch.isfinite(oracle(large.sigmoid(), truth))
    assert torch.isfinite(L.mcc_loss(large, truth))
