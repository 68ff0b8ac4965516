"""Corruptions against imagecorruptions, scikit-image and loops out of the papers; seeds; what is refused."""

from __future__ import annotations

import colorsys
import hashlib
import io
import math

import imagecorruptions.corruptions as published
import numpy as np
import pytest
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from skimage.color import combine_stains, hed_from_rgb, hsv2rgb, rgb2hsv, rgb_from_hed

from online_patching.philox import uniform, words
from pathfm.corruptions import CORRUPTIONS, SEVERITIES, corrupt, picture_numbers
from pathfm.corruptions.objects import BUBBLE_LEVEL, INKS
from pathfm.corruptions.optics import disk
from pathfm.runtime import PathfmError
from tests.conftest import noise

WIDE, SIDE = (224, 301, 3), (224, 224, 3)


def drawn(name: str, picture: int, severity: int, seed: int = 0) -> np.ndarray:
    """The numbers a corruption draws, in [0, 1)."""
    return uniform(words(seed, picture, severity, CORRUPTIONS[name].stream, 6))[0]


def one(picture: np.ndarray, name: str, severity: int, number: int = 0) -> np.ndarray:
    return corrupt(picture[None], name, severity, [number])[0]


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.float64) - b).max())


# --- against others ---------------------------------------------------------------------------------


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(
    ("name", "theirs"), [("jpeg", "jpeg_compression"), ("pixelate", "pixelate")]
)
def test_storing_is_imagecorruptions_to_the_bit(name: str, theirs: str, severity: int) -> None:
    picture = noise(WIDE, 3)
    expected = np.asarray(getattr(published, theirs)(Image.fromarray(picture), severity))
    np.testing.assert_array_equal(one(picture, name, severity), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_is_imagecorruptions_rounded(severity: int) -> None:
    picture = noise(SIDE, 4).copy()
    picture[50:60, 20:200] = 0  # hard edges, and one at the border, where the margin shows
    picture[:40, :30] = 255
    expected = published.defocus_blur(Image.fromarray(picture), severity)
    assert apart(one(picture, "defocus", severity), expected) <= 0.5 + 1e-2  # rounding; float32
    radius, soft = CORRUPTIONS["defocus"].levels[severity - 1]
    np.testing.assert_allclose(disk(radius, soft), published.disk(radius, soft), atol=1e-7)


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("number", [0, 1, 5, 2**63 + 7])
def test_motion_is_imagecorruptions_at_our_angle(severity: int, number: int) -> None:
    picture = noise((224, 260, 3), 5)
    angle = 90 * drawn("motion", number, severity)[0] - 45
    radius, sd = CORRUPTIONS["motion"].levels[severity - 1]
    expected = published._motion_blur(picture, radius, sd, angle)
    assert apart(one(picture, "motion", severity, number), expected) <= 0.5 + 1e-2


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize(("name", "axis"), [("brightness", 2), ("saturation", 1), ("hue", 0)])
def test_colours_are_moved_in_hsv_as_the_benchmark_moves_them(
    name: str, axis: int, severity: int
) -> None:
    every = np.arange(0, 256, 5, dtype=np.uint8)  # a lattice of colours with all greys in it
    picture = np.stack(np.meshgrid(every, every, every), axis=-1).reshape(52 * 52, 52, 3)
    shift = CORRUPTIONS[name].levels[severity - 1]
    hsv = rgb2hsv(picture / 255.0)
    moved = hsv[..., axis] + shift
    hsv[..., axis] = moved % 1.0 if name == "hue" else np.clip(moved, 0, 1)
    expected = 255 * np.clip(hsv2rgb(hsv), 0, 1)
    assert apart(one(picture, name, severity), expected) <= 0.5 + 1e-3


def test_hue_by_hand_pink_turns_to_orange_and_grey_stays() -> None:
    picture = np.full((32, 40, 3), (230, 120, 180), np.uint8)
    picture[0] = 77
    out = one(picture, "hue", 5)
    h, s, v = colorsys.rgb_to_hsv(230 / 255, 120 / 255, 180 / 255)
    expected = [255 * c for c in colorsys.hsv_to_rgb(h + 0.1, s, v)]
    assert apart(out[1, 0], np.array(expected)) <= 0.5 + 1e-3
    assert (out[0] == 77).all()


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("number", [0, 9])
def test_stains_move_as_a_loop_out_of_the_paper_moves_them(severity: int, number: int) -> None:
    picture = noise((32, 40, 3), 6).copy()
    picture[0, :3] = ((0, 0, 0), (255, 255, 255), (0, 255, 1))
    u = 2 * drawn("stain", number, severity) - 1
    a, b = (CORRUPTIONS["stain"].levels[severity - 1] * part for part in (u[:3], u[3:]))
    stains = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    stains = np.array([row / math.sqrt((row**2).sum()) for row in stains])
    expected = np.empty(picture.shape)
    for at in np.ndindex(*picture.shape[:2]):
        density = [-math.log10(max(int(v) / 255, 1 / 255)) for v in picture[at]]
        amounts = np.linalg.solve(stains.T, density)
        expected[at] = 255 * 10.0 ** -(((1 + a) * amounts + b) @ stains)
    assert apart(one(picture, "stain", severity, number), np.clip(expected, 0, 255)) <= 0.5 + 1e-2


def test_stains_move_in_scikit_images_space_where_no_amount_is_negative() -> None:
    """skimage's amounts are of rows that are not of length 1, in a sixth of base-10 density."""
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0.02, 0.08, (32, 32, 3))
    picture = np.rint(255 * combine_stains(amounts, rgb_from_hed)).astype(np.uint8)
    u = 0.25 * (2 * drawn("stain", 3, 5) - 1)
    lengths = np.linalg.norm(rgb_from_hed, axis=1)
    there = np.log(picture / 255.0) / np.log(1e-6) @ hed_from_rgb
    moved = (1 + u[:3]) * there + u[3:] / (6 * lengths)
    expected = 255 * np.clip(np.exp(np.log(1e-6) * (moved @ rgb_from_hed)), 0, 1)
    assert apart(one(picture, "stain", 5, 3), expected) <= 0.5 + 1e-2


