"""Views against PIL and torchvision where they share a definition, and against their own promise:
the same (seed, draw, view) is the same picture, whatever the batch and the number of threads.
"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError
from torchvision.transforms.v2 import functional as tv

from pathfm.runtime import PathfmError
from pathfm.views.params import ViewSpec, ViewTable, draw_views
from pathfm.views.render import render as render_groups
from pathfm.views.resampling import Axis, Filter, Shape, blur_matrix, dense, dense_numbers
from tests.views import (
    DRAWS,
    EVERYTHING,
    MIXED,
    ONE,
    PLAIN,
    ZERO,
    planes,
    renderer,
    some_patches,
    table,
    views_of,
)


@pytest.fixture(scope="module")
def patches():
    return some_patches()


@pytest.fixture(params=["banded", "dense"])
def render(request):
    return renderer(request.param)


def test_a_batch_of_eight_is_eight_batches_of_one(patches):
    together = views_of(patches, DRAWS, MIXED)
    for row in range(8):
        alone = views_of(patches[row : row + 1], DRAWS[row : row + 1], MIXED)
        for view in range(len(MIXED)):
            assert torch.equal(together[view][row], alone[view][0])  # on a CPU to the last bit


def test_the_order_of_the_batch_does_not_matter(patches):
    order = [5, 2, 7, 0, 1, 6, 4, 3]
    straight = views_of(patches, DRAWS, MIXED)
    shuffled = views_of(patches[order], DRAWS[order], MIXED)
    for view in range(len(MIXED)):
        assert torch.equal(shuffled[view], straight[view][order])


def test_two_ranks_of_two_micro_batches_make_what_one_rank_makes(patches):
    """Nine patches on one rank (more than are done at a time); five and four, split again, on two."""
    pixels, draws = patches[[*range(8), 0]], np.arange(9) + 77
    whole = views_of(pixels, draws, MIXED)
    parts = [views_of(pixels[a:b], draws[a:b], MIXED) for a, b in ((0, 3), (3, 5), (5, 7), (7, 9))]
    for view in range(len(MIXED)):
        assert torch.equal(torch.cat([part[view] for part in parts]), whole[view])


def test_views_come_in_the_order_of_their_specs(patches):
    """Specs of one size are made together, and given back where they stood; the first is the last."""
    sizes = [24, 48, 24, 40, 48, 24]
    specs = [ViewSpec(size_px=size, blur=1.0 - k % 5 / 5) for k, size in enumerate(sizes)]
    views = views_of(patches, DRAWS, specs)
    assert [tuple(view.shape) for view in views] == [(8, 3, s, s) for s in sizes]
    for k, spec in enumerate(specs):
        drawn = draw_views(spec, 3, DRAWS, k, 96)
        groups = [(drawn, Shape.of(spec))]
        (alone,) = render_groups(patches, groups, ZERO, ONE)
        assert torch.equal(views[k], alone)


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (torch.zeros(2, 96, 96, 3), "float32"),
        (torch.zeros(2, 96, 80, 3, dtype=torch.uint8), "80"),
        (torch.zeros(3, 96, 96, 3, dtype=torch.uint8), r"\(3, 96"),
        (torch.zeros(2, 96, 96, 4, dtype=torch.uint8), "4"),
        (torch.zeros(96, 96, 3, dtype=torch.uint8), "uint8"),
        (torch.zeros(7, dtype=torch.uint8), "uint8"),
    ],
)
def test_pixels_of_another_kind_are_refused_in_one_line(pixels, words):
    with pytest.raises(PathfmError, match=words) as caught:
        views_of(pixels, np.arange(2), [PLAIN])
    assert "\n" not in str(caught.value)


def test_the_number_of_threads_does_not_matter(patches):
    before = torch.get_num_threads()
    try:
        pictures = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            pictures.append(views_of(patches, DRAWS, [EVERYTHING])[0])
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(pictures[0], pictures[1], atol=1e-5, rtol=0)


def test_the_global_random_generator_is_neither_read_nor_moved(patches):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = views_of(patches, DRAWS, [EVERYTHING])[0]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(first, views_of(patches, DRAWS, [EVERYTHING])[0])


def test_seed_draw_and_view_each_change_the_view():
    def crops(seed, draw, view):
        return draw_views(EVERYTHING, seed, np.array([draw]), view, 256).x[0]

    drawn = {crops(s, d, v) for s in (0, 1, 2) for d in (0, 1, 2) for v in (0, 1, 2)}
    assert len(drawn) == 27  # seed + draw collisions would leave fewer


def test_no_draw_leaves_its_range_and_rates_are_as_asked():
    spec = ViewSpec(size_px=48, scale=(0.3, 1.0), blur=0.5, solarize=0.2, gray=0.2)
    drawn = draw_views(spec, 0, np.arange(20_000), 0, 256)
    assert (drawn.x >= 0).all()
    assert (drawn.x + drawn.width <= 256 + 1e-9).all()
    assert (drawn.y + drawn.height <= 256 + 1e-9).all()
    area = drawn.width * drawn.height / 256**2
    assert area.min() >= 0.3 - 1e-9
    assert area.max() <= 1.0
    ratio = drawn.width / drawn.height
    assert 0.75 - 1e-9 <= ratio.min() < ratio.max() <= 4 / 3 + 1e-9
    for rate, got in (
        (0.5, (drawn.sigma_px > 0).mean()),
        (0.2, drawn.solarize.mean()),
        (0.2, drawn.gray.mean()),
        (0.8, (drawn.brightness != 1).mean()),
        (0.5, drawn.transpose.mean()),
    ):
        assert got == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 20_000) ** 0.5)


def test_the_eight_orientations_are_equally_likely():
    drawn = draw_views(ViewSpec(), 0, np.arange(8_000), 0, 256)
    code = drawn.flip_x * 4 + drawn.flip_y * 2 + drawn.transpose
    assert np.abs(np.bincount(code, minlength=8) - 1_000).max() < 4 * 30  # sd about 30


@pytest.mark.parametrize(
    "box", [(0.0, 0.0, 96.0, 96.0), (3.3, 10.7, 80.1, 61.2), (9.5, 2.25, 21, 30)]
)
def test_a_crop_equals_pil_bilinear_with_a_box(patches, box, render):
    """PIL on float planes: the same triangle filter, antialiased when the crop shrinks."""
    x, y, width, height = box
    drawn = table(x=x, y=y, width=width, height=height)
    ours = render(planes(patches[:1]), drawn, 48, ZERO, ONE)[0]
    for channel, plane in enumerate(planes(patches[:1])[0].numpy()):
        picture = Image.fromarray(plane)
        theirs = picture.resize(
            (48, 48), Image.Resampling.BILINEAR, box=(x, y, x + width, y + height)
        )
        np.testing.assert_allclose(ours[channel].numpy(), np.asarray(theirs), atol=2e-6)


@pytest.mark.parametrize("size_out", [96, 48, 33])
def test_resampling_equals_torch_antialiased_interpolation(patches, size_out, render):
    image = planes(patches)
    ours = render(image, table(8), size_out, ZERO, ONE)
    theirs = F.interpolate(image, size_out, mode="bilinear", antialias=True)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_a_shrunken_checkerboard_is_grey_not_a_new_pattern(render):
    board = (torch.arange(96)[:, None] + torch.arange(96)) % 2
    image = board.float().expand(1, 3, 96, 96).contiguous()
    shrunk = render(image, table(), 32, ZERO, ONE)[0]
    assert (shrunk[:, 2:-2, 2:-2] - 0.5).abs().max() < 0.06  # without antialiasing: 0 or 1


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
@pytest.mark.parametrize("flip", [False, True])
def test_flips_and_turns_equal_numpys(patches, turns, flip, render):
    spec = PLAIN.model_copy(
        update={"flip": 0.5, "turn": 1.0, "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    )
    draws = np.arange(64)
    drawn = draw_views(spec, 0, draws, 0, 96)
    want_x = flip ^ (turns in (1, 2))
    found = (drawn.flip_x == want_x) & (drawn.flip_y == (turns in (2, 3)))
    found &= drawn.transpose == turns % 2
    row = int(np.argmax(found))
    assert found[row]
    one = ViewTable(
        **{f.name: getattr(drawn, f.name)[row : row + 1] for f in dataclasses.fields(drawn)}
    )
    ours = render(planes(patches[:1]), one, 96, ZERO, ONE)[0]
    image = planes(patches[:1])[0]
    theirs = torch.rot90(image.flip(2) if flip else image, turns, (1, 2))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_torchvisions(patches, sigma, render):
    ours = render(planes(patches), table(8, sigma_px=sigma), 96, ZERO, ONE)
    theirs = tv.gaussian_blur(planes(patches), [25, 25], [sigma, sigma])
    torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=0)


def test_blur_rows_sum_to_one_and_a_hardly_any_blur_is_the_identity():
    matrix = blur_matrix(torch.tensor([0.05, 0.5, 4.0]), 20)
    torch.testing.assert_close(matrix.sum(2), torch.ones(3, 20))
    assert torch.equal(matrix[0], torch.eye(20))


@pytest.mark.parametrize(
    ("field", "value", "reference"),
    [
        ("brightness", 0.7, tv.adjust_brightness),
        ("contrast", 1.3, tv.adjust_contrast),
        ("saturation", 0.6, tv.adjust_saturation),
    ],
)
def test_colour_steps_equal_torchvisions_where_nothing_clamps(
    patches, field, value, reference, render
):
    image = 0.3 + 0.4 * planes(patches)
    ours = render(image, table(8, **{field: value}), 96, ZERO, ONE)
    torch.testing.assert_close(ours, reference(image, value), atol=1e-4, rtol=0)  # .2989


def test_colour_steps_compose_in_the_documented_order(patches, render):
    image = 0.35 + 0.3 * planes(patches)
    ours = render(image, table(8, brightness=0.9, contrast=1.2, saturation=0.5), 96, ZERO, ONE)
    theirs = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(image, 0.9), 1.2), 0.5)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_greyscale_equals_torchvisions(patches, render):
    ours = render(planes(patches), table(8, gray=True), 96, ZERO, ONE)
    theirs = tv.rgb_to_grayscale(planes(patches), num_output_channels=3)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)  # its weights: .2989 .587 .114


def test_hue_turns_the_colour_plane_and_leaves_luma_and_grey(patches, render):
    """A third of a turn in YIQ, by hand: luma stays, chroma keeps its length and turns 120 deg."""
    image = 0.4 + 0.2 * planes(patches)
    turned = render(image, table(8, hue=1 / 3), 96, ZERO, ONE)
    yiq = torch.tensor(
        [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]]
    )
    before = torch.einsum("ij,bjhw->bihw", yiq, image)
    after = torch.einsum("ij,bjhw->bihw", yiq, turned)
    torch.testing.assert_close(after[:, 0], before[:, 0], atol=1e-4, rtol=0)
    chroma = torch.complex(before[:, 1], before[:, 2])
    turn = torch.polar(torch.tensor(1.0), torch.tensor(2 * torch.pi / 3))
    torch.testing.assert_close(
        torch.complex(after[:, 1], after[:, 2]), chroma * turn, atol=2e-4, rtol=0
    )
    grey = torch.full((1, 3, 96, 96), 0.5)
    torch.testing.assert_close(render(grey, table(hue=0.2), 96, ZERO, ONE), grey, atol=1e-5, rtol=0)


def test_solarize_equals_torchvisions(patches, render):
    ours = render(planes(patches), table(8, solarize=True), 96, ZERO, ONE)
    torch.testing.assert_close(ours, tv.solarize(planes(patches), 0.5), atol=2e-6, rtol=0)


def test_values_are_normalised_as_the_backbone_wants(patches, render):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = render(planes(patches), table(8), 96, mean, std)
    torch.testing.assert_close(ours, tv.normalize(planes(patches), mean, std), atol=2e-5, rtol=0)


def test_bright_colours_are_clamped_before_they_are_normalised(patches, render):
    bright = render(planes(patches), table(8, brightness=1.4, contrast=1.4), 96, ZERO, ONE)
    assert bright.min() >= 0
    assert bright.max() <= 1


@pytest.mark.parametrize("bicubic", [False, True])
def test_every_row_of_a_resampling_is_an_average(bicubic):
    start, length, sharp = np.array([0.0, 50.2]), np.array([96.0, 45.8]), np.zeros(2)
    axis = Axis(start, length, np.zeros(2, bool), sharp, 96, 48, 96.0, filter=Filter(bicubic))
    matrix = dense(torch.from_numpy(dense_numbers(axis)), axis)
    torch.testing.assert_close(matrix.sum(2), torch.ones(2, 48))
    assert bicubic or (matrix >= 0).all()


@pytest.mark.parametrize(
    "bad",
    [{"scale": (0.5, 0.2)}, {"scale": (0.0, 1.0)}, {"blur_sigma_px": (0.1, 9.0)}, {"flip": 1.5}],
)
def test_a_spec_out_of_range_cannot_be_built(bad):
    with pytest.raises(ValidationError, match=next(iter(bad))):
        ViewSpec(**bad)
