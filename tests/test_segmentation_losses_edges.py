"""Segmentation losses at the edges: saturated and absent, ignored, misused, and from config."""

import inspect
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from pathfm.runtime import PathfmError
from pathfm.segmentation import losses as L
from pathfm.segmentation.loss_terms import OPTIONS, LossTerm
from pathfm.segmentation.losses.combined import LOSSES, options_of

VARIANTS = {
    "bce": L.BCELoss(),
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


# --- misuse ---------------------------------------------------------------------------------------

Z, Z3 = torch.zeros(2, 4, 4), torch.zeros(2, 3, 4, 4)
T = torch.zeros(2, 4, 4, dtype=torch.long)
MISUSES = [
    (lambda: L.dice_loss(Z, T[:1]), r"logits \(2, 4, 4\), target \(1, 4, 4\)"),
    (lambda: L.dice_loss(Z3, T[:, :2]), "target"),
    (lambda: L.dice_loss(Z.long(), T), "floating"),
    (lambda: L.dice_loss(Z3, T.float()), "integers"),
    (lambda: L.dice_loss(Z[:, None], T), "drop the axis"),
    (lambda: L.dice_loss(Z, T + 255), "255.*wants 0 to 1"),
    (lambda: L.dice_loss(Z3, T + 3), "3.*wants 0 to 2"),
    (lambda: L.bce_loss(Z3, T - 1), "-1.*ignore"),
    (lambda: L.bce_loss(Z, T * math.nan), "nan"),
    (lambda: L.dice_loss(Z, T, T), "booleans"),
    (lambda: L.dice_loss(Z, T, T[:1].bool()), "booleans like target"),
    (lambda: L.dice_loss(Z, T, classes=(0,)), "binary"),
    (lambda: L.mcc_loss(Z, T, class_weights=(1.0,)), "binary"),
    (lambda: L.dice_loss(Z3, T, class_weights=(1, 2)), "2 numbers.*3 classes"),
    (lambda: L.dice_loss(Z3, T, class_weights=(1, -2, 1)), ">= 0"),
    (lambda: L.dice_loss(Z3, T, class_weights=(0, 0, 0)), "above 0"),
    (lambda: L.dice_loss(Z3, T, class_weights=(1, 0, 0), classes=(1, 2)), "nothing is left"),
    (lambda: L.dice_loss(Z3, T, classes=(3,)), "0 to 2"),
    (lambda: L.dice_loss(Z3, T, classes=()), "at least one"),
    (lambda: L.bce_loss(Z3, T, classes=(1, 1)), "different"),
    (lambda: L.dice_loss(Z, T, smooth=-1.0), "smooth = -1"),
    (lambda: L.dice_loss(Z, T, smooth=math.nan), "smooth = nan"),
    (lambda: L.dice_loss(Z, T, squared=True, beta=2.0), "V-Net"),
    (lambda: L.dice_loss(Z, T, reduction="mean"), "image, batch"),
    (lambda: L.dice_loss(Z, T, empty="zero"), "count, skip"),
    (lambda: L.tversky_loss(Z, T, alpha=0.0, beta=0.0), "no error"),
    (lambda: L.focal_tversky_loss(Z, T, gamma=0.0), "gamma"),
    (lambda: L.focal_loss(Z3, T, alpha=0.3), "class_weights"),
    (lambda: L.focal_loss(Z, T, alpha=1.3), "<= 1"),
    (lambda: L.bce_loss(Z, T, label_smoothing=1.1), "label_smoothing"),
    (lambda: L.DiceLoss(smoth=1.0), "DiceLoss has no option 'smoth'"),
    (lambda: L.build_loss([]), "at least one"),
    (lambda: L.inverse_frequency_weights([0, 0]), "nothing to weigh"),
    (lambda: L.inverse_frequency_weights([1, -1]), "finite"),
    (lambda: L.class_pixels(T + 2, 2), "0 to 1"),
    (lambda: L.class_pixels(T.float(), 2), "integers"),
]


@pytest.mark.parametrize("number", range(len(MISUSES)))
def test_a_misuse_is_told_on_one_line(number):
    misuse, says = MISUSES[number]
    with pytest.raises(PathfmError, match=says) as told:
        misuse()
    assert "\n" not in str(told.value)


# --- config ---------------------------------------------------------------------------------------


def test_a_weighted_sum_from_config_is_the_sum_by_hand():
    z = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    y = (z + torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(2)) > 0).float()
    ignore = z > 2
    terms = [
        {"name": "bce"},
        {"name": "dice", "smooth": 0.5, "weight": 2, "reduction": "batch"},
        {"name": "dice", "squared": True},
        {"name": "focal_tversky", "alpha": 0.4, "beta": 0.6, "gamma": 2, "weight": 0.25},
    ]
    loss = L.build_loss([LossTerm.model_validate(term) for term in terms])
    by_hand = [
        L.bce_loss(z, y, ignore),
        L.dice_loss(z, y, ignore, smooth=0.5, reduction="batch"),
        L.dice_loss(z, y, ignore, squared=True),
        L.focal_tversky_loss(z, y, ignore, alpha=0.4, beta=0.6, gamma=2.0),
    ]
    expected = by_hand[0] + 2 * by_hand[1] + by_hand[2] + by_hand[3] / 4
    torch.testing.assert_close(loss(z, y, ignore), expected)
    parts = loss.parts(z, y, ignore)
    assert list(parts) == ["bce", "dice", "dice_2", "focal_tversky"]
    torch.testing.assert_close(list(parts.values()), by_hand)
    assert "smooth=0.5" in repr(loss)
    assert not list(loss.parameters())


