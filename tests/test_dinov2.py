"""DINOv2: its step against the papers as loops in float64, however the batch is split."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightly.loss import DINOLoss, IBOTPatchLoss

from pathfm.backbone import load_backbone
from pathfm.methods import MicroBatch, build_method
from pathfm.methods.dinov2 import Hidden, hide, patch_cross_entropy, view_cross_entropy
from pathfm.methods.masks import block_masks
from pathfm.methods.settings import Dinov2Settings
from pathfm.runtime import PathfmError
from tests.distillation_loops import dinov2_step
from tests.rank_threads import run_ranks

SMALL = Dinov2Settings(out_dim=12, hidden_dim=16, bottleneck_dim=8, warmup_teacher_temp_steps=4)
SOFTMAX = {"centring": "softmax"}
SHARED = {"separate_ibot_head": False}
KDE = {"regulariser": "kde", "regulariser_weight": 0.3}
SIZES = {"vit_tiny_patch16_224": 16, "vit_small_patch14_reg4_dinov2": 14}


def settings(**changes):
    return Dinov2Settings(**(SMALL.model_dump() | changes))


def method(name="vit_tiny_patch16_224", drop_path=0.0, seed=0, depth=2, **changes):
    backbone = load_backbone(
        name, "random", embed_dim=24, depth=depth, num_heads=2, drop_path=drop_path
    )
    return build_method("dinov2", backbone, settings(**changes), steps=10, seed=seed)


def moved(made, seed=1):
    """The same method with a student and centres that are not those of the start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.student.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(0.2 * parameter.std().nan_to_num(0.1) * noise)
        for centre in made.centres.values():
            centre.center.add_(0.1 * torch.randn(centre.center.shape, generator=generator))
    return made


