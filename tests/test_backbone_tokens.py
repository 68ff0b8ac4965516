"""Tokens, masks, maps and layers of transformers and ConvNets, against timm and by hand."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pathfm.backbone import SampleKeys, export_backbone, load_backbone
from pathfm.backbone.layers import layer_table
from pathfm.runtime import PathfmError

NAME = "vit_tiny_patch16_224"
REGISTERS = "vit_small_patch14_reg4_dinov2"
TINY: dict[str, Any] = {"embed_dim": 24, "depth": 2, "num_heads": 2}


def tiny(name=NAME, **more):
    return load_backbone(name, "random:1", **TINY, **more)


def pictures(n, side_px=32):
    return torch.randn(n, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "prefix", "side_px", "cells"), [(NAME, 1, 48, 3), (REGISTERS, 5, 56, 4)]
)
def test_tokens_are_timms_features_without_the_prefix(name, prefix, side_px, cells):
    backbone, x = tiny(name), pictures(2, side_px)
    with torch.no_grad():
        cls, patches = backbone.tokens(x)
        timms: Any = backbone.network
        features = timms.forward_features(x)
        assert torch.equal(cls, backbone.embed(x))
    assert torch.equal(cls, features[:, 0])
    assert torch.equal(patches, features[:, prefix:])
    assert patches.shape == (2, cells**2, 24)
    assert backbone.grid(side_px) == (cells, cells)


@pytest.mark.parametrize(("name", "prefix"), [(NAME, 1), (REGISTERS, 5)])
def test_a_masked_patch_is_the_mask_token_plus_its_place(name, prefix):
    backbone = tiny(name)
    backbone.add_mask_token(3)
    net: Any = backbone.network
    x = pictures(2, 2 * backbone.patch_size)
    masks = torch.tensor([[True, False, False, True], [False, True, False, False]])
    with torch.no_grad():
        embedded = net.patch_embed.proj(x).flatten(2).transpose(1, 2)
        embedded[masks] = backbone.mask_token
        tokens = net.norm(net.blocks(net._pos_embed(embedded.view(2, 2, 2, 24))))
        cls, patches = backbone.tokens(x, masks=masks)
        bare = backbone.tokens(x)[1]
    torch.testing.assert_close(cls, tokens[:, 0])
    torch.testing.assert_close(patches, tokens[:, prefix:])
    assert not torch.equal(bare, patches)


def test_the_mask_token_gets_a_gradient_and_zeros_where_nothing_is_masked():
    backbone = tiny().train()
    backbone.add_mask_token(0)
    token = backbone.mask_token
    for masks in (None, torch.zeros(2, 4, dtype=torch.bool)):
        token.grad = None
        backbone.tokens(pictures(2), masks=masks)[1].pow(2).sum().backward()
        assert torch.equal(token.grad, torch.zeros(24))
    token.grad = None
    backbone.embed(pictures(2)).pow(2).sum().backward()
    assert torch.equal(token.grad, torch.zeros(24))
    masks = torch.tensor([[True, False, False, False]] * 2)
    token.grad = None
    backbone.tokens(pictures(2), masks=masks)[1].pow(3).sum().backward()
    assert token.grad.abs().max() > 0


def test_the_mask_token_follows_from_its_seed():
    first, again, other = tiny(), tiny(), tiny()
    for backbone, seed in ((first, 5), (again, 5), (other, 6)):
        backbone.add_mask_token(seed)
    assert torch.equal(first.mask_token, again.mask_token)
    assert not torch.equal(first.mask_token, other.mask_token)
    assert float(first.mask_token.detach().std()) == pytest.approx(0.02, rel=0.4)


def test_an_export_knows_neither_mask_token_nor_stochastic_depth(tmp_path):
    plain, trained = tiny(), tiny(drop_path=0.3)
    trained.add_mask_token(0)
    for backbone, name in ((plain, "plain"), (trained, "trained")):
        export_backbone(backbone, tmp_path / name)
    files = [
        [(tmp_path / name / file).read_bytes() for file in ("config.json", "model.safetensors")]
        for name in ("plain", "trained")
    ]
    assert files[0] == files[1]
    config = json.loads(files[1][0])
    assert config["model_args"]["dynamic_img_size"] is True
    assert not any("drop" in key for key in config["model_args"])
    assert "mask_token" not in load_file(tmp_path / "trained" / "model.safetensors")
    assert plain.digest == trained.digest


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        (torch.zeros(2, 5, dtype=torch.bool), r"\(2, 5\).*bool \(2, 4\)"),
        (torch.zeros(8, 1, dtype=torch.bool), r"\(8, 1\)"),
        (torch.zeros(2, 4), "float32"),
    ],
)
def test_masks_of_another_shape_or_kind_are_refused(masks, words):
    backbone = tiny()
    with pytest.raises(PathfmError, match="add_mask_token"):
        backbone.tokens(pictures(2), masks=torch.zeros(2, 4, dtype=torch.bool))
    backbone.add_mask_token(0)
    with pytest.raises(PathfmError, match=words):
        backbone.tokens(pictures(2), masks=masks)
    assert backbone.tokens(pictures(2))[1].shape == (2, 4, 24)  # the refused masks are forgotten


def test_masks_and_keys_meet_in_one_pass():
    backbone = tiny(drop_path=0.5).train()
    backbone.add_mask_token(0)
    keys = SampleKeys.of_views(0, [1, 2], [0])
    masks = torch.tensor([[True, False, True, False]] * 2)
    one, two = (backbone.tokens(pictures(2), keys, masks)[1] for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, backbone.tokens(pictures(2), None, masks)[1])


@pytest.mark.parametrize(
    ("name", "patch_px", "prefix", "dim", "n_layers", "millions"),
    [
        ("vit_tiny_patch16_224", 16, 1, 192, 12, 5.5),
        ("vit_small_patch16_224", 16, 1, 384, 12, 21.7),
        ("vit_small_patch14_reg4_dinov2", 14, 5, 384, 12, 21.7),
        ("resnet50", 32, None, 2048, 4, 23.5),
    ],
)
def test_the_structures_promised_are_built(name, patch_px, prefix, dim, n_layers, millions):
    backbone = load_backbone(name, "random", drop_path=0.1)
    assert (backbone.patch_size, backbone.dim, backbone.token_dim) == (patch_px, dim, dim)
    assert (backbone.n_layers, backbone.input_px) == (n_layers, 224)
    assert getattr(backbone.network, "num_prefix_tokens", None) == prefix
    assert len(backbone.blocks) == n_layers
    size = sum(p.numel() for p in backbone.parameters()) / 1e6
    assert size == pytest.approx(millions, abs=0.1)  # timm's tables, less the classifier
    side_px = 2 * patch_px
    with torch.no_grad():
        cls, patches = backbone.tokens(pictures(2, side_px))
    assert cls.shape == (2, dim)
    assert patches.shape == (2, 4, dim)


@pytest.mark.parametrize("side_px", [32, 50, 97])
def test_tokens_of_a_conv_net_are_its_map_and_its_feature_their_mean(side_px):
    backbone, x = load_backbone("resnet18", "random"), pictures(2, side_px)
    with torch.no_grad():
        cls, patches = backbone.tokens(x)
        timms: Any = backbone.network
        grid = timms.forward_features(x)
        assert torch.equal(backbone(x), patches)
        assert torch.equal(backbone.embed(x), cls)
    torch.testing.assert_close(cls, patches.mean(1))
    rows, columns = backbone.grid(side_px)
    torch.testing.assert_close(patches.transpose(1, 2).reshape(2, -1, rows, columns), grid)


def test_asking_for_a_grid_changes_nothing():
    backbone = load_backbone("resnet18", "random", drop_path=0.2).train()
    before = backbone.digest
    backbone.embed(pictures(2), SampleKeys.of_views(0, [1, 2], [0]))
    moved = backbone.digest
    assert backbone.grid(64) == (2, 2)
    assert backbone.training
    assert before != moved == backbone.digest  # running statistics of BatchNorm are tensors too


@pytest.mark.parametrize(("name", "side_px"), [(NAME, 40), ("resnet18", 16)])
def test_an_input_that_cannot_be_fed_is_named(name, side_px):
    backbone = load_backbone(name, "random")
    with pytest.raises(PathfmError, match=rf"views.local.size_px = {side_px}"):
        backbone.check_input(side_px, "views.local.size_px")
    with pytest.raises(PathfmError, match="size_px"):
        backbone.grid(side_px)


def test_a_conv_net_has_no_mask_token():
    with pytest.raises(PathfmError, match="masked image modelling needs a vision transformer"):
        load_backbone("resnet18", "random").add_mask_token(0)


def test_the_stem_is_what_turns_pixels_into_features():
    backbone, conv = tiny(), load_backbone("resnet18", "random")
    assert {name for name, _ in backbone.stem.named_parameters()} == {"proj.weight", "proj.bias"}
    assert conv.stem is conv.network.conv1


VIT_TI_LAYERS = {
    "network.cls_token": 0,
    "network.pos_embed": 0,
    "network.patch_embed.proj.weight": 0,
    "network.patch_embed.proj.bias": 0,
    "network.blocks.0.norm1.weight": 1,
    "network.blocks.0.mlp.fc2.bias": 1,
    "network.blocks.1.attn.qkv.weight": 2,
    "network.blocks.9.attn.proj.bias": 10,
    "network.blocks.10.attn.proj.bias": 11,
    "network.blocks.11.mlp.fc1.weight": 12,
    "network.norm.weight": 13,
    "network.norm.bias": 13,
    "mask_token": 0,
}


def test_layers_of_a_vit_ti_are_those_of_beit():
    backbone = load_backbone(NAME, "random")
    backbone.add_mask_token(0)
    assert backbone.n_layers == 12
    for name, layer in VIT_TI_LAYERS.items():
        assert backbone.layer_of(name) == layer, name
    found = [backbone.layer_of(name) for name, _ in backbone.named_parameters()]
    # 12 tensors a block: two norms, qkv, proj, fc1, fc2, each with a bias
    assert [found.count(layer) for layer in range(14)] == [5, *[12] * 12, 2]
    with pytest.raises(PathfmError, match=r"no parameter 'head\.weight'"):
        backbone.layer_of("head.weight")


def test_registers_are_embeddings():
    backbone = tiny(REGISTERS)
    assert backbone.layer_of("network.reg_token") == 0
    assert backbone.layer_of("network.blocks.1.ls2.gamma") == 2


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        (
            "resnet18",
            {"conv1.weight": 0, "bn1.bias": 0, "layer1.0.conv1.weight": 1, "layer4.1.bn2.bias": 4},
        ),
        (
            "convnext_atto",
            {
                "stem.0.weight": 0,
                "stages.0.blocks.0.gamma": 1,
                "stages.1.downsample.0.weight": 2,
                "stages.3.blocks.1.mlp.fc2.bias": 4,
                "head.norm.weight": 5,
            },
        ),
    ],
)
def test_layers_of_a_conv_net_are_its_stages(name, wanted):
    table, n = layer_table(load_backbone(name, "random").network)
    assert n == 4
    assert {key: table[key] for key in wanted} == wanted
