"""Stain jitter against the papers' steps, one pixel at a time in float64."""

import math

import numpy as np
import pytest
import torch

from pathfm.segmentation.augment import EXCHANGED
from pathfm.views.params import HED_LIGHT, HED_STRONG, ViewSpec, draw_views
from pathfm.views.stain import HED, restaining, unit_rows
from tests.views import planes, renderer, some_patches, table

SCALE, SHIFT = (1.2, 0.85, 1.1), (0.05, -0.1, 0.02)


@pytest.fixture(params=["banded", "dense"])
def render(request):
    return renderer(request.param)


def by_the_paper(rgb, scale, shift):
    """Ruifrok & Johnston: amounts = densities times the inverse stain matrix; Tellez: a s + b; back."""
    rows = [[value / math.dist(row, (0, 0, 0)) for value in row] for row in HED.tolist()]
    inverse = np.linalg.inv(np.array(rows)).tolist()
    density = [-math.log10(max(value, 1 / 255)) for value in rgb]
    amounts = [sum(density[c] * inverse[c][s] for c in range(3)) for s in range(3)]
    changed = [scale[s] * amounts[s] + shift[s] for s in range(3)]
    mixed = [sum(changed[s] * rows[s][c] for s in range(3)) for c in range(3)]
    return [min(10.0**-value, 1.0) for value in mixed]


def test_the_stain_matrix_is_ruifrok_and_johnston_s():
    assert HED.tolist() == [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]]
    np.testing.assert_allclose(np.linalg.norm(unit_rows(HED), axis=1), 1)


def test_restained_pixels_are_those_of_the_papers_steps(render):
    image = planes(some_patches(16)[:2])
    image[0, :, 0, 0] = 0.0  # black: its densities end at 1/255
    image[0, :, 0, 1] = 1.0
    ours = render(image, table(2, size=16.0, stain_scale=SCALE, stain_shift=SHIFT), 16)
    for n in range(2):
        for i in range(16):
            for j in range(16):
                want = by_the_paper(image[n, :, i, j].tolist(), SCALE, SHIFT)
                assert ours[n, :, i, j].tolist() == pytest.approx(want, abs=2e-5)


def test_twice_the_haematoxylin_darkens_haematoxylin_alone(render):
    """Pixels of one pure stain, at amount 0.3: by hand 10^-(0.6 h), and eosin as it was."""
    unit = unit_rows(HED)
    pure = torch.from_numpy(10 ** (-0.3 * unit)).float()  # (stain, channel)
    image = pure[:, :, None, None].expand(3, 3, 8, 8)
    ours = render(image, table(3, size=8.0, stain_scale=(2.0, 1.0, 1.0)), 8)
    np.testing.assert_allclose(ours[0, :, 4, 4], 10 ** (-0.6 * unit[0]), atol=1e-5)
    np.testing.assert_allclose(ours[1, :, 4, 4], 10 ** (-0.3 * unit[1]), atol=1e-5)
    np.testing.assert_allclose(ours[2, :, 4, 4], 10 ** (-0.3 * unit[2]), atol=1e-5)


def test_factors_leave_bare_glass_white_and_shifts_tint_it(render):
    glass = torch.ones(1, 3, 8, 8)
    scaled = render(glass, table(size=8.0, stain_scale=SCALE), 8)
    torch.testing.assert_close(scaled, glass, atol=1e-6, rtol=0)
    tinted = render(glass, table(size=8.0, stain_shift=(0.1, 0.0, 0.0)), 8)
    want = 10 ** (-0.1 * unit_rows(HED)[0])
    np.testing.assert_allclose(tinted[0, :, 4, 4], want, atol=1e-5)


def test_changing_nothing_is_the_identity():
    matrix, shift = restaining(np.ones((4, 3)), np.zeros((4, 3)))
    np.testing.assert_allclose(matrix, np.tile(np.eye(3), (4, 1, 1)), atol=1e-12)
    assert not shift.any()


def test_stains_may_be_mixed_again_as_others():
    """One matrix an exchange: a pure stain becomes the new one's colour at the same amount."""
    matrix, _ = restaining(np.ones((len(EXCHANGED), 3)), np.zeros((len(EXCHANGED), 3)), EXCHANGED)
    for found, wanted in zip(matrix, unit_rows(EXCHANGED), strict=True):
        np.testing.assert_allclose(unit_rows(HED) @ found, wanted, atol=1e-12)


def test_stains_are_changed_before_lamps_and_cameras(render):
    """Restained, then brighter: 0.8 times what the stain alone gives."""
    image = planes(some_patches(16)[:2])
    stained = table(2, size=16.0, stain_scale=SCALE)
    both = table(2, size=16.0, stain_scale=SCALE, brightness=0.8)
    torch.testing.assert_close(
        render(image, both, 16), 0.8 * render(image, stained, 16), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("preset", "low", "high"), [(HED_LIGHT, 0.95, 1.05), (HED_STRONG, 0.8, 1.2)]
)
def test_presets_have_the_ranges_of_tellez(preset, low, high):
    drawn = draw_views(ViewSpec(hed=preset), 0, np.arange(5_000), 0, 256)
    assert low <= drawn.stain_scale.min() < low + 0.01
    assert high - 0.01 < drawn.stain_scale.max() <= high
    assert np.abs(drawn.stain_shift).max() <= high - 1


def test_no_stain_changes_unless_asked():
    drawn = draw_views(ViewSpec(), 0, np.arange(1_000), 0, 256)
    assert (drawn.stain_scale == 1).all()
    assert (drawn.stain_shift == 0).all()
