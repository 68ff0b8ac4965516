"""The effective receptive field against fields known exactly, and the picture made of them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pathfm import cli
from pathfm.backbone import load_backbone
from pathfm.erf import ErfConfig, run
from pathfm.erf.fields import Field2d, energy_radius, random_signs, receptive_fields
from pathfm.erf.networks import outputs_of
from pathfm.erf.picture import drawn
from pathfm.runtime import PathfmError
from pathfm.segmentation.models import build_model, init_weights, save_model
from pathfm.segmentation.segformer import SegFormer
from pathfm.segmentation.segformer.mit import MixSettings
from pathfm.segmentation.unet import ThumbnailUNet


def noise(count: int, height: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.rand(1, 3, height, width, generator=generator) for _ in range(count)]


def test_the_field_of_a_stack_of_convolutions_is_their_kernels_composed():
    kernel = np.array([[1.0, 2, 0], [3, -4, 1], [0, 5, 2]])
    layers = [
        nn.Conv2d(3, 1, 3, padding=1),
        nn.Conv2d(1, 1, 3, padding=1),
        nn.Conv2d(1, 2, 3, padding=1),
    ]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.from_numpy(kernel).float().expand_as(layer.weight))
    layers[2].weight.data[1] = 0  # one channel of two, so that the sign cancels in the square
    model = nn.Sequential(*layers)
    fields = receptive_fields(outputs_of(model), noise(3, 21, 30), seed=0)
    composed = np.ones((1, 1))
    for _ in layers:  # what a central output sees: full convolutions, by hand
        wider = np.zeros((composed.shape[0] + 2, composed.shape[1] + 2))
        for y in range(3):
            for x in range(3):
                wider[y : y + composed.shape[0], x : x + composed.shape[1]] += (
                    kernel[y, x] * composed
                )
        composed = wider
    wanted = np.zeros((21, 30))
    wanted[10 - 3 : 10 + 4, 15 - 3 : 15 + 4] = composed**2 / (composed**2).sum()
    energy, centre = fields["logits"]
    assert np.allclose(energy, wanted, atol=1e-7)
    assert centre == (10.5, 15.5)


def unet_reach(levels: int, stem: int, at: int, cells: int) -> tuple[int, int]:
    """First and last input pixel that the logit at pixel `at` can depend on, one axis, by intervals."""

    def down(level: int, low: int, high: int) -> tuple[int, int]:
        low, high = low - 2, high + 2  # two 3 x 3 convolutions
        return (low, high) if level == 0 else down(level - 1, 2 * low, 2 * high + 1)

    def up(level: int, low: int, high: int) -> list[tuple[int, int]]:
        if level == levels - 1:
            return [down(level, low, high)]
        low, high = max(0, low - 2), min(cells // 2**level - 1, high + 2)
        coarse = (low - 1) // 2, (high + 1) // 2  # bilinear: the two nearest cells
        return [down(level, low, high), *up(level + 1, *coarse)]

    found = up(0, at // stem, at // stem)
    return min(a for a, _ in found) * stem, max(b for _, b in found) * stem + stem - 1


@pytest.mark.parametrize("stem", [2, 4])
def test_a_u_net_sees_to_its_bound_and_not_beyond(stem):
    side = 128 * stem // 2
    model = init_weights(ThumbnailUNet((4, 5, 6), stem=stem), 2)
    energy, centre = receptive_fields(outputs_of(model), noise(6, side, side), seed=1)["logits"]
    first, last = unet_reach(3, stem, side // 2, side // stem)
    assert 0 < first < last < side - 1  # the bound lies inside the picture
    rows, columns = np.nonzero(energy)
    assert (rows.min(), columns.min()) >= (first, first)
    assert (rows.max(), columns.max()) <= (last, last)
    assert rows.max() - rows.min() > 0.9 * (
        last - first
    )  # pooling leaves few gaps over six pictures
    assert centre == (side / 2 + 0.5, side / 2 + 0.5)


SMALL = MixSettings((8, 8, 10, 16), (1, 1, 1, 1))


def test_a_layer_norms_channels_summed_show_nothing_where_random_signs_show_the_field():
    """Their sum is that of the norm's biases, whatever the picture."""
    model = init_weights(SegFormer(SMALL, 16), 0).double()
    pictures = [picture.double() for picture in noise(2, 64, 64)]

    def gradient(signs):
        rgb = pictures[0].clone().requires_grad_()
        out, *_ = outputs_of(model)(rgb)["stage 3"]
        cell = out[0, :, 2, 2]
        return torch.autograd.grad((cell * signs(0, 0, len(cell)).to(cell)).sum(), rgb)[0]

    plain = gradient(lambda seed, draw, count: torch.ones(count)).abs().max()
    signed = gradient(random_signs).abs().max()
    assert plain < 1e-12
    assert signed > 1e-4
    fields = receptive_fields(outputs_of(model), pictures, 0)
    assert list(fields) == ["stage 1", "stage 2", "stage 3", "stage 4", "logits"]
    for energy, _ in fields.values():
        assert energy.sum() == pytest.approx(1)


