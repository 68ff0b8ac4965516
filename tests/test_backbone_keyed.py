"""Stochastic depth follows from (seed, draw, view, layer) and from nothing else."""

import copy
import functools
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from online_patching.philox import words
from pathfm.backbone import SampleKeys, load_backbone
from pathfm.backbone.create import create, key_drop_path
from pathfm.backbone.keyed import KeyedDropPath, keep_factors
from pathfm.runtime import PathfmError

NAME = "vit_tiny_patch16_224"
TINY = {"embed_dim": 24, "depth": 3, "num_heads": 2}
DRAWS = np.array([5, 2**40, 7], np.int64)


def tiny(drop_path=0.5, weights="random:1"):
    return load_backbone(NAME, weights, drop_path=drop_path, **TINY)


def pictures(n, side_px=32):
    return torch.randn(n, 3, side_px, side_px, generator=torch.Generator().manual_seed(0))


def test_a_branch_is_kept_where_its_own_philox_word_says_so():
    rates = [0.1, 0.5, 0.9]
    keys = SampleKeys.of_views(11, DRAWS, [0, 3])
    table = keep_factors(keys, rates)
    for row, (view, draw) in enumerate((v, d) for v in (0, 3) for d in DRAWS.tolist()):
        drawn = words(11, [draw], 0, (1 << 18) + view, len(rates))[0]
        for layer, rate in enumerate(rates):
            kept = int(drawn[layer]) / 2**32 >= rate
            assert table[layer, row] == np.float32(1 / (1 - rate) if kept else 0)


def test_the_draws_are_these_for_ever():
    """Committed values: a run that goes on elsewhere must drop what it would have dropped here."""
    kept = keep_factors(SampleKeys.of_views(3, np.arange(8), [0, 1]), [0.5, 0.5]) > 0
    assert ["".join(str(int(k)) for k in row) for row in kept] == GOLDEN


GOLDEN = ["1110000001001110", "1001000000101011"]