# --- strokes and bubbles ----------------------------------------------------------------------------


def test_a_stroke_is_ink_as_wide_as_told_and_leaves_the_rest_alone() -> None:
    white = np.full((300, 224, 3), 255, np.uint8)
    for severity, width in zip(SEVERITIES, CORRUPTIONS["mark"].levels, strict=True):
        for number in range(12):
            out = one(white, "mark", severity, number)
            touched = (out != 255).any(axis=2)
            x, y, angle, bend, pen = drawn("mark", number, severity)[:5]
            ink = INKS[int(pen * 4)]
            u = np.stack(np.meshgrid(np.arange(224), np.arange(300)), -1) - (
                (0.2 + 0.6 * x) * 223,
                (0.2 + 0.6 * y) * 299,
            )
            cos, sin = math.cos(math.pi * angle), math.sin(math.pi * angle)
            t, n = cos * u[..., 0] + sin * u[..., 1], cos * u[..., 1] - sin * u[..., 0]
            k = (bend - 0.5) / 224
            far = np.abs(n - k * t * t) / np.sqrt(1 + (2 * k * t) ** 2)
            border = width * 112 + 0.5
            clear = np.abs(far - border) > 0.05  # the last trace of ink may round to nothing
            np.testing.assert_array_equal(touched[clear], (far < border)[clear])
            middle = out[far < 1].astype(float) / 255  # 0.8 of the ink's density
            np.testing.assert_allclose(middle, np.broadcast_to(ink**0.8, middle.shape), atol=0.03)


