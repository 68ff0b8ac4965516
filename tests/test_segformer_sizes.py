"""SegFormer on pictures of any size, with and without positions, and its keyed drops."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pathfm.erf import fields
from pathfm.runtime import PathfmError
from pathfm.segmentation import augment, crops
from pathfm.segmentation.models import build_model
from pathfm.segmentation.segformer import (
    PRESETS,
    KeyedDrop,
    MixTransformer,
    key_drops,
    keyed,
    segformer,
)
from tests.test_segformer import randomised


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (3, 5), (31, 33), (97, 250)])
def test_any_size_in_the_same_size_out(size):
    model = build_model("segformer_b0", classes=2).eval()
    with torch.inference_mode():
        logits = model(torch.rand(2, 3, *size))
    assert logits.shape == (2, 2, *size)
    assert logits.isfinite().all()


def test_a_picture_cut_to_an_odd_size_keeps_its_squares_where_they_were():
    """Upsampling by size instead of by 4 would shift the far edge by up to 3 pixels."""
    model = segformer("b0").eval()
    logits = torch.arange(13.0).expand(1, 1, 10, 13)
    model.quarter_logits = lambda rgb: logits  # type: ignore[method-assign]
    whole, cut = model(torch.zeros(1, 3, 40, 52)), model(torch.zeros(1, 3, 37, 49))
    assert torch.equal(cut, whole[:, :37, :49])
    assert cut[0, 0, 1:3].tolist() == [0, 0.125]  # halfway between squares 0 and 1 lies 3.5 | 4.5


def test_autocast_leaves_the_logits_close():
    model = build_model("segformer_b0").eval()
    rgb = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        low = model(rgb)
    with torch.inference_mode():
        full = model(rgb)
    assert (low.float() - full).abs().max() < 0.05 * full.abs().max()


SMALL = replace(PRESETS["b0"], widths=(8, 8, 10, 16), depths=(1, 1, 1, 1))


def test_position_embeddings_of_zero_are_none_and_others_move_with_the_size():
    generator = torch.Generator().manual_seed(6)
    with_them = randomised(MixTransformer(replace(SMALL, positional="embedding", embedding_px=64)))
    without = MixTransformer(replace(SMALL, positional="none"))
    state = {k: v for k, v in with_them.state_dict().items() if "embedding" not in k}
    without.load_state_dict(state, strict=True)
    assert not any("mix" in name for name in state)
    rgb = torch.randn(1, 3, 96, 80, generator=generator)
    grids = [stage.embedding for stage in with_them.stages]
    assert [g.shape[-1] for g in grids] == [16, 8, 4, 2]
    moved = with_them(rgb)[3]
    assert (moved - without(rgb)[3]).abs().max() > 0.01
    with torch.no_grad():
        for grid in grids:
            grid.zero_()
    for a, b in zip(with_them(rgb), without(rgb), strict=True):
        assert torch.equal(a, b)


def test_interpolated_positions_keep_a_constant_and_a_ramp():
    from pathfm.segmentation.segformer.mit import _resized

    assert torch.allclose(_resized(torch.full((1, 2, 5, 5), 3.0), 11, 4), torch.tensor(3.0))
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    inner = _resized(ramp, 16, 16)[0, 0, 5, 5:11]
    assert torch.allclose(inner, torch.arange(5, 11) / 2 - 0.25, atol=1e-5)
    assert _resized(ramp, 8, 8) is ramp


def test_without_position_or_mixing_a_stage_s_blocks_know_no_order():
    """Permuted pixels give permuted outputs, unless the Mix-FFN's convolution says where they were."""
    order = torch.randperm(24, generator=torch.Generator().manual_seed(8))
    tokens = torch.randn(1, 24, 8, generator=torch.Generator().manual_seed(9))
    for mixes, wanted in ((False, True), (True, False)):
        from pathfm.segmentation.segformer.mit import Block

        block = randomised(Block(8, 2, 1, 0.0, mixes))
        same = torch.allclose(
            block(tokens, 4, 6)[:, order], block(tokens[:, order], 4, 6), atol=1e-5
        )
        assert same == wanted


def test_drops_follow_from_seed_sample_and_layer_alone_and_keep_the_mean():
    model = nn.Sequential(KeyedDrop(0.3), KeyedDrop(0.3), KeyedDrop(0.25, channels=40)).train()
    before = torch.get_rng_state()
    x = torch.ones(400, 40, 2)
    key_drops(model, 5, np.arange(400))
    paths, channels = model[0](x), model[2](x)
    assert set(paths[:, 0, 0].tolist()) == {0.0, float(torch.tensor(1 / 0.7))}
    assert (paths == paths[:, :1, :1]).all()
    assert (channels == channels[:, :, :1]).all()
    assert paths.mean() == pytest.approx(1, abs=0.1)
    assert channels.mean() == pytest.approx(1, abs=0.02)
    assert not torch.equal(paths, model[1](x))  # layers differ
    key_drops(model, 5, [390, 17])
    assert torch.equal(model[0](x[:2]), paths[[390, 17]])
    key_drops(model, 6, np.arange(400))
    assert not torch.equal(model[0](x), paths)  # seeds differ
    assert torch.equal(torch.get_rng_state(), before)
    assert model.eval()(x) is x


def test_training_with_drops_trains_only_with_draws():
    model = segformer("b0", drop_path=0.5, dropout=0.1)
    with pytest.raises(
        PathfmError, match=r"needs draws for 2 samples, and has none: call key_drops"
    ):
        model(torch.zeros(2, 3, 32, 32))
    key_drops(model, 0, [3])
    with pytest.raises(PathfmError, match="for 2 samples, and has 1"):
        model(torch.zeros(2, 3, 32, 32))
    key_drops(model, 0, [3, 4])
    model(torch.zeros(2, 3, 32, 32)).sum().backward()
    rates = [m.rate for m in model.encoder.modules() if isinstance(m, KeyedDrop)]
    assert rates[::2] == pytest.approx([0.5 * k / 7 for k in range(8)])
    with pytest.raises(PathfmError, match=r"below 1, not 1\.0"):
        KeyedDrop(1.0)


def test_no_layer_draws_the_words_of_crops_augmentation_or_signs():
    """Equal streams of one seed would drop the same samples that are, say, turned."""
    layers = sum(isinstance(m, KeyedDrop) for m in segformer("b5").modules())
    taken = {crops._STREAM, crops._PASTE_STREAM, augment._STREAM, augment._NOISE_STREAM}
    taken |= {fields._SIGN_STREAM}
    assert len(taken) == 5
    assert not taken & set(range(keyed._STREAM, keyed._STREAM + layers))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"positional": "mixffn"}, "positional = 'mixffn': wants one of mix_ffn, embedding, none"),
        ({"depths": (2, 2, 2)}, "has 4 stages"),
        ({"heads": (3, 2, 5, 8)}, "no multiples of the heads"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, says):
    with pytest.raises(PathfmError, match=says):
        segformer("b0", **changes)


def test_a_preset_that_is_none_is_refused():
    with pytest.raises(PathfmError, match=r"no SegFormer 'b6'\. There are b0, b1"):
        segformer("b6")