def test_cells_of_a_picture_that_is_no_multiple_of_32_are_a_stride_apart():
    model = init_weights(SegFormer(SMALL, 16), 0)
    fields = receptive_fields(outputs_of(model), noise(1, 100, 250), 0)
    # stage 4: 4 x 8 cells, the middle one (2, 4); logits: 25 x 63 cells of 4 px
    assert fields["stage 4"][1] == (2 * 32 + 0.5, 4 * 32 + 0.5)
    assert fields["logits"][1] == (12 * 4 + 2, 31 * 4 + 2)


def test_networks_are_looked_through_at_what_they_see_in_use():
    rgb = noise(1, 64, 64)[0]
    model = init_weights(SegFormer(SMALL, 16), 0).eval()
    quarter, *_ = outputs_of(model)(rgb)["logits"]
    assert torch.equal(quarter, model.quarter_logits(rgb))
    vit = load_backbone("test_vit", "random:0")
    grid, stride_px, offset_px = outputs_of(vit)(rgb)["tokens"]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (vit.mean, vit.std))
    tokens = vit((rgb - mean) / std)[0, -16:]
    assert torch.equal(grid[0, :, 1, 2], tokens[1 * 4 + 2])
    assert (stride_px, offset_px) == (16, 8)


def test_a_stages_field_is_centred_on_the_pixel_its_strided_convolutions_are():
    """Without blocks the field of stage i is that of the convolutions: symmetric round stride * j."""
    model = init_weights(SegFormer(MixSettings((8, 8, 10, 16), (0, 0, 0, 0)), 16), 0)
    fields = receptive_fields(outputs_of(model), noise(24, 128, 160), 0)
    half, stride = 3, 4  # kernel 7, then 3 at a stride of 4, 8, 16 pixels
    for stage in range(1, 5):
        energy, (y, x) = fields[f"stage {stage}"]
        rows, columns = np.nonzero(energy)
        assert ((rows.min() + rows.max() + 1) / 2, (columns.min() + columns.max() + 1) / 2) == (
            y,
            x,
        )
        assert columns.max() - columns.min() == 2 * half
        half, stride = half + stride, 2 * stride


def test_the_radius_is_that_of_the_smallest_circle_by_exhaustive_search():
    rng = np.random.default_rng(2)
    energy = rng.random((9, 14)) ** 4
    energy /= energy.sum()
    centre = (4.0, 7.5)
    for share in (0.2, 0.5, 0.9, 1.0):
        distances = {
            (y, x): ((y + 0.5 - centre[0]) ** 2 + (x + 0.5 - centre[1]) ** 2) ** 0.5
            for y in range(9)
            for x in range(14)
        }
        wanted = min(
            r
            for r in distances.values()
            if sum(energy[p] for p, d in distances.items() if d <= r) >= share - 1e-12
        )
        assert energy_radius(energy, centre, share) == pytest.approx(wanted)
    alone = np.zeros((5, 5))
    alone[2, 4] = 3
    assert energy_radius(alone, (2.5, 2.5), 0.5) == 2


def test_a_wide_blur_has_the_radii_of_a_gaussian():
    y, x = np.mgrid[:301, :301] - 150.0
    energy = np.exp(-(y**2 + x**2) / (2 * 20.0**2))
    for share in (0.5, 0.9):  # the Rayleigh distribution's quantiles
        wanted = 20 * (-2 * np.log(1 - share)) ** 0.5
        assert energy_radius(energy, (150.5, 150.5), share) == pytest.approx(wanted, abs=0.7)


def test_every_input_counts_alike_however_large_its_gradient():
    def outputs(rgb):
        return {"sum": (nn.functional.avg_pool2d(rgb**2, 3, 1, 1).sum(1, keepdim=True), 1, 0.5)}

    bright, faint = torch.zeros(1, 3, 7, 9), torch.zeros(1, 3, 7, 9)
    bright[..., 3, 3], faint[..., 3, 5] = 1.0, 0.001
    energy, _ = receptive_fields(outputs, [bright, faint], 0)["sum"]
    assert energy[3, 3] == pytest.approx(0.5)
    assert energy[3, 5] == pytest.approx(0.5)


def test_signs_follow_from_seed_and_picture_and_are_even():
    signs = random_signs(3, 5, 3000)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 0.06
    assert torch.equal(signs[:7], random_signs(3, 5, 7))
    assert not torch.equal(signs, random_signs(3, 6, 3000))
    assert not torch.equal(signs, random_signs(4, 5, 3000))
    assert not torch.equal(signs[:1024], signs[1024:2048])