def test_ink_is_a_filter_and_darkens_what_lies_under_it() -> None:
    tissue = noise(SIDE, 7)
    on_white = one(np.full_like(tissue, 255), "mark", 4, 2) / 255.0
    assert apart(one(tissue, "mark", 4, 2), tissue * on_white) <= 1.5  # white was rounded first


def test_a_bubble_is_round_has_a_dark_rim_and_hides_by_its_opacity() -> None:
    black, grey = np.zeros((224, 260, 3), np.uint8), np.full((224, 260, 3), 100, np.uint8)
    for number in range(6):
        x, y, r = drawn("bubble", number, 4)[:3]
        u = np.stack(np.meshgrid(np.arange(260), np.arange(224)), -1) - (
            (0.2 + 0.6 * x) * 259,
            (0.2 + 0.6 * y) * 223,
        )
        far = np.hypot(u[..., 0], u[..., 1]) / ((0.2 + 0.25 * r) * 224)
        on_black, on_grey = one(black, "bubble", 4, number), one(grey, "bubble", 4, number)
        assert (on_grey[far > 1.05] == 100).all()
        inside = far < 0.7
        np.testing.assert_allclose(on_black[inside], 0.7 * BUBBLE_LEVEL, atol=1)
        np.testing.assert_allclose(on_grey[inside], 0.3 * 100 + 0.7 * BUBBLE_LEVEL, atol=1)
        rim = on_black[np.abs(far - 0.94) < 0.01]
        assert rim.max() < 0.7 * 100  # 232 - 150 in its middle, a share of 0.7


# --- seeds ------------------------------------------------------------------------------------------

RANDOM = ("motion", "mark", "bubble", "stain")


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_what_happens_follows_from_seed_picture_and_severity_alone(name: str) -> None:
    batch = np.stack([noise((48, 64, 3), i) for i in range(5)])
    numbers = np.array([7, 0, 2**64 - 1, 3, 12], np.uint64)
    whole = corrupt(batch, name, 3, numbers, seed=5)
    order = [3, 1, 4, 0, 2]
    np.testing.assert_array_equal(
        corrupt(batch[order], name, 3, numbers[order], seed=5), whole[order]
    )
    np.testing.assert_array_equal(corrupt(batch[2:3], name, 3, numbers[2:3], seed=5), whole[2:3])
    np.testing.assert_array_equal(corrupt(batch, name, 3, numbers, seed=5, threads=3), whole)
    same = np.repeat(batch[:1], 2, axis=0)
    a, b = corrupt(same, name, 3, [1, 2])
    other = corrupt(same[:1], name, 3, [1], seed=1)[0]
    assert (name in RANDOM) == bool((a != b).any()) == bool((a != other).any())


def test_severities_and_corruptions_draw_numbers_of_their_own() -> None:
    streams = [kind.stream for kind in CORRUPTIONS.values()]
    assert streams == list(range(411, 421))  # golden: a stored result names them by their seed
    rows = [drawn(name, 4, s) for name in CORRUPTIONS for s in SEVERITIES]
    assert len(np.unique(np.stack(rows), axis=0)) == 50


def test_the_input_is_left_as_it_was_and_may_be_read_only() -> None:
    batch = noise((40, 40, 3), 1)[None].copy()
    before = batch.copy()
    batch.flags.writeable = False
    for name in CORRUPTIONS:
        assert corrupt(batch, name, 5, [0]).shape == batch.shape
    np.testing.assert_array_equal(batch, before)


@pytest.mark.parametrize("name", sorted(set(CORRUPTIONS) - {"stain", "motion"}))
def test_each_severity_is_further_from_the_picture_than_the_one_before(name: str) -> None:
    batch = np.stack([noise((112, 112, 3), i) for i in range(24)])
    moved = [
        np.abs(corrupt(batch, name, s, np.arange(24)).astype(int) - batch).mean()
        for s in SEVERITIES
    ]
    assert moved == sorted(moved)
    assert moved[0] > 0.5


