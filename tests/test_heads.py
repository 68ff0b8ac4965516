"""What all probes of heads share: the fit that keeps its best epoch, the file, and doing it once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from torch import nn

from pathfm.heads.fit import Fit, Schedule, fit_best
from pathfm.heads.recording import file_name, once
from pathfm.heads.result import HeadResult, HeadScores, load_result, write_eva_results, write_result
from pathfm.heads.telling import show
from pathfm.runtime import PathfmError
from pathfm.tracking import TrackingConfig
from pathfm.uncertainty import interval_of_mean


class One(nn.Module):
    """A single number, with the gradient 1: every step of AdamW moves it by its rate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))


def fitted(scores: list[float], **changes: object) -> tuple[One, Fit, list[list[int]]]:
    """A head fitted on five rows, two a step, whose epochs are scored as given; the rows of each step."""
    head, asked, told = One(), iter(scores), []
    given = {"lr": 0.3, "batch": 2, "patience_epochs": 99, "weight_decay": 0.0, "max_epochs": 9}

    def loss(rows: np.ndarray) -> torch.Tensor:
        told.append(rows.tolist())
        return head.weight.sum()

    schedule = Schedule(**given | changes)  # type: ignore[arg-type]
    fit = fit_best(head, schedule, lambda _: np.arange(5), loss, lambda: next(asked))
    return head, fit, told


def test_a_head_is_left_as_it_was_at_the_first_of_its_best_epochs() -> None:
    head, fit, told = fitted([0.1, 0.7, 0.2, 0.7, 0.3], max_epochs=5)
    assert (fit.best, fit.best_epoch, fit.epochs) == (0.7, 1, 5)
    # three steps an epoch, a third of the rate: 0.1 each (AdamW's first moments are exact for a gradient of 1)
    assert head.weight.item() == pytest.approx(-6 * 0.1, abs=1e-6)
    assert told[:3] == [[0, 1], [2, 3], [4]]
    assert len(fit.losses) == 15


def test_the_rate_is_a_third_for_five_epochs_and_whole_after_them() -> None:
    head, _, _ = fitted([0.1 * e for e in range(7)], max_epochs=7)
    assert head.weight.item() == pytest.approx(-(15 * 0.1 + 6 * 0.3), abs=1e-5)


def test_patience_counts_epochs_since_the_best_and_not_a_number_never_wins() -> None:
    nan = float("nan")
    _, fit, _ = fitted([0.5, 0.6, nan, 0.6, 0.1, 0.9], patience_epochs=3)
    assert (fit.best_epoch, fit.epochs) == (1, 5)
    _, fit, _ = fitted([nan, nan], max_epochs=2)
    assert fit.best_epoch == 0


def test_an_epoch_that_steps_cut_short_is_not_judged_unless_it_is_the_only_one() -> None:
    _, fit, told = fitted([0.1, 0.9], steps=7, max_epochs=None)
    assert (fit.best_epoch, fit.epochs, len(fit.losses)) == (1, 3, 7)
    assert told[-1] == [0, 1]
    _, fit, told = fitted([0.4], steps=2, max_epochs=None)
    assert (fit.best, len(told)) == (0.4, 2)


def test_an_order_that_itself_ends_early_is_a_cut_epoch_too() -> None:
    head, asked = One(), iter([0.1, 0.9])
    schedule = Schedule(lr=0.3, batch=2, patience_epochs=9, steps=5)
    orders = [np.arange(4), np.arange(4), np.arange(2)]
    fit = fit_best(head, schedule, orders.__getitem__, lambda _: head.weight.sum(), asked.__next__)
    assert (fit.best_epoch, fit.epochs) == (1, 3)


def test_a_schedule_without_an_end_or_with_nothing_in_it_is_refused() -> None:
    with pytest.raises(PathfmError, match="a run would not end"):
        Schedule(lr=1.0, batch=1, patience_epochs=1)
    with pytest.raises(PathfmError, match="batch = 0: wants a number above 0"):
        Schedule(lr=1.0, batch=0, patience_epochs=1, steps=1)


