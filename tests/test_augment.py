"""Augmentation of training crops: keyed by seed and sample, each step against its formula."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter

from pathfm.segmentation.augment import (
    NO_AUGMENTATION,
    AugmentSettings,
    augment,
    choose,
    compressed,
    focused,
    lit,
    noisy,
    restained,
    turned,
)
from pathfm.segmentation.jpeg import jpeg_artefacts, quantisation
from pathfm.segmentation.synthetic import draw_thumbnail


def test_a_sample_is_the_same_whatever_the_size_of_its_batch():
    x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    masks = x[:, :2] > 0.5
    whole = augment(x, masks, AugmentSettings(), 5, [10, 11, 12, 13])
    for k in range(4):
        one = augment(x[k : k + 1], masks[k : k + 1], AugmentSettings(), 5, [10 + k])
        torch.testing.assert_close(one[0][0], whole[0][k], atol=1e-5, rtol=0)
        assert torch.equal(one[1][0], whole[1][k])


def test_without_augmentation_nothing_changes():
    x = torch.rand(2, 3, 33, 40)
    out, masks = augment(x, x[:, :1] > 0.3, NO_AUGMENTATION, 0, [4, 5])
    torch.testing.assert_close(out, x, atol=1e-6, rtol=0)
    assert torch.equal(masks, x[:, :1] > 0.3)


def test_choices_have_the_stated_ranges_and_frequencies():
    s = AugmentSettings()
    c = choose(s, 0, np.arange(20_000))
    assert np.bincount(c.turns) / 20_000 == pytest.approx([0.25] * 4, abs=0.02)
    assert c.mirrored.mean() == pytest.approx(0.5, abs=0.02)
    assert np.log(c.stain_scale).std() == pytest.approx(s.stain_sd, rel=0.03)
    assert np.log(c.stain_scale).mean() == pytest.approx(0, abs=0.003)
    assert np.abs(c.stain_shift).max() <= s.stain_floor
    assert (c.exchanged >= 0).mean() == pytest.approx(s.exchange_chance, abs=0.01)
    assert set(np.unique(c.exchanged)) == set(range(-1, 6))
    assert (c.glass < 1).any(axis=1).mean() == pytest.approx(s.glass_chance, abs=0.02)
    assert c.glass.min() >= (1 - s.glass_grey) * (1 - s.glass_tint)
    assert (c.light != 0).any(axis=1).mean() == pytest.approx(s.light_chance, abs=0.02)
    assert np.abs(c.light).max() <= s.light
    assert np.abs(c.gain - 1).max() <= s.gain
    assert np.abs(np.log(c.gamma)).max() <= s.gamma
    assert (c.sharpen == -1).mean() == pytest.approx(s.blur_chance, abs=0.02)
    assert (c.sharpen > 0).mean() == pytest.approx(s.sharpen_chance, abs=0.02)
    assert c.sigma_px.max() <= s.blur_px
    assert (c.noise > 0).mean() == pytest.approx(s.noise_chance, abs=0.02)
    assert c.noise.max() <= s.noise
    used = c.quality[c.quality > 0]
    assert len(used) / 20_000 == pytest.approx(s.jpeg_chance, abs=0.02)
    assert (used.min(), used.max()) == s.jpeg_quality


def test_choices_do_not_depend_on_one_another():
    c = choose(AugmentSettings(), 0, np.arange(5000))
    table = np.column_stack(
        [c.turns, c.mirrored, np.log(c.stain_scale), c.stain_shift, c.exchanged >= 0,
         c.glass, c.light, c.gain, c.gamma, c.noise > 0, c.quality > 0, c.sharpen < 0]
    )  # fmt: skip
    told = np.corrcoef(table.T) - np.eye(table.shape[1])
    glass = slice(9, 12)  # one lamp darkens all three
    told[glass, glass] = 0
    assert np.abs(told).max() < 0.06


def test_stain_jitter_equals_deconvolving_with_scikit_images_way_by_hand():
    c = choose(dataclasses.replace(AugmentSettings(), exchange_chance=0), 2, [0, 1, 2])
    x = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
    out = restained(x, c).numpy()
    hed = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
    hed /= np.linalg.norm(hed, axis=1, keepdims=True)
    for b in range(3):
        for i in range(4):
            for j in range(5):
                amounts = np.linalg.solve(hed.T, -np.log(x[b, :, i, j].numpy().astype(float)))
                changed = amounts * c.stain_scale[b] + c.stain_shift[b]
                expected = np.clip(np.exp(-changed @ hed), 0, 1)
                np.testing.assert_allclose(out[b, :, i, j], expected, atol=2e-5)


def test_exchanged_stains_keep_white_glass_white_and_change_tissue():
    s = dataclasses.replace(NO_AUGMENTATION, exchange_chance=1.0)
    c = choose(s, 0, np.arange(12))
    x = torch.ones(12, 3, 2, 2)
    x[:, :, 0] = torch.tensor([0.75, 0.45, 0.65])[:, None]
    out = restained(x, c)
    assert out[:, :, 1].min() > 0.999
    assert (out[:, :, 0] - x[:, :, 0]).abs().amax(dim=(1, 2)).min() > 0.02


def test_light_and_gamma_are_those_of_the_formula():
    c = choose(AugmentSettings(light_chance=1, glass_chance=1), 0, [3])
    x = torch.rand(1, 3, 5, 7) * 0.6
    out = lit(x, c)
    for i, y_at in enumerate(np.linspace(-1, 1, 5)):
        for j, x_at in enumerate(np.linspace(-1, 1, 7)):
            a, b, d = c.light[0]
            light = 1 + a * x_at + b * y_at + d * ((x_at**2 + y_at**2) / 2 - 1 / 3)
            expected = (x[0, :, i, j].numpy() * light * c.glass[0] * c.gain[0]) ** c.gamma[0]
            np.testing.assert_allclose(out[0, :, i, j], expected, atol=1e-5)


def test_blur_is_scipys_gaussian_and_sharpening_its_opposite():
    settings = dataclasses.replace(
        NO_AUGMENTATION, blur_chance=0.5, blur_px=1.2, sharpen_chance=0.5, sharpen=1.0
    )
    c = choose(settings, 0, np.arange(6))
    x = torch.rand(6, 3, 20, 24, generator=torch.Generator().manual_seed(2)) * 0.2 + 0.4
    out = focused(x, c)
    assert (c.sharpen < 0).any()
    assert (c.sharpen > 0).any()
    for b in range(6):
        for k in range(3):
            plane = x[b, k].numpy().astype(float)
            soft = gaussian_filter(plane, c.sigma_px[b], mode="nearest", radius=4)
            expected = np.clip(plane + c.sharpen[b] * (plane - soft), 0, 1)
            np.testing.assert_allclose(out[b, k], expected, atol=1e-5)


def test_noise_has_the_sd_chosen_and_differs_between_samples():
    settings = dataclasses.replace(NO_AUGMENTATION, noise_chance=1.0, noise=0.05)
    c = choose(settings, 0, np.arange(4))
    grey = torch.full((4, 3, 128, 128), 0.5)
    changed = noisy(grey, c, 0) - grey
    for b in range(4):
        assert float(changed[b].std()) == pytest.approx(c.noise[b], rel=0.03)
        assert abs(float(changed[b].mean())) < 0.05 * c.noise[b]
    assert abs(np.corrcoef(changed[0].flatten(), changed[1].flatten())[0, 1]) < 0.02


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("quality", [30, 60, 92])
def test_jpeg_marks_are_those_libjpeg_leaves(quality, subsampling):
    rgb = draw_thumbnail(0, 5, 120).rgb[:104, :115]
    saved = io.BytesIO()
    Image.fromarray(rgb).save(saved, "JPEG", quality=quality, subsampling=subsampling)
    libjpeg = np.asarray(Image.open(saved)).astype(float)
    x = torch.from_numpy(rgb.copy()).permute(2, 0, 1)[None].float() / 255
    marked = jpeg_artefacts(x, np.array([quality]), subsample=bool(subsampling))
    ours = marked[0].permute(1, 2, 0).numpy() * 255
    lost = np.abs(libjpeg - rgb).mean()
    assert np.abs(ours - libjpeg).mean() < 0.25 * lost + 0.5
    assert np.abs(ours - rgb).mean() == pytest.approx(lost, rel=0.12)


def test_quantisation_tables_are_libjpegs():
    saved = io.BytesIO()
    Image.new("RGB", (8, 8)).save(saved, "JPEG", quality=37)
    with Image.open(saved) as opened:
        tables = opened.quantization  # type: ignore[attr-defined]
    for k in (0, 1):
        assert sorted(tables[k]) == sorted(quantisation(np.array([37]))[0, k].ravel())


def test_only_the_chosen_crops_are_compressed():
    settings = dataclasses.replace(NO_AUGMENTATION, jpeg_chance=0.5, jpeg_quality=(20, 30))
    c = choose(settings, 0, np.arange(8))
    x = torch.rand(8, 3, 16, 16)
    changed = (compressed(x, c) != x).flatten(1).any(dim=1).numpy()
    assert np.array_equal(changed, c.quality > 0)


def test_turns_are_numpys():
    c = choose(AugmentSettings(), 0, np.arange(16))
    x = torch.arange(16 * 2 * 3 * 3).reshape(16, 2, 3, 3)
    out = turned(x, c)
    for b in range(16):
        expected = np.rot90(x[b].numpy(), c.turns[b], (1, 2))
        assert np.array_equal(out[b], expected[:, :, ::-1] if c.mirrored[b] else expected)
