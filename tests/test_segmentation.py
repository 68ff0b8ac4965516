"""The foreground model: the network's shape, its shipped weights, Otsu."""

import numpy as np
import pytest
import torch

from online_patching.testing import SyntheticSlide
from pathfm.segmentation.models import load_model
from pathfm.segmentation.predict import tissue_probability
from pathfm.segmentation.thresholds import otsu_mask, otsu_threshold
from pathfm.segmentation.tidy import mask_iou, tidy
from pathfm.segmentation.training_data import PERMITTED
from pathfm.segmentation.truth import DRAWN, read_table
from pathfm.segmentation.unet import SHIPPED_WEIGHTS, ThumbnailUNet


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (64, 32), (97, 250)])
def test_any_size_in_the_same_size_out(size):
    model = ThumbnailUNet((2, 3, 4)).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, *size)).shape == (2, *size)


def test_the_shipped_weights_say_what_they_were_made_from_and_all_of_it_is_permitted():
    _, facts = load_model()
    assert SHIPPED_WEIGHTS.stat().st_size < 8 << 20
    pictures = [made for made in facts["trained_on"] if "licence" in made]
    assert len(pictures) >= 12
    assert all(made["licence"].startswith(PERMITTED) for made in pictures)
    evaluation = {r["name"] for r in read_table(DRAWN / "pictures.csv") if r["split"] != "training"}
    assert not evaluation & {made["name"] for made in pictures}
    card = SHIPPED_WEIGHTS.with_name("README.md").read_text()
    for name in ("drawn_dice", "synthetic_dice"):
        assert f"{facts['validation'][name]:.3f} on " in card.replace("mean Dice ", "")


def test_the_shipped_weights_find_the_tissue_of_slides_drawn_another_way():
    slide = SyntheticSlide(seed=5, width_px0=9000, height_px0=6400, mpp=0.25, pen=False)
    truth = slide.class_map(8.0) > 0
    picture = slide.render(0, 0, truth.shape[1], truth.shape[0], mpp=8.0)
    found = tidy(tissue_probability(load_model()[0], picture) > 0.5, 100)
    assert mask_iou(found, truth) > 0.85
    assert mask_iou(found, truth) > mask_iou(tidy(otsu_mask(picture), 100), truth) - 0.02


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
