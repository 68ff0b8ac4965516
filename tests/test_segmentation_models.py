"""Segmentation models by name: sizes, classes, first weights, and files that may be anything."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import nn

from pathfm.runtime import PathfmError
from pathfm.segmentation.models import (
    MODEL_NAMES,
    build_model,
    init_weights,
    load_model,
    multiply_adds_per_pixel,
    save_model,
)
from pathfm.segmentation.unet import SHIPPED_WEIGHTS, ThumbnailUNet

SMALL = ("unet", "unet_stem4", "segformer_b0")


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(1, 1), (1, 77), (97, 131)])
def test_any_size_in_logits_of_the_same_size_out(name, classes, size):
    model = build_model(name, classes).eval()
    with torch.inference_mode():
        logits = model(torch.rand(2, 3, *size))
    assert logits.shape == ((2, *size) if classes == 1 else (2, classes, *size))
    assert logits.isfinite().all()


def test_a_second_class_changes_nothing_about_the_first_of_a_unet():
    one, two = ThumbnailUNet((4, 6)).eval(), ThumbnailUNet((4, 6), classes=2).eval()
    state = one.state_dict()
    for key in ("head.weight", "head.bias"):
        state[key] = torch.cat([state[key], torch.randn_like(state[key])])
    two.load_state_dict(state)
    rgb = torch.rand(1, 3, 21, 34)
    assert torch.allclose(two(rgb)[:, 0], one(rgb), atol=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_first_weights_follow_from_the_seed_and_leave_the_global_generator_alone(name):
    before = torch.get_rng_state()
    first, again = build_model(name), build_model(name)
    other = init_weights(build_model(name), 1)
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
        assert value.isfinite().all()
    differing = [
        k for k, v in first.state_dict().items() if not torch.equal(v, other.state_dict()[k])
    ]
    weights = [k for k, v in first.state_dict().items() if k.endswith("weight") and v.dim() > 1]
    assert differing == weights


def test_first_weights_have_the_spread_their_authors_chose():
    unet = build_model("unet").down[2][0].weight  # He by fan-in: 32 channels of 3 x 3
    assert unet.std().item() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.03)
    block = build_model("segformer_b0").encoder.stages[3].blocks[0]
    assert block.attention.query.weight.std().item() == pytest.approx(
        0.0176, rel=0.02
    )  # cut at 2 sd
    assert block.attention.query.weight.abs().max() <= 0.04
    mix = block.feed_forward.mix.weight  # depth-wise: fan-out 9 of one group
    assert mix.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.03)


def test_a_layer_without_a_rule_is_named_rather_than_left_to_chance():
    with pytest.raises(PathfmError, match="no rule for the initial weight of a Conv1d"):
        init_weights(nn.Sequential(nn.Conv1d(2, 2, 1)), 0)


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [("unet", 496_516, 8719), ("unet_stem4", 462_064, 4263.5625)],
)
def test_a_u_nets_size_and_cost_are_as_documented(name, parameters, multiply_adds):
    model = build_model(name).train()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert multiply_adds_per_pixel(model, 256) == multiply_adds
    assert model.training  # counting leaves it as it was
    assert next(model.parameters()).device.type == "cpu"


def test_two_levels_of_a_u_net_cost_what_one_counts_by_hand():
    # 3 x 3 convolutions at 1/4 and 1/16 of the pixels, then 1 x 1.
    quarter = 9 * (12 * 2 + 2 * 2) + 9 * ((3 + 2) * 2 + 2 * 2) + 2 * 4
    wanted = quarter / 4 + 9 * (2 * 3 + 3 * 3) / 16
    assert multiply_adds_per_pixel(ThumbnailUNet((2, 3)), 64) == wanted


def test_a_stem_of_4_costs_what_one_counts_by_hand():
    model = ThumbnailUNet((2, 3), stem=4)
    level_0 = 9 * (48 * 2 + 2 * 2) + 9 * ((3 + 2) * 2 + 2 * 2) + 2 * 16
    assert multiply_adds_per_pixel(model, 64) == level_0 / 16 + 9 * (2 * 3 + 3 * 3) / 64


@pytest.mark.parametrize(("name", "classes"), [("unet", 1), ("unet_stem4", 3), ("segformer_b0", 2)])
def test_a_saved_model_comes_back_to_half_precision_with_its_facts(tmp_path, name, classes):
    model = init_weights(build_model(name, classes), 3)
    facts = {"loss": [{"name": "dice"}], "µm": 8.5, "nested": {"a": [1, None]}}
    path = tmp_path / "deep" / "m.safetensors"
    save_model(model, name, path, facts)
    loaded, told = load_model(path)
    assert told == facts
    assert not loaded.training
    assert path.stat().st_size < 2.1 * sum(p.numel() for p in model.parameters()) + 60_000
    for key, value in loaded.state_dict().items():
        assert value.dtype == model.state_dict()[key].dtype
        wanted = model.state_dict()[key]
        assert torch.allclose(value.double(), wanted.double(), rtol=2**-11, atol=2**-25)
    rgb = torch.rand(1, 3, 40, 50)
    with torch.inference_mode():
        assert torch.allclose(loaded(rgb), model.eval()(rgb), atol=0.02)
    again = tmp_path / "again.safetensors"
    save_model(loaded, name, again, dict(reversed(facts.items())))
    assert again.read_bytes() == path.read_bytes()


def test_saving_leaves_nothing_half_written_and_refuses_what_fp16_cannot_hold(tmp_path):
    model = build_model("unet_stem4")
    path = tmp_path / "m.safetensors"
    save_model(model, "unet_stem4", path, {})
    before = path.read_bytes()
    with torch.no_grad():
        model.down[0][1].running_var[0] = 70_000.0
    with pytest.raises(
        PathfmError, match=r"down\.0\.1\.running_var does not fit into fp16 .*7e\+04"
    ):
        save_model(model, "unet_stem4", path, {})
    with pytest.raises(PathfmError, match="is no unet: 24 tensors missing and 0 unknown"):
        save_model(build_model("unet_stem4"), "unet", path, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


ABOUT = {"format": "segmentation 1", "model": "unet_stem4", "classes": 1, "facts": {}}


def with_header(header: str | None) -> bytes:
    """A whole file of the U-Net of stem 4 under another header."""
    state = build_model("unet_stem4").state_dict()
    halves = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    return save(halves, None if header is None else {"pathfm": header})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "pickle"}, "does not say which segmentation model it holds"),
        (
            {"model": "resnet"},
            "says {.*'model': 'resnet'.*}. Models are unet, unet_stem4",
        ),
        ({"model": ["unet"]}, r"'model': \['unet'\]"),
        ({"model": "unet"}, "not the weights of unet with 1 classes: 24 tensors missing"),
        ({"model": "segformer_b5"}, "not the weights of segformer_b5"),
        ({"classes": 2}, r"with 2 classes: head.bias is .16,., wanted .32,."),
        ({"classes": 0}, "classes 1 to 1024"),
        ({"classes": 99999}, "classes 1 to 1024"),
        ({"classes": True}, "'classes': True"),
        ({"classes": "1"}, "'classes': '1'"),
        ({"facts": [1] * 1000}, "facts a mapping"),
    ],
)
def test_a_file_that_claims_something_else_is_refused_in_one_line(tmp_path, change, reason):
    path = tmp_path / "m.safetensors"
    path.write_bytes(with_header(json.dumps(ABOUT | change)))
    with pytest.raises(PathfmError, match=reason) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("header", [None, "", "{", "[" * 100_000, "9" * 5000, "3", "[]"])
def test_a_file_whose_header_is_nothing_of_ours_is_refused(tmp_path, header):
    path = tmp_path / "m.safetensors"
    path.write_bytes(with_header(header))
    with pytest.raises(
        PathfmError, match=r"m.safetensors: (its header is damaged|does not say which)"
    ):
        load_model(path)


def test_damaged_missing_oversized_and_foreign_files_are_refused_with_their_name(tmp_path):
    path = tmp_path / "m.safetensors"
    with pytest.raises(PathfmError, match=r"m\.safetensors: cannot be read .No such file"):
        load_model(path)
    with pytest.raises(PathfmError, match=r"cannot be read"):
        load_model(tmp_path)
    whole = with_header(json.dumps(ABOUT))
    for cut in (0, 5, 200, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(PathfmError, match=r"m\.safetensors .*not a whole \.safetensors file"):
            load_model(path)
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(PathfmError, match=r"not a whole"):
        load_model(path)
    save_file({"x": torch.zeros(3)}, path)
    with pytest.raises(PathfmError, match="does not say which"):
        load_model(path)
    with path.open("wb") as file:
        file.truncate((512 << 20) + 1)  # sparse
    with pytest.raises(PathfmError, match="536,870,913 bytes, more than"):
        load_model(path)


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_model(build_model("unet_stem4"), "unet_stem4", path, {})
    header = {"pathfm": json.dumps(ABOUT)}
    state = load_file(path)
    state["head.bias"][2] = float("nan")
    save_file(state, path, header)
    with pytest.raises(PathfmError, match=r"head\.bias has numbers that are not finite"):
        load_model(path)
    state["head.bias"] = torch.full((16,), 1e300, dtype=torch.float64)  # infinite in fp32
    save_file(state, path, header)
    with pytest.raises(PathfmError, match=r"head\.bias has numbers that are not finite"):
        load_model(path)
    state["head.bias"] = torch.zeros(16).to(torch.float8_e4m3fn)
    save_file(state, path, header)
    assert load_model(path)[0].head.bias.dtype == torch.float32
    state["head.bias"] = torch.zeros(16, dtype=torch.int64)
    save_file(state, path, header)
    with pytest.raises(PathfmError, match=r"head\.bias is torch\.int64"):
        load_model(path)


def test_a_name_or_a_number_of_classes_that_is_none_is_refused():
    with pytest.raises(
        PathfmError, match=r"no segmentation model 'segformer_b9'\. There are unet, unet_stem4"
    ):
        build_model("segformer_b9")
    with pytest.raises(PathfmError, match="unet with 0 classes"):
        build_model("unet", 0)
    assert len(MODEL_NAMES) == 8


def test_the_shipped_weights_load_and_say_how_they_were_made():
    model, facts = load_model()
    assert facts
    assert json.dumps(facts)
    assert SHIPPED_WEIGHTS.stat().st_size <= 8 << 20
    with torch.inference_mode():
        assert model(torch.ones(1, 3, 64, 64)).shape == (1, 64, 64)
