"""The ways to make pixels agree: blocks of matrices, whole ones, compiled; any sizes, any precision."""

import numpy as np
import pytest
import torch

from pathfm.views.colour import finishing
from pathfm.views.dense import dense_views
from pathfm.views.params import ViewSpec, draw_views
from pathfm.views.resampling import Shape, axes
from tests.views import DRAWS, EVERYTHING, MIXED, some_patches, views_of


@pytest.fixture(scope="module")
def patches():
    return some_patches()


@pytest.mark.parametrize("engine", ["dense", pytest.param("compiled", marks=pytest.mark.slow)])
def test_engines_agree_up_to_rounding(patches, engine):
    banded = views_of(patches, DRAWS, MIXED)
    other = views_of(patches, DRAWS, MIXED, engine=engine)
    for one, two in zip(banded, other, strict=True):
        close = torch.isclose(one, two, atol=1e-5, rtol=0)
        # where a solarised value lies within rounding of 0.5, it may fall on either side
        assert ((one - 0.5).abs()[~close] < 1e-4).all()
        assert (~close).sum() <= 2


def test_dense_views_of_another_batch_differ_by_rounding_only(patches):
    specs = [EVERYTHING.model_copy(update={"solarize": 0.0}), ViewSpec(size_px=24, hed=0.1)]
    together = views_of(patches, DRAWS, specs, engine="dense")
    for row in range(8):
        alone = views_of(patches[row : row + 1], DRAWS[row : row + 1], specs, engine="dense")
        for view in range(2):
            # another batch size may pick another BLAS kernel (1/255 = 4e-3)
            torch.testing.assert_close(together[view][row], alone[view][0], atol=1e-5, rtol=0)


def test_autocast_does_not_reach_views(patches):
    """bf16 has eight bits: products in it would be off by up to half a grey level."""
    for engine in ("banded", "dense"):
        plain = views_of(patches, DRAWS, MIXED, engine=engine)
        with torch.autocast("cpu", torch.bfloat16):
            under = views_of(patches, DRAWS, MIXED, engine=engine)
        for one, two in zip(plain, under, strict=True):
            assert torch.equal(one, two)
            assert two.dtype == torch.float32
            assert not two.requires_grad


@pytest.mark.parametrize("patch_px", [8, 17, 64])
@pytest.mark.parametrize("size_px", [8, 33, 100])
def test_any_sizes_go_together_and_both_engines_agree(patch_px, size_px):
    """Also views larger than their patch, blurs wider than the view, sizes that blocks do not divide."""
    pixels = some_patches(96)[:, :patch_px, :patch_px].contiguous()
    spec = ViewSpec(size_px=size_px, scale=(0.3, 1.0), blur=0.7, blur_sigma_px=(0.5, 4.0))
    (one,) = views_of(pixels, DRAWS, [spec])
    (two,) = views_of(pixels, DRAWS, [spec], engine="dense")
    torch.testing.assert_close(one, two, atol=1e-5, rtol=0)
    assert torch.isfinite(one).all()


def test_dense_views_keep_every_tensor_on_the_device_of_the_patches():
    """A meta device refuses products with anything that was left on the CPU, as a GPU does."""
    spec = EVERYTHING.model_copy(update={"hed": 0.1, "interpolation": "bicubic"})
    drawn = draw_views(spec, 0, np.arange(16), 0, 64)
    assert (drawn.sigma_px > 0).any()
    patches = torch.empty(8, 64, 3, 64, device="meta")
    finish = finishing(drawn, (0.5,) * 3, (0.5,) * 3)
    views = dense_views(patches, *axes(drawn, Shape.of(spec), 64), finish)
    assert views.device.type == "meta"
    assert views.shape == (16, 3, 48, 48)