@pytest.mark.parametrize("name", ["stain", "motion"])
def test_on_average_over_draws_severities_grow_too(name: str) -> None:
    batch = np.repeat(noise((64, 64, 3), 2)[None], 64, axis=0)
    moved = [
        np.abs(corrupt(batch, name, s, np.arange(64)).astype(int) - batch).mean()
        for s in SEVERITIES
    ]
    assert moved == sorted(moved)


@pytest.mark.parametrize("name", ["defocus", "motion"])
def test_blurs_scale_with_the_picture(name: str) -> None:
    """A picture of twice the side, blurred and halved, is the picture blurred (to interpolation)."""
    small = noise((224, 224, 3), 8)
    large = np.repeat(np.repeat(small, 2, axis=0), 2, axis=1)
    halved = one(large, name, 4).reshape(224, 2, 224, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - one(small, name, 4)).mean() < 2.0


def test_blurs_keep_a_flat_picture_flat_even_where_the_disk_is_wider_than_the_picture() -> None:
    flat = np.full((32, 32, 3), 93, np.uint8)
    for name in ("defocus", "motion"):
        for severity in SEVERITIES:
            assert (one(flat, name, severity) == 93).all()


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixels", "name", "severity", "numbers", "message"),
    [
        (np.zeros((1, 40, 40, 3), np.uint8), "defocuss", 1, [0], "did you mean 'defocus'"),
        (np.zeros((1, 40, 40, 3), np.uint8), "frost", 1, [0], "known: jpeg, pixelate"),
        (np.zeros((1, 40, 40, 3), np.uint8), "jpeg", 0, [0], "severity 0"),
        (np.zeros((1, 40, 40, 3), np.uint8), "jpeg", 6, [0], "severity 6"),
        (np.zeros((1, 40, 40, 3), np.float32), "jpeg", 1, [0], "float32"),
        (np.zeros((40, 40, 3), np.uint8), "jpeg", 1, [0], r"\(40, 40, 3\)"),
        (np.zeros((1, 40, 40, 4), np.uint8), "jpeg", 1, [0], r"\(1, 40, 40, 4\)"),
        (np.zeros((1, 31, 40, 3), np.uint8), "jpeg", 1, [0], "40 x 31 px"),
        (np.zeros((2, 40, 40, 3), np.uint8), "jpeg", 1, [0], "2 patches to corrupt but 1"),
    ],
)
def test_what_cannot_be_corrupted_is_told_in_one_line(
    pixels: np.ndarray, name: str, severity: int, numbers: list[int], message: str
) -> None:
    with pytest.raises(PathfmError, match=message) as caught:
        corrupt(pixels, name, severity, numbers)
    assert "\n" not in str(caught.value)


def test_no_patches_are_no_mistake() -> None:
    assert corrupt(np.zeros((0, 40, 40, 3), np.uint8), "mark", 1, []).shape == (0, 40, 40, 3)


def test_a_picture_s_number_is_of_its_name() -> None:
    numbers = picture_numbers(["a/1.png", "b/1.png"])
    first = int.from_bytes(hashlib.sha256(b"a/1.png").digest()[:8], "little")
    assert numbers.dtype == np.uint64
    assert int(numbers[0]) == first
    assert numbers[0] != numbers[1]
    assert picture_numbers(["b/1.png"])[0] == numbers[1]


def test_jpeg_is_the_quality_told() -> None:
    """libjpeg's own table 1 at quality 10 begins with 80; ours is read out of what we write."""
    stored = io.BytesIO()
    Image.fromarray(noise((64, 64, 3), 0)).save(stored, "JPEG", quality=10, subsampling="4:2:0")
    read = Image.open(stored)
    assert isinstance(read, JpegImageFile)
    assert read.quantization[0][0] == 80
    expected = np.asarray(read.convert("RGB"))
    np.testing.assert_array_equal(one(noise((64, 64, 3), 0), "jpeg", 4), expected)
