"""Views against lightly's DINOTransform, PIL and torchvision, op by op; and where they differ.

Peers work on uint8 and round after every step: half a grey level a step, stated beside each test.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.transforms.dino_transform import DINOTransform, DINOViewTransform
from lightly.transforms.gaussian_blur import GaussianBlur
from lightly.transforms.solarize import RandomSolarization
from PIL import Image
from torchvision.transforms import functional as pil_ops
from torchvision.transforms.v2 import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from pathfm.pretrain.settings import ViewsConfig
from pathfm.views.resampling import Filter
from tests.views import planes, renderer, some_patches, table

LEVEL = 1 / 255
BICUBIC = {"filter": Filter(bicubic=True)}


@pytest.fixture(scope="module")
def patches():
    return some_patches()


@pytest.fixture(params=["banded", "dense"])
def render(request):
    return renderer(request.param)


def as_pil(patches):
    return [Image.fromarray(patch.numpy()) for patch in patches]


def from_pil(pictures):
    return torch.stack([pil_ops.pil_to_tensor(picture).float() / 255 for picture in pictures])


@pytest.mark.parametrize(
    "box", [(0.0, 0.0, 96.0, 96.0), (3.3, 10.7, 80.1, 61.2), (9.5, 2.2, 21, 30)]
)
def test_a_bicubic_crop_equals_pil_with_a_box(patches, render, box):
    x, y, width, height = box
    image = 0.25 + 0.5 * planes(
        patches[:1]
    )  # no overshoot, which ours cuts off and PIL's floats not
    ours = render(image, table(x=x, y=y, width=width, height=height), 48, **BICUBIC)[0]
    for channel, plane in enumerate(image[0].numpy()):
        kept = x, y, x + width, y + height
        theirs = Image.fromarray(plane).resize((48, 48), Image.Resampling.BICUBIC, box=kept)
        np.testing.assert_allclose(ours[channel].numpy(), np.asarray(theirs), atol=3e-6)


@pytest.mark.parametrize("size_out", [96, 48, 33])
def test_bicubic_equals_torch_antialiased_interpolation(patches, render, size_out):
    image = 0.25 + 0.5 * planes(patches)
    theirs = F.interpolate(image, size_out, mode="bicubic", antialias=True)
    ours = render(image, table(8), size_out, **BICUBIC)
    torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=0)


@pytest.mark.parametrize("bicubic", [False, True])
def test_without_antialiasing_it_is_torch_s_plain_interpolation(patches, render, bicubic):
    image = 0.25 + 0.5 * planes(patches)
    plain = Filter(bicubic, antialias=False)
    ours = render(image, table(8), 33, filter=plain)
    theirs = F.interpolate(image, 33, mode="bicubic" if bicubic else "bilinear")
    # torch's plain bicubic has a = -0.75, PIL's and ours -0.5: only the bilinear one is the same
    torch.testing.assert_close(ours, theirs, atol=0.08 if bicubic else 3e-6, rtol=0)


def test_a_crop_equals_lightly_s_crop_then_resize_but_for_its_border(patches, render):
    """Theirs cuts whole pixels first, so its filter ends at the cut; ours looks at what is there."""
    x, y, width, height = 9, 14, 64, 48
    mild = (64 + patches // 2).contiguous()  # nothing overshoots, which PIL cuts off in each pass
    ours = render(
        planes(mild), table(8, x=x, y=y, width=width, height=height), 32, filter=Filter(True)
    )
    theirs = from_pil(
        pil_ops.resized_crop(one, y, x, height, width, [32, 32], Image.Resampling.BICUBIC)
        for one in as_pil(mild)
    )
    away = (ours - theirs).abs()
    assert away[:, :, 2:-2, 2:-2].max() < 1.3 * LEVEL  # two passes, both rounded
    assert 2 * LEVEL < away.max() < 20 * LEVEL  # at the border: the difference is meant


@pytest.mark.parametrize(
    ("field", "value", "reference"),
    [
        ("brightness", 0.7, pil_ops.adjust_brightness),
        ("contrast", 1.3, pil_ops.adjust_contrast),
        ("saturation", 0.6, pil_ops.adjust_saturation),
        ("saturation", 1.2, pil_ops.adjust_saturation),
    ],
)
def test_colour_steps_equal_pil_s_within_a_grey_level(patches, render, field, value, reference):
    mild = (64 + patches // 2).contiguous()
    ours = render(planes(mild), table(8, **{field: value}), 96)
    theirs = from_pil(reference(one, value) for one in as_pil(mild))
    assert (ours - theirs).abs().max() < 1.1 * LEVEL  # PIL cuts digits off instead of rounding


def test_greyscale_equals_pil_s_within_half_a_grey_level(patches, render):
    theirs = from_pil(pil_ops.to_grayscale(one, 3) for one in as_pil(patches))
    ours = render(planes(patches), table(8, gray=True), 96)
    assert (ours - theirs).abs().max() < 0.51 * LEVEL


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_near_lightly_s_which_approximates_a_gaussian_by_boxes(patches, render, sigma):
    """lightly blurs by PIL: three box filters. Ours has the Gaussian itself."""
    smooth = render(planes(patches), table(8, sigma_px=1.0), 96)  # as tissue is, not white noise
    image = (smooth * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    ours = render(planes(image), table(8, sigma_px=sigma), 96)
    blur = GaussianBlur(prob=1.0, sigmas=(sigma, sigma))
    theirs = from_pil(blur(one) for one in as_pil(image))
    away = (ours - theirs).abs()[:, :, 8:-8, 8:-8]  # PIL repeats the border, torchvision mirrors it
    assert away.max() < 3 * LEVEL
    assert away.mean() < 0.7 * LEVEL


def test_solarize_equals_lightly_s(patches, render):
    ours = render(planes(patches), table(8, solarize=True), 96)
    theirs = from_pil(RandomSolarization(prob=1.0)(one) for one in as_pil(patches))
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)  # 128 / 255 is the first above 0.5


def test_a_whole_view_of_lightly_s_equals_ours_where_its_dice_are_loaded(patches, render):
    """Bicubic, flip, grey, blur, solarise, normalise in one go, at probability 1."""
    theirs_of = DINOViewTransform(
        crop_size=64, crop_scale=(1.0, 1.0), hf_prob=1.0, cj_prob=0.0, random_gray_scale=1.0,
        gaussian_blur=1.0, sigmas=(1.5, 1.5), solarization_prob=1.0,
    )  # fmt: skip
    theirs_of.transform.transforms[0].ratio = (1.0, 1.0)
    theirs = torch.stack([theirs_of(one) for one in as_pil(patches)])
    drawn = table(8, flip_x=True, gray=True, sigma_px=1.5, solarize=True)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = render(planes(patches), drawn, 64, mean, std, **BICUBIC)
    away = (ours - theirs).abs() * 0.225  # back to 0..1
    inside = away[:, :, 6:-6, 6:-6]
    # a value at the threshold may fall on either side of it: as far apart as 1 - 2 x 0.5 is near 0
    assert inside.max() < 5 * LEVEL
    assert inside.mean() < 0.7 * LEVEL


def test_crops_are_spread_as_torchvision_s(patches):
    """Two-sample Kolmogorov-Smirnov over area and ratio; torchvision's are whole pixels."""
    from scipy.stats import ks_2samp

    from pathfm.views import ViewSpec, draw_views

    torch.manual_seed(0)
    for scale in ((0.05, 0.4), (0.4, 1.0)):  # the second rejects some, as torchvision does
        crop = RandomResizedCrop(224, scale=scale)
        blank = torch.empty(3, 4096, 4096, device="meta")
        drawn = [crop.make_params([blank]) for _ in range(3_000)]
        theirs = np.array([(one["width"], one["height"]) for one in drawn]) / 4096
        ours_t = draw_views(ViewSpec(scale=scale), 1, np.arange(6_000), 0, 256)
        ours = np.stack([ours_t.width, ours_t.height], axis=1) / 256
        for measure in (lambda s: s[:, 0] * s[:, 1], lambda s: np.log(s[:, 0] / s[:, 1])):
            assert ks_2samp(measure(ours), measure(theirs)).pvalue > 1e-3