@pytest.mark.slow
def test_another_process_draws_the_same():
    code = (
        "import numpy as np; from pathfm.backbone.keyed import *;"
        "print(keep_factors(SampleKeys.of_views(3, np.arange(99), [0, 1]), [.2, .7]).tobytes().hex())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = keep_factors(SampleKeys.of_views(3, np.arange(99), [0, 1]), [0.2, 0.7])
    assert done.stdout.strip() == here.tobytes().hex()


def test_shares_are_the_rates_and_layers_views_and_draws_are_independent():
    n, rates = 20_000, [0.1, 0.3, 0.3]
    tables = [keep_factors(SampleKeys.of_views(1, np.arange(n), [view]), rates) for view in (0, 1)]
    for table in tables:
        for factors, rate in zip(table, rates, strict=True):
            sd = np.sqrt(rate * (1 - rate) / n)
            assert abs((factors == 0).mean() - rate) < 4 * sd
            assert abs(factors.mean() - 1) < 4 * sd / (1 - rate)  # the mean of a branch stays
    columns = np.concatenate([t > 0 for t in tables]).astype(float)
    columns = np.vstack([columns, np.roll(columns[:1], 1)])  # the draw before
    off = np.corrcoef(columns) - np.eye(len(columns))
    assert np.abs(off).max() < 4.5 / np.sqrt(n)


def test_rates_rise_linearly_from_nothing_in_the_first_block():
    blocks = tiny(0.3).network.blocks
    assert isinstance(blocks[0].drop_path1, nn.Identity)
    rates = [[b.drop_path1.rate, b.drop_path2.rate] for b in list(blocks)[1:]]
    np.testing.assert_allclose(rates, [[0.15, 0.15], [0.3, 0.3]], rtol=1e-6)


def test_a_forward_pass_equals_the_blocks_written_out_with_their_factors():
    backbone = tiny().train()
    x, keys = pictures(6), SampleKeys.of_views(0, DRAWS, [0, 1])
    net = backbone.network
    rates = [0.25, 0.25, 0.5, 0.5]
    factors = [torch.from_numpy(f)[:, None, None] for f in keep_factors(keys, rates)]
    with torch.no_grad():
        y = net._pos_embed(net.patch_embed(x))
        for number, block in enumerate(net.blocks):
            one, two = ([1.0] * 2 + factors)[2 * number : 2 * number + 2]
            y = y + one * block.ls1(block.attn(block.norm1(y)))
            y = y + two * block.ls2(block.mlp(block.norm2(y)))
        torch.testing.assert_close(backbone.embed(x, keys), net.norm(y)[:, 0])
        cls, patches = backbone.tokens(x, keys)
    torch.testing.assert_close(cls, net.norm(y)[:, 0])
    torch.testing.assert_close(patches, net.norm(y)[:, 1:])
    assert any((f == 0).any() for f in factors)


def test_a_sample_is_dropped_alike_in_any_batch():
    backbone = tiny().train()
    x, keys = pictures(6), SampleKeys.of_views(0, DRAWS, [0, 1])
    with torch.no_grad():
        whole = backbone.embed(x, keys)
        order = [4, 0, 5]
        some = SampleKeys(0, keys.draws[order], keys.views[order])
        torch.testing.assert_close(backbone.embed(x[order], some), whole[order])
        other = backbone.embed(x, SampleKeys.of_views(1, DRAWS, [0, 1]))
    assert not torch.equal(other, whole)


def test_nothing_is_dropped_in_eval_mode_or_without_keys():
    backbone, plain = tiny(0.9), tiny(0.0)
    x, keys = pictures(3), SampleKeys.of_views(0, DRAWS, [0])
    with torch.no_grad():
        wanted = plain.embed(x)
        assert torch.equal(backbone.eval().embed(x, keys), wanted)
        backbone.train()
        assert not torch.equal(backbone.embed(x, keys), wanted)
        assert torch.equal(backbone.embed(x), wanted)  # the draws before are gone


@pytest.mark.parametrize("name", [NAME, "convnext_atto", "resnet18"])
def test_no_forward_pass_touches_torchs_generator(name):
    architecture = TINY if name == NAME else {}
    backbone = load_backbone(name, "random", drop_path=0.4, **architecture).train()
    before = torch.get_rng_state()
    backbone.tokens(pictures(3), SampleKeys.of_views(0, DRAWS, [0]))
    assert torch.equal(torch.get_rng_state(), before)
    kinds = {type(module).__name__ for module in backbone.modules()}
    assert "DropPath" not in kinds
    assert "KeyedDropPath" in kinds


def test_rates_of_a_conv_net_are_timms_own():
    theirs = timm.create_model("convnext_atto", drop_path_rate=0.2)
    rates = [m.drop_prob for m in theirs.modules() if type(m).__name__ == "DropPath"]
    ours = load_backbone("convnext_atto", "random", drop_path=0.2)
    assert [m.rate for m in ours.modules() if isinstance(m, KeyedDropPath)] == rates


def test_names_and_tensors_do_not_depend_on_the_rate():
    assert tiny(0.0).digest == tiny(0.4).digest
    assert list(tiny(0.0).state_dict()) == list(tiny(0.4).state_dict())


def test_a_copy_has_layers_of_its_own():
    backbone = tiny().train()
    teacher = copy.deepcopy(backbone)
    with torch.no_grad():
        dropped = backbone.embed(pictures(3), SampleKeys.of_views(0, DRAWS, [0]))
        plain = teacher.embed(pictures(3))
        again = backbone.network(pictures(3))  # as it was keyed last
    assert torch.equal(again, dropped)
    assert not torch.equal(plain, dropped)


@pytest.mark.parametrize("option", ["drop_rate", "attn_drop_rate", "proj_drop_rate"])
def test_a_dropout_that_is_not_keyed_is_refused(option):
    with pytest.raises(PathfmError, match=f"{option} = 0.1.*drop_path"):
        load_backbone(NAME, "random", **TINY, **{option: 0.1})


def test_a_dropout_the_architecture_brings_is_off(monkeypatch):
    brings = functools.partial(timm.create_model, drop_rate=0.5, proj_drop_rate=0.1)
    assert {m.p for m in brings(NAME, **TINY).modules() if isinstance(m, nn.Dropout)} >= {0.1, 0.5}
    monkeypatch.setattr(timm, "create_model", brings)
    ours = create(NAME, None, **TINY)
    assert {m.p for m in ours.modules() if isinstance(m, nn.Dropout)} == {0.0}


@pytest.mark.parametrize(
    ("make", "words_said"),
    [
        (lambda: tiny(1.0), "drop_path = 1.0"),
        (lambda: tiny(-0.1), "drop_path = -0.1"),
        (lambda: key_drop_path(nn.Identity(), "vgg11", 0.1), "vgg11"),
        (lambda: SampleKeys(0, DRAWS, np.array([0])), r"\(3,\) draws and \(1,\) views"),
        (lambda: SampleKeys.of_views(0, DRAWS, [4096]), "4096 have no random streams"),
        (
            lambda: tiny().train().embed(pictures(2), SampleKeys.of_views(0, DRAWS, [0])),
            "3 keys for a batch of 2",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make, words_said):
    with pytest.raises(PathfmError, match=words_said):
        make()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own tracing
def test_a_compiled_block_is_compiled_once_for_all_draws():
    backbone = tiny().train()
    eager = copy.deepcopy(backbone)
    counter = CompileCounter()
    for block in backbone.blocks:
        block.compile(backend=counter, fullgraph=True)
    counts = []
    for step in range(4):
        keys = SampleKeys.of_views(step, DRAWS, [0])
        torch.testing.assert_close(
            backbone.embed(pictures(3), keys), eager.embed(pictures(3), keys)
        )
        counts.append(counter.frame_count)
    assert counts[0] == counts[-1]
