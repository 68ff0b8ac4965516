"""The foreground model: the network's shape, its shipped weights, Otsu."""

import hashlib
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from online_patching.testing import SyntheticSlide
from pathfm.segmentation.thresholds import otsu_mask, otsu_threshold
from pathfm.segmentation.tidy import mask_iou, tidy
from pathfm.segmentation.unet import (
    SHIPPED_WEIGHTS,
    ThumbnailUNet,
    load_unet,
    multiply_adds_per_pixel,
    tissue_probability,
)


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (64, 32), (97, 250)])
def test_any_size_in_the_same_size_out(size):
    model = ThumbnailUNet((2, 3, 4)).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, *size)).shape == (2, *size)


def test_parameters_and_multiply_adds_are_as_documented():
    model = ThumbnailUNet()
    assert sum(p.numel() for p in model.parameters()) == 496_516
    # Two levels by hand: 3x3 convolutions at 1/4 and 1/16 of the pixels, then 1x1.
    small = ThumbnailUNet((2, 3))
    quarter = 9 * (12 * 2 + 2 * 2) + 9 * ((3 + 2) * 2 + 2 * 2) + 2 * 4
    assert multiply_adds_per_pixel(small, 64) == quarter / 4 + 9 * (2 * 3 + 3 * 3) / 16
    assert multiply_adds_per_pixel(model) == pytest.approx(8719, abs=1)


def test_the_shipped_weights_are_those_the_sidecar_tells_of():
    facts = json.loads(SHIPPED_WEIGHTS.with_suffix(".json").read_text())
    assert hashlib.sha256(SHIPPED_WEIGHTS.read_bytes()).hexdigest() == facts["sha256"]
    assert SHIPPED_WEIGHTS.stat().st_size < 1_200_000
    held_out = facts["held_out_synthetic"]
    assert held_out["unet"]["iou_all_pixels"] > held_out["otsu"]["iou_all_pixels"]


def test_the_shipped_weights_find_the_tissue_of_slides_drawn_another_way():
    slide = SyntheticSlide(seed=5, width_px0=9000, height_px0=6400, mpp=0.25, pen=False)
    truth = slide.class_map(8.0) > 0
    picture = slide.render(0, 0, truth.shape[1], truth.shape[0], mpp=8.0)
    found = tidy(tissue_probability(load_unet(), picture) > 0.5, 100)
    assert mask_iou(found, truth) > 0.85
    assert mask_iou(found, truth) > mask_iou(tidy(otsu_mask(picture), 100), truth) - 0.02


@pytest.mark.parametrize("damage", ["missing", "cut", "other"])
def test_weights_that_do_not_fit_are_named(tmp_path, damage):
    path = tmp_path / "w.safetensors"
    if damage == "cut":
        path.write_bytes(SHIPPED_WEIGHTS.read_bytes()[:1000])
    if damage == "other":
        save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"w\.safetensors"):
        load_unet(path)


def test_otsus_threshold_is_the_best_by_exhaustive_search():
    rng = np.random.default_rng(3)
    values = np.concatenate([rng.normal(60, 12, 900), rng.normal(150, 30, 400)])
    values = values.clip(0, 255).astype(np.uint8)

    def between(t: int) -> float:
        low, high = values[values <= t], values[values > t]
        if not len(low) or not len(high):
            return -1.0
        return len(low) * len(high) * float(low.mean() - high.mean()) ** 2

    assert otsu_threshold(values) == max(range(256), key=between)


def test_otsu_finds_pink_on_white_and_nothing_on_bare_glass():
    glass = np.full((50, 70, 3), 240, np.uint8)
    assert not otsu_mask(glass).any()
    glass[::2] -= 3  # noise has two sides as well
    assert not otsu_mask(glass).any()
    glass[10:30, 5:60] = (200, 120, 170)
    assert otsu_mask(glass).sum() == 20 * 55


def test_tidy_drops_specks_and_fills_pinholes_but_not_bays():
    mask = np.zeros((20, 30), bool)
    mask[5:15, 5:25] = True
    mask[8:10, 8:10] = False  # a pinhole
    mask[5:11, 20:22] = False  # a bay, open to the glass
    mask[0:2, 28:30] = True  # a speck
    tidied = tidy(mask, smallest_px=5)
    assert tidied[8:10, 8:10].all()
    assert not tidied[5:11, 20:22].any()
    assert not tidied[0:2, 28:30].any()
    assert tidy(mask, smallest_px=4)[0:2, 28:30].all()  # 4 of 180 pixels
    assert tidy(mask, smallest_px=1, smallest_share=0.02)[0:2, 28:30].all()
    assert not tidy(mask, smallest_px=1, smallest_share=0.03)[0:2, 28:30].any()
    assert not tidy(np.zeros((4, 5), bool), 3).any()
    assert tidy(np.ones((4, 5), bool), 3).all()


def test_mask_iou_of_empty_masks_is_one():
    a, b = np.zeros((2, 3), bool), np.ones((2, 3), bool)
    assert (mask_iou(a, a), mask_iou(a, b), mask_iou(b, b)) == (1.0, 0.0, 1.0)
