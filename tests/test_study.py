"""The planners of `pathfm study`: what a YAML may say, what is held equal, whose cell it is, what counts as a yes."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy import stats

from pathfm.cli import main
from pathfm.datasets import scan_folder
from pathfm.runtime import PathfmError
from pathfm.study import StudyConfig
from pathfm.study.claims import Place
from pathfm.study.equal import check_equal, check_plan, config_of, planned
from pathfm.study.judging import Difference, judge, overall, summed
from pathfm.study.page import write_page
from pathfm.study.plan import (
    START,
    Criterion,
    Study,
    cells_of,
    load_study,
    names_in,
    settings_of,
    start_of,
)
from pathfm.study.preparing import _mislabel, _part, linked_tree, look_up, prepare
from pathfm.study.running import commands_of
from pathfm.study.showing import last_step, measured_s, trained_s
from pathfm.study.working import Share, share_of

STUDIES = Path(__file__).parents[1] / "configs" / "studies"
ARMS: list[dict[str, Any]] = [
    {"name": "a", "tells": "the <first> arm"},
    {"name": "b", "tells": "the other | arm"},
]
RANDOM = [ARMS[0], ARMS[1] | {"pretrain": {"weights": "random"}}]
CRITERION: dict[str, Any] = {
    "metric": "probe/224/knn",
    "contrasts": [{"arm": "a", "against": "b"}],
}
TINY: dict[str, Any] = {
    "name": "tiny",
    "title": "Tiny",
    "question": "Is a better than b?",
    "published": "nothing",
    "seeds": 3,
    "pretrain": {"steps": 6, "batch_size": 4, "optim": {"warmup_steps": 1}},
    "arms": ARMS,
    "equal": ["patches_seen", "optimizer_steps"],
    "criterion": CRITERION,
    "rates": {"patches_per_s": 2, "pictures_per_s": 5, "pictures": 50, "measured": "a test"},
}


def study(**changes: Any) -> Study:
    return Study.model_validate(TINY | changes)


def results(a: list[float], b: list[float], **more: Any) -> dict[str, Any]:
    """Finished cells of TINY with these kNN scores."""
    held = {"run/patches_seen": 24.0, "run/optimizer_steps": 6.0, "run/views_seen": 240.0}
    found = {
        f"{arm}-s{seed}": {"metrics": {**held, "probe/224/knn": value}, "curves": {}}
        for arm, values in (("a", a), ("b", b))
        for seed, value in enumerate(values)
    }
    return {START: {"metrics": {"probe/224/knn": 0.5}, "curves": {}}, **found, **more}


# what a YAML may say


@pytest.mark.parametrize("name", names_in(STUDIES))
def test_a_shipped_study_is_valid_and_holds_equal_what_it_says(name: str) -> None:
    found = load_study(STUDIES, name)
    plans = check_plan(found)
    assert set(plans) == {arm.name for arm in found.arms}
    for what in found.equal:
        assert len({plan[what] for plan in plans.values()}) == 1
    assert found.published


def test_a_study_goes_over_the_base_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "_base.yaml").write_text(yaml.safe_dump({k: TINY[k] for k in TINY if k != "arms"}))
    own = {"base": "_base", "name": "own", "arms": ARMS, "pretrain": {"steps": 9}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    found = load_study(tmp_path, "own")
    assert settings_of(found, found.arm("a")) | {"optim": None} == {
        "steps": 9, "batch_size": 4, "optim": None,
    }  # fmt: skip
    assert names_in(tmp_path) == ["own"]
    (tmp_path / "own.yaml").write_text("base: ../_base")
    with pytest.raises(PathfmError, match=r"no '\.\./_base' beside it"):
        load_study(tmp_path, "own")


def test_an_arm_s_settings_lie_over_the_common_ones_and_spoil_none() -> None:
    found = study(arms=[{"name": "a", "pretrain": {"optim": {"lr": 1e-3}}}, ARMS[1]])
    assert settings_of(found, found.arm("a"))["optim"] == {"warmup_steps": 1, "lr": 1e-3}
    assert settings_of(found, found.arm("b"))["optim"] == {"warmup_steps": 1}


def test_words_of_the_command_line_are_settings_of_all_arms() -> None:
    name = names_in(STUDIES)[0]
    words = ["pretrain.steps=20", "pretrain.optim.lr=1e-3", "pretrain.mpp=[0.5, 1]"]
    values = load_study(STUDIES, name, words).pretrain
    assert (values["steps"], values["optim"]["lr"], values["mpp"]) == (20, 0.001, [0.5, 1])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arms": [ARMS[0], ARMS[0]]}, "two arms have one name"),
        ({"arms": [{"name": "start"}, ARMS[0]]}, "not be 'start'"),
        ({"arms": [{"name": "../a"}, ARMS[0]]}, "1 to 48 of a-z"),
        ({"arms": [{"name": "a", "reads": "offline"}, ARMS[1]]}, "does not say which places"),
        ({"arms": [{"name": "a", "reads": "labelled"}, ARMS[1]]}, "set split_labelled"),
        ({"arms": [{"name": "a", "label_noise": 0.1}, ARMS[1]]}, "label_noise is of arms"),
        ({"equal": ["hours"]}, "optimizer_steps"),
        ({"criterion": {"metric": "m", "contrasts": [{"arm": "a", "against": "c"}]}}, "'c' is no arm; there: a, b"),
        ({"criterion": {"metric": "m", "contrasts": [{"arm": "a", "against": "a"}]}}, "cannot be compared"),
        ({"name": "other"}, "name: 'other' should be its file's, 'tiny'"),
        ({"views": [{"name": "x"}, {"name": "x"}]}, "two views have one name"),
        ({"criterion": CRITERION | {"metric": "probe/225/knn"}}, "probe/225/knn is no figure of this study"),
        ({"criterion": CRITERION | {"metric": "robust/mce"}}, "robust/mce is no figure of this study"),
        ({"criterion": CRITERION | {"margin": 0.1, "matters": 0.0}}, "matters 0 lies below margin 0.1"),
        ({"also_shown": ["few-shot/224/simpleshot/1"]}, "few-shot/224/simpleshot/1 is no figure"),
        ({"also_compared": [{"arm": "a", "against": "z"}]}, "'z' is no arm"),
        ({"views": [{"embed": {"input_px": 3}}]}, "view 224: input_px = 3: should be"),
        ({"robustness": {"severities": [9]}}, "severities: 9 is none of 1, 2, 3, 4, 5"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)  # fmt: skip
def test_a_study_that_makes_no_sense_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | changes))
    assert main(["study", "tiny", "--studies", str(tmp_path), "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert reason in told


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["nothing"], "no study 'nothing' in"),
        (["../tiny"], "no study '../tiny' in"),
        (["tiny", "--set", "steps=2"], "should be KEY=VALUE with a KEY below pretrain"),
        (["tiny", "--set", "pretrain.steps=[", "--dry-run"], "its value is no YAML"),
        (["tiny", "--set", "pretrain.stebs=2", "--dry-run"], "arm a: unknown key 'stebs': did you mean 'steps'?"),
        (["tiny", "--set", "probe.k=0", "--dry-run"], "study tiny, probe: k = 0: should be greater"),
        (["tiny", "--seeds", "0"], "seeds = '0'"),
        (["tiny", "--worker", "2/2", "--out", "OUT"], "'2/2' should be K/N"),
        (["tiny", "--worker", "0/2", "--processes", "2", "--out", "OUT"], "--worker is one process of several"),
        (["tinny"], "no study 'tinny' in"),
        (["tinny"], "did you mean 'tiny'?"),
        (["tiny", "--set", "foreground.steps=2"], "--set foreground.…: study tiny has no foreground"),
        (["tiny", "--set", "robustness.n_splits=1"], "study tiny has no robustness"),
        (["own", "--set", "pretrain.steps=7"], "--set pretrain.steps: arm b has its own, which would stay"),
        (["masks", "--out", "OUT"], "no drawn thumbnails: give --pictures FOLDER"),
        (["tiny", "--out", "OUT"], "no labelled patches: give --patches FOLDER"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line(
    tmp_path: Path, words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    of_masks = {"name": "masks", "kind": "foreground", "foreground": {"steps": 60}}
    of_masks["criterion"] = CRITERION | {"metric": "foreground/drawn_dice"}
    (tmp_path / "masks.yaml").write_text(yaml.safe_dump(TINY | of_masks))
    arms = {"name": "own", "arms": [ARMS[0], ARMS[1] | {"pretrain": {"steps": 6}}]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(TINY | arms))
    given = [str(tmp_path / "out") if word == "OUT" else word for word in words]
    assert main(["study", *given, "--studies", str(tmp_path), "--tracking.no-enabled"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert reason in told


def test_what_a_study_leaves_out_of_its_own_slides_is_not_left_out_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"slides": ["own"], "exclude": "copy_", "mpp_overrides": "own.csv"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY | {"data": data}))
    told: list[Study] = []
    monkeypatch.setattr("pathfm.study.showing.show_plan", told.append)
    words = ["study", "tiny", "--studies", str(tmp_path), "--dry-run"]
    for more in ([], ["--slides", "others"], ["--slides", "others", "--exclude", "x_"]):
        assert main([*words, *more]) == 0
    assert [one.data.exclude for one in told] == ["copy_", "", "x_"]
    assert [one.data.mpp_overrides for one in told] == [Path("own.csv"), None, None]


def test_without_a_name_the_studies_are_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    assert main(["study", "--studies", str(tmp_path)]) == 0
    assert "Is a better than b?" in capsys.readouterr().out


def test_a_dry_run_shows_what_each_arm_sees_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    out = tmp_path / "out"
    assert main(["study", "tiny", "--studies", str(tmp_path), "--dry-run", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "held equal: patches_seen, optimizer_steps" in told
    # 24 patches at 2 a second and 50 pictures at 5: 22 s a cell, 2 arms x 3 seeds, and the start's 10
    assert "7 cells, about 2 min one after the other" in told
    assert trained_s(study(), {"patches_seen": 24}) == 12.0
    assert measured_s(study(), 50) == 10.0
    assert "made of: weights imagenet" in told
    assert not out.exists()


def test_what_is_missing_is_told_with_its_option_and_nothing_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    out, slides = tmp_path / "out", tmp_path / "slides"
    slides.mkdir()
    words = ["study", "tiny", "--studies", str(tmp_path), "--out", str(out)]
    words += ["--patches", "/nowhere", "--slides", str(slides), "/gone.svs", "s3://box/a.svs"]
    words += ["--weights", "/lost.safetensors"]
    assert main([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "before it can run: labelled patches /nowhere are not there: give --patches" in told
    assert "before it can run: slides /gone.svs are not there: give --slides" in told
    assert "before it can run: weights /lost.safetensors are not there: give --weights" in told
    assert main(words) == 2
    assert "give --patches FOLDER; slides /gone.svs" in capsys.readouterr().err
    assert not out.exists()


# the grid


def test_the_grid_goes_seed_by_seed_so_that_a_part_of_it_has_whole_pairs() -> None:
    names = [cell.name for cell in cells_of(study())]
    assert names == ["start", "a-s0", "b-s0", "a-s1", "b-s1", "a-s2", "b-s2"]


def test_each_arm_has_the_start_that_it_begins_with() -> None:
    own = {"name": "c", "pretrain": {"weights": "w.safetensors"}}
    other = {"name": "d", "pretrain": {"backbone": "vit_tiny_patch16_224"}}
    found = study(arms=[*RANDOM, own, other], seeds=2, data={"weights": "imagenet"})
    starts = {cell.name: (cell.weights, cell.backbone) for cell in cells_of(found) if not cell.arm}
    small, tiny = "vit_small_patch16_224", "vit_tiny_patch16_224"
    assert starts == {
        "start": ("imagenet", small),
        "start-random-s0": ("random:0", small),
        "start-random-s1": ("random:1", small),
        "start-c": ("w.safetensors", small),
        "start-d": ("imagenet", tiny),
    }
    everywhere = study(seeds=1, data={"weights": "random"})  # arms share it
    assert [cell.name for cell in cells_of(everywhere)] == ["start-random-s0", "a-s0", "b-s0"]
    assert start_of(found, found.arm("b"), 1).name == "start-random-s1"


def test_workers_begin_at_different_cells_and_together_get_to_all() -> None:
    cells = list("abcdefg")
    orders = [Share(k, 3).order(cells) for k in range(3)]
    assert [order[0] for order in orders] == ["a", "b", "c"]
    assert all(sorted(order) == cells for order in orders)
    assert Share().order(cells) == cells


def test_a_rank_of_torchrun_is_a_worker_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")  # as a scheduler gives them
    monkeypatch.setenv("MASTER_PORT", "1")
    assert share_of(None) == Share(1, 4)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    assert "WORLD_SIZE" not in os.environ  # else its training would wait for the others
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(PathfmError, match="WORLD_SIZE is set"):
        share_of(None)


# what is held equal


def test_views_are_counted_as_the_method_takes_them() -> None:
    """By hand: 6 steps of 4 patches; DINO sees 2 + 8 views of each, SimCLR two, cross-entropy one."""
    seen = {}
    for method in ("dino", "simclr", "supervised"):
        arm = study(arms=[{"name": "a", "pretrain": {"method": method}}, ARMS[1]])
        seen[method] = planned(config_of(arm, arm.arm("a")))
    assert {m: s["views_seen"] for m, s in seen.items()} == {
        "dino": 240, "simclr": 48, "supervised": 24,
    }  # fmt: skip
    assert {s["patches_seen"] for s in seen.values()} == {24}


def test_arms_that_see_unequal_amounts_are_refused_before_and_after() -> None:
    uneven = study(arms=[ARMS[0], {"name": "b", "pretrain": {"steps": 7}}])
    with pytest.raises(
        PathfmError, match=r"holds patches_seen equal, and as planned a has 24, b 28"
    ):
        check_plan(uneven)
    halves = {"name": "b", "pretrain": {"steps": 12, "batch_size": 2}}
    check_plan(study(arms=[ARMS[0], halves], equal=["patches_seen"]))
    short = results([0.7], [0.6])
    short["b-s0"]["metrics"]["run/optimizer_steps"] = 5.0
    with pytest.raises(PathfmError, match=r"as it came out b \(seed 0\) has 5, a \(seed 0\) 6"):
        judge(study(), short)
    check_equal(study(), {}, "without cells")


# whose cell it is


def test_a_cell_is_done_only_with_a_whole_result_of_these_very_settings(tmp_path: Path) -> None:
    place = Place(tmp_path / "cell", "digest")
    assert place.state() == "waiting"
    with place.claimed() as ours:
        assert ours
        place.fail("no slides")
    assert place.state() == "failed"
    assert place.failed_since(0)
    place.finish({"metrics": {}})
    assert (place.state(), place.failed()) == ("done", "")
    assert Place(tmp_path / "cell", "another").state() == "stopped"
    (tmp_path / "cell" / "result.json").write_text('{"digest": "digest", "metr')
    assert place.result() is None


@pytest.mark.slow
def test_a_cell_that_a_process_works_on_is_nobody_else_s_until_it_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom pathfm.study.claims import Place\n"
        f"with Place(Path({str(tmp_path)!r}), 'd').claimed() as ours:\n"
        "    print(ours, flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        place = Place(tmp_path, "d")
        with place.claimed() as ours:
            assert not ours
        assert place.state() == "running"
        other.kill()
        other.wait()
        assert place.state() == "stopped"
        with place.claimed() as ours:
            assert ours


def test_progress_is_read_from_the_last_whole_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) == (0, 0.0)
    row = json.dumps({"step": 4, "patches_per_s": 12.5})
    path.write_text(f'{{"step": 3}}\n{row}\n{{"step": 5, "pat')
    assert last_step(path) == (5, 12.5)
    path.write_text("[]\n")
    assert last_step(path) == (0, 0.0)


# what counts as a yes


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_is_that_of_a_paired_t_test(seed: int) -> None:
    ours, theirs = np.random.default_rng(seed).normal(size=(2, 3 + seed))
    found = summed("a", "b", "probe/224/knn", (ours - theirs).tolist(), 0.95)
    oracle = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high))
    assert found.mean == pytest.approx((ours - theirs).mean())


@pytest.mark.parametrize(
    ("low", "high", "margin", "matters", "says"),
    [
        (0.01, 0.03, 0.0, None, "yes"),
        (-0.01, 0.03, 0.0, None, "cannot tell"),
        (-0.03, -0.01, 0.0, None, "no"),
        (0.01, 0.03, 0.02, None, "cannot tell"),
        (-0.005, 0.03, -0.01, None, "yes"),  # not worse by more than 0.01
        (0.0, 0.03, 0.0, None, "cannot tell"),  # the whole of it must lie above
        (-0.002, 0.008, 0.0, 0.01, "no"),  # no gain that would matter
        (0.002, 0.008, 0.0, 0.01, "yes"),
        (float("nan"), float("nan"), 0.0, None, "cannot tell"),  # one seed
    ],
)
def test_a_difference_answers_by_the_whole_of_its_interval(
    low: float, high: float, margin: float, matters: float | None, says: str
) -> None:
    criterion = Criterion.model_validate(CRITERION | {"margin": margin, "matters": matters})
    each = Difference("a", "b", "probe/224/knn", (0.0, 0.0), 0.0, low, high)
    assert each.answers(criterion, 2) == says
    lower = Difference("a", "b", "robust/mce", (0.0, 0.0), 0.0, -high, -low)  # lower is better
    assert lower.answers(criterion, 2) == says
    assert each.answers(criterion, 3) == "cannot tell"  # a seed lacks the figure
    assert Difference("a", "b", "m", (), 0.0, low, high).answers(criterion, 2) == "not finished"


def test_one_no_is_a_no_and_a_yes_wants_all() -> None:
    assert overall(["yes", "yes"]) == "yes"
    assert overall(["yes", "cannot tell"]) == "cannot tell"
    assert overall(["yes", "cannot tell", "no"]) == "no"


def test_equal_pairs_tell_nothing_of_chance() -> None:
    found = summed("a", "b", "probe/224/knn", [0.25, 0.25, 0.25], 0.95)
    assert found.mean == 0.25
    assert np.isnan([found.low, found.high]).all()


def test_not_to_be_worse_than_an_arm_that_learnt_nothing_says_nothing(tmp_path: Path) -> None:
    """Both end 0.3 above the start, or both where it was: the same difference, and another answer."""
    found = study(criterion=CRITERION | {"margin": -0.01})
    above = results([0.801, 0.812, 0.807], [0.802, 0.810, 0.809])
    judged = judge(found, above)
    assert (judged.verdict, judged.answers) == ("yes", ("yes",))
    idle = results([0.501, 0.512, 0.497], [0.502, 0.510, 0.499])
    judged = judge(found, idle)
    assert judged.differences[0].low > -0.01
    assert (judged.verdict, judged.answers) == ("cannot tell", ("cannot tell",))
    write_page(found, judged, idle, [], tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert "Training did not make b better than its start" in text


def test_an_arm_that_learnt_nothing_cannot_show_that_there_is_nothing_to_gain() -> None:
    found = study(criterion=CRITERION | {"matters": 0.01})
    above = results([0.801, 0.812, 0.807], [0.802, 0.810, 0.809])
    assert judge(found, above).verdict == "no"
    idle = results([0.501, 0.512, 0.487], [0.502, 0.510, 0.489])
    assert judge(found, idle).verdict == "cannot tell"
    worse = results([0.401, 0.412, 0.387], [0.502, 0.510, 0.489])
    assert judge(found, worse).verdict == "no"  # a loss is one all the same


def test_one_seed_cannot_tell_and_says_why(tmp_path: Path) -> None:
    found = study(seeds=1)
    cells = results([0.9], [0.5])
    judged = judge(found, cells)
    assert judged.verdict == "cannot tell"
    write_page(found, judged, cells, [], tmp_path, ["Of these data."])
    text = (tmp_path / "study.md").read_text()
    assert "One seed has no interval, so nothing can be told: give --seeds 3." in text
    assert "\n- Of these data.\n" in text
    assert "made of: weights imagenet" in text


def test_a_figure_that_no_cell_has_is_an_error_and_one_that_lacks_in_a_seed_is_told(
    tmp_path: Path,
) -> None:
    cells = results([0.70, 0.75, 0.72], [0.60, 0.64, 0.63])
    del cells["a-s1"]["metrics"]["probe/224/knn"]
    judged = judge(study(), cells)
    assert judged.verdict == "cannot tell"
    write_page(study(), judged, cells, [], tmp_path)
    assert "a − b: 2 of 3 seeds have the figure" in (tmp_path / "study.md").read_text()
    for cell in cells.values():
        cell["metrics"].pop("probe/224/knn", None)
    with pytest.raises(PathfmError, match="all cells are done and none has probe/224/knn"):
        judge(study(), cells)


def test_seeds_are_paired_and_the_answer_waits_for_the_whole_grid() -> None:
    found = judge(study(), results([0.70, 0.75, 0.72], [0.60, 0.64, 0.63]))
    assert found.verdict == "yes"
    assert found.differences[0].values == pytest.approx((0.10, 0.11, 0.09))
    assert found.values["probe/224/knn"][START] == [0.5]
    assert judge(study(), results([0.70, 0.75], [0.60, 0.64])).verdict == "not finished"


def test_where_lower_is_better_less_is_a_gain_and_the_sign_stays() -> None:
    found = study(robustness={}, criterion=CRITERION | {"metric": "robust/mce"})
    cells = results([0.7, 0.7, 0.7], [0.7, 0.7, 0.7])
    for seed, (a, b) in enumerate(((80.0, 90.0), (82.0, 91.0), (81.0, 92.0))):
        cells[f"a-s{seed}"]["metrics"]["robust/mce"] = a
        cells[f"b-s{seed}"]["metrics"]["robust/mce"] = b
    judged = judge(found, cells)
    assert judged.differences[0].mean == -10.0
    assert judged.verdict == "yes"


def test_the_start_is_the_same_at_every_seed() -> None:
    criterion = TINY["criterion"] | {"contrasts": [{"arm": "a", "against": START}]}
    found = judge(study(criterion=criterion), results([0.7, 0.8, 0.6], [0.6, 0.6, 0.6]))
    assert found.differences[0].values == pytest.approx((0.2, 0.3, 0.1))


def test_what_else_is_measured_or_compared_is_shown_and_decides_nothing() -> None:
    cells = results([0.70, 0.75, 0.72], [0.60, 0.64, 0.63])
    for name, (mce, seen) in {"a": (90.0, 10.0), "b": (80.0, 20.0)}.items():
        for seed in range(3):
            own = {"robust/mce": mce + (seed if name == "a" else 0), "run/slides_seen": seen}
            cells[f"{name}-s{seed}"]["metrics"] |= own
    more = {"also_compared": [{"arm": "b", "against": "a"}], "robustness": {}}
    found = judge(study(also_shown=["robust/mce", "run/slides_seen"], **more), cells)
    assert found.verdict == "yes"  # by its own metric and contrast alone
    assert list(found.beside) == ["robust/mce"]
    ours, theirs = found.beside["robust/mce"]
    assert (ours.values, theirs.values) == ((10.0, 11.0, 12.0), (-10.0, -11.0, -12.0))
    (also,) = found.also
    assert also.values == pytest.approx((-0.10, -0.11, -0.09))


def test_what_training_did_is_told_against_the_weights_each_arm_began_with() -> None:
    found = study(arms=RANDOM)
    cells = results([0.70, 0.75, 0.72], [0.30, 0.34, 0.33])
    for seed, score in enumerate((0.35, 0.36, 0.37)):
        cells[f"start-random-s{seed}"] = {"metrics": {"probe/224/knn": score}, "curves": {}}
    judged = judge(found, cells)
    a, b = judged.moved
    assert a.values == pytest.approx((0.20, 0.25, 0.22))  # the same start at every seed
    assert b.values == pytest.approx((-0.05, -0.02, -0.04))
    oracle = stats.ttest_1samp([-0.05, -0.02, -0.04], 0).confidence_interval()
    assert (b.low, b.high) == pytest.approx((oracle.low, oracle.high))
    assert judged.values["probe/224/knn"] == {
        "a": [0.70, 0.75, 0.72], "b": [0.30, 0.34, 0.33], "start": [0.5],
        "start-random": [0.35, 0.36, 0.37],
    }  # fmt: skip


# the page


def test_what_probes_say_stands_once_where_only_numbers_differ(tmp_path: Path) -> None:
    cells = results([0.70, 0.75, 0.72], [0.60, 0.64, 0.63])
    for number, cell in enumerate(cells.values()):
        cell["caveats"] = [
            f"cell: 0 of 50 were seen; listed are 1,{number}00 patches.",
            "The sd is over splits of one data set; it does not tell how another would differ.",
        ]
        cell["provenance"] = {"machine": "Linux, 2 cores", "git_commit": f"abc{number // 4}"}
        cell["seconds"] = 720.0
    cells["a-s0"]["metrics"] |= {"run/share_at_0.5": 0.25, "run/share_at_2": 0.75}
    cells["a-s1"]["metrics"] |= {"run/share_at_2": 1.0}  # none at 0.5; the third seed is not done
    cells["b-s1"]["caveats"].append("Own words.")
    found = study(criterion=TINY["criterion"] | {"margin": -0.01})
    write_page(found, judge(found, cells), cells, [], tmp_path)
    text = (tmp_path / "study.md").read_text()
    assert text.count("were seen") == 1
    assert "1,000 patches. (And 6 more cells likewise.)" in text
    assert "- Own words.\n" in text
    assert "sd is over splits" not in text  # it is over seeds here
    assert "cells made on: Linux, 2 cores; commit abc0, abc1; 84 min one after the other" in text
    assert "To be above −1 points" in text
    assert "| a | 12.5 | 87.5 |" in text  # patches seen by µm/px


def test_secrets_are_left_out_and_what_is_written_can_still_be_read(tmp_path: Path) -> None:
    cells = results([0.70, 0.75, 0.72], [0.60, 0.64, 0.63])
    signed = "https://host/a.svs?X-Signature=abc123"
    found = study(data={"slides": [signed, "s3://box/b.svs"]})
    write_page(found, judge(found, cells), cells, [], tmp_path)
    text = (tmp_path / "study.json").read_text()
    assert "abc123" not in text
    assert len(json.loads(text)["study"]["data"]["slides"]) == 2
    config = StudyConfig(name="tiny", slides=(signed, "s3://box/b.svs"))
    for command in commands_of(found, config):
        assert "abc123" not in command
        assert "s3://box/b.svs" in shlex.split(command)  # quotes still pair


def test_the_page_says_answer_interval_and_commands_and_escapes_names(tmp_path: Path) -> None:
    found = study(also_shown=["run/patches_seen"], caveats=["few <slides>"])
    cells = results([0.70, 0.75, 0.72], [0.60, 0.64, 0.63])
    judged = judge(found, cells)
    files = write_page(found, judged, cells, ["pathfm study tiny"], tmp_path)
    page, text = files[0].read_text(), (tmp_path / "study.md").read_text()
    oracle = stats.ttest_rel([0.70, 0.75, 0.72], [0.60, 0.64, 0.63]).confidence_interval()
    interval = f"[+{100 * oracle.low:.2f}, +{100 * oracle.high:.2f}]"
    for each in (page, text):
        assert "Yes." in each
        assert f"+10.00 points {interval}" in each.replace("\\", "")
        assert "pathfm study tiny" in each
        assert "<slides>" not in each
        assert "&lt;first&gt;" in each
    assert r"other \| arm" in text
    assert "<script" not in page
    with Image.open(tmp_path / "verdict.png") as picture:
        assert picture.width > 800
    figures = json.loads((tmp_path / "study.json").read_text())
    assert figures["verdict"] == "yes"
    assert figures["differences"][0]["mean"] == pytest.approx(0.10)


def test_a_page_of_nothing_but_one_pair_says_that_it_is_not_finished(tmp_path: Path) -> None:
    cells = results([0.7], [0.6])
    write_page(study(), judge(study(), cells), cells, [], tmp_path)
    assert "Not finished: 3 of 7 cells are done" in (tmp_path / "study.md").read_text()


# what cells share


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Two classes of twenty pictures, four of each slide."""
    lines = ["path,group"]
    for label in ("x", "y"):
        (tmp_path / "labelled" / label).mkdir(parents=True)
        for number in range(20):
            path = f"{label}/{number:02d}.png"
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "labelled" / path)
            lines.append(f"{path},slide{number // 4}")
    (tmp_path / "labelled" / "groups.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "labelled"


def reads_labels(labelled: Path, weights: str = "random") -> Study:
    """A study whose arms read nothing but labelled patches."""
    arms = [{**arm, "reads": "labelled"} for arm in ARMS]
    arms[1]["label_noise"] = 0.25
    return study(
        split_labelled=True, arms=arms, data={"patches": str(labelled), "weights": weights}
    )


def test_looking_makes_nothing_and_finds_what_was_made(labelled: Path, tmp_path: Path) -> None:
    found = reads_labels(labelled)
    with pytest.raises(PathfmError, match="is not made yet: the same command without --status"):
        look_up(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert prepare(found, tmp_path / "out") == look_up(found, tmp_path / "out")


def test_what_is_shared_goes_by_its_content_and_not_by_its_place(
    labelled: Path, tmp_path: Path
) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"one")

    def facts(of: Path = labelled) -> dict[str, Any]:
        return prepare(reads_labels(of, str(tmp_path / "w.safetensors")), tmp_path / "out").facts

    first = facts()
    assert facts(labelled.rename(tmp_path / "moved")) == first
    groups = tmp_path / "moved" / "groups.csv"
    groups.write_text(groups.read_text().replace("x/00.png,slide0", "x/00.png,slide1"))
    regrouped = facts(tmp_path / "moved")
    assert (regrouped["labelled"], regrouped["groups"]) == (first["labelled"], first["groups"])
    assert regrouped != first
    Image.new("RGB", (8, 8), (0, 9, 0)).save(tmp_path / "moved" / "x" / "00.png")
    assert facts(tmp_path / "moved") not in (first, regrouped)
    (tmp_path / "w.safetensors").write_bytes(b"two")
    assert facts(tmp_path / "moved")["weights start"] != first["weights start"]


def test_the_labelled_parts_tear_no_group_and_lose_no_picture(
    labelled: Path, tmp_path: Path
) -> None:
    _part(scan_folder(labelled), tmp_path / "parted")
    parts = [scan_folder(tmp_path / "parted" / name) for name in ("train", "val", "test")]
    train, val, test = parts
    assert sum(map(len, parts)) == 40
    assert len(set().union(*(part.groups for part in parts))) == sum(
        len(set(part.groups)) for part in parts
    )
    assert 0.2 <= len(test) / 40 <= 0.4
    assert 0 < len(val) < len(train)


def test_wrong_labels_are_as_many_of_each_class_as_asked_for(
    labelled: Path, tmp_path: Path
) -> None:
    _mislabel(scan_folder(labelled), 0.25, tmp_path / "noisy")
    noisy = scan_folder(tmp_path / "noisy")
    pairs = Counter((p.split("/")[0], p.split("/")[1].split("__")[0]) for p in noisy.paths)
    assert pairs == {("x", "x"): 15, ("y", "x"): 5, ("y", "y"): 15, ("x", "y"): 5}


def test_a_tree_is_linked_once_and_never_over_another(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "f").write_text("1")
    linked_tree(tmp_path / "none", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    linked_tree(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "f").read_text() == "1"
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "f").write_text("2")
    linked_tree(tmp_path / "c", tmp_path / "b")
    assert (tmp_path / "b" / "f").read_text() == "1"
