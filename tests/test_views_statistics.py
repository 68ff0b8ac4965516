"""Every number that views are drawn from: its law, its rate, and that nothing tells of another."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy.stats import kstest

from pathfm.views.params import HED_STRONG, ViewSpec, draw_views

N = 20_000
PATCH_PX = 256
SPEC = ViewSpec(hed=HED_STRONG, restain=0.7, solarize=0.2)  # its crops always fit: none is rejected


@pytest.fixture(scope="module")
def drawn():
    return draw_views(SPEC, 11, np.arange(N), 5, PATCH_PX)


def laws(drawn):
    """Each number mapped to what must be uniform on 0..1, where it was drawn at all."""
    area = drawn.width * drawn.height / PATCH_PX**2
    jittered, blurred = drawn.brightness != 1, drawn.sigma_px > 0
    restained = (drawn.stain_scale != 1).any(axis=1)
    ratio = np.log(drawn.width / drawn.height)
    return {
        "x": drawn.x / (PATCH_PX - drawn.width),
        "y": drawn.y / (PATCH_PX - drawn.height),
        "area": (area - 0.05) / 0.35,
        "log ratio": (ratio - np.log(0.75)) / np.log(16 / 9),
        "brightness": (drawn.brightness[jittered] - 0.6) / 0.8,
        "contrast": (drawn.contrast[jittered] - 0.6) / 0.8,
        "saturation": (drawn.saturation[jittered] - 0.8) / 0.4,
        "hue": (drawn.hue[jittered] + 0.1) / 0.2,
        "sigma": (drawn.sigma_px[blurred] - 0.1) / 1.9,
        **{f"scale {k}": (drawn.stain_scale[restained, k] - 0.8) / 0.4 for k in range(3)},
        **{f"shift {k}": (drawn.stain_shift[restained, k] + 0.2) / 0.4 for k in range(3)},
    }


def test_every_number_is_uniform_over_its_range(drawn):
    for name, uniform in laws(drawn).items():
        assert len(uniform) > N / 3, name
        assert -1e-9 <= uniform.min() < uniform.max() <= 1 + 1e-9, name
        assert kstest(uniform, "uniform").pvalue > 1e-4, name


def test_every_choice_comes_as_often_as_asked(drawn):
    rates = {
        "jitter": (0.8, drawn.brightness != 1),
        "gray": (0.2, drawn.gray),
        "blur": (0.5, drawn.sigma_px > 0),
        "solarize": (0.2, drawn.solarize),
        "restain": (0.7, (drawn.stain_scale != 1).any(axis=1)),
        "transpose": (0.5, drawn.transpose),
        "flip_x": (0.5, drawn.flip_x),
        "flip_y": (0.5, drawn.flip_y),
    }
    for name, (rate, happened) in rates.items():
        sd = (rate * (1 - rate) / N) ** 0.5
        assert happened.mean() == pytest.approx(rate, abs=4 * sd), name


def as_columns(table):
    """Every drawn number as a column, -1..1 or so; crops by place and logarithms of size."""
    columns = {f.name: getattr(table, f.name) for f in dataclasses.fields(table)}
    columns["x"] = table.x / (PATCH_PX - table.width)
    columns["y"] = table.y / (PATCH_PX - table.height)
    columns["width"], columns["height"] = (
        np.log(table.width * table.height),
        np.log(table.width / table.height),
    )
    for name in ("stain_scale", "stain_shift"):
        columns |= {f"{name} {k}": columns[name][:, k] for k in range(3)}
        del columns[name]
    return {name: np.asarray(column, float) for name, column in columns.items()}


def test_no_number_tells_of_another_in_its_view(drawn):
    """Pearson's r of all pairs; those that one coin turns on share only that they are neutral."""
    coins = [{"brightness", "contrast", "saturation", "hue"}]
    coins += [{f"{kind} {k}" for kind in ("stain_scale", "stain_shift") for k in range(3)}]
    columns = as_columns(drawn)
    assert len(columns) == 20
    for one, other in itertools.combinations(columns, 2):
        r = np.corrcoef(columns[one], columns[other])[0, 1]
        # factors lie symmetrically about their neutral value, so even a shared coin gives r = 0
        assert abs(r) < 4.5 / N**0.5, (one, other, r, coins)


@pytest.mark.parametrize(
    "other", [(11, 0, 6), (12, 0, 5), (11, 1, 5)], ids=["view", "seed", "draw"]
)
def test_no_number_tells_of_the_next_view_seed_or_draw(drawn, other):
    seed, later, view = other
    theirs = as_columns(draw_views(SPEC, seed, np.arange(N) + later, view, PATCH_PX))
    for name, ours in as_columns(drawn).items():
        r = np.corrcoef(ours, theirs[name])[0, 1]
        assert abs(r) < 4.5 / N**0.5, (name, r)


def test_crops_that_do_not_fit_are_drawn_again_and_then_given_up():
    """Scale 1 with any ratio but 1 never fits: the whole patch, as torchvision falls back to."""
    never = draw_views(ViewSpec(scale=(1.0, 1.0)), 0, np.arange(500), 0, PATCH_PX)
    assert (never.width == PATCH_PX).all()
    assert (never.height == PATCH_PX).all()
    wide = draw_views(ViewSpec(scale=(0.4, 1.0)), 0, np.arange(N), 0, PATCH_PX)
    assert (np.maximum(wide.width, wide.height) <= PATCH_PX).all()


def test_views_of_a_batch_drawn_at_once_are_those_drawn_alone():
    draws = np.array([5, 1_000_003, 2**40])
    together = draw_views(SPEC, 3, np.tile(draws, 2), np.repeat([4, 9], 3), PATCH_PX)
    for part, view in ((slice(0, 3), 4), (slice(3, 6), 9)):
        alone = draw_views(SPEC, 3, draws, view, PATCH_PX)
        for field in dataclasses.fields(alone):
            assert np.array_equal(
                getattr(together, field.name)[part], getattr(alone, field.name)
            ), field.name


def test_the_numbers_of_stored_runs_stay_as_they_were():
    """Golden: drawn before stain jitter was there. Words may only be appended."""
    spec = ViewSpec(size_px=48, scale=(0.2, 0.9), solarize=0.5)
    drawn = draw_views(spec, 7, np.array([0, 1_000_003, 2**40]), 3, 256)
    golden: dict[str, list[float]] = {
        "x": [7.868674616992042, 83.21724390856963, 22.728001652332797],
        "y": [5.762654117525363, 16.2681901603346, 12.810543006505107],
        "width": [246.74448927747932, 139.54987473253806, 164.448762392322],
        "height": [237.55129844227142, 167.37678741427607, 179.29518420630276],
        "flip_x": [True, False, False],
        "flip_y": [False, False, False],
        "transpose": [True, True, False],
        "brightness": [0.8485217126086354, 0.7424178488552571, 0.9218384888023138],
        "contrast": [0.8791413020342589, 1.1108562832698226, 1.1828907992690803],
        "saturation": [0.9353574085049331, 0.8046352569013834, 0.9180078434757888],
        "hue": [-0.09075172343291343, 0.01296301824040711, -0.07917239204980434],
        "gray": [False, True, False],
        "sigma_px": [0.0, 1.411190769309178, 0.0],
        "solarize": [True, True, True],
    }
    for name, values in golden.items():
        np.testing.assert_allclose(getattr(drawn, name), values, rtol=1e-14, err_msg=name)
    assert (drawn.stain_scale == 1).all()
    assert (drawn.stain_shift == 0).all()