def pictures(patch_px=16, batch=4, n_local=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sides = [3, 3] + [2] * n_local
    return [
        torch.randn(batch, 3, patch_px * side, patch_px * side, generator=generator)
        for side in sides
    ]


def micros(crops, part=slice(None), count=1, step=1, seed=5):
    """The samples `part` of a batch in `count` micro-batches."""
    rows = np.array_split(np.arange(*part.indices(len(crops[0]))), count)
    return [
        MicroBatch([crop[r] for crop in crops], 2, 30 + r, None, seed, step, index, count)
        for index, r in enumerate(rows)
    ]


def take_step(made, parts):
    """This rank's loss, every gradient and what is told of a step, up to the optimizer."""
    step = parts[0].step
    for micro in parts:
        made.look(micro)
    made.settle(step)
    total = 0.0
    for micro in parts:
        loss = made(micro)
        loss.backward()
        total += float(loss.detach())
    made.before_update(step)
    return SimpleNamespace(
        loss=total,
        gradients={name: p.grad for name, p in made.named_parameters() if p.requires_grad},
        told={name: float(value) for name, value in made.diagnostics().items()},
        centres={name: centre.center.clone() for name, centre in made.centres.items()},
    )


def assert_same_step(got, want, rtol=1e-4):
    assert got.loss == pytest.approx(want.loss, rel=0.1 * rtol)
    assert got.told == pytest.approx(want.told, rel=rtol, abs=1e-5)
    largest = max(float(gradient.abs().max()) for gradient in want.gradients.values())
    for key, gradient in want.gradients.items():
        torch.testing.assert_close(
            got.gradients[key], gradient, rtol=rtol, atol=1e-6 * largest, msg=key
        )
    assert got.centres.keys() == want.centres.keys()
    for key, centre in want.centres.items():
        torch.testing.assert_close(got.centres[key], centre, rtol=1e-5, atol=1e-6)


def hidden_patches(crops, patch_px, given, draws, seed):
    """hidden[view][sample]: the numbers of the masked patches."""
    side = crops[0].shape[-1] // patch_px
    return [
        [
            np.flatnonzero(mask).tolist()
            for mask in block_masks(
                draws,
                (side, side),
                seed=seed,
                view=view,
                probability=given.mask_probability,
                ratio=given.mask_ratio,
            )
        ]
        for view in range(2)
    ]


CASES = {
    "sinkhorn koleo": ("vit_tiny_patch16_224", {}),
    "softmax koleo": ("vit_tiny_patch16_224", SOFTMAX),
    "sinkhorn kde shared": ("vit_tiny_patch16_224", SHARED | KDE),
    "softmax kde shared": ("vit_tiny_patch16_224", SOFTMAX | SHARED | KDE),
    "no regulariser": ("vit_tiny_patch16_224", {"regulariser_weight": 0.0, "ibot_weight": 0.7}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"ibot_out_dim": 9, "dino_weight": 2.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_masked_step_is_the_papers_in_float64(case):
    name, changes = CASES[case]
    made = moved(method(name, **changes)).double()
    crops = [crop.double() for crop in pictures(SIZES[name])]
    hidden = hidden_patches(crops, SIZES[name], made.settings, 30 + np.arange(4), 5)
    assert [] in hidden[0] + hidden[1], "some views are whole"
    assert len({len(h) for h in hidden[0] + hidden[1]}) > 2, "and shares differ"
    centres = [made.centres[n].center.tolist() for n in ("cls", "patches") if made.centres]
    temperature = 0.04 + (0.07 - 0.04) * 1 / 4
    want = dinov2_step(
        made.student, made.teacher, crops, 2, hidden, made.settings, temperature, centres
    )
    expected = torch.autograd.grad(
        want["loss"], [p for p in made.student.parameters() if p.requires_grad], allow_unused=True
    )
    got = take_step(made, micros(crops))
    assert got.loss == pytest.approx(float(want["loss"].detach()), rel=1e-7)
    for part in ("dino_loss", "ibot_loss", "regulariser"):
        if made.settings.regulariser_weight or part != "regulariser":
            assert got.told[part] == pytest.approx(float(want[part].detach()), rel=1e-7)
    largest = max(float(g.abs().max()) for g in expected)
    named = [pair for pair in made.student.named_parameters() if pair[1].requires_grad]
    for (key, parameter), gradient in zip(named, expected, strict=True):
        assert gradient is not None, key
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-6, atol=1e-8 * largest, msg=key
        )
    for centre, n, rows in zip(
        centres, made.centres, (want["t_cls"], want["t_patches"])[: len(centres)], strict=True
    ):
        means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        after = [0.9 * c + 0.1 * m for c, m in zip(centre, means, strict=True)]
        assert made.centres[n].center.tolist() == pytest.approx(after, rel=1e-9)


@pytest.mark.parametrize("case", ["sinkhorn koleo", "softmax kde shared"])
def test_fp32_gives_what_float64_gives(case):
    changes = CASES[case][1]
    wide = take_step(moved(method(**changes)).double(), micros([c.double() for c in pictures()]))
    narrow = take_step(moved(method(**changes)), micros(pictures()))
    wide.gradients = {name: g.float() for name, g in wide.gradients.items()}
    wide.centres = {name: c.float() for name, c in wide.centres.items()}
    assert_same_step(narrow, wide, rtol=1e-3)


@pytest.mark.parametrize(("world", "count"), [(1, 2), (1, 4), (2, 1), (2, 2)])
@pytest.mark.parametrize("changes", [{}, SOFTMAX | SHARED | KDE], ids=["sinkhorn", "softmax"])
def test_a_step_is_the_same_however_its_batch_is_split(changes, world, count, monkeypatch):
    crops, size = pictures(batch=8), 8 // world
    made = [moved(method(drop_path=0.3, **changes)) for _ in range(world + 1)]
    whole = take_step(made.pop(), micros(crops))
    parts = [micros(crops, slice(r * size, (r + 1) * size), count) for r in range(world)]
    if world == 1:
        assert_same_step(take_step(made[0], parts[0]), whole)
        return
    done = run_ranks(monkeypatch, world, lambda rank: take_step(made[rank], parts[rank]))
    assert done[0].told == pytest.approx(done[1].told)
    joined = SimpleNamespace(
        loss=sum(one.loss for one in done) / world,
        gradients={
            key: sum(one.gradients[key] for one in done) / world for key in done[0].gradients
        },
        told=done[0].told,
        centres=done[1].centres,
    )
    assert_same_step(joined, whole)


def test_without_joining_micro_batches_the_step_would_be_another():
    crops = pictures(batch=8)
    whole = take_step(moved(method()), micros(crops))
    alone = moved(method())
    parts = micros(crops, count=2)
    losses = [
        take_step(alone, [dataclasses.replace(part, index=0, count=1)]).loss for part in parts
    ]
    assert sum(losses) / 2 != pytest.approx(whole.loss, rel=1e-4)  # ten times the test's bound


def test_the_losses_on_targets_are_lightlys():
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    teacher, student = randn(2, 3, 12), randn(5, 3, 12)
    want = DINOLoss(output_dim=12)(list(teacher), list(student), teacher_temp=0.05)
    got = view_cross_entropy(torch.softmax(teacher / 0.05, -1), student, 0.1)
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    masks = torch.rand(6, 9, generator=generator) < 0.4
    masks[2] = False
    where, counts = masks.flatten().nonzero().flatten(), masks.sum(1)
    weights = torch.cat([torch.full((int(c),), 1.0 / int(c)) for c in counts if c])
    teacher, student = randn(len(where), 12), randn(len(where), 12)
    want = IBOTPatchLoss(output_dim=12)(teacher, student, masks.view(6, 3, 3), teacher_temp=0.05)
    hidden = Hidden(masks, where, weights)
    got = patch_cross_entropy(torch.softmax(teacher / 0.05, -1), student, hidden, 0.1)
    assert float(got) == pytest.approx(float(want), rel=1e-6)


def test_what_is_hidden_is_what_the_masks_say():
    made, micro = method(mask_probability=0.7), micros(pictures())[0]
    hidden = hide(micro, made.exported, made.settings)
    first, second = (
        block_masks(30 + np.arange(4), (3, 3), seed=5, view=view, probability=0.7)
        for view in range(2)
    )
    assert np.array_equal(hidden.masks.numpy(), np.concatenate([first, second]))
    patches = torch.arange(8 * 9).view(8, 9)
    assert torch.equal(patches.flatten()[hidden.where], patches[hidden.masks])
    for row, number in zip(hidden.weights.tolist(), hidden.where.tolist(), strict=True):
        assert row == pytest.approx(1 / int(hidden.masks[number // 9].sum()))


@pytest.mark.parametrize("changes", [{}, SHARED], ids=["separate", "shared"])
def test_without_any_masked_patch_every_parameter_still_has_a_gradient(changes):
    made = method(mask_probability=0.0, **changes)
    got = take_step(made, micros(pictures()))
    assert got.told["ibot_loss"] == got.told["masked_share"] == 0
    assert got.told["patch_teacher_entropy"] == 0
    assert all(g is not None and g.isfinite().all() for g in got.gradients.values())
    assert got.gradients["student.backbone.mask_token"].abs().sum() == 0
    if not changes:
        assert got.gradients["student.ibot_head.layers.0.weight"].abs().sum() == 0


def test_a_centre_stays_where_no_patch_is_masked():
    made = moved(method(mask_probability=0.0, **SOFTMAX))
    before = made.centres["patches"].center.clone()
    take_step(made, micros(pictures()))
    assert torch.equal(made.centres["patches"].center, before)


def test_student_and_teacher_are_equal_at_the_start_and_share_no_memory():
    made = method(**SOFTMAX)
    student, teacher = made.student.state_dict(), made.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert "backbone.mask_token" in student
    for name, tensor in student.items():
        assert torch.equal(tensor, teacher[name]), name
        assert tensor.data_ptr() != teacher[name].data_ptr(), name
    heads = [student[f"{head}.layers.0.weight"] for head in ("head", "ibot_head")]
    assert not torch.equal(*heads)


def test_the_teacher_sees_whole_views_without_stochastic_depth_and_gets_no_gradient():
    made, micro = method(drop_path=0.5, mask_probability=1.0), micros(pictures())[0]
    made.look(micro)
    with torch.no_grad():
        backbone = made.teacher["backbone"]
        cls = [made.teacher["head"](backbone.embed(crop)) for crop in micro.views[:2]]
    torch.testing.assert_close(made._seen[0].cls, torch.cat(cls))
    made.settle(1)
    made.loss(micro).backward()
    assert all(p.grad is None and not p.requires_grad for p in made.teacher.parameters())
    assert made.student["backbone"].mask_token.grad.abs().sum() > 0


def test_the_teacher_is_the_moving_average_by_hand():
    made = moved(method(ema=(0.5, 1.0)))
    made.steps = 3
    for step, momentum in enumerate((0.5, 0.75, 1.0)):
        before = {name: tensor.clone() for name, tensor in made.teacher.state_dict().items()}
        made.after_update(step)
        for name, student in made.student.state_dict().items():
            want = momentum * before[name] + (1 - momentum) * student
            torch.testing.assert_close(made.teacher.state_dict()[name], want, msg=name)
        moved(made, seed=step)


def test_prototypes_of_both_heads_stay_in_the_first_steps_only():
    for step, frozen in ((0, True), (1, False)):
        made = method(freeze_last_layer_steps=1)
        gradients = take_step(made, micros(pictures(), step=step)).gradients
        for head in ("head", "ibot_head"):
            assert (gradients[f"student.{head}.last_layer.weight_v"] is None) == frozen
            assert gradients[f"student.{head}.layers.0.weight"] is not None


def test_the_patch_embedding_is_frozen_when_asked():
    made = method(freeze_patch_embed=True)
    gradients = take_step(made, micros(pictures())).gradients
    assert not any("patch_embed" in name for name in gradients)
    assert "student.backbone.mask_token" in gradients


def mean_cosine(made, micro):
    """Of the student's global CLS tokens within a view."""
    with torch.no_grad():
        cls, _ = made._student_global(micro, hide(micro, made.exported, made.settings))
    cls = torch.nn.functional.normalize(cls.view(2, len(micro), -1), dim=-1)
    cosines = cls @ cls.transpose(1, 2)
    n = len(micro)
    return float((cosines.sum() - 2 * n) / (2 * n * (n - 1)))


@pytest.mark.parametrize("regulariser", ["koleo", "kde"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_step_on_the_regulariser_alone_moves_embeddings_apart(regulariser, count):
    made = method(
        regulariser=regulariser, regulariser_weight=1.0, dino_weight=1e-12, ibot_weight=1e-12
    )
    crops = pictures(batch=8)
    before = mean_cosine(made, micros(crops)[0])
    gradients = take_step(made, micros(crops, count=count)).gradients
    length = torch.stack([g.norm() for g in gradients.values()]).norm()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name in gradients:
                parameter.sub_(0.02 * gradients[name] / length)
    assert mean_cosine(made, micros(crops)[0]) < before - 1e-4


def test_losses_are_fp32_under_bf16_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made, parts = method(**SOFTMAX), micros(pictures(), count=2)
        for micro in parts:
            made.look(micro)
        assert made._seen[0].cls.dtype == torch.bfloat16
        made.settle(1)
        assert made._seen[0].cls.dtype == made._seen[0].patches.dtype == torch.float32
        losses = [made.loss(micro) for micro in parts]
    for loss in losses:
        assert loss.dtype == torch.float32
        loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in made.student.parameters() if p.requires_grad)
    made.before_update(1)
    assert all(value.dtype == torch.float32 for value in made.diagnostics().values())
    assert made.centres["cls"].center.dtype == torch.float32
    want = take_step(method(**SOFTMAX), micros(pictures()))
    assert sum(float(loss.detach()) for loss in losses) == pytest.approx(want.loss, rel=0.05)


@pytest.mark.parametrize("changes", [{}, SOFTMAX], ids=["sinkhorn", "softmax"])
def test_a_teacher_that_says_the_same_of_all_has_no_information(changes):
    healthy = take_step(method(**changes), micros(pictures())).told
    dead = method(**changes)
    with torch.no_grad():
        for name in ("head", "ibot_head"):
            last = dead.teacher[name].layers[-1]
            last.weight.zero_()
            last.bias.copy_(torch.linspace(-1, 1, len(last.bias)))
    told = take_step(dead, micros(pictures())).told
    for name in ("teacher", "patch_teacher"):
        assert healthy[f"{name}_information"] > 5e-5
        assert told[f"{name}_information"] == pytest.approx(0, abs=1e-5)
    if not changes:  # Sinkhorn makes equal rows uniform: neither entropy alone would tell
        assert told["teacher_entropy"] == pytest.approx(math.log(12), rel=1e-5)
        assert told["teacher_marginal_entropy"] == pytest.approx(math.log(12), rel=1e-5)


def test_what_is_told_is_what_happened():
    made = method(**SOFTMAX)
    micro = micros(pictures())[0]
    told = take_step(made, [micro]).told
    hidden = hide(micro, made.exported, made.settings)
    assert told["masked_share"] == pytest.approx(float(hidden.masks.float().mean()))
    loss = told["dino_loss"] + told["ibot_loss"] + 0.1 * told["regulariser"]
    assert take_step(method(**SOFTMAX), [micro]).loss == pytest.approx(loss, rel=1e-6)
    assert told["centre_norm"] == told["patch_centre_norm"] == 0  # as the losses saw it


def test_the_state_brings_everything_back():
    made = moved(method(**SOFTMAX))
    take_step(made, micros(pictures()))
    made.after_update(1)
    state = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    other = method(seed=9, **SOFTMAX)
    other.load_state_dict(state)
    made.zero_grad(set_to_none=True)
    first, again = (take_step(m, micros(pictures(seed=3), step=2)) for m in (made, other))
    assert first.loss == again.loss
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, again.gradients[name]), name


def test_what_is_exported_knows_no_mask_token():
    made = method()
    assert made.exported is made.teacher["backbone"]
    assert not any("mask" in name for name in made.exported.network.state_dict())


def test_a_convnet_is_refused():
    backbone = load_backbone("resnet10t", "random")
    with pytest.raises(PathfmError, match="vision transformer"):
        build_method("dinov2", backbone, SMALL, steps=1, seed=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mask_ratio": (0.5, 0.1)}, "low <= high"),
        ({"mask_ratio": (0.0, 0.1)}, "low <= high"),
        ({"ibot_out_dim": 9, "separate_ibot_head": False}, "one head has one width"),
        ({"centring": "mean"}, "sinkhorn"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        settings(**changes)
