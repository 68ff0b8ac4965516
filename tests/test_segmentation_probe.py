"""Heads on patch tokens, their Dice and their protocol, each against something that knows otherwise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pathfm.backbone import load_backbone
from pathfm.heads.fit import shuffled
from pathfm.models.loading import of_backbone
from pathfm.models.maps import embed_maps, token_maps
from pathfm.probing.parts import Parts
from pathfm.runtime import PathfmError
from pathfm.segmentation_probe.decoders import HeadName, TokenHead, make_head, parameters_of
from pathfm.segmentation_probe.fit import (
    MaskedMaps,
    SegmentationProtocol,
    fit_run,
    predict,
)
from pathfm.segmentation_probe.scores import dice_table, eva_dice_loss

CLASSES = ("background", "one", "two")
HEADS: tuple[HeadName, ...] = ("conv", "mlp", "linear")


def some_pictures(n: int = 24, noise: float = 0.3) -> MaskedMaps:
    """Masks of 16 x 24 px in cells of 4, and maps (6 channels) whose first three tell the cell's class."""
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 3, (n, 4, 6))
    maps = rng.normal(size=(n, 6, 4, 6)).astype(np.float32) * noise
    maps[:, :3] += np.eye(3, dtype=np.float32)[cells].transpose(0, 3, 1, 2)
    return MaskedMaps([maps], np.kron(cells, np.ones((4, 4), np.int64)), CLASSES)


