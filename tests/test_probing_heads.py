"""The batched heads against torch's own Linear, AdamW and ConstantLR, one head at a time in a loop."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy

from pathfm.probing.heads import TrainedHeads, train_heads
from pathfm.probing.orders import Balanced, Shuffled, draw_shots, linear_start
from pathfm.probing.parts import Parts
from pathfm.probing.protocol import TASKS, HeadProtocol, ten_shot
from pathfm.probing.selecting import Kept
from pathfm.runtime import PathfmError
from tests.test_metrics import blobs

NONE = np.zeros(0, np.int64)


def task(n: int = 230, n_classes: int = 3, dim: int = 7) -> tuple[np.ndarray, np.ndarray, Parts]:
    x, y = blobs(n, dim, n_classes, seed=n_classes)
    rows = np.random.default_rng(0).permutation(n)
    return 2 * x, y, Parts(np.sort(rows[:150]), np.sort(rows[150:200]), np.sort(rows[200:]))


SMALL = HeadProtocol(
    learning_rates=(1e-3, 0.1), n_runs=2, n_steps=100, batch_size=32, patience=4, warm_epochs=3
)


def in_a_loop(
    x: np.ndarray,
    y: np.ndarray,
    parts: Parts,
    n_classes: int,
    told: HeadProtocol,
    run: int,
    lr: float,
) -> tuple[list[float], list[float], torch.nn.Linear, int]:
    """One head as eva's modules would train it: losses, validation scores, best head, best step."""
    outputs = 1 if n_classes == 2 else n_classes
    head = torch.nn.Linear(x.shape[1], outputs)
    first = torch.from_numpy(linear_start(x.shape[1], outputs, told.seed, run))
    with torch.no_grad():
        head.weight.copy_(first[:-1].T)
        head.bias.copy_(first[-1])
    solver = torch.optim.AdamW(head.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.ConstantLR(solver, 1 / 3, told.warm_epochs)
    orders = Shuffled(parts.train, told.seed)
    losses, scores, best, waited, step, epoch = [], [], (-1.0, head, 0), 0, 0, 0
    while True:
        rows = orders.rows(run, epoch)
        for at in range(0, len(rows), told.batch_size):
            if step == told.n_steps:
                return losses, scores, best[1], best[2]
            batch = rows[at : at + told.batch_size]
            logits, target = head(torch.from_numpy(x[batch])), torch.from_numpy(y[batch])
            if n_classes == 2:
                loss = torch.nn.functional.binary_cross_entropy_with_logits(
                    logits.squeeze(-1), target.float()
                )
            else:
                loss = torch.nn.functional.cross_entropy(logits, target)
            solver.zero_grad()
            loss.backward()
            solver.step()
            losses.append(loss.item())
            step += 1
        schedule.step()
        epoch += 1
        score = score_of(head, x[parts.val], y[parts.val], n_classes)
        scores.append(score)
        if score > best[0]:
            best, waited = (score, copy.deepcopy(head), step), 0
        else:
            waited += 1
        if waited >= told.patience:
            return losses, scores, best[1], best[2]


def score_of(head: torch.nn.Linear, x: np.ndarray, y: np.ndarray, n_classes: int) -> float:
    with torch.no_grad():
        logits = head(torch.from_numpy(x))
    if n_classes == 2:
        found = logits[:, 0].numpy() > 0
        return float(np.mean([(found[y == 1] == 1).mean(), (found[y == 0] == 0).mean()]))
    return float(multiclass_accuracy(logits, torch.from_numpy(y), n_classes, average="macro"))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_every_head_of_the_batch_is_the_one_torch_trains_alone(n_classes: int) -> None:
    x, y, parts = task(n_classes=n_classes)
    got = train_heads(x, y, parts, n_classes, SMALL)
    for run in range(SMALL.n_runs):
        for k, lr in enumerate(SMALL.learning_rates):
            losses, scores, head, best = in_a_loop(x, y, parts, n_classes, SMALL, run, lr)
            np.testing.assert_allclose(got.losses[: len(losses), run, k], losses, atol=2e-6)
            np.testing.assert_allclose(got.val_scores[: len(scores), run, k], scores, atol=1e-6)
            assert got.best_step[run, k] == best
            assert got.stopped_step[run, k] == len(losses)
            weights = got.weights[run, k]
            np.testing.assert_allclose(weights[:-1].T, head.weight.detach(), atol=1e-5)
            np.testing.assert_allclose(weights[-1], head.bias.detach(), atol=1e-5)
            assert got.best_score[run, k] == pytest.approx(max(scores), abs=1e-6)


def test_a_head_is_the_same_alone_and_beside_others() -> None:
    x, y, parts = task()
    many = train_heads(x, y, parts, 3, SMALL)
    alone = train_heads(x, y, parts, 3, replace(SMALL, n_runs=1, learning_rates=(0.1,)))
    steps = len(alone.losses)
    np.testing.assert_allclose(many.losses[:steps, 0, 1], alone.losses[:, 0, 0], atol=2e-6)
    np.testing.assert_allclose(many.weights[0, 1], alone.weights[0, 0], atol=1e-5)


def test_a_head_that_runs_away_spoils_no_other() -> None:
    x, y, parts = task()
    told = replace(SMALL, learning_rates=(1e-3, 1e30), n_runs=1)
    got = train_heads(x, y, parts, 3, told)
    alone = train_heads(x, y, parts, 3, replace(told, learning_rates=(1e-3,)))
    n = len(alone.losses)
    assert not np.isfinite(got.losses[:n, 0, 1]).all()
    np.testing.assert_allclose(got.losses[:n, 0, 0], alone.losses[:, 0, 0], atol=2e-6)


def test_neither_training_nor_choice_sees_the_test_rows() -> None:
    x, y, parts = task()
    before = train_heads(x, y, parts, 3, SMALL)
    spoiled, turned = x.copy(), y.copy()
    spoiled[parts.test] = 1e3
    turned[parts.test] = (turned[parts.test] + 1) % 3
    after = train_heads(spoiled, turned, parts, 3, SMALL)
    np.testing.assert_array_equal(before.weights, after.weights)
    assert before.rate == after.rate


def test_the_learning_rate_is_the_one_with_the_best_mean_over_runs_and_the_first_of_equals() -> (
    None
):
    x, y, parts = task()
    heads = train_heads(x, y, parts, 3, SMALL)
    scores = np.array([[0.5, 0.9, 0.7], [0.9, 0.5, 0.7]], np.float32)
    chosen = replace(heads, best_score=scores, learning_rates=(1.0, 2.0, 3.0))
    assert chosen.rate == 0
    assert replace(chosen, best_score=scores + np.float32([0, 0, 0.1])).rate == 2


def test_predictions_are_the_classes_with_the_highest_logit() -> None:
    heads = TrainedHeads(
        learning_rates=(1.0,),
        weights=np.array([[[[1.0, 0.0], [0.0, 1.0], [0.0, 0.5]]]], np.float32),
        best_score=np.ones((1, 1), np.float32),
        best_step=np.ones((1, 1), np.int64),
        stopped_step=np.ones((1, 1), np.int64),
        losses=np.zeros((1, 1, 1), np.float32),
        val_scores=np.zeros((1, 1, 1), np.float32),
        val_steps=np.ones(1, np.int64),
        n_classes=3,
    )
    x = np.array([[1.0, 0.2], [0.3, 0.1]], np.float32)  # logits (1, .7), (.3, .6)
    np.testing.assert_allclose(heads.logits(x)[0], [[1.0, 0.7], [0.3, 0.6]], rtol=1e-6)
    assert heads.predict(x).tolist() == [[0, 1]]
    binary = replace(heads, weights=np.array([[[[1.0], [-1.0], [0.0]]]], np.float32), n_classes=2)
    assert binary.predict(np.array([[2, 1], [1, 2]], np.float32)).tolist() == [[1, 0]]


def test_training_stops_when_every_head_has_waited_long_enough() -> None:
    x, y, parts = task()
    told = replace(SMALL, n_steps=10_000, patience=3)
    heads = train_heads(x, y, parts, 3, told)
    assert len(heads.losses) == heads.stopped_step.max() < 10_000
    assert (heads.stopped_step - heads.best_step == 3 * told.steps_per_epoch(150)).all()


def test_an_epoch_that_the_steps_cut_off_is_not_validated() -> None:
    x, y, parts = task()  # 5 steps an epoch
    heads = train_heads(x, y, parts, 3, replace(SMALL, n_steps=13))
    assert heads.val_steps.tolist() == [5, 10]
    assert len(heads.losses) == 13
    with pytest.raises(PathfmError, match="4 steps of 32 end before the first validation"):
        train_heads(x, y, parts, 3, replace(SMALL, n_steps=4))


def test_the_patience_rule_gives_every_figure_of_evas_configs() -> None:
    n_train = {
        "bach": 268,
        "bracs": 3657,
        "breakhis": 1132,
        "crc": 100_000,
        "gleason_arvaniti": 15_303,
        "mhist": 2175,
        "patch_camelyon": 262_144,
        "unitopatho": 6270,
    }
    found = {name: HeadProtocol().patience_for(n) for name, n in n_train.items()}
    assert found == {name: known.patience for name, known in TASKS.items()}


def test_ten_shot_is_fifty_runs_of_new_samples_validated_every_tenth_epoch() -> None:
    x, y, parts = task(n_classes=2)
    told = replace(ten_shot(200), patience=3, n_runs=4)
    orders = Balanced(parts.train, y, 10, told.seed)
    heads = train_heads(x, y, parts, 2, told, orders=orders)
    assert heads.val_steps.tolist()[:2] == [10, 20]
    drawn = [frozenset(orders.rows(run, 0).tolist()) for run in range(4)]
    assert len(set(drawn)) == 4
    for rows in drawn:
        assert np.bincount(y[list(rows)]).tolist() == [10, 10]
        assert rows <= set(parts.train.tolist())
    np.testing.assert_array_equal(orders.rows(2, 0), orders.rows(2, 9))
    with pytest.raises(PathfmError, match="fewer than the 1000"):
        Balanced(parts.train, y, 1000, 0)


def test_an_improvement_within_min_delta_keeps_the_best_but_not_the_patience() -> None:
    kept = Kept(torch.zeros(1, 2, 1), (1, 1), patience=2, min_delta=0.05)
    for step, score in enumerate([0.50, 0.53, 0.54, 0.9], start=1):
        kept.update(torch.tensor([[score]]), torch.full((1, 2, 1), score), step)
    assert kept.stopped_step.item() == 3  # 0.53 and 0.54 are not 0.05 better than 0.50
    assert kept.step.item() == 3  # yet the best checkpoint was the third; the fourth came too late
    assert kept.heads[0, 0, 0].item() == pytest.approx(0.54)


def test_an_order_shows_every_row_once_an_epoch_and_differs_by_run_and_epoch() -> None:
    orders = Shuffled(np.arange(100, 200), seed=3)
    seen = [orders.rows(run, epoch) for run in (0, 1) for epoch in (0, 1)]
    for rows in seen:
        np.testing.assert_array_equal(np.sort(rows), np.arange(100, 200))
    assert len({tuple(rows) for rows in seen}) == 4
    np.testing.assert_array_equal(seen[0], Shuffled(np.arange(100, 200), seed=3).rows(0, 0))


def test_shots_are_nested_and_uniform() -> None:
    labels = np.repeat([0, 1], [40, 8])
    train = np.arange(48)
    few, more = (set(draw_shots(train, labels, k, 0, 5).tolist()) for k in (2, 4))
    assert few < more
    hits = np.zeros(48)
    for resample in range(2000):
        hits[draw_shots(train, labels, 4, 0, resample)] += 1
    assert np.abs(hits[:40] / 2000 - 0.1).max() < 0.03  # 4.5 sd
    assert np.abs(hits[40:] / 2000 - 0.5).max() < 0.05


def test_the_first_head_is_drawn_as_torch_draws_a_linear_layer() -> None:
    head = linear_start(400, 5, 0, 0)
    bound = 400**-0.5
    assert head.shape == (401, 5)
    assert 0.99 * bound < np.abs(head).max() <= bound
    assert head.var() == pytest.approx(bound**2 / 3, rel=0.1)
    assert np.abs(head - linear_start(400, 5, 0, 1)).max() > bound / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rates": ()}, "learning rates"),
        ({"learning_rates": (0.1, 0.1)}, "each once"),
        ({"n_runs": 0}, "at least 1"),
        ({"patience": 0}, "at least 1"),
    ],
)
def test_a_protocol_that_makes_no_sense_cannot_be_made(change: dict, message: str) -> None:
    with pytest.raises(PathfmError, match=message):
        HeadProtocol(**change)


def test_first_heads_of_another_shape_are_refused() -> None:
    x, y, parts = task()
    with pytest.raises(PathfmError, match=r"starts \(1, 7, 3\), wanted .*\(2, 8, 3\)"):
        train_heads(x, y, parts, 3, SMALL, starts=np.zeros((1, 7, 3), np.float32))
