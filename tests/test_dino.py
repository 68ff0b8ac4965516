"""DINO: the loss against the paper written as loops in float64, the teacher, the frozen parts."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from lightly.loss import DINOLoss

from pathfm.backbone import load_backbone
from pathfm.methods import MicroBatch, build_method, distillation
from pathfm.methods.distillation import summarise
from pathfm.methods.settings import DinoSettings
from pathfm.runtime import PathfmError
from tests.rank_threads import run_ranks

SMALL = DinoSettings(out_dim=32, hidden_dim=16, bottleneck_dim=8)


def method(settings=SMALL, steps=10, seed=0):
    backbone = load_backbone("vit_tiny_patch16_224", "random", embed_dim=24, depth=1, num_heads=2)
    return build_method("dino", backbone, settings, steps=steps, seed=seed)


def views(n_local=2, batch=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [32, 32] + [16] * n_local
    return [torch.randn(batch, 3, size, size, generator=generator) for size in sizes]


def step_loss(dino, crops, n_global, step=0):
    """A whole batch as one step's only micro-batch."""
    micro = MicroBatch(crops, n_global, np.arange(len(crops[0])), None, 0, step)
    dino.look(micro)
    dino.settle(step)
    return dino.loss(micro)


def paper_loss(teacher, student, centre, teacher_temp, student_temp):
    """Algorithm 1 and eq. 2-3 of the paper, view by view, image by image, prototype by prototype."""
    total, terms = 0.0, 0
    for i, t_view in enumerate(teacher):
        for j, s_view in enumerate(student):
            if i == j:
                continue
            terms += 1
            for t, s in zip(t_view.tolist(), s_view.tolist(), strict=True):
                p = [math.exp((a - c) / teacher_temp) for a, c in zip(t, centre, strict=True)]
                q = [math.exp(b / student_temp) for b in s]
                total -= sum(
                    a / sum(p) * math.log(b / sum(q)) for a, b in zip(p, q, strict=True)
                ) / len(t_view)
    return total / terms


def test_lightlys_loss_is_the_papers_and_so_is_its_centre():
    generator = torch.Generator().manual_seed(0)
    teacher = [torch.rand(3, 6, generator=generator, dtype=torch.float64) for _ in range(2)]
    student = [torch.rand(3, 6, generator=generator, dtype=torch.float64) for _ in range(4)]
    criterion = DINOLoss(output_dim=6, student_temp=0.1, center_momentum=0.9).double()
    centre = [0.0] * 6
    for _ in range(3):
        want = paper_loss(teacher, student, centre, 0.05, 0.1)
        got = criterion(teacher, student, teacher_temp=0.05)
        assert float(got) == pytest.approx(want, rel=1e-6)  # its temperature is a float32 tensor
        rows = [row for view in teacher for row in view.tolist()]
        batch_mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        centre = [0.9 * c + 0.1 * m for c, m in zip(centre, batch_mean, strict=True)]
        assert criterion.center.flatten().tolist() == pytest.approx(centre, rel=1e-6)
        teacher = [view.roll(1, dims=1) for view in teacher]


def test_the_method_gives_the_loss_of_its_own_networks():
    dino, crops = method(), views()
    loss = step_loss(dino, crops, 2, step=0).detach()
    with torch.no_grad():
        head, backbone = dino.teacher["head"], dino.teacher["backbone"]
        outputs = [head(backbone.embed(crop)).double() for crop in crops]
    # at step 0 student and teacher are one network, and the centre is zero
    want = paper_loss(outputs[:2], outputs, [0.0] * 32, 0.04, 0.1)
    assert float(loss) == pytest.approx(want, rel=1e-5)


def test_student_and_teacher_are_equal_at_the_start_and_share_no_memory():
    dino = method()
    pairs = list(zip(dino.student.parameters(), dino.teacher.parameters(), strict=True))
    assert len(pairs) > 20
    for student, teacher in pairs:
        assert torch.equal(student, teacher)
        assert student.data_ptr() != teacher.data_ptr()
        assert not teacher.requires_grad


