"""Training crops: keyed by seed and batch, antialiased, and true to the picture's truth."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from PIL import Image

from pathfm.runtime import PathfmError
from pathfm.segmentation.augment import NO_AUGMENTATION
from pathfm.segmentation.crops import (
    CropSettings,
    CropSource,
    TrainingPicture,
    batches,
    cut,
    places,
)
from pathfm.segmentation.synthetic import draw_thumbnail
from pathfm.segmentation.templates import paste, read_templates

PLAIN = CropSettings(crop_px=32, batch_size=4, augmentation=NO_AUGMENTATION, stretch=0.0)


def picture(
    width: int = 150, height: int = 90, mpp: float | None = None, **more
) -> TrainingPicture:
    """Red grows to the right, green downwards; tissue is a disc, told by blue."""
    y, x = np.mgrid[0:height, 0:width]
    tissue = np.hypot(x - width / 2, y - height / 2) < 30
    rgb = np.stack([x, y, np.where(tissue, 200, 20)], 2).astype(np.uint8)
    ignore = np.zeros_like(tissue)
    return TrainingPicture("disc", rgb, tissue, ignore, mpp, **more)


def test_batch_k_is_a_pure_function_of_seed_and_k():
    pictures = [picture(), picture(200, 120, mpp=10.0)]
    settings = CropSettings(crop_px=32, batch_size=4)
    stream = batches(pictures, settings, 3)
    taken = [next(stream) for _ in range(4)]
    late = next(batches(pictures, settings, 3, first=2))
    alone = CropSource(pictures, settings, 3).batch(2)
    for a, b, c in zip(taken[2], late, alone, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    crops = torch.cat([batch[0] for batch in taken]).flatten(1)
    assert len(crops) == 16
    assert len(torch.unique(crops, dim=0)) == 16
    assert not torch.equal(next(batches(pictures, settings, 4, first=2))[0], late[0])


def test_batches_have_the_shapes_and_types_the_losses_want():
    rgb, truth, ignore = next(batches([picture()], CropSettings(crop_px=48, batch_size=3), 0))
    assert rgb.shape == (3, 3, 48, 48)
    assert truth.shape == ignore.shape == (3, 48, 48)
    assert (rgb.dtype, truth.dtype, ignore.dtype) == (torch.float32, torch.bool, torch.bool)
    assert 0 <= float(rgb.min()) <= float(rgb.max()) <= 1


def test_truth_follows_every_turn_flip_scale_and_stretch():
    settings = dataclasses.replace(
        PLAIN, stretch=0.4, augmentation=dataclasses.replace(NO_AUGMENTATION, flips=True)
    )
    source = CropSource([picture(mpp=8.0)], settings, 0)
    seen = set()
    for k in range(20):
        rgb, truth, _ = source.batch(k)
        told = rgb[:, 2] > 110 / 255
        assert (told == truth).float().mean() > 0.985  # borders, where crops are enlarged
        seen |= {tuple(np.sign(np.gradient(c[0].numpy())[a].mean()) for a in (0, 1)) for c in rgb}
    assert len(seen - {(0, 0)}) >= 4  # red runs right, left, up and down


def test_an_untouched_box_gives_the_very_pixels():
    p = picture()
    rgb, masks = cut(p, 40.0, 20.0, 32.0, 32.0, 32)
    assert np.array_equal(rgb, p.rgb[20:52, 40:72])
    assert np.array_equal(masks[0], p.tissue[20:52, 40:72])
    assert not masks[1].any()


def test_shrunken_crops_are_the_mean_of_their_area_and_truth_its_majority():
    p = picture(160, 96)
    rgb, masks = cut(p, 16.0, 8.0, 96.0, 72.0, 24)
    window = p.tissue[8:80, 16:112].reshape(24, 3, 24, 4).mean(axis=(1, 3))
    sure = np.abs(window - 0.5) > 0.05
    assert np.array_equal(masks[0][sure], (window > 0.5)[sure])
    mean = p.rgb[8:80, 16:112].astype(float).reshape(24, 3, 24, 4, 3).mean(axis=(1, 3))
    assert np.abs(rgb.astype(float) - mean)[..., :2].max() < 1


def test_a_fine_checker_turns_grey_instead_of_aliasing():
    checker = (np.indices((128, 128)).sum(axis=0) % 2 * 255).astype(np.uint8)
    nothing = np.zeros((128, 128), bool)
    p = TrainingPicture("checker", np.stack([checker] * 3, 2), nothing, nothing)
    rgb, _ = cut(p, 3.3, 5.1, 96.0, 96.0, 32)
    assert np.abs(rgb.astype(float) - 127.5).max() < 30


def test_what_lies_outside_a_small_picture_is_mirrored_and_ignored():
    p = picture(40, 24)
    rgb, masks = cut(p, -4.0, -4.0, 32.0, 32.0, 32)
    assert masks[1][:4].all()
    assert masks[1][:, :4].all()
    assert not masks[1][4:28, 4:].any()
    assert masks[1][28:].all()
    assert np.array_equal(rgb[3, 4:], rgb[4, 4:])
    _, truth, ignore = CropSource([p], PLAIN, 0).batch(0)
    assert truth.shape == (4, 32, 32)
    tiny = CropSource([picture(5, 7)], PLAIN, 0).batch(0)
    assert tiny[2].float().mean() > 0.5
    assert not ignore.any()  # crops of 24 picture px: it is large enough


def test_pixels_that_were_not_decided_are_ignored_whatever_the_scale():
    p = picture()
    p.ignore[40:43, 60:62] = True
    assert cut(p, 20.0, 10.0, 64.0, 64.0, 16)[1][1].any()
    assert not cut(p, 80.0, 10.0, 64.0, 64.0, 16)[1][1].any()


def test_scales_are_those_asked_for():
    settings = dataclasses.replace(PLAIN, mpp_range=(4.0, 32.0))
    source = CropSource([picture(400, 300, mpp=8.0)], settings, 0)
    scales = [source._size(source.pictures[0], u, 0.5)[0] / 32 * 8 for u in np.linspace(0, 1, 9)]
    np.testing.assert_allclose(scales, np.geomspace(4, 32, 9))
    unknown = [source._size(picture(400, 300), u, 0.5)[0] / 32 for u in (0, 0.5, 1)]
    np.testing.assert_allclose(unknown, [0.5, 1.0, 2.0])
    assert source._size(picture(48, 48), 1.0, 0.5)[0] == pytest.approx(48)


def test_pictures_are_drawn_by_their_weight():
    dark, light = (
        TrainingPicture(str(v), np.full((64, 64, 3), v, np.uint8), t, t, None, w)
        for v, w, t in ((20, 3.0, np.zeros((64, 64), bool)), (220, 1.0, np.zeros((64, 64), bool)))
    )
    never = dataclasses.replace(light, weight=0.0, rgb=np.full((64, 64, 3), 128, np.uint8))
    source = CropSource([dark, never, light], dataclasses.replace(PLAIN, batch_size=500), 1)
    means = source.batch(0)[0].mean(dim=(1, 2, 3)).mul(255).round().tolist()
    assert set(means) == {20.0, 220.0}
    assert means.count(20.0) / 500 == pytest.approx(0.75, abs=0.06)


def test_crops_look_for_borders_and_for_what_is_rare():
    big = picture(1200, 900)
    kinds = big.tissue.astype(np.uint8)
    kinds[100:103, 1000:1003] = 4  # a dot of ink, 1 in 120,000 pixels
    big = dataclasses.replace(big, kinds=kinds)
    for what, mask in (("border", big.tissue), ("rare", kinds == 4)):
        share = {f"{what}_share": 1.0, ("rare_share" if what == "border" else "border_share"): 0.0}
        source = CropSource([big], dataclasses.replace(PLAIN, **share), 0)
        found = 0
        for k in range(8):
            rgb, truth, _ = source.batch(k)
            if what == "border":
                found += int((truth.any(dim=(1, 2)) & (~truth).any(dim=(1, 2))).sum())
            else:
                at_x, at_y = rgb[:, 0].amax((1, 2)) * 255, rgb[:, 1].amax((1, 2)) * 255
                found += int(((at_x - 1002 % 256).abs() < 66).mul((at_y - 102).abs() < 66).sum())
        assert found >= 30, what
        assert mask[tuple(places(big, what)[0])] or what == "border"
    assert len(places(picture(), "rare")) == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rgb": np.zeros((4, 5, 3), np.float32)}, "float32"),
        ({"tissue": np.zeros((5, 4), bool)}, r"\(5, 4\)"),
        ({"weight": -1.0}, "-1"),
        ({"mpp": 0.0}, "mpp is 0"),
    ],
)
def test_a_picture_that_does_not_fit_together_is_refused_by_name(change, words):
    nothing = np.zeros((4, 5), bool)
    good = {"rgb": np.zeros((4, 5, 3), np.uint8), "tissue": nothing, "ignore": nothing}
    with pytest.raises(PathfmError, match=f"slide 7: .*{words}"):
        TrainingPicture("slide 7", **(good | change))


def test_no_pictures_or_no_weight_is_said():
    with pytest.raises(PathfmError, match="0 training pictures"):
        next(batches([], PLAIN, 0))
    with pytest.raises(PathfmError, match="1 training pictures, none with a weight"):
        next(batches([dataclasses.replace(picture(), weight=0.0)], PLAIN, 0))


def write_template(folder, name="pen_black", grey=30):
    rgb, mask = np.full((40, 60, 3), 240, np.uint8), np.zeros((40, 60), np.uint8)
    rgb[10:20, 5:55], mask[10:20, 5:55] = grey, 255
    Image.fromarray(rgb).save(folder / f"{name}.png")
    Image.fromarray(mask).save(folder / f"{name}_mask.png")


MIDDLE = np.array([0.0, 0.0, 0.9, 0.3, 0.5, 0.5])


@pytest.mark.parametrize(
    ("name", "grey", "stays"),
    [("pen_black", 30, False), ("pen_thin", 170, True), ("coverslip_edge", 30, True)],
)
def test_opaque_ink_takes_tissue_away_and_thin_ink_and_edges_do_not(tmp_path, name, grey, stays):
    write_template(tmp_path, name, grey)
    (template,) = read_templates(tmp_path)
    assert template.mask.shape == (10, 50)
    crop, tissue = np.full((64, 64, 3), 200, np.uint8), np.ones((64, 64), bool)
    rgb, truth = paste(crop, tissue, [template], MIDDLE)
    assert rgb[32, 32] == pytest.approx(200 * grey / 240, abs=1.5)
    assert truth[32, 32] == stays
    assert np.array_equal(rgb[0], crop[0])
    assert truth[0].all()
    assert tissue.all()
    height = 10 / 50 * 64 * 0.7 * (2.5 / 0.7) ** 0.3
    assert (rgb[:, 32, 0] != 200).sum() == pytest.approx(height, abs=2)


def test_artefacts_are_pasted_as_often_as_asked_and_only_where_given(tmp_path):
    write_template(tmp_path)
    templates = read_templates(tmp_path)
    settings = dataclasses.replace(PLAIN, batch_size=200, paste_chance=0.3)
    bare = CropSource([picture(mpp=8.0)], settings, 0).batch(0)[0]
    pasted = CropSource([picture(mpp=8.0)], settings, 0, templates).batch(0)[0]
    changed = (bare != pasted).flatten(1).any(dim=1).float().mean()
    assert float(changed) == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize("damage", ["none", "cut", "size", "blank"])
def test_folders_without_usable_templates_are_named(tmp_path, damage):
    if damage != "none":
        write_template(tmp_path)
    if damage == "cut":
        whole = (tmp_path / "pen_black.png").read_bytes()
        (tmp_path / "pen_black.png").write_bytes(whole[:60])
    if damage in ("size", "blank"):
        shape = (40, 60) if damage == "blank" else (40, 59)
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / "pen_black_mask.png")
    with pytest.raises(PathfmError, match=str(tmp_path)):
        read_templates(tmp_path)


def test_histoqcs_templates_are_read(shared_data):
    templates = read_templates(shared_data / "masks" / "histoqc")
    assert [t.name for t in templates] == [
        "coverslip_edge", "ihc_coverslip_edge", "pen_black", "pen_green", "pen_red",
    ]  # fmt: skip
    assert [t.ink for t in templates] == [False, False, True, True, True]
    for t in templates:
        assert t.light[t.mask].mean() < 0.8 * 255


@pytest.mark.slow
def test_a_core_cuts_at_least_forty_crops_a_second():
    pictures = []
    for d in range(6):
        t = draw_thumbnail(0, d, 512)
        nothing = np.zeros_like(t.tissue)
        pictures.append(TrainingPicture(str(d), t.rgb, t.tissue, nothing, t.mpp, 1.0, t.kinds))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        source = CropSource(pictures, CropSettings(), 0)
        source.batch(0)
        started = time.process_time()
        for k in range(1, 13):
            source.batch(k)
        spent_s = time.process_time() - started
    finally:
        torch.set_num_threads(threads)
    assert 12 * 8 / spent_s > 40  # 135 on a quiet machine
