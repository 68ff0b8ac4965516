"""Segmentation losses misused, from config, and as their page in the docs tells of them."""

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
    (lambda: L.dice_loss(Z3, T, classes=(1, -1)), "0 to 2"),
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
    (lambda: L.class_pixels(T, 2, T), "booleans like target"),
    (lambda: L.class_pixels(T, 2, T[:1].bool()), "booleans like target"),
    (lambda: L.class_pixels(T[:0], -1), "n_classes = -1"),
    (lambda: L.dice_loss(Z, T, beta=1e200), "beta = 1e.200.*<= 1,000,000"),
    (lambda: L.tversky_loss(Z, T, alpha=1e300), "alpha = 1e.300"),
    (lambda: L.focal_loss(Z, T, gamma=1e308), "gamma = 1e.308"),
    (lambda: L.dice_loss(Z3, T, class_weights=(1e39, 1, 1)), "<= 1,000,000"),
    (lambda: L.WeightedLoss([L.BCELoss()], [math.nan]), "weight = nan"),
    (lambda: L.WeightedLoss([L.BCELoss()], [1, 1]), "1 terms, 2 weights"),
    (lambda: L.soft_counts(Z, T, None, "mean"), "image, batch"),  # type: ignore[arg-type]
    (lambda: L.dice_loss(Z3, T.to(torch.uint16)), r"uint16.*target.long\(\)"),
    (lambda: L.dice_loss(Z, T.to(torch.complex64)), "complex64"),
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
    assert set(LOSSES) == set(OPTIONS)
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
        ({"name": "focal", "alpha": 0.2, "class_weights": [1, 2]}, "not both"),
        ({"name": "dice", "beta": 1e200}, "less than or equal to 1000000"),
        ({"name": "dice", "weight": 1e39}, "less than or equal to 1000000"),
        ({"name": "dice", "classes": []}, "at least one"),
        ({"name": "dice", "classes": [1, 1]}, "different"),
        ({"name": "dice", "class_weights": [0, 0]}, "one above 0"),
        ({"name": "dice", "class_weights": []}, "one above 0"),
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