# --- on purpose otherwise -------------------------------------------------------------------------


def test_our_hue_keeps_the_luma_that_torchvision_s_changes(patches, render):
    """Theirs shifts the H of HSV, which darkens a blue made red; ours turns colours about grey."""
    image = 0.4 + 0.2 * planes(patches)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    before = (image * luma).sum(1)
    ours = (render(image, table(8, hue=0.1), 96) * luma).sum(1)
    theirs = (tv.adjust_hue(image, 0.1) * luma).sum(1)
    assert (ours - before).abs().max() < 1e-4
    assert (theirs - before).abs().max() > 5 * LEVEL


def test_a_small_hue_turns_colours_as_far_as_torchvision_s(patches, render):
    """The angle of the chroma turns by as much on average: one unit, one direction."""
    image = 0.4 + 0.2 * planes(patches)
    yiq = torch.tensor([[0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])

    def chroma(picture):
        i, q = torch.einsum("ij,bjhw->ibhw", yiq, picture)
        return torch.complex(i, q)

    def turned(after):
        return torch.angle((chroma(after) * chroma(image).conj()).sum()) / (2 * torch.pi)

    ours = turned(render(image, table(8, hue=0.05), 96))
    theirs = turned(tv.adjust_hue(image, 0.05))
    assert ours == pytest.approx(0.05, abs=1e-4)
    assert abs(theirs) == pytest.approx(0.05, abs=0.02)


def test_values_are_cut_off_once_where_torchvision_cuts_after_every_step(patches, render):
    """Bright, then low contrast: theirs has lost what was above 1, ours brings it back."""
    image = planes(patches)
    ours = render(image, table(8, brightness=1.4, contrast=0.6), 96)
    theirs = tv.adjust_contrast(tv.adjust_brightness(image, 1.4), 0.6)
    lost = image > 0.9
    assert (ours - theirs)[lost].mean() > 0.01
    mild = 0.2 + 0.4 * image
    torch.testing.assert_close(
        render(mild, table(8, brightness=1.4, contrast=0.6), 96),
        tv.adjust_contrast(tv.adjust_brightness(mild, 1.4), 0.6), atol=1e-4, rtol=0,
    )  # fmt: skip


def test_lightly_s_second_view_ignores_its_strength_of_colour():
    """So a comparison at equal definition leaves cj_strength alone."""
    plain = DINOTransform(cj_strength=0.0)
    first, second, local = (plain.transforms[k].transform.transforms[4] for k in (0, 1, 2))
    assert [view.transforms[0].brightness for view in (first, local)] == [None, None]
    assert second.transforms[0].brightness == (0.6, 1.4)


def test_our_rates_are_those_of_dino_not_dinov2_s_inverted_ones():
    """DINO blurs 100, 10 and 50 %. DINOv2's class hands 1 - p on: really 0, 90 and 50 %."""
    views = ViewsConfig()
    rates = [(view.blur, view.solarize) for view in (views.global_1, views.global_2, views.local)]
    assert rates == [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)]
    plain = DINOTransform()
    theirs = [plain.transforms[k].transform.transforms for k in (0, 1, 2)]
    assert [(steps[6].prob, steps[7].prob) for steps in theirs] == rates