def thirds(n: int) -> Parts:
    return Parts(np.arange(n // 3), np.arange(n // 3, 2 * n // 3), np.arange(2 * n // 3, n))


# --- heads ----------------------------------------------------------------------------------------


def test_the_conv_head_is_two_convolutions_written_as_loops() -> None:
    head = TokenHead("conv", (2,), 2).double()
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64)
    w = {k: v.detach().numpy() for k, v in head.layers.state_dict().items()}

    def convolved(picture: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        c, h, wide = picture.shape
        padded = np.zeros((c, h + 2, wide + 2))
        padded[:, 1:-1, 1:-1] = picture
        out = np.zeros((len(weight), h, wide))
        for o in range(len(weight)):
            for i in range(h):
                for j in range(wide):
                    out[o, i, j] = (padded[:, i : i + 3, j : j + 3] * weight[o]).sum() + bias[o]
        return out

    once = convolved(x.numpy()[0].repeat(2, 1).repeat(2, 2), w["1.weight"], w["1.bias"])
    logits = convolved(once.repeat(2, 1).repeat(2, 2), w["3.weight"], w["3.bias"])
    assert np.allclose(head([x], (8, 12)).detach().numpy()[0], logits, rtol=0, atol=1e-12)


def test_the_linear_head_is_one_matrix_a_token_then_bilinear() -> None:
    import scipy.ndimage

    head = TokenHead("linear", (5,), 3).double()
    x = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    weight, bias = (p.detach().numpy() for p in head.layers.parameters())
    tokens = np.einsum("oc,bchw->bohw", weight[:, :, 0, 0], x.numpy()) + bias[:, None, None]
    found = head([x], (12, 18)).detach().numpy()
    rows = (np.arange(12) + 0.5) / 3 - 0.5  # half-pixel centres
    columns = (np.arange(18) + 0.5) / 3 - 0.5
    at = np.stack(np.meshgrid(rows, columns, indexing="ij"))
    for b in range(2):
        for o in range(3):
            wanted = scipy.ndimage.map_coordinates(tokens[b, o], at, order=1, mode="nearest")
            assert np.allclose(found[b, o], wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_takes_maps_of_several_layers_and_answers_at_the_picture_s_size(
    name: HeadName,
) -> None:
    head = make_head(name, (6, 3), 4, seed=0, run=0)
    maps = [torch.randn(2, 6, 5, 7), torch.randn(2, 3, 3, 4)]
    assert head(maps, (33, 51)).shape == (2, 4, 33, 51)
    again = make_head(name, (6, 3), 4, seed=0, run=0)
    other = make_head(name, (6, 3), 4, seed=0, run=1)
    flat = [torch.cat([p.flatten() for p in h.parameters()]) for h in (head, again, other)]
    assert torch.equal(flat[0], flat[1])
    assert not torch.equal(flat[0], flat[2])
    with pytest.raises(PathfmError, match=r"a head on maps of \[6, 3\] channels"):
        head(maps[:1], (33, 51))


def test_heads_count_what_they_learn() -> None:
    assert parameters_of(TokenHead("linear", (192,), 5)) == 192 * 5 + 5
    assert parameters_of(TokenHead("conv", (192,), 5)) == 192 * 9 * 64 + 64 + 64 * 9 * 5 + 5
    with pytest.raises(PathfmError, match="no head 'unet'"):
        TokenHead("unet", (192,), 5)  # type: ignore[arg-type]
    with pytest.raises(PathfmError, match="1 classes and 1 maps"):
        TokenHead("conv", (192,), 1)


# --- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
def test_maps_are_the_patch_tokens_of_the_last_blocks_in_rows(norm: bool) -> None:
    backbone = load_backbone(
        "vit_tiny_patch16_224", "random", embed_dim=24, depth=2, num_heads=2
    ).eval()
    x = torch.randn(2, 3, 32, 48)
    network = backbone.network
    seen: list[torch.Tensor] = []
    hooks = [b.register_forward_hook(lambda *a: seen.append(a[2])) for b in network.blocks]  # type: ignore[union-attr, arg-type]
    with torch.inference_mode():
        network.forward_features(x)  # type: ignore[operator]
    for hook in hooks:
        hook.remove()
    found = token_maps(of_backbone(backbone), x, last=2, norm=norm)
    assert [m.shape for m in found] == [(2, 24, 2, 3)] * 2
    for given, m in zip(seen, found, strict=True):
        with torch.inference_mode():
            tokens = network.norm(given) if norm else given  # type: ignore[operator]
        for row in range(2):
            for column in range(3):
                wanted = tokens[:, 1 + 3 * row + column]
                assert torch.allclose(m[:, :, row, column], wanted, atol=1e-6)


def test_maps_are_those_of_timm_s_feature_extractor_which_eva_uses() -> None:
    import timm

    backbone = load_backbone("vit_tiny_patch16_224", "random", embed_dim=24, depth=2, num_heads=2)
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        features_only=True,
        out_indices=1,
        embed_dim=24,
        depth=2,
        num_heads=2,
        dynamic_img_size=True,
    ).eval()
    state = {f"model.{k}": v for k, v in backbone.network.state_dict().items()}
    missing, _ = theirs.load_state_dict(state, strict=False)
    assert missing == []
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    mean, std = (np.array(v, np.float32) for v in (backbone.mean, backbone.std))
    x = torch.from_numpy((pixels / np.float32(255) - mean) / std).permute(0, 3, 1, 2)
    with torch.inference_mode():
        (wanted,) = theirs(x)
    (found,) = embed_maps(of_backbone(backbone), [pixels[:2], pixels[2:]], torch.device("cpu"))
    assert np.allclose(found, wanted.numpy(), atol=1e-5)


def test_an_input_of_no_whole_patches_and_too_many_blocks_are_refused() -> None:
    backbone = load_backbone("vit_tiny_patch16_224", "random", embed_dim=24, depth=2, num_heads=2)
    model = of_backbone(backbone)
    with pytest.raises(PathfmError, match="input_px = 40 is no multiple"):
        token_maps(model, torch.zeros(1, 3, 40, 32))
    with pytest.raises(PathfmError, match=r"last_blocks = 3: .* has 2 blocks"):
        token_maps(model, torch.zeros(1, 3, 32, 32), last=3)


# --- dice -----------------------------------------------------------------------------------------


def test_dice_worked_out_by_hand() -> None:
    truth = np.array([[[0, 1, 1], [2, 2, 2]], [[0, 0, 0], [0, 0, 1]], [[0, 0, 0], [0, 0, 0]]])
    predicted = np.array([[[0, 1, 0], [2, 2, 1]], [[0, 0, 2], [0, 0, 1]], [[0, 0, 0], [0, 0, 1]]])
    table = dice_table(predicted, truth, CLASSES)
    nan = np.nan
    assert np.allclose(
        table.values,
        [[2 / 3, 2 / 4, 4 / 5], [8 / 9, 1, nan], [10 / 11, nan, nan]],
        equal_nan=True,
    )
    assert np.allclose(table.pictures, [0.65, 1, nan], equal_nan=True)
    assert table.mean == pytest.approx(0.825)
    assert table.per_class["one"] == pytest.approx(0.75)
    assert table.per_class["background"] == pytest.approx((2 / 3 + 8 / 9 + 10 / 11) / 3)


@pytest.mark.slow
def test_dice_is_monai_s() -> None:
    from monai.metrics.meandice import DiceMetric

    rng = np.random.default_rng(2)
    truth, predicted = rng.integers(0, 3, (2, 9, 10, 12))
    truth[3][truth[3] == 2] = 0
    truth[5] = 0
    table = dice_table(predicted, truth, CLASSES)
    hot = [
        torch.nn.functional.one_hot(torch.from_numpy(v), 3).movedim(-1, 1)
        for v in (predicted, truth)
    ]
    assert table.mean == pytest.approx(
        float(_aggregated(DiceMetric(include_background=False, reduction="mean"), hot)), abs=1e-6
    )
    metric = DiceMetric(include_background=True, reduction="none")
    assert np.allclose(table.values, _aggregated(metric, hot).numpy(), atol=1e-6, equal_nan=True)


def _aggregated(metric: object, hot: list[torch.Tensor]) -> torch.Tensor:
    metric(*hot)  # type: ignore[operator]
    found: torch.Tensor = metric.aggregate()  # type: ignore[attr-defined]
    return found


def test_ignored_pixels_take_no_part_whatever_is_predicted_there() -> None:
    rng = np.random.default_rng(3)
    truth, predicted = rng.integers(0, 3, (2, 4, 10, 12))
    truth[:, :5] = 255
    other = predicted.copy()
    other[:, :5] = (other[:, :5] + 1) % 3
    a, b = (dice_table(p, truth, CLASSES, ignore=255) for p in (predicted, other))
    alone = dice_table(predicted[:, 5:], truth[:, 5:], CLASSES)
    assert np.array_equal(a.values, b.values)
    assert np.array_equal(a.values, alone.values)
    as_eva = dice_table(predicted, truth, CLASSES, ignore=255, eva_ignore=True)
    assert as_eva.mean < a.mean


def test_wrong_masks_are_refused() -> None:
    zeros = np.zeros((2, 4, 4), np.int64)
    with pytest.raises(PathfmError, match=r"masks \(2, 4, 4\) and truth \(2, 4, 5\)"):
        dice_table(zeros, np.zeros((2, 4, 5), np.int64), CLASSES)
    with pytest.raises(PathfmError, match="a truth has values 0 to 7 for 3 classes"):
        dice_table(zeros, zeros + np.array([0, 7])[:, None, None], CLASSES)
    with pytest.raises(PathfmError, match="masks hold 9, which is none of 3 classes"):
        MaskedMaps([np.zeros((2, 3, 1, 1))], zeros + 9, CLASSES)
    with pytest.raises(PathfmError, match="of as many pictures"):
        MaskedMaps([np.zeros((3, 3, 1, 1))], zeros, CLASSES)
    assert np.isnan(dice_table(zeros, zeros, CLASSES).mean)  # background alone


def test_the_loss_is_the_formula_in_float64() -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(3, 4, 5, 6))
    truth = rng.integers(0, 4, (3, 5, 6))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    losses = []
    for c in range(4):
        inside, total = 0.0, 0.0
        for b in range(3):
            for i in range(5):
                for j in range(6):
                    inside += p[b, c, i, j] * (truth[b, i, j] == c)
                    total += p[b, c, i, j] + (truth[b, i, j] == c)
        losses.append(1 - (2 * inside + 1e-5) / (total + 1e-5))
    found = eva_dice_loss(torch.from_numpy(logits), torch.from_numpy(truth))
    assert float(found) == pytest.approx(np.mean(losses), abs=1e-6)


# --- the protocol ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_every_head_learns_what_tokens_tell(name: HeadName) -> None:
    data = some_pictures()
    protocol = SegmentationProtocol(head=name, batch=4, steps=40, lr=0.02)
    found = fit_run(data, thirds(24), protocol)
    assert found.test is not None
    assert found.test.mean > 0.75
    assert found.losses[-1] < found.losses[0]


def test_a_run_is_a_function_of_its_seed_and_number_and_test_has_no_say() -> None:
    data = some_pictures()
    parts = thirds(24)
    protocol = SegmentationProtocol(batch=4, steps=6)
    one = fit_run(data, parts, protocol, seed=5)
    masks = data.masks.copy()
    masks[parts.test] = (masks[parts.test] + 1) % 3
    lied = fit_run(MaskedMaps(data.maps, masks, CLASSES), parts, protocol, seed=5)
    assert one.losses == lied.losses
    assert one.val.mean == lied.val.mean
    assert fit_run(data, parts, protocol, seed=5, run=1).losses != one.losses
    assert not np.array_equal(
        shuffled(np.arange(50), 0, 0, 0, 408, 20), shuffled(np.arange(50), 0, 0, 1, 408, 20)
    )


def test_a_last_epoch_cut_short_is_not_judged_and_patience_ends_a_run() -> None:
    data, parts = some_pictures(noise=0.0), thirds(24)
    whole = fit_run(data, parts, SegmentationProtocol(batch=4, steps=4))
    cut = fit_run(data, parts, SegmentationProtocol(batch=4, steps=5))
    assert len(cut.losses) == 5
    assert np.array_equal(whole.val.values, cut.val.values, equal_nan=True)
    slow = SegmentationProtocol(batch=4, steps=400, lr=1e-12, patience_epochs=3)
    stuck = fit_run(data, parts, slow)
    assert (stuck.best_epoch, stuck.epochs) == (0, 4)


def test_a_rate_that_is_too_high_and_no_steps_are_refused() -> None:
    data, parts = some_pictures(), thirds(24)
    with pytest.raises(PathfmError, match="the loss is nan"):
        fit_run(data, parts, SegmentationProtocol(batch=4, steps=9, lr=1e30))
    with pytest.raises(PathfmError, match="steps = 0"):
        SegmentationProtocol(steps=0)


def test_predictions_are_classes_at_the_masks_size_whatever_the_batch() -> None:
    data = some_pictures()
    head = make_head("conv", data.widths, 3, 0, 0)
    rows = np.arange(7)
    one, other = (predict(head, data, rows, batch=b) for b in (3, 64))
    assert one.shape == (7, 16, 24)
    assert one.dtype == np.uint8
    assert np.array_equal(one, other)