def test_an_output_that_sees_nothing_is_an_error_and_no_black_panel():
    with pytest.raises(
        PathfmError, match="gradient of logits is 0 in all: the output does not depend"
    ):
        receptive_fields(outputs_of(nn.Conv2d(3, 1, 1).apply(_zero)), noise(1, 8, 8), 0)
    model = nn.Conv2d(3, 1, 1)
    model.weight.data[:] = float("nan")
    with pytest.raises(PathfmError, match="gradient of logits is nan"):
        receptive_fields(outputs_of(model), noise(1, 8, 8), 0)


def _zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.zero_()


def test_the_picture_shows_a_field_where_it_lies_and_its_circle_round_it():
    energy = np.zeros((200, 200))
    energy[60:64, 140:144] = 1 / 16
    page = drawn([Field2d("net", "logits", False, "seed 0", energy, (62.0, 142.0))], 200)
    pixels = np.asarray(Image.open(io.BytesIO(page)).convert("RGB")).astype(int)
    pixels = pixels[:, : int(0.72 * pixels.shape[1])]  # without the colour bar
    dark = (pixels < 12).all(-1)
    rows, columns = (np.flatnonzero(dark.mean(axis) > 0.4) for axis in (1, 0))
    top, bottom, left, right = rows.min(), rows.max(), columns.min(), columns.max()
    panel = pixels[top : bottom + 1, left : right + 1]
    bright = np.argwhere((panel[: len(panel) // 2] > 60).any(-1))  # the scale bar lies below
    assert len(bright)
    middle = bright.mean(0) / (bottom - top, right - left)
    assert middle == pytest.approx([0.31, 0.71], abs=0.03)
    assert page == drawn([Field2d("net", "logits", False, "seed 0", energy, (62.0, 142.0))], 200)


def test_the_scale_bar_of_a_small_input_is_shorter_than_it():
    energy = np.zeros((40, 40))
    energy[20, 20] = 1
    page = drawn([Field2d("net", "logits", False, "seed 0", energy, (20.5, 20.5))], 40)
    pixels = np.asarray(Image.open(io.BytesIO(page)).convert("RGB")).astype(int)
    pixels = pixels[:, : int(0.72 * pixels.shape[1])]
    dark = (pixels < 12).all(-1)
    rows, columns = (np.flatnonzero(dark.mean(axis) > 0.4) for axis in (1, 0))
    panel = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    low = panel[int(0.92 * len(panel)) : int(0.96 * len(panel))]
    bar = (low > 200).all(-1).any(0)
    assert 0.2 < bar.mean() < 0.5
    assert not bar[int(0.9 * len(bar)) :].any()


@pytest.mark.slow
def test_the_verb_draws_untrained_above_trained_and_writes_its_figures(tmp_path, capsys):
    weights, out = tmp_path / "w.safetensors", tmp_path / "deep" / "erf.png"
    save_model(init_weights(build_model("unet"), 9), "unet", weights, {})
    words = ["--models", "unet", "segformer_b0", "--weights", str(weights), "--vit", "test_vit"]
    code = cli.main(["erf", "--out", str(out), *words, "--size_px", "64", "--inputs", "2"])
    assert code == 0, capsys.readouterr().err
    told = json.loads(out.with_suffix(".json").read_text())["fields"]
    kinds = [(f["network"], f["output"], f["trained"]) for f in told]
    assert kinds[:2] == [("U-Net", "logits", True), ("U-Net", "logits", False)]
    assert [k[1] for k in kinds[2:]] == [*(f"stage {k}" for k in range(1, 5)), "logits", "tokens"]
    assert told[0]["weights"] == "w.safetensors"
    assert all(0 < f["radius_50_px"] <= f["radius_90_px"] < 64 for f in told)
    with Image.open(out) as picture:
        assert picture.size[0] > 500
    again = run(ErfConfig(out=tmp_path / "b.png", models=["unet"], vit="", size_px=64, inputs=2))
    assert [f.network for f in again.fields] == ["U-Net"]
    assert round(again.fields[0].radius_px(0.5), 1) == told[1]["radius_50_px"]


def test_mistakes_are_told_in_a_line(tmp_path, capsys):
    out = ["--out", str(tmp_path / "erf.png")]
    assert cli.main(["erf", *out, "--models", "unett", "--inputs", "1", "--size_px", "64"]) == 2
    assert "no segmentation model 'unett'" in capsys.readouterr().err
    assert cli.main(["erf", *out, "--models", "--vit", ""]) == 2
    assert "nothing to look through" in capsys.readouterr().err
    assert cli.main(["erf", *out, "--weights", "none.safetensors", "--size_px", "64"]) == 2
    assert "none.safetensors: cannot be read" in capsys.readouterr().err
    assert cli.main(["erf", *out, "--models", "--size_px", "50", "--inputs", "1"]) == 2
    assert "size_px = 50 is no multiple of the 16 px patches" in capsys.readouterr().err
    assert not (tmp_path / "erf.png").exists()