def scores(values: list[float]) -> HeadScores:
    interval = interval_of_mean(np.array([0.2, 0.4, 0.9]), ["a", "b", "c"])
    return HeadScores.of(
        "vit", "conv", values, [0.5], interval, "patients resampled", [3, 4], dim=8
    )


def result(**changes: object) -> HeadResult:
    given = {
        "key": "k",
        "data": "d",
        "data_digest": "f",
        "n": 3,
        "classes": ["a"],
        "told": "test (val chose the epoch)",
        "metric": "m",
        "models": [scores([0.25, 0.75])],
        "caveats": [],
    }
    return HeadResult(**given | changes)  # type: ignore[arg-type]


def test_a_file_holds_what_applies_and_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_result(path, result())
    held = json.loads(path.read_text())
    assert held["caveats"] == []
    assert not {"n_slides", "input_px"} & set(held)
    assert not {"parameters", "per_class", "backbone_digest"} & set(held["models"][0])
    model = held["models"][0]
    assert (model["mean"], model["epochs"], model["n_patients"]) == (0.5, 3.5, 3)
    assert model["sd"] == pytest.approx(0.5 / np.sqrt(2))
    assert load_result(path) == result()
    path.write_text("{}")
    assert load_result(path) is None


def test_eva_s_keys_are_kept_and_test_is_empty_where_validation_reports(tmp_path: Path) -> None:
    write_eva_results(tmp_path / "a.json", "Score", [0.1, 0.3], [])
    held = json.loads((tmp_path / "a.json").read_text())["metrics"]
    assert held["test"] == []
    assert held["val"][0]["val/Score"]["values"] == [0.1, 0.3]
    assert held["val"][0]["val/Score"]["stdev"] == pytest.approx(np.sqrt(0.02))


class Settings(BaseModel, frozen=True):
    out: Path
    tracking: TrackingConfig = TrackingConfig(enabled=False)


def test_the_same_key_is_measured_once_and_another_key_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[str] = []

    def ask(key: str) -> HeadResult:
        def measure() -> HeadResult:
            made.append(key)
            (tmp_path / "o" / "vit.conv.npz").touch()
            return result(key=key)

        config = Settings(out=tmp_path / "o")
        return once("a-verb", config, "r.json", key, ("d", "f"), measure, lambda _: None, [".npz"])

    ask("one"), ask("one"), ask("two")
    assert made == ["one", "two"]
    assert capsys.readouterr().out.count("up to date") == 1
    assert (tmp_path / "o" / "a_verb.yaml").exists()
    (tmp_path / "o" / "vit.conv.npz").unlink()
    ask("two")
    assert made == ["one", "two", "two"]


def test_a_run_that_is_killed_while_it_is_recorded_leaves_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pathfm.tracking.run.Run.summary", killed)
    config = Settings(out=tmp_path / "o")
    with pytest.raises(KeyboardInterrupt):
        once("a-verb", config, "r.json", "k", ("d", "f"), result, lambda _: None)
    assert not (tmp_path / "o" / "r.json").exists()


@pytest.mark.parametrize(
    ("between", "told"),
    [
        (True, "Score, %, with the mean's 95 % interval over 3 slides:"),
        (False, "Score, %, without an interval:"),
    ],
)
def test_the_table_says_what_its_intervals_are_over(
    between: bool, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    interval = interval_of_mean(np.array([0.2, 0.4, 0.9]), ["a", "b", "c"]) if between else None
    one = HeadScores.of("vit", "conv", [0.5], [0.5], interval, "slides", [3])
    show(result(models=[one]), "9 slides, 3 reported", "Score")
    said = " ".join(capsys.readouterr().out.split())
    assert "│ - │ 1 │" in said  # one run has no spread
    assert f"d: 9 slides, 3 reported: test (val chose the epoch). {told}" in said


def test_a_model_s_path_becomes_a_file_s_name() -> None:
    assert file_name("../w/a b.safetensors") == "_w_a_b.safetensors"
    assert file_name("...") == "_"
