"""Weights that are really there: sizes, normalisation, DINOv2's names, the next stage of a run."""

import copy
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from timm.layers.pos_embed import resample_abs_pos_embed
from torch.nn import functional as F

from pathfm.backbone import export_backbone, load_backbone, seeded_init
from pathfm.methods import build_method
from pathfm.methods.settings import DinoSettings, Dinov2Settings
from pathfm.runtime import PathfmError

NAME = "vit_tiny_patch16_224"
REGISTERS = "vit_small_patch14_reg4_dinov2"
TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}
IMAGENET_MEAN, IMAGENET_SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def imagenet_file(shared_data: Path) -> Path:
    return shared_data / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"


def pictures(n, side_px):
    return torch.randn(n, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("side_px", [112, 448])
def test_another_size_resamples_the_position_embedding_as_timm_does_and_nothing_else(
    imagenet_file, side_px
):
    stored = load_file(imagenet_file)
    backbone = load_backbone(NAME, str(imagenet_file), side_px)
    ours = backbone.network.state_dict()
    cells = side_px // 16
    wanted = resample_abs_pos_embed(
        stored["pos_embed"], (cells, cells), (14, 14), num_prefix_tokens=1
    )
    torch.testing.assert_close(ours["pos_embed"], wanted, rtol=0, atol=0)
    assert torch.equal(ours["pos_embed"][:, 0], stored["pos_embed"][:, 0])  # CLS has no place
    assert [k for k in ours if not torch.equal(ours[k], stored[k])] == ["pos_embed"]
    assert f"pos_embed resampled to {side_px} px" in backbone.weights_note
    assert backbone.input_px == side_px


def test_resampling_once_or_in_every_pass_gives_the_same_features(imagenet_file):
    once, always = (load_backbone(NAME, str(imagenet_file), side) for side in (96, None))
    x = pictures(2, 96)
    with torch.no_grad():
        torch.testing.assert_close(once.embed(x), always.embed(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "mean", "sd"),
    [
        (NAME, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # augreg
        ("vit_small_patch16_224.dino", IMAGENET_MEAN, IMAGENET_SD),
        (REGISTERS, IMAGENET_MEAN, IMAGENET_SD),
        ("resnet50", IMAGENET_MEAN, IMAGENET_SD),
    ],
)
def test_normalisation_is_that_of_the_weights(name, mean, sd):
    small = {} if name == "resnet50" else TINY
    backbone = load_backbone(name, "random", **small)
    assert (backbone.mean, backbone.std) == (mean, sd)


@pytest.mark.parametrize(("asked_px", "cells"), [(None, 16), (224, 16), (518, 37), (98, 7)])
def test_a_dinov2_vit_is_built_for_224_px_unless_said_otherwise(asked_px, cells):
    backbone = load_backbone(REGISTERS, "random", asked_px, **TINY)
    net: Any = backbone.network
    assert net.pos_embed.shape == (1, cells**2, 24)  # CLS and registers have no place
    assert backbone.input_px == 14 * cells
    assert backbone.embed(pictures(1, 56)).shape == (1, 24)  # and takes other views too


@pytest.fixture
def original_dinov2(tmp_path) -> Path:
    """A tiny model under the names, and with the position embedding, of DINOv2's own repository."""
    with seeded_init(7):
        model = timm.create_model(REGISTERS, num_classes=0, **TINY)  # 518 px: 37 x 37 places
        tensors = {k: torch.randn_like(v) * 0.1 for k, v in model.state_dict().items()}
        tensors["register_tokens"] = tensors.pop("reg_token")
        tensors["mask_token"] = torch.randn(1, 24)
        tensors["pos_embed"] = torch.randn(1, 1 + 37 * 37, 24)
    save_file(tensors, tmp_path / "dinov2_vits14_reg4_pretrain.safetensors")
    return tmp_path / "dinov2_vits14_reg4_pretrain.safetensors"


def test_a_file_of_dinov2s_own_names_gives_what_dinov2_computes(original_dinov2):
    """What enters the blocks there: CLS + its position, then registers without one, then patches."""
    stored = load_file(original_dinov2)
    backbone = load_backbone(REGISTERS, str(original_dinov2), 518, **TINY)
    net: Any = backbone.network
    x = pictures(1, 518)
    patches = F.conv2d(
        x, stored["patch_embed.proj.weight"], stored["patch_embed.proj.bias"], stride=14
    )
    tokens = torch.cat([stored["cls_token"], patches.flatten(2).transpose(1, 2)], 1)
    tokens = tokens + stored["pos_embed"]
    tokens = torch.cat([tokens[:, :1], stored["register_tokens"], tokens[:, 1:]], 1)
    with torch.no_grad():
        torch.testing.assert_close(net._pos_embed(net.patch_embed(x)), tokens)
    for name, tensor in net.blocks.state_dict().items():
        assert torch.equal(tensor, stored[f"blocks.{name}"]), name
    assert "resampled" not in backbone.weights_note
    smaller = load_backbone(REGISTERS, str(original_dinov2), **TINY)
    wanted = resample_abs_pos_embed(
        stored["pos_embed"][:, 1:], (16, 16), (37, 37), num_prefix_tokens=0
    )
    torch.testing.assert_close(smaller.network.state_dict()["pos_embed"], wanted)
    assert "pos_embed resampled to 224 px" in smaller.weights_note


def test_a_file_of_dinov2s_names_with_a_tensor_missing_is_refused(original_dinov2):
    tensors = {k: v.clone() for k, v in load_file(original_dinov2).items()}
    del tensors["blocks.1.ls1.gamma"]
    save_file(tensors, original_dinov2)
    with pytest.raises(PathfmError, match=r"1 missing, first blocks\.1\.ls1\.gamma"):
        load_backbone(REGISTERS, str(original_dinov2), **TINY)


def test_dinov2_is_timms_tag_of_that_architecture(monkeypatch):
    asked = []

    def hub(place, *args, **kwargs):
        asked.append(place)
        model = timm.create_model(REGISTERS, num_classes=0, **TINY)
        return {name: torch.full_like(value, 0.5) for name, value in model.state_dict().items()}

    monkeypatch.setattr("pathfm.backbone.weights._hub_answers", lambda: True)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", hub)
    backbone = load_backbone(REGISTERS, "dinov2", **TINY)
    assert asked == ["timm/vit_small_patch14_reg4_dinov2.lvd142m"]
    assert backbone.weights_note == "timm's weights vit_small_patch14_reg4_dinov2.lvd142m"
    for name, tensor in backbone.network.state_dict().items():
        torch.testing.assert_close(tensor, torch.full_like(tensor, 0.5)), name


@pytest.mark.parametrize("weights", ["imagenet", "dinov2"])
def test_without_a_network_the_file_to_give_is_named(monkeypatch, weights):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("pathfm.backbone.weights._hub_answers", lambda: True)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(PathfmError) as caught:
        load_backbone(REGISTERS, weights, **TINY)
    said = str(caught.value)
    assert "\n" not in said
    assert "model.safetensors of timm/vit_small_patch14_reg4_dinov2.lvd142m" in said


def test_a_hub_that_does_not_answer_is_asked_once_and_says_nothing_itself(
    monkeypatch, tmp_path, caplog
):
    """By itself it asks for 53 s, with two lines a time."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    began_s = time.monotonic()
    with pytest.raises(PathfmError, match="neither in timm's cache"):
        load_backbone(NAME, "imagenet", **TINY)
    assert time.monotonic() - began_s < 10
    assert [row for row in caplog.records if row.name.startswith("huggingface_hub")] == []
    assert constants.HF_HUB_OFFLINE is False


def test_dinov2_weights_of_another_architecture_are_none():
    with pytest.raises(
        PathfmError, match=r"none for vit_tiny_patch16_224.*vit_small_patch14_dinov2"
    ):
        load_backbone(NAME, "dinov2")


def test_a_loader_that_alters_a_tensor_is_caught(tmp_path, monkeypatch):
    """As lightly's wrapper does with 52 of 152: no note would tell."""
    with seeded_init(5):
        model = timm.create_model(NAME, num_classes=0, **TINY)
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    make = timm.create_model

    def altered(*args, **kwargs):
        made = make(*args, **kwargs)
        if kwargs.get("pretrained"):
            torch.nn.init.zeros_(made.blocks[1].mlp.fc1.weight)
        return made

    monkeypatch.setattr(timm, "create_model", altered)
    with pytest.raises(PathfmError, match=r"1 of 30 tensors are not the file's.*mlp\.fc1\.weight"):
        load_backbone(NAME, str(tmp_path / "tiny.safetensors"), **TINY)


@pytest.mark.parametrize(("name", "settings"), [("dino", DinoSettings), ("dinov2", Dinov2Settings)])
def test_student_and_teacher_begin_as_the_file_says(tmp_path, name, settings):
    with seeded_init(5):
        model = timm.create_model(NAME, num_classes=0, **TINY)
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    backbone = load_backbone(NAME, str(tmp_path / "tiny.safetensors"), drop_path=0.1, **TINY)
    small = settings(out_dim=16, hidden_dim=16, bottleneck_dim=8)
    method: Any = build_method(name, backbone, small, steps=10, seed=0)
    assert method.exported is not backbone
    for part in (method.student, method.teacher):
        ours = part["backbone"].network.state_dict()
        assert ours.keys() == model.state_dict().keys() - {"head.weight", "head.bias"}
        for key, tensor in ours.items():
            assert torch.equal(tensor, model.state_dict()[key]), key
    student, teacher = (dict(m.named_parameters()) for m in (method.student, method.teacher))
    for key in student.keys() & teacher.keys():  # heads too
        assert torch.equal(student[key], teacher[key]), key


@pytest.mark.parametrize("name", [NAME, REGISTERS])
def test_a_next_stage_at_a_larger_input_resamples_once(tmp_path, name):
    patch_px = load_backbone(name, "random", **TINY).patch_size
    first = load_backbone(name, "random:2", 2 * patch_px, **TINY)
    export_backbone(first, tmp_path / "first" / "backbone")
    second = load_backbone(name, str(tmp_path / "first"), 4 * patch_px)
    before, after = first.network.state_dict(), second.network.state_dict()
    prefix = before["pos_embed"].shape[1] - 4
    wanted = resample_abs_pos_embed(before["pos_embed"], (4, 4), (2, 2), num_prefix_tokens=prefix)
    torch.testing.assert_close(after["pos_embed"], wanted)
    assert [k for k in after if not torch.equal(after[k], before[k])] == ["pos_embed"]
    assert second.input_px == 4 * patch_px
    assert f"resampled to {4 * patch_px} px" in second.weights_note
    export_backbone(second, tmp_path / "second")
    third = load_backbone(name, str(tmp_path / "second"))  # as a resumed second stage reads it
    assert third.digest == second.digest
    assert third.input_px == 4 * patch_px
    assert "resampled" not in third.weights_note


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_a_conv_net_goes_out_and_comes_back(tmp_path, name):
    backbone = load_backbone(name, "random:3", 96, drop_path=0.1)
    export_backbone(backbone, tmp_path)
    again = load_backbone("", str(tmp_path))
    assert again.digest == backbone.digest
    assert (again.name, again.input_px) == (name, 96)
    theirs: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(theirs(pictures(2, 96)), copy.deepcopy(backbone).embed(pictures(2, 96)))
