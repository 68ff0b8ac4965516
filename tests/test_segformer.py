"""SegFormer against transformers' own, the paper's formulas, and a picture of any size."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pathfm.runtime import PathfmError
from pathfm.segmentation.models import multiply_adds_per_pixel
from pathfm.segmentation.segformer import (
    DECODER_CHANNELS,
    PRESETS,
    AllMlpDecoder,
    segformer,
)
from pathfm.segmentation.segformer.mit import EfficientAttention, MixFeedForward

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# --- transformers' implementation as the oracle -----------------------------------------------------

NAMES = [  # theirs -> ours
    (r"segformer\.stages", "encoder.stages"),
    (r"patch_embeddings\.proj", "merge"),
    (r"patch_embeddings\.layer_norm", "merge_norm"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"q_proj", "query"),
    (r"k_proj", "key"),
    (r"v_proj", "value"),
    (r"o_proj", "out"),
    (r"sequence_reduction\.sequence_reduction", "shorten"),
    (r"sequence_reduction\.layer_norm", "norm"),
    (r"mlp\.fc1", "feed_forward.wide"),
    (r"mlp\.dwconv\.dwconv", "feed_forward.mix"),
    (r"mlp\.fc2", "feed_forward.narrow"),
    (r"(stages\.\d)\.layer_norm", r"\1.norm"),
    (r"decode_head\.linear_projections\.(\d)\.proj", r"decoder.linears.\1"),
    (r"decode_head\.linear_fuse", "decoder.fuse"),
    (r"decode_head\.batch_norm", "decoder.norm"),
    (r"decode_head\.classifier", "decoder.classify"),
]


def our_name(theirs: str) -> str:
    name = theirs
    for pattern, word in NAMES:
        name = re.sub(pattern, word, name)
    return name


def oracle(preset: str, classes: int, device: str = "cpu") -> nn.Module:
    import transformers

    shape = PRESETS[preset]
    settings: Any = transformers.SegformerConfig
    config = settings(
        num_labels=classes,
        hidden_sizes=list(shape.widths),
        depths=list(shape.depths),
        num_attention_heads=list(shape.heads),
        sr_ratios=list(shape.reductions),
        decoder_hidden_size=DECODER_CHANNELS[preset],
        attn_implementation="eager",  # written-out attention: not the kernel we call
    )
    with torch.device("meta"):
        model = transformers.SegformerForSemanticSegmentation(config)
    return randomised(model.to_empty(device=device)).eval()


def randomised(model: nn.Module) -> nn.Module:
    """Every weight, bias and running statistic away from its usual start, so that each one matters."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.zero_()
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 2, generator=generator)
            elif tensor.dim() > 1:
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
            elif name.endswith("weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.normal_(0, 0.2, generator=generator)
    return model


def mapped(theirs: nn.Module, preset: str, classes: int) -> nn.Module:
    """Ours with their weights; every one of theirs finds exactly one of ours."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        ours = our_name(name)
        state[ours] = tensor
        if ours == "decoder.fuse.weight":  # they concatenate the deepest map first
            state[ours] = torch.cat(tensor[:, :, 0, 0].chunk(4, dim=1)[::-1], dim=1)
    model = segformer(preset, classes)
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.mark.parametrize(
    "preset",
    [*("b0", "b1", "b2"), *(pytest.param(p, marks=pytest.mark.slow) for p in ("b3", "b4", "b5"))],
)
def test_logits_equal_those_of_transformers_on_the_same_weights(preset):
    theirs = oracle(preset, 3)
    ours = mapped(theirs, preset, 3)
    for height, width in [(64, 96), (67, 45), (33, 130)]:
        rgb = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))
        with torch.inference_mode():
            wanted = theirs(2 * rgb - 1).logits
            found = ours.quarter_logits(rgb)
        assert found.shape == wanted.shape == (2, 3, -(-height // 4), -(-width // 4))
        assert wanted.std() > 0.1  # a network that says something
        assert (found - wanted).abs().max() < 1e-4


def test_gradients_equal_those_of_transformers_on_the_same_weights():
    theirs = oracle("b0", 2)
    ours = mapped(theirs, "b0", 2)
    rgb = torch.rand(1, 3, 50, 70, generator=torch.Generator().manual_seed(1))
    signs = torch.randn(1, 2, 13, 18, generator=torch.Generator().manual_seed(2))
    (theirs(2 * rgb - 1).logits * signs).sum().backward()
    (ours.quarter_logits(rgb) * signs).sum().backward()
    for name, parameter in theirs.named_parameters():
        if "linear_fuse" in name:
            continue  # in another order: the loop transcription below has it
        mine = ours.get_parameter(our_name(name)).grad
        # a key's bias shifts all scores of a query alike: its gradient is 0 but for rounding
        close = 1e-5 + 1e-4 * float(parameter.grad.abs().max())
        assert torch.allclose(mine, parameter.grad, rtol=1e-3, atol=close), name


@pytest.mark.parametrize(("classes", "millions"), [(2, 3.714658), (150, 3.752694)])
def test_b0_has_as_many_parameters_as_published(classes, millions):
    assert sum(p.numel() for p in segformer("b0", classes).parameters()) == millions * 1e6


def test_every_preset_has_as_many_parameters_as_the_oracle():
    for preset in PRESETS:
        theirs = oracle(preset, 19, "meta")
        with torch.device("meta"):
            ours = segformer(preset, 19)
        counted = [sum(p.numel() for p in model.parameters()) for model in (theirs, ours)]
        assert counted[0] == counted[1], preset


# --- formulas ---------------------------------------------------------------------------------------


def test_attention_is_the_softmax_over_a_sequence_shortened_by_sr_squared():
    layer = randomised(EfficientAttention(6, heads=2, reduction=2)).double()
    height, width = 4, 6
    tokens = torch.randn(1, 24, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    squares = tokens.reshape(4, 6, 6)
    short = []
    for row in range(2):  # eq. 2: each 2 x 2 square becomes one key
        for column in range(3):
            total = layer.shorten.bias.clone()
            for y in range(2):
                for x in range(2):
                    total += layer.shorten.weight[:, :, y, x] @ squares[2 * row + y, 2 * column + x]
            short.append(F.layer_norm(total, (6,), layer.norm.weight, layer.norm.bias))
    keys = torch.stack([layer.key(s) for s in short])
    values = torch.stack([layer.value(s) for s in short])
    wanted = torch.zeros(24, 6, dtype=torch.float64)
    for n in range(24):
        query = layer.query(tokens[0, n])
        for head in range(2):
            part = slice(3 * head, 3 * head + 3)
            scores = torch.exp(keys[:, part] @ query[part] / 3**0.5)
            wanted[n, part] = (scores[:, None] * values[:, part]).sum(0) / scores.sum()
    wanted = layer.out(wanted)
    assert torch.allclose(layer(tokens, height, width)[0], wanted, atol=1e-12)


def test_mix_ffn_is_mlp_gelu_conv_mlp():
    layer = randomised(MixFeedForward(3)).double()
    tokens = torch.randn(2, 20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    inner = layer.wide(tokens).reshape(2, 4, 5, 12)
    padded = np.zeros((2, 6, 7, 12))
    padded[:, 1:-1, 1:-1] = inner.detach().numpy()
    mixed = np.zeros((2, 4, 5, 12))
    for i in range(3):
        for j in range(3):
            kernel = layer.mix.weight[:, 0, i, j].detach().numpy()
            mixed += padded[:, i : i + 4, j : j + 5] * kernel
    x = torch.from_numpy(mixed + layer.mix.bias.detach().numpy()).reshape(2, 20, 12)
    gelu = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    assert torch.allclose(layer(tokens, 4, 5), layer.narrow(gelu), atol=1e-12)


def as_the_paper_orders(decoder: AllMlpDecoder, maps: list[torch.Tensor]) -> torch.Tensor:
    """Linear, upsample, concatenate, fuse: the decoder of the paper, step by step."""
    wide = []
    for layer, x in zip(decoder.linears, maps, strict=True):
        w = layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        wide.append(F.interpolate(w, maps[0].shape[-2:], mode="bilinear", align_corners=False))
    fused = decoder.fuse(torch.cat(wide, 1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return decoder.classify(F.relu(decoder.norm(fused)))


@pytest.mark.parametrize("training", [False, True])
def test_the_decoder_is_the_papers_though_in_another_order_values_and_gradients(training):
    decoder = randomised(AllMlpDecoder((3, 5, 2), 7, classes=4)).double().train(training)
    generator = torch.Generator().manual_seed(5)
    sizes = [(3, 12, 9), (5, 6, 5), (2, 1, 1)]
    maps = [torch.randn(2, *s, dtype=torch.float64, generator=generator) for s in sizes]
    found, gradients = [], []
    for way in (decoder, lambda x: as_the_paper_orders(decoder, x)):
        decoder.zero_grad()
        found.append(way(maps))
        (found[-1] ** 3).sum().backward()
        gradients.append([p.grad.clone() for p in decoder.parameters()])
    assert torch.allclose(*found, atol=1e-12)
    for mine, wanted in zip(*gradients, strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-9, atol=1e-9)


def test_the_decoder_is_a_head_on_frozen_tokens_and_says_when_they_do_not_fit():
    head = AllMlpDecoder([192], 64, classes=5)
    tokens = torch.randn(2, 192, 14, 14)
    assert head([tokens]).shape == (2, 5, 14, 14)
    with pytest.raises(PathfmError, match=r"\[192\] channels was given .*\(2, 96, 14, 14\)"):
        head([tokens[:, :96]])
    with pytest.raises(PathfmError, match=r"\[192\] channels"):
        head([tokens, tokens])


def multiply_adds_by_hand(preset: str, side_px: int, decoder_as_published: bool) -> int:
    shape, total, source = PRESETS[preset], 0, 3
    channels, cells = DECODER_CHANNELS[preset], []
    for i, (c, depth, sr) in enumerate(
        zip(shape.widths, shape.depths, shape.reductions, strict=True)
    ):
        n = (side_px // (4 * 2**i)) ** 2
        cells.append(n)
        total += n * c * source * (49 if i == 0 else 9)
        shorter = n // sr**2
        attention = 2 * n * c * c + 2 * shorter * c * c + 2 * n * shorter * c
        attention += shorter * sr**2 * c * c if sr > 1 else 0
        total += depth * (attention + 2 * n * c * 4 * c + n * 4 * c * 9)
        source = c
    if decoder_as_published:
        total += sum(n * c * channels for n, c in zip(cells, shape.widths, strict=True))
        total += cells[0] * 4 * channels**2
    else:
        total += sum(
            (n + channels) * c * channels for n, c in zip(cells, shape.widths, strict=True)
        )
        total += 4 * channels**2  # the biases
    return total + cells[0] * channels


@pytest.mark.parametrize("preset", PRESETS)
def test_multiply_adds_are_those_counted_by_hand(preset):
    with torch.device("meta"):
        model = segformer(preset)
    for side_px in (64, 512):
        found = multiply_adds_per_pixel(model, side_px) * side_px**2
        assert found == multiply_adds_by_hand(preset, side_px, decoder_as_published=False)


@pytest.mark.parametrize(
    ("preset", "side_px", "published"),
    [
        ("b0", 512, 8.4),
        ("b1", 512, 15.9),
        ("b2", 512, 62.4),
        ("b3", 512, 79.0),
        ("b4", 512, 95.7),
        ("b5", 640, 183.3),
    ],
)
def test_in_the_papers_order_it_costs_what_the_paper_says(preset, side_px, published):
    """Its table of ADE20K, 150 classes, in 10^9 multiply-adds (called Flops there)."""
    classes = 149 * (side_px // 4) ** 2 * DECODER_CHANNELS[preset]
    total = multiply_adds_by_hand(preset, side_px, decoder_as_published=True) + classes
    assert total / 1e9 == pytest.approx(published, rel=0.02)
