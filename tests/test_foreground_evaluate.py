"""``pathfm foreground-evaluate``: sums against loops, targets by hand, files, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import typing
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from pathfm.cli import main
from pathfm.foreground_evaluate import METHODS, ForegroundEvaluateConfig, Method, run
from pathfm.foreground_evaluate.measuring import Row, Subject
from pathfm.foreground_evaluate.page import error_map
from pathfm.foreground_evaluate.summing import agreement, interval, summarise
from pathfm.segmentation.scores import MaskScores
from pathfm.segmentation.thresholds import THRESHOLDS
from pathfm.segmentation.truth import INSIDE, OUTSIDE, Truth
from pathfm.segmentation.unet import SHIPPED_WEIGHTS
from pathfm.tracking import TrackingConfig, read_runs
from tests.test_truth import box, feature, write_drawn

QUIET = TrackingConfig(enabled=False)


def row(
    method: str, picture: str, dice: float, group: str = "H&E", source: str = "", **kinds
) -> Row:
    """A row with a Dice and, for each kind, (pixels, pixels inside)."""
    px = {kind: kinds.get(kind, (0, 0))[0] for kind in (*INSIDE, *OUTSIDE)}
    inside = {kind: kinds.get(kind, (0, 0))[1] for kind in (*INSIDE, *OUTSIDE)}
    scores = MaskScores(dice, dice, dice, dice, 1 - dice, math.nan, px, inside)
    return Row(method, picture, group, source or picture, True, scores)


def summary(rows: list[Row], agreed: dict[str, float] | None = None):
    return summarise(rows, ["net"], agreed or {}, seed=1, resamplings=500)


def targets(rows: list[Row], agreed: dict[str, float] | None = None) -> dict[str, bool | None]:
    return {target.name: target.met for target in summary(rows, agreed).targets}


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Path, Path]:
    """Two pictures of unequal size, pink on white: one with ink that is drawn, one drawn twice."""
    rng = np.random.default_rng(0)
    plain = np.full((70, 90, 3), 241, np.uint8)
    plain[20:60, 10:70] = (200, 120, 175)
    inked = np.full((64, 110, 3), 238, np.uint8)
    inked[10:50, 40:100] = (180, 100, 165)
    inked[10:50, 5:20] = (30, 60, 200)
    plain -= rng.integers(0, 9, plain.shape).astype(np.uint8)
    inked -= rng.integers(0, 9, inked.shape).astype(np.uint8)
    tissue = feature("Tissue", box(10, 20, 70, 60))
    again = [feature("Tissue", box(11, 20, 70, 60))]
    root, folder = write_drawn(tmp_path, "plain", plain, [tissue], again=again)
    features = [
        feature("Tissue", box(40, 10, 100, 50)),
        feature("Pen", box(5, 10, 20, 50)),
        feature("Fat", box(60, 20, 70, 30)),
    ]
    write_drawn(tmp_path, "inked", inked, features, stain_group="IHC")
    return root, folder


def test_the_interval_is_that_of_a_loop_over_resampled_sources() -> None:
    from pathfm.foreground_evaluate.summing import _draws

    values, sources = [0.9, 0.7, 0.8, math.nan, 0.2], ["a", "a", "b", "b", "c"]
    draws = _draws(sources, seed=3, resamplings=4000)
    means = []
    for times in draws:
        kept = [v for v, n in zip(values, times, strict=True) for _ in range(int(n)) if v == v]
        if kept:
            means.append(sum(kept) / len(kept))
    assert interval(values, draws) == pytest.approx(np.percentile(means, [2.5, 97.5]))
    assert (draws[:, 0] == draws[:, 1]).all()  # one source: drawn together
    rng = np.random.default_rng(0)
    groups = [[0.9, 0.7], [0.8], [0.2]]
    other = [np.mean([v for i in rng.integers(0, 3, 3) for v in groups[i]]) for _ in range(20_000)]
    assert interval(values, draws) == pytest.approx(np.percentile(other, [2.5, 97.5]), abs=0.02)
    assert all(math.isnan(v) for v in interval([math.nan] * 5, draws))


def test_a_summary_has_the_worst_slide_the_groups_and_the_best_threshold() -> None:
    rows = [
        row("net", "a", 0.9, fat=(10, 9)), row("net", "b", 0.6, "IHC", fat=(30, 15)),
        row("otsu", "a", 0.8), row("otsu", "b", 0.7, "IHC"),
        row("hsv", "a", 0.9), row("hsv", "b", 0.5, "IHC"),
    ]  # fmt: skip
    got = summary(rows)
    dice = got.methods["net"].scores["dice"]
    assert (dice.mean, dice.worst, dice.worst_picture) == (0.75, 0.6, "b")
    lost = got.methods["net"].scores["tissue_lost"]
    assert (lost.worst, lost.worst_picture) == (pytest.approx(0.4), "b")
    assert math.isnan(got.methods["net"].scores["glass_taken"].mean)
    assert got.methods["net"].groups["dice"] == {"H&E": 0.9, "IHC": 0.6}
    assert got.methods["net"].inside["fat"] == 24 / 40
    assert got.best_threshold == "otsu"
    (difference,) = got.differences
    assert difference.mean == pytest.approx(0.0)
    assert (difference.better_on, difference.pictures) == (1, 2)


def test_targets_are_met_by_what_the_issue_asks_and_by_nothing_less() -> None:
    good = [
        row("net", "a", 0.97, fat=(100, 97), pale=(100, 97), pen=(100, 5), edge=(100, 6)),
        row("net", "b", 0.95, "IHC"), row("net", "c", 0.93, "special"),
        row("otsu", "a", 0.9), row("otsu", "b", 0.92, "IHC"), row("otsu", "c", 0.91, "special"),
    ]  # fmt: skip
    assert targets(good) == {
        "mean_dice": True,
        "better_than_thresholds": True,
        "pen_outside": True,
        "bubble_outside": None,
        "edge_outside": False,
        "fat_inside": True,
        "pale_inside": True,
        "IHC_like_HE": True,
        "special_like_HE": False,
    }
    low = [row("net", "a", 0.9, fat=(100, 96)), row("otsu", "a", 0.95)]
    assert targets(low)["mean_dice"] is False
    assert targets(low)["fat_inside"] is False
    assert targets(low)["IHC_like_HE"] is None
    assert targets(low)["better_than_thresholds"] is False
    assert targets(low, {"a": 0.91})["mean_dice"] is True
    assert targets(low, {"a": 0.93})["mean_dice"] is False


def test_a_model_with_a_worse_worst_slide_is_not_better_than_thresholds() -> None:
    rows = [
        row("net", "a", 1.0),
        row("net", "b", 0.5),
        row("otsu", "a", 0.6),
        row("otsu", "b", 0.6),
    ]
    assert targets(rows)["better_than_thresholds"] is False


def test_the_drawers_agreement_leaves_out_what_either_drawing_ignores() -> None:
    first, second, ignore = (np.zeros((4, 6), bool) for _ in range(3))
    first[:2], second[0, :3], second[1], ignore[1] = True, True, True, True
    rgb = np.zeros((4, 6, 3), np.uint8)
    nothing = np.zeros((4, 6), bool)
    twice = Subject(
        "a", rgb, Truth(first, nothing, {}), "H&E", "a", again=Truth(second, ignore, {})
    )
    once = Subject("b", rgb, Truth(first, nothing, {}), "H&E", "b")
    assert agreement([twice, once]) == {"a": pytest.approx(2 * 3 / (6 + 3))}


def test_an_error_map_shows_what_is_missed_wrong_and_ignored() -> None:
    tissue, mask, ignore = (np.zeros((2, 4), bool) for _ in range(3))
    tissue[0, :2], mask[0, 1:3], ignore[1, 3] = True, True, True
    shown = error_map(
        Subject("a", np.zeros((2, 4, 3), np.uint8), Truth(tissue, ignore, {}), "", ""), mask
    )
    colours = {tuple(shown[at]) for at in [(0, 1), (0, 3), (1, 0)]}
    assert len(colours) == 1  # right, right, right
    assert len({tuple(shown[0, 0]), tuple(shown[0, 2]), tuple(shown[1, 3])} - colours) == 3


def test_the_config_knows_every_threshold() -> None:
    assert set(METHODS) == set(THRESHOLDS) == set(typing.get_args(Method))


def test_a_run_writes_numbers_and_a_page(drawn, tmp_path: Path, capsys) -> None:
    root, folder = drawn
    out = tmp_path / "out"
    config = ForegroundEvaluateConfig(
        pictures=[root], drawn=folder, methods=["otsu", "hsv"], synthetic=1, synthetic_px=96,
        bootstrap=200, out=out, tracking=QUIET,
    )  # fmt: skip
    result = run(config)
    names = ("unet_thumbnail", "otsu", "hsv")
    assert tuple(result.drawn.methods) == names
    assert result.drawn.agreement == {"plain": pytest.approx(2 * 2360 / (2400 + 2360))}
    otsu = {r.picture: r for r in result.rows if r.method == "otsu"}
    assert otsu["plain"].scores.dice == 1
    assert otsu["inked"].inside("pen") == 1
    assert otsu["inked"].scores.dice == pytest.approx(2 * 2400 / (2 * 2400 + 600))
    read = json.loads((out / "results.json").read_text())
    assert read["drawn"]["methods"]["otsu"]["scores"]["dice"]["worst_picture"] == "inked"
    assert read["synthetic"]["pictures"] == 1
    with (out / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 * 3
    assert {line["pen_inside"] for line in lines if line["picture"] == "plain"} == {""}
    page = (out / "evaluation.html").read_text()
    assert page.count("<img") == 2 * 4
    model = result.drawn.methods["unet_thumbnail"].dice
    worst, other = sorted(model, key=model.__getitem__)
    assert page.index(f"<h2>{worst}") < page.index(f"<h2>{other}")
    assert "drawn twice" in page
    assert "better_than_thresholds" in capsys.readouterr().out


@pytest.mark.slow
def test_mlflow_has_a_run_with_a_child_for_each_method(drawn, tmp_path: Path) -> None:
    root, folder = drawn
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    config = ForegroundEvaluateConfig(
        pictures=[root], drawn=folder, methods=["otsu"], bootstrap=200, out=tmp_path / "out",
        tracking=TrackingConfig(uri=uri, experiment="masks"),
    )  # fmt: skip
    result = run(config)
    runs = {r.name: r for r in read_runs(uri, "masks")}
    assert set(runs) == {"foreground-evaluate", "unet_thumbnail", "otsu"}
    told = result.drawn.methods["otsu"].scores["dice"]
    assert runs["otsu"].metrics["drawn/dice.mean"] == pytest.approx(told.mean)
    assert runs["otsu"].metrics["drawn/dice.worst"] == pytest.approx(told.worst)


def test_the_page_of_an_earlier_evaluation_does_not_stay(drawn, tmp_path: Path) -> None:
    root, folder = drawn
    common = {"methods": ["hsv"], "bootstrap": 200, "out": tmp_path / "o", "tracking": QUIET}
    first = run(ForegroundEvaluateConfig(pictures=[root], drawn=folder, **common))
    assert first.page.exists()
    run(ForegroundEvaluateConfig(synthetic=1, synthetic_px=64, **common))
    assert not first.page.exists()
    tasks = (tmp_path / "o" / "tracking_tasks.jsonl").read_text().splitlines()
    assert sum("evaluation.html" in task for task in tasks) <= 1


def test_weights_may_have_any_name(drawn, tmp_path: Path) -> None:
    root, folder = drawn
    weights = tmp_path / "my net (2), büste <b>.safetensors"
    weights.write_bytes(SHIPPED_WEIGHTS.read_bytes())
    result = run(
        ForegroundEvaluateConfig(
            pictures=[root], drawn=folder, weights=[weights], methods=["hsv"], bootstrap=200,
            out=tmp_path / "o", tracking=QUIET,
        )
    )  # fmt: skip
    assert list(result.drawn.methods) == ["my_net__2___b_ste__b_", "hsv"]
    assert "my_net__2___b_ste__b_" in result.page.read_text()


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    paths = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        paths.append(tmp_path / name / "model.safetensors")
        paths[-1].write_bytes(SHIPPED_WEIGHTS.read_bytes())
    config = ForegroundEvaluateConfig(
        weights=paths, methods=[], synthetic=1, synthetic_px=64, out=tmp_path / "o", tracking=QUIET
    )
    result = run(config)
    assert list(result.synthetic.methods) == ["first_model", "second_model"]
    assert result.synthetic.best_threshold == ""
    assert result.drawn is None
    assert not (tmp_path / "o" / "evaluation.html").exists()
    assert load_file(paths[0])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--pictures", "{none}"], "no such folder"),
        (["--pictures", "{root}", "--split", "validation"], "no picture has split=validation"),
        (["--pictures", "{root}", "--split", "test"], "split = 'test'"),
        (["--pictures", "{root}", "--weights", "{none}"], "cannot be read"),
        (["--pictures", "{root}", "--weights", "{table}"], "not a whole .safetensors"),
        (["--pictures", "{root}", "--methods", "otsuu"], "methods"),
        (["--pictures", "{root}", "--drawn", "{none}"], "pictures.csv"),
        (["--drawn", "{none}", "--synthetic", "2"], "give --pictures FOLDER too"),
        ([], "nothing to judge on"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(drawn, tmp_path: Path, capsys, words, told) -> None:
    root, folder = drawn
    names = {"root": root, "none": tmp_path / "none", "table": folder / "pictures.csv"}
    words = [word.format(**names) for word in words]
    if "--drawn" not in words and words:
        words += ["--drawn", str(folder)]
    words += ["--out", str(tmp_path / "out"), "--tracking.enabled", "false"]
    assert main(["foreground-evaluate", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert told in error
    assert not (tmp_path / "out").exists()


def test_a_changed_picture_stops_the_evaluation(drawn, tmp_path: Path, capsys) -> None:
    root, folder = drawn
    (root / "plain.png").write_bytes((root / "inked.png").read_bytes())
    words = ["--pictures", str(root), "--drawn", str(folder), "--out", str(tmp_path / "out")]
    assert main(["foreground-evaluate", *words]) == 2
    assert "not the picture that was drawn on" in capsys.readouterr().err