def test_heads_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = method(seed=4).student["head"].state_dict()
    torch.manual_seed(2)
    again, other = (method(seed=s).student["head"].state_dict() for s in (4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_the_teacher_is_the_moving_average_by_hand():
    dino = method(DinoSettings(**(SMALL.model_dump() | {"ema": (0.5, 1.0)})), steps=3)
    weight = dino.student["backbone"].network.norm.bias
    average = dino.teacher["backbone"].network.norm.bias
    expected = average.detach().clone()
    for step, momentum in enumerate((0.5, 0.75, 1.0)):
        with torch.no_grad():
            weight += 1.0
        expected = momentum * expected + (1 - momentum) * weight.detach()
        dino.after_update(step)
        torch.testing.assert_close(average.detach(), expected)


def test_gradients_reach_the_student_only_and_not_the_frozen_patch_embedding():
    dino = method()
    step_loss(dino, views(), 2, step=0).backward()
    assert all(p.grad is None for p in dino.teacher.parameters())
    named = dict(dino.student["backbone"].network.named_parameters())
    assert named["patch_embed.proj.weight"].grad is None
    assert named["blocks.0.attn.qkv.weight"].grad.abs().sum() > 0
    assert dino.student["head"].last_layer.weight_v.grad.abs().sum() > 0


def test_prototypes_stay_in_the_first_steps_only():
    dino = method(DinoSettings(**(SMALL.model_dump() | {"freeze_last_layer_steps": 1})))
    for step, frozen in ((0, True), (1, False)):
        step_loss(dino, views(), 2, step).backward()
        dino.before_update(step)
        assert (dino.student["head"].last_layer.weight_v.grad is None) == frozen
        assert dino.student["head"].layers[0].weight.grad is not None
        dino.zero_grad(set_to_none=True)


def test_the_loss_is_fp32_under_bf16_autocast():
    dino = method()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = step_loss(dino, views(), 2, step=0).detach()
    assert loss.dtype == torch.float32
    assert dino.criterion.center.dtype == torch.float32
    assert float(loss) == pytest.approx(
        float(step_loss(method(), views(), 2, step=0).detach()), rel=0.02
    )


def outputs_of(*parts):
    """What `summarise` makes of logits whose targets are their softmax at 0.04."""
    return summarise((part, torch.softmax(part / 0.04, -1)) for part in parts).described()


def test_a_uniform_and_a_one_hot_teacher_have_the_entropies_known():
    uniform = outputs_of(torch.zeros(4, 32))
    assert float(uniform["teacher_entropy"]) == pytest.approx(math.log(32), rel=1e-6)
    assert float(uniform["teacher_marginal_entropy"]) == pytest.approx(math.log(32), rel=1e-6)
    assert float(uniform["teacher_information"]) == pytest.approx(0, abs=1e-5)
    apart = outputs_of(100.0 * torch.eye(4, 32)[:3], 100.0 * torch.eye(4, 32)[3:])
    assert float(apart["teacher_entropy"]) == pytest.approx(0, abs=1e-6)
    assert float(apart["teacher_marginal_entropy"]) == pytest.approx(math.log(4), rel=1e-6)
    assert float(apart["teacher_information"]) == pytest.approx(math.log(4), rel=1e-6)
    collapsed = outputs_of(100.0 * torch.eye(1, 32).expand(4, 32))
    assert float(collapsed["teacher_marginal_entropy"]) == pytest.approx(0, abs=1e-6)
    assert float(collapsed["teacher_information"]) == pytest.approx(0, abs=1e-6)


def test_entropies_of_many_targets_take_a_slab_of_memory_at_a_time(monkeypatch):
    targets = torch.softmax(torch.randn(50, 32, generator=torch.Generator().manual_seed(2)), -1)
    seen, true_entr = [], torch.special.entr

    def entr(values):
        seen.append(values.numel())
        return true_entr(values)

    monkeypatch.setattr(distillation, "SLAB_ELEMENTS", 7 * 32 + 5)
    monkeypatch.setattr(torch.special, "entr", entr)
    found = summarise([(targets, targets), (targets[:0], targets[:0])])
    expected = -sum(p * math.log(p) for row in targets.double().tolist() for p in row) / 50
    assert float(found.entropy) == pytest.approx(expected, rel=1e-6)
    assert max(seen) == 7 * 32


def split(crops, n_global, parts, step=0):
    """The same batch as `parts` micro-batches of equal size."""
    n = len(crops[0]) // parts
    draws = np.arange(len(crops[0]))
    return [
        MicroBatch(
            [c[i * n : (i + 1) * n] for c in crops],
            n_global,
            draws[i * n : (i + 1) * n],
            None,
            0,
            step,
            index=i,
            count=parts,
        )
        for i in range(parts)
    ]


def one_step(dino, micros):
    """Loss and gradients of a step, and its diagnostics."""
    for micro in micros:
        dino.look(micro)
    dino.settle(micros[0].step)
    total = 0.0
    for micro in micros:
        loss = dino.loss(micro)
        loss.backward()
        total += float(loss.detach())
    gradients = {n: p.grad for n, p in dino.named_parameters() if p.grad is not None}
    dino.after_update(micros[0].step)
    return total, gradients, dict(dino.diagnostics()), dino.criterion.center.clone()


def assert_same_step(got, want):
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[1][name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-9)
    assert {k: float(v) for k, v in got[2].items()} == pytest.approx(
        {k: float(v) for k, v in want[2].items()}, rel=1e-4, abs=1e-6
    )
    torch.testing.assert_close(got[3], want[3], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_take_the_step_of_the_whole_batch_and_move_the_centre_once(parts):
    crops = views(batch=4)
    whole = one_step(method(), split(crops, 2, 1))
    assert_same_step(one_step(method(), split(crops, 2, parts)), whole)
    outputs = torch.cat(
        [
            method().teacher["head"](method().teacher["backbone"].embed(crop)).detach()
            for crop in crops[:2]
        ]
    )
    torch.testing.assert_close(whole[3].flatten(), 0.1 * outputs.mean(0), rtol=1e-4, atol=1e-6)


def test_ranks_take_the_step_of_one(monkeypatch):
    crops = views(batch=4)
    whole = one_step(method(), split(crops, 2, 1))
    methods = [method(), method()]  # built one after the other: initial weights use torch's state

    def work(rank):
        micro = split(crops, 2, 2)[rank]
        return one_step(methods[rank], [dataclasses.replace(micro, index=0, count=1)])

    steps = run_ranks(monkeypatch, 2, work)
    loss = sum(step[0] for step in steps) / 2
    gradients = {n: (steps[0][1][n] + steps[1][1][n]) / 2 for n in whole[1]}
    for _, _, diagnostics, centre in steps:
        assert_same_step((loss, gradients, diagnostics, centre), whole)


def test_a_step_is_lightlys_on_the_whole_batch_and_so_is_the_next_centre():
    dino, crops = method(), views()
    criterion = DINOLoss(output_dim=32, student_temp=0.1, center_momentum=0.9)
    for step in range(3):
        with torch.no_grad():
            teacher, student = (
                [net["head"](net["backbone"].embed(crop)) for crop in crops]
                for net in (dino.teacher, dino.student)
            )
        want = criterion(teacher[:2], student, teacher_temp=0.04)
        assert float(step_loss(dino, crops, 2, step).detach()) == pytest.approx(float(want), 1e-5)
        torch.testing.assert_close(dino.criterion.center, criterion.center)
        crops = [crop.roll(1, 0) * 1.1 for crop in crops]


def test_the_students_stochastic_depth_is_keyed_and_the_teachers_is_off():
    def depths(seed):
        backbone = load_backbone(
            "vit_tiny_patch16_224", "random", embed_dim=24, depth=2, num_heads=2, drop_path=0.5
        )
        dino: Any = build_method("dino", backbone, SMALL, steps=10, seed=0)
        crops = views(batch=4)
        micro = MicroBatch(crops, 2, np.arange(4) + 7, None, seed, 0)
        dino.look(micro)
        teacher_out = dino._teacher_out[0].clone()
        dino.settle(0)
        return float(dino.loss(micro).detach()), teacher_out

    torch.manual_seed(0)
    first, teacher = depths(1)
    torch.manual_seed(1)
    again, _ = depths(1)
    other, same_teacher = depths(2)
    assert first == again
    assert first != other
    assert torch.equal(teacher, same_teacher)


def test_a_batchnorm_teacher_follows_the_students_statistics():
    backbone = load_backbone("resnet10t", "random")
    dino: Any = build_method("dino", backbone, SMALL, steps=3, seed=0)
    assert not dino.student["backbone"].stem.weight.requires_grad
    step_loss(dino, [torch.randn(4, 3, 64, 64) + 2 for _ in range(2)], 2)
    name = next(n for n, _ in dino.student.named_buffers() if n.endswith("running_mean"))
    student, teacher = (dict(net.named_buffers())[name] for net in (dino.student, dino.teacher))
    before = teacher.clone()
    assert not torch.equal(before, student)
    dino.after_update(0)
    torch.testing.assert_close(teacher, 0.99 * before + 0.01 * student)


def test_the_state_holds_the_centre_and_brings_it_back():
    dino = method()
    step_loss(dino, views(), 2, step=0)
    state = {name: tensor.clone() for name, tensor in dino.state_dict().items()}
    assert state["criterion.center"].abs().sum() > 0
    other = method(seed=9)
    other.load_state_dict(state)
    loss, again = step_loss(dino, views(seed=1), 2, 1), step_loss(other, views(seed=1), 2, 1)
    assert torch.equal(loss, again)


def test_an_unknown_method_is_refused():
    with pytest.raises(PathfmError, match="choose dino"):
        build_method("byol", load_backbone("vit_tiny_patch16_224", "random"), SMALL, 1, 0)