def test_lists_of_a_yaml_file_become_classes_and_weights():
    term = LossTerm.model_validate(
        {"name": "dice", "classes": [1, 2], "class_weights": [0, 0.5, 1.5], "empty": "skip"}
    )
    z = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    y = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(1))
    by_hand = L.dice_loss(z, y, classes=(1, 2), class_weights=(0, 0.5, 1.5), empty="skip")
    torch.testing.assert_close(L.build_loss([term])(z, y), by_hand)


def test_config_offers_exactly_the_options_that_the_losses_have():
    assert list(LOSSES) == list(OPTIONS) or set(LOSSES) == set(OPTIONS)
    for name, known in OPTIONS.items():
        assert sorted(known) == sorted(options_of(LOSSES[name].function)), name
        signature = inspect.signature(LOSSES[name].function)
        assert list(signature.parameters)[:3] == ["logits", "target", "ignore"]
    fields = set(LossTerm.model_fields) - {"name", "weight"}
    assert fields == {option for known in OPTIONS.values() for option in known}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": "bcd"}, "bce"),
        ({"name": "bce", "smooth": 1}, "bce has no option 'smooth'.*label_smoothing"),
        ({"name": "mcc", "gamma": 1}, "mcc has no option 'gamma'"),
        ({"name": "dice", "smoth": 1}, "smoth"),
        ({"name": "dice", "smooth": -1}, "greater than or equal to 0"),
        ({"name": "dice", "weight": 0}, "greater than 0"),
        ({"name": "dice", "weight": math.inf}, "finite"),
        ({"name": "focal", "alpha": 2}, "0 to 1"),
        ({"name": "tversky", "alpha": 0, "beta": 0}, "no error"),
        ({"name": "focal_tversky", "gamma": 0}, "0.1 to 10"),
        ({"name": "dice", "squared": True, "beta": 2}, "no beta"),
        ({"name": "dice", "reduction": "mean"}, "image"),
        ({"name": "dice", "class_weights": [-1, 1]}, "greater than or equal to 0"),
    ],
)
def test_a_term_that_makes_no_sense_is_refused(given, says):
    with pytest.raises(ValidationError, match=says):
        LossTerm.model_validate(given)


# --- the page -------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "losses.md"


def test_the_examples_of_the_page_run():
    page = PAGE.read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    given = {"logits": Z, "target": T, "ignore": T.bool()}
    exec(code, given)  # the page is ours
    (terms,) = re.findall(r"`loss: (\[.*?\])`", page)
    loss = L.build_loss([LossTerm.model_validate(term) for term in yaml.safe_load(terms)])
    assert loss.names == ("bce", "dice")


def test_the_defaults_that_the_page_tells_are_those_of_the_losses():
    page = PAGE.read_text()
    rows = re.findall(
        r"^\| `(\w+)`.*? \| .* \| (.*) \|$", page.partition("## Formulas")[2], re.MULTILINE
    )
    assert {name for name, _ in rows} == set(LOSSES)
    for name, told in rows:
        for option, value in re.findall(r"`(\w+)` (?:e = )?(none|false|[\d./]+)", told):
            default = inspect.signature(LOSSES[name].function).parameters[option].default
            assert str(default).lower() == value or default == pytest.approx(eval(value)), option


def test_the_pages_pictures_exist_and_are_small():
    pictures = re.findall(r"\(pictures/(.*?)\)", PAGE.read_text())
    assert len(pictures) == 4
    for name in pictures:
        assert 5_000 < (PAGE.parent / "pictures" / name).stat().st_size < 150_000
