"""Weights that go in come out: no tensor re-initialised, and a file that does not fit is refused."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pathfm.backbone import export_backbone, find_backbone_folder, load_backbone, seeded_init
from pathfm.runtime import PathfmError

NAME = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"embed_dim": 48, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def imagenet_file(shared_data: Path) -> Path:
    return shared_data / "weights" / "vit_tiny_patch16_224.augreg_in21k_ft_in1k.safetensors"


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """All tensors of a one-block ViT with a classifier, as timm would save them."""
    with seeded_init(5):
        model = timm.create_model(NAME, num_classes=7, **TINY)
    save_file(model.state_dict(), tmp_path / "tiny.safetensors")
    return tmp_path / "tiny.safetensors"


def test_no_tensor_of_the_imagenet_file_is_initialised_again(imagenet_file):
    backbone, stored = load_backbone(NAME, str(imagenet_file)), load_file(imagenet_file)
    ours = backbone.network.state_dict()
    assert set(stored) - set(ours) == {"head.weight", "head.bias"}
    assert len(ours) == 150
    for name, tensor in ours.items():
        assert torch.equal(tensor, stored[name]), name
    assert "150 of 150" in backbone.weights_note
    assert imagenet_file.name in backbone.weights_note
    assert backbone.mean == backbone.std == (0.5, 0.5, 0.5)  # augreg's, not ImageNet's


def test_features_are_the_cls_token_of_timms_own_model(imagenet_file):
    reference: Any = timm.create_model(NAME, num_classes=1000)
    reference.load_state_dict(load_file(imagenet_file))
    backbone = load_backbone(NAME, str(imagenet_file))
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = reference.eval().forward_features(x)
        torch.testing.assert_close(backbone(x), tokens)
        torch.testing.assert_close(backbone.embed(x), tokens[:, 0])


def test_a_file_of_a_tiny_model_loads_whole(tiny_file):
    backbone, stored = load_backbone(NAME, str(tiny_file), **TINY), load_file(tiny_file)
    for name, tensor in backbone.network.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    assert (backbone.dim, backbone.patch_size, backbone.input_px) == (48, 16, 224)


def test_another_input_size_resamples_only_the_position_embedding(tiny_file):
    backbone, stored = load_backbone(NAME, str(tiny_file), 112, **TINY), load_file(tiny_file)
    ours = backbone.network.state_dict()
    assert [k for k in ours if not torch.equal(ours[k], stored[k])] == ["pos_embed"]
    assert ours["pos_embed"].shape == (1, 1 + 7 * 7, 48)
    assert "pos_embed resampled to 112 px" in backbone.weights_note


@pytest.mark.parametrize("side_px", [48, 112, 224])
def test_views_of_any_multiple_of_the_patch_size_go_in(tiny_file, side_px):
    backbone = load_backbone(NAME, str(tiny_file), **TINY)
    x = torch.zeros(2, 3, side_px, side_px)
    assert backbone.embed(x).shape == (2, 48)
    assert backbone(x).shape == (2, 1 + (side_px // 16) ** 2, 48)


def _tensors(path):
    """In memory: load_file maps the file, and a mapped file must not be written over."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def _drop_a_tensor(path):
    tensors = _tensors(path)
    del tensors["blocks.0.attn.qkv.weight"]
    save_file(tensors, path)


def _add_a_tensor(path):
    save_file(_tensors(path) | {"blocks.9.norm1.bias": torch.zeros(48)}, path)


def _reshape_a_tensor(path):
    save_file(_tensors(path) | {"cls_token": torch.zeros(1, 1, 64)}, path)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def _pickle(path):
    torch.save(_tensors(path), path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_drop_a_tensor, ["17 of 18", "1 missing, first blocks.0.attn.qkv.weight"]),
        (_add_a_tensor, ["1 unknown, first blocks.9.norm1.bias"]),
        (_reshape_a_tensor, ["cls_token is (1, 1, 64), wanted (1, 1, 48)"]),
        (_truncate, ["not a whole .safetensors file", "bytes"]),
        (_pickle, ["not a whole .safetensors file", "pickles"]),
    ],
)
def test_a_file_that_does_not_fit_is_one_clear_line(tiny_file, damage, words):
    damage(tiny_file)
    with pytest.raises(PathfmError) as caught:
        load_backbone(NAME, str(tiny_file), **TINY)
    said = str(caught.value)
    assert "tiny.safetensors" in said
    assert "\n" not in said
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("name", "weights", "words"),
    [
        (NAME, "/nowhere/at/all.safetensors", "no such file or run folder"),
        (NAME, "random:x", "whole number"),
        ("vit_tinny_patch16", "random", "no timm model"),
        ("swin_tiny_patch4_window7_224", "random", "vision transformer"),
    ],
)
def test_names_and_weights_nobody_knows(name, weights, words):
    with pytest.raises(PathfmError, match=words):
        load_backbone(name, weights)


def test_random_weights_depend_on_their_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first, again = (load_backbone(NAME, "random:3", **TINY).digest for _ in range(2))
    assert first == again
    assert first != load_backbone(NAME, "random:4", **TINY).digest
    assert load_backbone(NAME, "random", **TINY).weights_note == "random weights (seed 0)"
    assert torch.equal(torch.get_rng_state(), before)


def test_the_digest_sees_one_changed_value():
    backbone = load_backbone(NAME, "random", **TINY)
    before = backbone.digest
    with torch.no_grad():
        next(backbone.parameters())[0] += 1e-6
    assert backbone.digest != before


def test_an_export_gives_timm_the_same_features_and_normalisation(tmp_path, tiny_file):
    backbone = load_backbone(NAME, str(tiny_file), **TINY)
    backbone.mean, backbone.std = (0.7, 0.6, 0.5), (0.1, 0.2, 0.3)
    export_backbone(backbone, tmp_path / "backbone")
    theirs: Any = timm.create_model(f"local-dir:{tmp_path / 'backbone'}", pretrained=True).eval()
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(theirs(x), backbone.embed(x))
    assert tuple(theirs.pretrained_cfg["mean"]) == (0.7, 0.6, 0.5)
    assert tuple(theirs.pretrained_cfg["input_size"]) == (3, 224, 224)
    again = load_backbone(NAME, str(tmp_path))  # a run folder: what is in its backbone/
    assert again.digest == backbone.digest
    assert (again.mean, again.std) == (backbone.mean, backbone.std)
    assert "18 of 18 tensors" in again.weights_note
    with pytest.raises(PathfmError, match="holds a vit_tiny_patch16_224"):
        load_backbone("vit_small_patch16_224", str(tmp_path))


def test_a_run_with_only_checkpoints_is_found_through_last(tmp_path):
    step = tmp_path / "checkpoints" / "step_00000002"
    export_backbone(load_backbone(NAME, "random", **TINY), step / "backbone")
    (tmp_path / "checkpoints" / "last").write_text("step_00000002\n")
    for path in (tmp_path, tmp_path / "last", tmp_path / "checkpoints" / "last", step):
        assert find_backbone_folder(path) == step / "backbone"
    assert find_backbone_folder(tmp_path / "nothing") is None
