"""From thumbnails to probabilities: tiles are the whole, batches are one at a time, fast is the same."""

import numpy as np
import pytest
import torch

from pathfm.runtime import PathfmError
from pathfm.segmentation import predict
from pathfm.segmentation.models import build_model
from pathfm.segmentation.predict import ready, tissue_probabilities, tissue_probability
from tests.conftest import noise

U_NETS = ("unet", "unet_stem4")


def _trained_like(name: str) -> torch.nn.Module:
    """A network whose batch norms have seen something, so that folding them has work to do."""
    model = build_model(name)
    with torch.no_grad():
        for seed in range(2):
            model.train()(
                torch.from_numpy(noise((96, 64, 3), seed).copy()).permute(2, 0, 1)[None] / 255
            )
    return model.eval()


@pytest.mark.parametrize("name", U_NETS)
def test_one_picture_gives_what_the_network_says_of_it(name):
    picture = noise((70, 101, 3))
    model = _trained_like(name)
    got = tissue_probability(model, picture)
    with torch.inference_mode():
        rgb = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None] / 255
        wide = torch.nn.functional.pad(rgb, (0, 27, 0, 58), mode="replicate")
        wanted = torch.sigmoid(model(wide))[0, :70, :101].numpy()
    assert got.shape == (70, 101)
    assert got.dtype == np.float32
    assert np.abs(got - wanted).max() < 1e-5
    assert got.std() > 0.001


@pytest.mark.parametrize("name", U_NETS)
def test_no_output_depends_on_pixels_further_than_the_margin(name):
    # NaN spreads along every path there is, whatever the weights
    side = 2 * (predict.MARGIN_PX + 64)
    model = ready(build_model(name))
    reach = []
    for phase in (0, 7, 12, 20, 31):
        x = torch.zeros(1, 3, side, 64)
        x[0, :, side // 2 + phase, :] = torch.nan
        with torch.inference_mode():
            touched = torch.isnan(model(x))[0].any(dim=1).nonzero()[:, 0]
        reach += [side // 2 + phase - int(touched.min()), int(touched.max()) - side // 2 - phase]
    assert 200 < max(reach) <= predict.MARGIN_PX
    assert predict.MARGIN_PX % predict.PADDED_TO_PX == 0


@pytest.mark.parametrize("name", U_NETS)
def test_tiles_equal_the_whole(name, monkeypatch):
    model = ready(_trained_like(name))
    picture = noise((1100, 1000, 3), seed=3)
    whole = tissue_probability(model, picture)
    monkeypatch.setattr(predict, "MOST_AT_ONCE_PX", 900 * 900)
    monkeypatch.setattr(predict, "_TILE_PX", 960)
    assert len(list(predict._parts(1152))) == 3
    tiled = tissue_probability(model, picture)
    assert np.abs(tiled - whole).max() < 1e-5
    monkeypatch.setattr(predict, "MARGIN_PX", 64)  # too little is seen: the test can fail
    assert np.abs(tissue_probability(model, picture) - whole).max() > 1e-4


@pytest.mark.parametrize("name", [*U_NETS, "segformer_b0"])
def test_several_at_once_equal_one_at_a_time(name, monkeypatch):
    shapes = [(60, 90), (64, 70), (1, 1), (33, 128), (130, 65), (64, 128)]
    pictures = [noise((*shape, 3), seed) for seed, shape in enumerate(shapes)]
    model = ready(_trained_like(name))
    batches = []
    forward = predict._forward

    def counted(model, batch, device):
        batches.append(len(batch))
        return forward(model, batch, device)

    monkeypatch.setattr(predict, "_forward", counted)
    together = tissue_probabilities(model, pictures)
    assert sorted(batches) == [1, 1, 4]
    for shape, picture, got in zip(shapes, pictures, together, strict=True):
        assert got.shape == shape
        assert np.abs(got - tissue_probability(model, picture)).max() < 1e-5
    monkeypatch.setattr(predict, "MOST_AT_ONCE_PX", 2 * 64 * 128)
    batches.clear()
    tissue_probabilities(model, pictures)
    assert max(batches) == 2
    assert tissue_probabilities(model, []) == []


@pytest.mark.parametrize("name", [*U_NETS, "segformer_b0"])
def test_a_ready_model_says_the_same_and_leaves_the_given_one_alone(name):
    model = _trained_like(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    quick = ready(model)
    picture = noise((128, 90, 3), seed=5)
    assert model.training
    assert not any(layer.training for layer in quick.modules())
    difference = tissue_probability(quick, picture) - tissue_probability(model.eval(), picture)
    assert np.abs(difference).max() < 1e-5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if name in U_NETS:
        assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in quick.modules())


@pytest.mark.parametrize("name", U_NETS)
def test_bf16_moves_probabilities_a_little(name):
    model = _trained_like(name)
    picture = noise((128, 90, 3), seed=6)
    exact = tissue_probability(ready(model), picture)
    rough = tissue_probability(ready(model, precision="bf16"), picture)
    assert rough.dtype == np.float32
    assert 0 < np.abs(rough - exact).max() < 0.03


def test_a_read_only_picture_that_is_a_view_is_fine():
    picture = noise((64, 80, 3))[::-1, ::2]
    picture.setflags(write=False)
    model = ready(build_model("unet"))
    assert np.array_equal(
        tissue_probability(model, picture), tissue_probability(model, picture.copy())
    )


def test_a_model_of_several_classes_is_refused():
    with pytest.raises(PathfmError, match="one class"):
        tissue_probability(build_model("unet", classes=3), noise((8, 8, 3)))
